"""Features on Ray Data: the functions by themselves, a lost node, and the example."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import ijepa_zoo
from ijepa_zoo.errors import DataError, MissingPackageError, SettingsError
from ijepa_zoo.models.classifier import Classifier, LinearHead, save_classifier
from ijepa_zoo.ray import FeatureActor, decode_images, map_features, read_images

NANO = "vit_nano8_64_ijepa"
ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "examples" / "images" / "photos"
BROKEN = [b"", b"not an image", (PHOTOS / "cat.jpg").read_bytes()[:5000]]


@pytest.fixture(scope="module")
def transform():
    return ijepa_zoo.create_transform(ijepa_zoo.create_model(NANO), normalize=False)


@pytest.fixture(scope="module")
def actor():
    return FeatureActor(NANO, device="cpu", threads=1)


def table(contents: list[bytes | None], **columns) -> pa.Table:
    return pa.table({"bytes": pa.array(contents, pa.binary()), **columns})


def write_images(folder: Path, count: int, broken: int) -> list[Path]:
    """Crops of an example photo, some of them broken."""
    folder.mkdir()
    photo = Image.open(PHOTOS / "cat.jpg").convert("RGB")
    paths = [folder / f"{number:03}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        photo.crop((number, 0, 70 + 5 * number, 90)).save(path)
    for path, content in zip(paths[1::2], BROKEN[:broken]):
        path.write_bytes(content)
    return paths


def features_of(folder: Path, out: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Features and errors of `ijepa-zoo features`, by path."""
    model = ijepa_zoo.create_model(NANO)
    report = ijepa_zoo.extract_features([folder], model, out, device="cpu", workers=0)
    found = parquet.read_table(out)
    errors = {
        line["path"]: line["error"]
        for line in map(json.loads, report.index.read_text().splitlines())
        if "error" in line
    }
    return dict(zip(found["path"].to_pylist(), found["features"].to_pylist())), errors


def assert_same(rows: list[dict], features: dict, errors: dict) -> None:
    assert sorted(row["path"] for row in rows) == sorted([*features, *errors])
    for row in rows:
        assert row["error"] == errors.get(row["path"])
        if row["error"] is None:
            np.testing.assert_allclose(row["features"], features[row["path"]], rtol=1e-4, atol=1e-5)
        else:
            assert row["features"] is None


def test_a_missing_ray_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ray\[data\]'"):
        read_images("photos")


def test_batches_have_the_features_and_errors_of_extract_features(tmp_path, transform, actor):
    paths = write_images(tmp_path / "images", 12, broken=3)
    columns = {"label": pa.array([1, None] * 6), "tags": pa.array([["a", "b"], None] * 6)}
    contents = [path.read_bytes() for path in paths]
    batch = table(contents, path=[str(path) for path in paths], **columns)
    decoded = decode_images(batch, transform)
    result = actor(decoded)
    assert result.column_names == ["path", "label", "tags", "error", "features"]
    features, errors = features_of(tmp_path / "images", tmp_path / "f.parquet")
    assert len(errors) == 3
    assert_same(result.to_pylist(), features, errors)
    for name, column in columns.items():  # other columns keep their types
        assert result[name].combine_chunks().equals(column)
    pixels = decoded["pixels"].combine_chunks().to_numpy_ndarray()
    for content, own, error in zip(contents, pixels, decoded["error"].to_pylist()):
        expected = np.zeros_like(own) if error else transform(content).numpy()
        np.testing.assert_array_equal(own, expected)


def test_images_of_parquet_and_of_webdataset_samples_are_found(transform):
    photo = (PHOTOS / "cat.jpg").read_bytes()
    structs = pa.table({"image": [{"bytes": photo, "path": "cat.jpg"}]})
    samples = pa.table({"__key__": ["a", "b"], "JPG": [None, photo], "png": [photo, None]})
    for batch in (structs, samples, pa.table({"thumbnail": [photo], "bytes": [b"other"]})):
        column = "thumbnail" if "thumbnail" in batch.column_names else None
        decoded = decode_images(batch, transform, column=column)
        for pixels in decoded["pixels"].combine_chunks().to_numpy_ndarray():
            np.testing.assert_array_equal(pixels, transform(photo).numpy())
    assert decode_images(structs, transform)["path"].to_pylist() == ["cat.jpg"]
    with pytest.raises(DataError, match="__key__"):
        decode_images(samples, transform, column="image")


