"""`ijepa-zoo features` and `ijepa-zoo predict`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from ..errors import DataError, SettingsError
from . import options

if TYPE_CHECKING:
    from ..extract import ExtractionReport

SOME_IMAGES_FAILED = 3
_SHOWN = 20  # failed and skipped files printed; index and record have all


def add_features(commands: options.Commands) -> list[argparse.ArgumentParser]:
    """`features`."""
    parser = commands.add_parser(
        "features",
        description="Extract features of images into FILE, with an index next to it. The same "
        "command resumes after an interruption. Several processes: torchrun --nproc-per-node N "
        "-m ijepa_zoo features ... Exit status 3: done, but some images failed (one process only).",
    )
    _add_inputs(parser)
    out = parser.add_argument_group("output options")
    add = out.add_argument
    add("--out", required=True, metavar="FILE",
        help="required: file to write, .safetensors, .npy or .parquet")  # fmt: skip
    options.add_feature_options(out)
    add("--dtype", choices=options.DTYPES, default="float32", help="of the file (default: float32)")
    add("--overwrite", action="store_true", help="replace files that have other settings")
    add("--picture", metavar="FILE", help="draw principal components of patch features, a PNG")
    add("--picture-images", type=options.positive, default=12, metavar="N",
        help="images in the picture (default: 12)")  # fmt: skip
    _add_run(parser)
    parser.set_defaults(run=_features)
    return [parser]


def add_predict(commands: options.Commands) -> list[argparse.ArgumentParser]:
    """`predict`."""
    parser = commands.add_parser(
        "predict",
        description="Classify images with a fine-tuned model or a saved probe. Writes path, label "
        "and probability of each image to FILE, or maps of a dense head to a folder. The same "
        "command resumes after an interruption. Exit status 3: done, but some images failed.",
    )
    _add_inputs(parser)
    add = parser.add_argument_group("output options").add_argument
    add("--out", required=True, metavar="FILE",
        help="required: file to write, .csv or .parquet; a folder for a dense head")  # fmt: skip
    add("--topk", type=options.positive, default=1, metavar="K",
        help="classes per image, the most probable first (default: 1)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace files of other settings")
    _add_run(parser)
    parser.set_defaults(run=_predict)
    return [parser]


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data options")
    data.add_argument("inputs", nargs="+", metavar="INPUT",
        help="folders, images, globs, tar shards, .txt lists of paths, .npy, hfds/NAME, ...",
    )  # fmt: skip
    options.add_pixel_options(data)
    data.add_argument("--max-pixels", type=options.positive, default=178_956_970, metavar="N",
        help="images of more pixels fail (default: 178956970, as in Pillow)")  # fmt: skip
    data.add_argument("--strict", action="store_true", help="stop at the first image that fails")
    options.add_model_options(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = options.add_run_options(parser, batch_size="32, more on a CUDA GPU")
    run.add_argument("--threads", type=options.positive, metavar="N",
        help="threads of the computation on a CPU (default: one per CPU)")  # fmt: skip
    parser.set_defaults(interrupted=options.RESUME)


def _arguments(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Options that are arguments of `extract_features` and `predict`, with the same names."""
    names = (
        "batch_size", "device", "workers", "threads", "precision", "strict", "value_range",
        "bands", "max_pixels", "overwrite",
    )  # fmt: skip
    return {"progress": True, **{name: getattr(args, name) for name in (*names, *more)}}


def _predict(args: argparse.Namespace) -> int:
    _check_paths(args.inputs)
    from ..predictions import predict

    model = options.open_model(args)
    report = predict(args.inputs, model, args.out, **_arguments(args, "topk"))
    if report is None:  # rank 0 reports
        return 0
    return _print_report(report, [("classes", str(len(report.settings["classes"])))], [])


def _features(args: argparse.Namespace) -> int:
    _check_paths(args.inputs)
    if args.picture:
        _check_picture(args.picture, args.inputs)
    from ..data.transforms import transform_config
    from ..extract import extract_features
    from ..models.classifier import Classifier

    model = options.open_model(args)
    if isinstance(model, Classifier):
        model = model.encoder
    channels = transform_config(model)["input_size"][0]
    if args.picture and channels not in (1, 3):
        raise SettingsError(f"--picture draws images of 1 or 3 channels, not of {channels}")
    arguments = _arguments(args, "dtype") | options.feature_options(args)
    report = extract_features(args.inputs, model, args.out, **arguments)
    if report is None:
        return 0
    files = [f"{report.index}  which row is which image", f"{report.record}  settings and counts"]
    if args.picture and report.shape[0]:
        _draw(args, model)
        files.append(f"{args.picture}  principal components of the patch features")
    settings = report.settings
    features = f"layers {settings['layers']}, pool {settings['pool'] or 'none'}"
    return _print_report(report, [("input", settings["transform"]), ("features", features)], files)


def _check_picture(path: str, inputs: list[str]) -> None:
    from ..data.files import refuse_inside

    if not path.endswith(".png"):
        raise SettingsError(f"--picture '{path}' is drawn as a PNG: end its name in .png")
    refuse_inside(path, inputs)


def _check_paths(inputs: list[str]) -> None:
    """Find a wrong path before weights are downloaded, which may be gigabytes."""
    from ..data.files import expand

    for path in (path for given in inputs for path in expand(given)):
        is_path = ":" not in path and not path.startswith(("hfds/", "torch/"))
        if is_path and not os.path.lexists(path):
            raise DataError(f"'{path}' does not exist")


def _draw(args: argparse.Namespace, model: Any) -> None:
    from ..data.decode import Decoder
    from ..data.sources import open_images
    from ..data.transforms import transform_config
    from ..visualize import save_pca_picture

    channels = transform_config(model)["input_size"][0]
    decoder = Decoder(channels, args.value_range, args.bands, args.max_pixels)
    images = open_images(args.inputs, decoder=decoder)
    os.makedirs(os.path.dirname(args.picture) or ".", exist_ok=True)
    save_pca_picture(images, model, args.picture, count=args.picture_images, device=args.device)


def _print_report(
    report: ExtractionReport, details: list[tuple[str, str]], files: list[str]
) -> int:
    """Print what was done; returns the exit status."""
    from ..distributed import read_environment

    settings, shape = report.settings, " x ".join(map(str, report.shape))
    done = f"{report.shape[0]} done, {len(report.failed)} failed, {len(report.skipped)} skipped"
    lines = [
        ("model", f"{settings['model']}, {settings['weights']}"),
        *details,
        ("images", f"{done}{' (all done before)' if report.already_done else ''}"),
        ("written", f"{report.features}  [{shape}] {report.dtype}"),
        *(("", file) for file in files),
    ]
    for name, text in lines:
        print(f"{name:9} {text}")
    for kind, found in (("failed", report.failed), ("skipped", report.skipped)):
        for path, reason in found[:_SHOWN]:
            print(f"{kind}: {path!r}: {reason}", file=sys.stderr)
        if len(found) > _SHOWN:
            where = report.index if kind == "failed" else report.record
            print(f"and {len(found) - _SHOWN} more, see {where}", file=sys.stderr)
    is_alone = read_environment(os.environ) is None  # torchrun calls any other status a failure
    return SOME_IMAGES_FAILED if report.failed and is_alone else 0
