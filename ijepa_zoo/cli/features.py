"""`ijepa-zoo features`."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ..errors import CheckpointError, FetchError, RunError
from .status import DONE, FAILED, SOME_IMAGES_FAILED, USAGE, complain, count, layers, positive

if TYPE_CHECKING:
    from ..extraction import ExtractionReport

_SHOWN = 20  # failures printed; the index has all


def add_features(parser: argparse.ArgumentParser) -> None:
    """Arguments of `features`."""
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="folder, image, glob, tar shard or .txt list of paths",
    )
    add("--model", required=True, metavar="NAME[.TAG]", help="see `ijepa-zoo list`")
    add("--out", required=True, metavar="FILE", help="ends in .safetensors, .npy or .parquet")
    add("--checkpoint", metavar="PATH", help="your own weights, or hf-hub:REPO")
    add("--network", choices=("target_encoder", "encoder"), help="default: the target encoder")
    add("--img-size", type=positive, metavar="N", help="default: the model's own image size")
    add(
        "--layers",
        type=layers,
        default="last",
        help="last (default), last4 or block indices: 3,7,11 or, from the end, --layers=-4,-1",
    )
    add("--pool", choices=("avg", "none"), default="avg", help="mean over patches, or maps")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--format", choices=("safetensors", "npy", "parquet"), help="default: by FILE's suffix")
    add("--batch-size", type=positive, metavar="N", help="default: 32, more on a CUDA GPU")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--workers", type=count, metavar="N", help="processes that decode (default: one per CPU)")
    add("--threads", type=positive, metavar="N", help="CPU threads of the computation")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16", "bfloat16-weights"),
        default="auto",
        help="of the computation; bfloat16 and float16 by autocast; auto (default): the faster of "
        "the two on a CUDA GPU, else float32",
    )
    add("--max-pixels", type=positive, metavar="N", help="largest image decoded (178956970)")
    add("--strict", action="store_true", help="stop at the first image that fails")
    add("--overwrite", action="store_true", help="replace finished files of another run")
    add("--picture", metavar="FILE", help="draw principal components of patch features, a PNG")
    add("--picture-images", type=positive, default=12, metavar="N", help="images in it")
    parser.set_defaults(run=_features)


def _features(args: argparse.Namespace) -> int:
    from torch import OutOfMemoryError

    try:
        return _run_features(args)
    except ValueError as error:
        return complain(error, USAGE)
    except OutOfMemoryError as error:
        now = f" than {args.batch_size}" if args.batch_size else ", for example 32"
        return complain(f"{error}\nTry a smaller --batch-size{now}", FAILED)
    except (CheckpointError, FetchError, RunError, ImportError, OSError) as error:
        return complain(error, FAILED)


def _run_features(args: argparse.Namespace) -> int:
    from ..data.images import MAX_PIXELS
    from ..data.sources import find_items
    from ..extraction import extract_features
    from ..models.factory import create_model

    max_pixels = args.max_pixels or MAX_PIXELS
    items = find_items(args.inputs)  # before the weights, which may be gigabytes away
    if args.picture:
        from ..pictures import check_picture, save_pca_picture

        check_picture(args.picture, items)
    size = {"img_size": args.img_size} if args.img_size else {}
    model = create_model(
        args.model, checkpoint=args.checkpoint, network=args.network, **size
    ).eval()
    report = extract_features(
        items,
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
        max_pixels=max_pixels,
        overwrite=args.overwrite,
        progress=True,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        if args.picture and report.shape[0]:
            save_pca_picture(
                items,
                model,
                args.picture,
                count=args.picture_images,
                device=args.device,
                max_pixels=max_pixels,
            )
        _print_report(report, args)
    return SOME_IMAGES_FAILED if report.failed else DONE


def _print_report(report: "ExtractionReport", args: argparse.Namespace) -> None:
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
    if args.picture and report.shape[0]:
        lines.append(("", f"{args.picture}  principal components of the patch features"))
    for name, text in lines:
        print(f"{name:9} {text}")
    for path, reason in report.failed[:_SHOWN]:
        print(f"failed: {path!r}: {reason}", file=sys.stderr)
    if len(report.failed) > _SHOWN:
        rest = len(report.failed) - _SHOWN
        print(f"and {rest} more, see 'error' in {report.index}", file=sys.stderr)