@pytest.mark.parametrize("contents", [[], [b"", None]], ids=["no rows", "only broken images"])
def test_batches_without_a_good_image(contents, transform, actor):
    usual = actor(decode_images(table([(PHOTOS / "cat.jpg").read_bytes()]), transform))
    result = actor(decode_images(table(contents), transform))
    assert result.schema == usual.schema
    assert result["features"].to_pylist() == [None] * len(contents)
    assert result["error"].to_pylist() == ["empty file", "no image in this row"][: len(contents)]


def test_a_classifier_folder_gives_probabilities(tmp_path, transform):
    encoder = ijepa_zoo.create_model(NANO)
    classifier = Classifier(encoder, LinearHead(encoder.embed_dim, 3)).eval()
    save_classifier(tmp_path / "model", classifier, with_encoder=True)
    photo = (PHOTOS / "cat.jpg").read_bytes()
    actor = FeatureActor(f"local-dir:{tmp_path / 'model'}", device="cpu", threads=1)
    found = actor(decode_images(table([photo, b""]), transform))["probabilities"].to_pylist()
    image = ijepa_zoo.create_transform(encoder)(photo)[None]
    with torch.no_grad():
        expected = classifier(image).softmax(dim=1)[0]
    assert found[0] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found[1] is None


@pytest.mark.parametrize("options", [{"pool": None}, {"dtype": "bfloat16"}], ids=str)
def test_what_a_row_of_parquet_cannot_hold_is_refused(options):
    model = partial(ijepa_zoo.create_model, NANO, img_size=32)
    with pytest.raises(SettingsError, match="Parquet"):
        FeatureActor(model, device="cpu", threads=1, **options)


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_gives_the_same_features(tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    write_images(tmp_path / "images", 200, broken=3)
    seen = tmp_path / "seen"
    seen.mkdir()

    def slow(batch: pa.Table) -> pa.Table:
        node = ray.get_runtime_context().get_node_id()
        for path in batch["path"].to_pylist():
            Path(seen, f"{node}-{Path(path).name}").touch()
            time.sleep(0.1)
        return batch

    small = {"num_cpus": 1, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    node = cluster.add_node(**small)

    def kill() -> int:
        """Remove the node after 50 images; returns how many all nodes had seen."""
        while len(list(seen.glob(f"{node.node_id}*"))) < 50:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        return len(list(seen.iterdir()))

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        killed = ThreadPoolExecutor().submit(kill)
        images = read_images(str(tmp_path / "images"))
        slowed = images.map_batches(slow, batch_size=None, batch_format="pyarrow")
        # Actors that reserve no CPU leave the last CPU to decoding.
        rows = map_features(slowed, NANO, actors=2, num_cpus=0, device="cpu", threads=1)
        rows.write_parquet(str(tmp_path / "out"))
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed.result(timeout=1) < 190
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    assert_same(rows, *features_of(tmp_path / "images", tmp_path / "f.parquet"))


@pytest.mark.slow
def test_the_example_resumes_by_shards(tmp_path):
    pytest.importorskip("ray")
    images, out = tmp_path / "images", tmp_path / "out"

    def extract() -> str:
        command = [sys.executable, str(ROOT / "examples/ray/extract.py"), str(images), str(out)]
        small = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "200000000"}
        done = subprocess.run(
            [*command, "--model", NANO, "--group", "1"],
            env={**os.environ, **small},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    images.mkdir()
    for name in "ab":
        write_images(images / name, 6, broken=1)
    assert "0 shards done before, 2 to do" in extract()
    first = {path: path.stat().st_mtime_ns for path in (out / "000000").iterdir()}
    (out / "000001" / "_done.json").unlink()  # as if the run had ended there
    write_images(images / "0", 6, broken=0)
    printed = extract()
    assert "1 shards done before, 2 to do" in printed
    assert "6 images, 1 errors" in printed
    assert "3 shards done before, 0 to do" in extract()
    assert {path: path.stat().st_mtime_ns for path in (out / "000000").iterdir()} == first
    rows = parquet.read_table(out).to_pylist()
    assert_same(rows, *features_of(images, tmp_path / "f.parquet"))
