"""`ijepa-zoo list` and `ijepa-zoo convert`."""

import argparse
from functools import cache
from typing import TYPE_CHECKING

from ..errors import CheckpointError, FetchError
from .status import DONE, FAILED, USAGE, complain, positive

if TYPE_CHECKING:
    from ..weights.catalog import Checkpoint


def add_list(parser: argparse.ArgumentParser) -> None:
    """Arguments of `list`."""
    parser.add_argument("--pretrained", action="store_true", help="only names with weights")
    parser.set_defaults(run=_list)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of `convert`."""
    add = parser.add_argument
    add("source", metavar="SRC", help="NAME.TAG, a checkpoint file or folder, or hf-hub:REPO")
    add("folder", metavar="DST", help="folder to write")
    add("--to", required=True, choices=("native", "timm", "transformers", "official"))
    add("--network", choices=("target_encoder", "encoder"), help="default: the target encoder")
    add("--model", metavar="NAME", help="architecture of a file that does not say it")
    for name in ("img-size", "patch-size", "embed-dim", "depth", "num-heads", "in-chans"):
        add(f"--{name}", type=positive, metavar="N", help="where it differs from the model's")
    add("--mlp-ratio", type=float, metavar="X", help="where it differs from the model's")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as in the source")
    add("--license", metavar="SPDX", help="licence of the weights, for the model card")
    add("--overwrite", action="store_true", help="replace DST once the new folder is whole")
    add("--push-to", metavar="REPO", help="also upload to the Hugging Face Hub")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    import torch

    from ..weights.export import export

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
        return complain(error, USAGE)
    except (CheckpointError, FetchError, OSError) as error:
        return complain(error, FAILED)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return DONE


def _list(args: argparse.Namespace) -> int:
    from ..models.predictor import PREDICTORS
    from ..weights.catalog import checkpoints

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
    from ..models.factory import create_model

    state = create_model(name, pretrained=False, device="meta").state_dict()
    return f"{sum(tensor.numel() for tensor in state.values()) / 1e6:.1f} M"
