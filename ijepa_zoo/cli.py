"""The command ``ijepa-zoo``: thin, every subcommand calls the package's own functions."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .extraction import ExtractionReport
    from .weights.catalog import Checkpoint

DONE, FAILED, USAGE, SOME_IMAGES_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
_SHOWN = 20  # failures printed; the index has all


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit status: 0 done, 1 error, 2 wrong usage, 3 done but some images failed, 130 interrupted.
    """
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may be beyond its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # of our own output: a full disk
        return _complain(error, FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ijepa-zoo", description="I-JEPA encoders for timm code")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_list(commands.add_parser("list", help="models and their weights"))
    _add_features(
        commands.add_parser(
            "features",
            help="features of images into a file",
            description="Extract features of images into FILE, with an index beside it. Images "
            "that cannot be read are listed and the rest goes on. The same command after an "
            "interruption goes on where it was. torchrun -m ijepa_zoo.cli features ... shares the "
            "work. Exit status: 0 done, 1 error, 2 wrong usage, 3 done but some images failed.",
        )
    )
    _add_convert(
        commands.add_parser(
            "convert",
            help="weights into the layout of another library",
            description="Copy weights into a folder that another library loads without this "
            "package. Tensors are copied as they are. official needs all three networks.",
        )
    )
    return parser


def _version() -> str:
    from . import __version__

    return __version__


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained", action="store_true", help="only names with weights")
    parser.set_defaults(run=_list)


def _add_features(parser: argparse.ArgumentParser) -> None:
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
    add("--img-size", type=_positive, metavar="N", help="default: the model's own image size")
    add(
        "--layers",
        type=_layers,
        default="last",
        help="last (default), last4 or block indices: 3,7,11 or, from the end, --layers=-4,-1",
    )
    add("--pool", choices=("avg", "none"), default="avg", help="mean over patches, or maps")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--format", choices=("safetensors", "npy", "parquet"), help="default: by FILE's suffix")
    add("--batch-size", type=_positive, default=32, metavar="N")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--workers", type=_count, metavar="N", help="processes that decode (default: one per CPU)")
    add("--threads", type=_positive, metavar="N", help="CPU threads of the computation")
    add(
        "--precision",
        choices=("float32", "bfloat16", "float16", "bfloat16-weights"),
        default="float32",
        help="of the computation; bfloat16 and float16 by autocast",
    )
    add("--max-pixels", type=_positive, metavar="N", help="largest image decoded (178956970)")
    add("--strict", action="store_true", help="stop at the first image that fails")
    add("--overwrite", action="store_true", help="replace finished files of another run")
    add("--picture", metavar="FILE", help="draw principal components of patch features, a PNG")
    add("--picture-images", type=_positive, default=12, metavar="N", help="images in it")
    parser.set_defaults(run=_features)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="NAME.TAG, a checkpoint file or folder, or hf-hub:REPO")
    add("folder", metavar="DST", help="folder to write")
    add("--to", required=True, choices=("native", "timm", "transformers", "official"))
    add("--network", choices=("target_encoder", "encoder"), help="default: the target encoder")
    add("--model", metavar="NAME", help="architecture of a file that does not say it")
    for name in ("img-size", "patch-size", "embed-dim", "depth", "num-heads", "in-chans"):
        add(f"--{name}", type=_positive, metavar="N", help="where it differs from the model's")
    add("--mlp-ratio", type=float, metavar="X", help="where it differs from the model's")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as in the source")
    add("--license", metavar="SPDX", help="licence of the weights, for the model card")
    add("--overwrite", action="store_true", help="replace DST once the new folder is whole")
    add("--push-to", metavar="REPO", help="also upload to the Hugging Face Hub")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    import torch

    from .weights.export import export
    from .weights.layouts import CheckpointError
    from .weights.ranged import FetchError

    sizes = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "in_chans", "mlp_ratio")
    given = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    try:
        folder = export(
            args.source,
            args.folder,
            args.to,
            network=args.network,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            license=args.license,
            overwrite=args.overwrite,
            push_to=args.push_to,
            model_name=args.model,
            **given,
        )
    except ValueError as error:
        return _complain(error, USAGE)
    except (CheckpointError, FetchError, OSError) as error:
        return _complain(error, FAILED)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return DONE


def _list(args: argparse.Namespace) -> int:
    from .models.predictor import PREDICTORS
    from .weights.catalog import checkpoints

    rows: list[tuple[str, ...]] = [
        ("model", "network", "parameters", "input", "data, epochs", "licence of the weights")
    ]
    rows += [_weights_row(record) for record in checkpoints()]
    if not args.pretrained:
        known = {record.model for record in checkpoints()}
        rows += [_plain_row(name) for name in PREDICTORS if name not in known]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return DONE


def _weights_row(record: "Checkpoint") -> tuple[str, ...]:
    size = "x".join(map(str, record.input_size[1:]))
    trained = f"{record.data}, {record.epochs:g}"
    millions = _millions(record.model)
    return (record.name, record.network, millions, size, trained, record.license)


def _plain_row(name: str) -> tuple[str, ...]:
    return (name, "-", _millions(name), "-", "no released weights", "-")


@cache
def _millions(name: str) -> str:
    from .models.factory import create_model

    state = create_model(name, pretrained=False, device="meta").state_dict()
    return f"{sum(tensor.numel() for tensor in state.values()) / 1e6:.1f} M"


def _features(args: argparse.Namespace) -> int:
    from torch import OutOfMemoryError

    from .extraction import ExtractionError
    from .weights.layouts import CheckpointError
    from .weights.ranged import FetchError

    try:
        return _run_features(args)
    except ValueError as error:
        return _complain(error, USAGE)
    except OutOfMemoryError as error:
        return _complain(f"{error}\nTry a smaller --batch-size than {args.batch_size}", FAILED)
    except (CheckpointError, FetchError, ExtractionError, ImportError, OSError) as error:
        return _complain(error, FAILED)


def _run_features(args: argparse.Namespace) -> int:
    from .data.images import MAX_PIXELS
    from .data.sources import find_items
    from .extraction import extract_features
    from .models.factory import create_model

    max_pixels = args.max_pixels or MAX_PIXELS
    items = find_items(args.inputs)  # before the weights, which may be gigabytes away
    if args.picture:
        from .pictures import check_picture, save_pca_picture

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


def _complain(error: object, status: int) -> int:
    print(f"ijepa-zoo: error: {error}", file=sys.stderr)
    return status


def _layers(text: str) -> str | list[int]:
    if text in ("last", "last4"):
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither last, last4 nor block indices such as 3,7,11"
        ) from None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
