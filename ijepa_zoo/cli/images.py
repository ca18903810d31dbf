"""`ijepa-zoo features`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

from ..data.decode import MAX_PIXELS, Decoder
from ..data.files import expand
from ..data.sources import open_images
from ..errors import DataError
from ..extraction import ExtractionReport, extract_features
from ..models.factory import create_model
from ..pictures import check_picture, save_pca_picture
from .options import (
    DTYPES,
    LAYERS,
    RESUME,
    Commands,
    add_model_options,
    add_pixel_options,
    add_run_options,
    is_main_process,
    layers,
    positive,
)

SOME_IMAGES_FAILED = 3
_SHOWN = 20  # failures printed; the index has all
_MEMORY = "a smaller --batch-size, fewer --workers or --precision bfloat16"


def add_features(commands: Commands) -> list[argparse.ArgumentParser]:
    """`features`."""
    parser = commands.add_parser(
        "features",
        help="features of images into a file",
        description="Extract features of images into FILE, with an index next to it. The same "
        "command resumes after an interruption. Several processes: torchrun --nproc-per-node N "
        "-m ijepa_zoo features ... Exit status 3: done, but some images failed.",
    )
    data = parser.add_argument_group("data options")
    data.add_argument("inputs", nargs="+", metavar="INPUT",
        help="folders, images, globs, tar shards, .txt lists of paths, .npy, hfds/NAME, ...",
    )  # fmt: skip
    add_pixel_options(data)
    data.add_argument("--max-pixels", type=positive, default=MAX_PIXELS, metavar="N",
        help=f"images of more pixels fail (default: {MAX_PIXELS})")  # fmt: skip
    data.add_argument("--strict", action="store_true", help="stop at the first image that fails")
    add_model_options(parser)
    out = parser.add_argument_group("output options")
    add = out.add_argument
    add("--out", required=True, metavar="FILE",
        help="required: file to write, .safetensors, .npy or .parquet")  # fmt: skip
    add("--format", choices=("safetensors", "npy", "parquet"), help="default: by the suffix")
    add("--layers", type=layers, metavar="WHICH", default="last", help=LAYERS)
    add("--pool", choices=("avg", "none"), default="avg",
        help="avg (default): mean over patches; none: maps")  # fmt: skip
    add("--dtype", choices=DTYPES, default="float32", help="of the file (default: float32)")
    add("--overwrite", action="store_true", help="replace files that have other settings")
    add("--picture", metavar="FILE", help="draw principal components of patch features, a PNG")
    add("--picture-images", type=positive, default=12, metavar="N",
        help="images in the picture (default: 12)")  # fmt: skip
    run = add_run_options(parser, batch_size="32, more on a CUDA GPU")
    run.add_argument("--threads", type=positive, metavar="N",
        help="threads of the computation on a CPU (default: one per CPU)")  # fmt: skip
    parser.set_defaults(run=_features, interrupted=RESUME, memory=_MEMORY)
    return [parser]


def _features(args: argparse.Namespace) -> int:
    _check_paths(args.inputs)
    model = create_model(
        args.model,
        checkpoint=args.checkpoint,
        network=args.network,
        **({"img_size": args.img_size} if args.img_size else {}),
    ).eval()
    if args.picture:
        in_chans = model.patch_embed.proj.in_channels
        decoder = Decoder(in_chans, args.value_range, args.bands, args.max_pixels)
        images = open_images(args.inputs, decoder=decoder)
        check_picture(args.picture, images)
    report = extract_features(
        args.inputs,
        model,
        args.out,
        layers=args.layers,
        pool=None if args.pool == "none" else args.pool,
        dtype=args.dtype,
        batch_size=args.batch_size,
        device=args.device,
        workers=args.workers,
        threads=args.threads,
        precision=args.precision,
        format=args.format,
        strict=args.strict,
        value_range=args.value_range,
        bands=args.bands,
        max_pixels=args.max_pixels,
        overwrite=args.overwrite,
        progress=True,
    )
    if report is None:  # another process finished the run
        return 0
    if not report.already_done or is_main_process():  # all processes find a finished run
        if args.picture and report.shape[0]:
            count, device = args.picture_images, args.device
            save_pca_picture(images, model, args.picture, count=count, device=device)
        _print_report(report, args.picture)
    return SOME_IMAGES_FAILED if report.failed else 0


def _check_paths(inputs: Iterable[str]) -> None:
    """Find a wrong path before weights are downloaded, which may be gigabytes.

    Raises:
        DataError: A path does not exist, or a pattern matches nothing.
    """
    for path in (path for given in inputs for path in expand(given)):
        is_path = ":" not in path and not path.startswith(("hfds/", "torch/"))
        if is_path and not os.path.lexists(path):
            raise DataError(f"'{path}' does not exist")


def _print_report(report: ExtractionReport, picture: str | None) -> None:
    settings = report.settings
    shape = " x ".join(map(str, report.shape))
    blocks = ", ".join(map(str, settings["layers"]))
    pooled = "mean over patches" if settings["pool"] else "maps"
    done = f"{report.shape[0]} done, {len(report.failed)} failed, {report.skipped} skipped"
    rate = f"{report.images_per_second:.1f} images/s on {settings['device']}"
    lines = [
        ("model", f"{settings['model']}, {settings['weights']}"),
        ("input", settings["transform"]),
        ("features", f"block {blocks}, final LayerNorm, {pooled}"),
        ("images", f"{done} ({'all done before' if report.already_done else rate})"),
        ("written", f"{report.features}  [{shape}] {report.dtype}"),
        ("", f"{report.index}  which row is which image"),
        ("", f"{report.record}  settings and counts"),
    ]
    if picture and report.shape[0]:
        lines.append(("", f"{picture}  principal components of the patch features"))
    for name, text in lines:
        print(f"{name:9} {text}")
    for path, reason in report.failed[:_SHOWN]:
        print(f"failed: {path!r}: {reason}", file=sys.stderr)
    if len(report.failed) > _SHOWN:
        rest = len(report.failed) - _SHOWN
        print(f"and {rest} more, see 'error' in {report.index}", file=sys.stderr)
