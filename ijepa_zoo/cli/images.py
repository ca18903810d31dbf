"""`ijepa-zoo features` and `ijepa-zoo predict`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

from PIL import Image

from ..data.decode import MAX_PIXELS, Decoder
from ..data.files import expand
from ..data.sources import open_images
from ..data.transforms import transform_config
from ..distributed import read_environment
from ..errors import DataError, SettingsError
from ..extract import ExtractionReport, extract_features
from ..models.classifier import Classifier
from ..predictions import predict
from ..visualize import save_pca_picture
from .options import (
    DTYPES,
    RESUME,
    Commands,
    add_feature_options,
    add_model_options,
    add_pixel_options,
    add_run_options,
    feature_options,
    open_model,
    positive,
)

SOME_IMAGES_FAILED = 3
_POOLS = {
    "avg": "mean over patches",
    "cls": "class token",
    "cls_avg": "class token and mean over patches",
    "map": "the model's attention pooling",
    None: "maps",
}
_SHOWN = 20  # failures printed; the index has all
_MEMORY = "a smaller --batch-size, fewer --workers or --precision bfloat16"


def add_features(commands: Commands) -> list[argparse.ArgumentParser]:
    """`features`."""
    parser = commands.add_parser(
        "features",
        help="features of images into a file",
        description="Extract features of images into FILE, with an index next to it. The same "
        "command resumes after an interruption. Several processes: torchrun --nproc-per-node N "
        "-m ijepa_zoo features ... Exit status 3: done, but some images failed (one process only).",
    )
    _add_inputs(parser)
    add_model_options(parser)
    out = parser.add_argument_group("output options")
    add = out.add_argument
    add("--out", required=True, metavar="FILE",
        help="required: file to write, .safetensors, .npy or .parquet")  # fmt: skip
    add("--format", choices=("safetensors", "npy", "parquet"), help="default: by the suffix")
    add_feature_options(out)
    add("--dtype", choices=DTYPES, default="float32", help="of the file (default: float32)")
    add("--overwrite", action="store_true", help="replace files that have other settings")
    add("--picture", metavar="FILE", help="draw principal components of patch features, a PNG")
    add("--picture-images", type=positive, default=12, metavar="N",
        help="images in the picture (default: 12)")  # fmt: skip
    _add_run(parser)
    parser.set_defaults(run=_features, interrupted=RESUME, memory=_MEMORY)
    return [parser]


def add_predict(commands: Commands) -> list[argparse.ArgumentParser]:
    """`predict`."""
    parser = commands.add_parser(
        "predict",
        help="classes of images into a table",
        description="Classify images with a fine-tuned model or a saved probe. Writes path, label "
        "and probability of each image to FILE, or maps of a dense head to a folder. The same "
        "command resumes after an interruption. Exit status 3: done, but some images failed.",
    )
    _add_inputs(parser)
    add_model_options(parser)
    out = parser.add_argument_group("output options")
    out.add_argument("--out", required=True, metavar="FILE",
        help="required: file to write, .csv or .parquet; a folder for a dense head")  # fmt: skip
    out.add_argument("--topk", type=positive, default=1, metavar="K",
        help="classes per image, the likeliest first (default: 1)")  # fmt: skip
    out.add_argument("--overwrite", action="store_true", help="replace files of other settings")
    _add_run(parser)
    parser.set_defaults(run=_predict, interrupted=RESUME, memory=_MEMORY)
    return [parser]


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data options")
    data.add_argument("inputs", nargs="+", metavar="INPUT",
        help="folders, images, globs, tar shards, .txt lists of paths, .npy, hfds/NAME, ...",
    )  # fmt: skip
    add_pixel_options(data)
    data.add_argument("--max-pixels", type=positive, default=MAX_PIXELS, metavar="N",
        help=f"images of more pixels fail (default: {MAX_PIXELS})")  # fmt: skip
    data.add_argument("--strict", action="store_true", help="stop at the first image that fails")


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = add_run_options(parser, batch_size="32, more on a CUDA GPU")
    run.add_argument("--threads", type=positive, metavar="N",
        help="threads of the computation on a CPU (default: one per CPU)")  # fmt: skip


def _run_options(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        *("batch_size", "device", "workers", "threads", "precision", "strict", "value_range"),
        *("bands", "max_pixels", "overwrite"),
    )
    return {name: getattr(args, name) for name in names} | {"progress": True}


def _predict(args: argparse.Namespace) -> int:
    _check_paths(args.inputs)
    model = open_model(args)
    report = predict(args.inputs, model, args.out, topk=args.topk, **_run_options(args))
    if report is None:  # rank 0 reports
        return 0
    settings = report.settings
    _print_summary(report, [
        ("model", f"{settings['model']}, {settings['weights']}"),
        ("classes", str(len(settings["classes"]))),
        *_counts(report),
        ("written", str(report.features)),
    ])  # fmt: skip
    return _status(report)


def _features(args: argparse.Namespace) -> int:
    _check_paths(args.inputs)
    if args.picture:
        _check_picture(args.picture)
    model = open_model(args)
    if isinstance(model, Classifier):
        model = model.encoder
    report = extract_features(
        args.inputs,
        model,
        args.out,
        **feature_options(args),
        dtype=args.dtype,
        format=args.format,
        **_run_options(args),
    )
    if report is None:  # rank 0 reports
        return 0
    if args.picture and report.shape[0]:
        channels = transform_config(model)["input_size"][0]
        decoder = Decoder(channels, args.value_range, args.bands, args.max_pixels)
        images = open_images(args.inputs, decoder=decoder)
        save_pca_picture(images, model, args.picture, count=args.picture_images, device=args.device)
    _print_report(report, args.picture)
    return _status(report)


def _status(report: ExtractionReport) -> int:
    is_alone = read_environment(os.environ) is None  # torchrun calls any other status a failure
    return SOME_IMAGES_FAILED if report.failed and is_alone else 0


def _check_paths(inputs: Iterable[str]) -> None:
    """Find a wrong path before weights are downloaded, which may be gigabytes.

    Raises:
        DataError: A path does not exist, or a pattern matches nothing.
    """
    for path in (path for given in inputs for path in expand(given)):
        is_path = ":" not in path and not path.startswith(("hfds/", "torch/"))
        if is_path and not os.path.lexists(path):
            raise DataError(f"'{path}' does not exist")


def _check_picture(path: str) -> None:
    """Refuse the name of a picture before the work.

    Raises:
        SettingsError: The folder does not exist or the suffix is not that of an image format.
    """
    Image.init()
    folder, suffix = os.path.dirname(path), os.path.splitext(path)[1].lower()
    if Image.EXTENSION.get(suffix) not in Image.SAVE:
        raise SettingsError(f"--picture '{path}' does not end like an image, such as .png")
    if not os.path.isdir(folder or "."):
        raise SettingsError(f"the folder of --picture '{path}' does not exist")


def _print_report(report: ExtractionReport, picture: str | None) -> None:
    settings = report.settings
    shape = " x ".join(map(str, report.shape))
    blocks = ", ".join(map(str, settings["layers"]))
    layers = (
        "last map" if settings["layers"] == [-1] else f"after block {blocks} and the final norm"
    )
    lines = [
        ("model", f"{settings['model']}, {settings['weights']}"),
        ("input", settings["transform"]),
        ("features", f"{layers}, {_POOLS[settings['pool']]}"),
        *_counts(report),
        ("written", f"{report.features}  [{shape}] {report.dtype}"),
        ("", f"{report.index}  which row is which image"),
        ("", f"{report.record}  settings and counts"),
    ]
    if picture and report.shape[0]:
        lines.append(("", f"{picture}  principal components of the patch features"))
    _print_summary(report, lines)


def _counts(report: ExtractionReport) -> list[tuple[str, str]]:
    done = f"{report.shape[0]} done, {len(report.failed)} failed, {report.skipped} skipped"
    rate = f"{report.images_per_second:.1f} images/s on {report.settings['device']}"
    return [("images", f"{done} ({'all done before' if report.already_done else rate})")]


def _print_summary(report: ExtractionReport, lines: list[tuple[str, str]]) -> None:
    for name, text in lines:
        print(f"{name:9} {text}")
    for path, reason in report.failed[:_SHOWN]:
        print(f"failed: {path!r}: {reason}", file=sys.stderr)
    if len(report.failed) > _SHOWN:
        rest = len(report.failed) - _SHOWN
        print(f"and {rest} more, see 'error' in {report.index}", file=sys.stderr)
