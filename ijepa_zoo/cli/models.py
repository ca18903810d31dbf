"""`ijepa-zoo list`, `convert` and `export`: models and their weights."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError, SettingsError
from ..models.factory import create_model
from ..models.predictor import PREDICTORS
from ..serving import export_graph
from ..serving.export import check_request
from ..train import export_run
from ..weights.catalog import Checkpoint, checkpoints
from ..weights.export import export
from .options import (
    DTYPES,
    LAYERS,
    Commands,
    add_checkpoint,
    add_img_size,
    add_network,
    count,
    layers,
    positive,
)

_SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "in_chans")
_GRAPH_OPTIONS = ("layers", "pool", "quantize", "img_size", "checkpoint", "network")


def add_list(commands: Commands) -> list[argparse.ArgumentParser]:
    """`list`."""
    parser = commands.add_parser("list", help="models and their weights")
    parser.add_argument("--pretrained", action="store_true", help="only names with weights")
    parser.set_defaults(run=_list)
    return [parser]


def add_convert(commands: Commands) -> list[argparse.ArgumentParser]:
    """`convert`."""
    parser = commands.add_parser(
        "convert",
        help="weights into the format of another library",
        description="Copy weights into a folder that another library loads without this package.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="NAME.TAG, a checkpoint file or folder, or hf-hub:REPO")
    add("folder", metavar="DST", help="folder to write")
    add("--to", required=True, choices=("native", "timm", "transformers", "official"),
        help="required: format to write; official needs all three networks")  # fmt: skip
    _add_output_options(parser, "as in SRC")
    add("--push-to", metavar="REPO", help="also upload to the Hugging Face Hub")
    add_network(parser)
    group = parser.add_argument_group("architecture, where SRC does not tell it")
    group.add_argument("--model", metavar="NAME", help="a name of `ijepa-zoo list`")
    add_img_size(group)
    for name in _SIZES:
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=positive, metavar="N", help="default: that of the model")
    group.add_argument("--mlp-ratio", type=float, metavar="X", help="default: that of the model")
    parser.set_defaults(run=_convert)
    return [parser]


def add_export(commands: Commands) -> list[argparse.ArgumentParser]:
    """`export`."""
    parser = commands.add_parser("export", help="weights of a run, or a model for servers")
    add = parser.add_argument
    add("source", metavar="RUN|NAME|FOLDER",
        help="a pretraining run; for onnx and torch-export also a model or a folder with weights",
    )  # fmt: skip
    add("folder", nargs="?", metavar="DST", help="folder to write (native: default RUN/export)")
    add("--to", choices=("native", "onnx", "torch-export"), default="native",
        help="native (default): all networks of a run; onnx, torch-export: uint8 to features",
    )  # fmt: skip
    _add_output_options(parser, "float32")
    add("--step", type=count, metavar="N", help="native: which checkpoint (default: the newest)")
    graph = parser.add_argument_group("options of onnx and torch-export")
    graph.add_argument("--layers", type=layers, metavar="WHICH", help=LAYERS)
    graph.add_argument("--pool", choices=("avg", "none"),
        help="avg (default): mean over patches; none: maps")  # fmt: skip
    graph.add_argument("--quantize", choices=("int8",),
        help="onnx: linear layers in 8 bits, faster on CPUs")  # fmt: skip
    add_img_size(graph)
    add_checkpoint(graph)
    add_network(graph)
    graph.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_export)
    return [parser]


def _add_output_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    add = parser.add_argument
    add("--dtype", choices=DTYPES, help=f"of the weights (default: {dtype})")
    add("--license", metavar="SPDX", help="license of the weights (default: as in the source)")
    add("--overwrite", action="store_true", help="replace DST once the new folder is complete")


def _list(args: argparse.Namespace) -> int:
    rows: list[tuple[str, ...]] = [
        ("model", "network", "parameters", "input", "data, epochs", "license of the weights")
    ]
    rows += [_weights_row(record) for record in checkpoints()]
    if not args.pretrained:
        known = {record.model for record in checkpoints()}
        rows += [
            (name, "-", _millions(name), "-", "no released weights", "-")
            for name in PREDICTORS
            if name not in known
        ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def _weights_row(record: Checkpoint) -> tuple[str, ...]:
    size = "x".join(map(str, record.input_size[1:]))
    trained = f"{record.data}, {record.epochs:g}"
    millions = _millions(record.model)
    return record.name, record.network, millions, size, trained, record.license


@cache
def _millions(name: str) -> str:
    state = create_model(name, pretrained=False, device="meta").state_dict()
    return f"{sum(tensor.numel() for tensor in state.values()) / 1e6:.1f} M"


def _convert(args: argparse.Namespace) -> int:
    sizes = ("img_size", *_SIZES, "mlp_ratio")
    given = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
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
    _print_files(folder)
    return 0


def _export(args: argparse.Namespace) -> int:
    return _export_native(args) if args.to == "native" else _export_graph(args)


def _export_native(args: argparse.Namespace) -> int:
    given = [name for name in _GRAPH_OPTIONS if getattr(args, name) is not None]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SettingsError(f"{options}: only with --to onnx or --to torch-export")
    run = Path(args.source)
    if not run.is_dir() or ((run / "config.json").exists() and not (run / "config.yaml").exists()):
        raise SettingsError(
            f"{args.source} is not the folder of a pretraining run; for other weights use "
            f"`ijepa-zoo convert {args.source} DST --to native` or "
            f"`ijepa-zoo export {args.source} DST --to onnx`"
        )
    target = Path(args.folder or run / "export")
    if target.exists() and not args.overwrite:  # before gigabytes are read
        raise RunError(f"{target} exists: choose another name, or replace it with --overwrite")
    folder = export_run(
        run,
        args.folder,
        step=args.step,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        license=args.license,
        overwrite=args.overwrite,
    )
    print(f'{folder}  for create_model("local-dir:{folder}")')
    return 0


def _export_graph(args: argparse.Namespace) -> int:
    if args.step is not None:
        raise SettingsError(
            f"--step is for native: use `ijepa-zoo export {args.source} DST --step {args.step}`, "
            f"then `ijepa-zoo export DST SERVED --to {args.to}`"
        )
    if args.folder is None:
        raise SettingsError(
            f"name the folder to write: ijepa-zoo export {args.source} DST --to {args.to}"
        )
    if os.path.isfile(args.source):
        raise SettingsError(
            f"{args.source} is a file: name its model, and the file with --checkpoint {args.source}"
        )
    options: dict[str, Any] = {"dtype": args.dtype or "float32", "quantize": args.quantize}
    check_request(args.folder, args.to, overwrite=args.overwrite, **options)
    model = create_model(
        f"local-dir:{args.source}" if os.path.isdir(args.source) else args.source,
        checkpoint=args.checkpoint,
        network=args.network,
        **({"img_size": args.img_size} if args.img_size else {}),
    )
    folder = export_graph(
        model,
        args.folder,
        args.to,
        layers=args.layers or "last",
        pool=None if args.pool == "none" else "avg",
        license=args.license,
        overwrite=args.overwrite,
        progress=not args.quiet,
        **options,
    )
    _print_files(folder)
    _print_graph(json.loads((folder / "serving.json").read_text(encoding="utf-8")))
    return 0


def _print_files(folder: Path) -> None:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size:,} bytes")


def _print_graph(record: dict[str, Any]) -> None:
    for name in ("input", "output"):
        tensor = record[name]
        print(f"{name}: {tensor['name']} {tensor['dtype']} {tensor['shape']}")
    worst = max(check["relative_error"] for check in record["checked"]["batches"])
    cosine = record["checked"]["lowest_cosine"]
    print(f"checked: relative error {worst:.1g}, cosine {cosine:.6f} to the model in float32")
    if not record["license"]:
        print("license unknown: name it with --license", file=sys.stderr)
