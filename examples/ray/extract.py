"""Features of very many images with Ray Data; the same command resumes after an interruption.

python examples/ray/extract.py s3://bucket/images s3://bucket/out --model NAME --actors 8 --gpus 1
"""

import argparse
import json
import os
import time

import pyarrow as pa
import pyarrow.dataset
from pyarrow import fs

from ijepa_zoo.ray import map_features, read_images

TABLES = (".parquet", ".tar", ".tar.gz", ".tgz")
DONE = "_done.json"  # in the folder of a finished group; readers of Parquet skip it


def list_shards(files: fs.FileSystem, root: str) -> list[str]:
    """Parquet files or tar shards, else subfolders of images, else the input itself."""
    if files.get_file_info(root).is_file:
        return [root]
    found = sorted(files.get_file_info(fs.FileSelector(root)), key=lambda info: info.path)
    found = [info for info in found if not info.base_name.startswith((".", "_"))]
    tables = [info.path for info in found if info.path.lower().endswith(TABLES)]
    has_folders = any(info.type == fs.FileType.Directory for info in found)
    return tables or ([info.path for info in found] if has_folders else [root])


def finished_groups(files: fs.FileSystem, out: str) -> list[dict]:
    """Content of `DONE` in each complete group."""
    groups = files.get_file_info(fs.FileSelector(out, allow_not_found=True))
    done = files.get_file_info([f"{group.path}/{DONE}" for group in groups])
    return [json.loads(files.open_input_stream(i.path).read()) for i in done if i.is_file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("input", help="folder or file, local, s3:// or gs://")
    parser.add_argument("out", help="folder of Parquet files, local, s3:// or gs://")
    parser.add_argument("--model", required=True, help="a name of `ijepa-zoo list`, local-dir:...")
    parser.add_argument("--column", help="of image bytes in Parquet (default: bytes or image)")
    parser.add_argument("--actors", type=int, default=1, help="copies of the model")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--group", type=int, default=100, help="shards between two savepoints")
    args = parser.parse_args()
    uris = [uri if "://" in uri else os.path.abspath(uri) for uri in (args.input, args.out)]
    (source, root), (target, out) = map(fs.FileSystem.from_uri, uris)

    done = finished_groups(target, out)
    if any(group["model"] != args.model for group in done):
        raise SystemExit(f"{args.out} holds features of {done[0]['model']}: choose another folder")
    before = {shard for group in done for shard in group["shards"]}
    shards = [shard for shard in list_shards(source, root) if shard not in before]
    print(f"{len(before)} shards done before, {len(shards)} to do")
    for number, first in enumerate(range(0, len(shards), args.group), len(done)):
        group, folder = shards[first : first + args.group], f"{out}/{number:06}"
        start = time.perf_counter()
        images = read_images(group, filesystem=source)
        options = {"column": args.column, "actors": args.actors, "num_gpus": args.gpus or None}
        rows = map_features(images, args.model, **options)
        rows.write_parquet(folder, filesystem=target, mode="overwrite", min_rows_per_file=10_000)
        seconds = time.perf_counter() - start
        written = pa.dataset.dataset(folder, filesystem=target)
        count = written.count_rows()
        errors = written.count_rows(filter=pa.dataset.field("error").is_valid())
        print(f"{folder}: {count} images, {errors} errors, {count / seconds:.1f} images/s")
        with target.open_output_stream(f"{folder}/{DONE}") as file:
            about = {"model": args.model, "shards": group, "images": count, "errors": errors}
            file.write(json.dumps(about).encode())


if __name__ == "__main__":
    main()
