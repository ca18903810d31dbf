"""`ijepa-zoo list` and `ijepa-zoo export`: models and their weights."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from . import options

_WEIGHTS, _GRAPHS = ("native", "timm", "transformers", "official"), ("onnx", "torch-export")
_SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "in_chans", "mlp_ratio")
# Options of some formats or sources only; all are None or False unless given.
_OF_GRAPHS = ("layers", "pool", "quantize", "dynamic_size", "quiet")
_OF_CHECKPOINTS = ("model", *_SIZES)


def add_list(commands: options.Commands) -> list[argparse.ArgumentParser]:
    """`list`."""
    parser = commands.add_parser("list", description="List the models and their weights.")
    parser.add_argument("--pretrained", action="store_true", help="only names with weights")
    parser.set_defaults(run=_list)
    return [parser]


def add_export(commands: options.Commands) -> list[argparse.ArgumentParser]:
    """`export`."""
    parser = commands.add_parser(
        "export",
        description="Export weights to a folder that another library loads without this package "
        "(native, timm, transformers, official), or a graph for servers, from uint8 pixels to "
        "features, or to logits for a classifier without --layers and --pool (onnx, torch-export).",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE",
        help="NAME[.TAG], a checkpoint file or folder, hf-hub:REPO, or the folder of a "
        "pretraining run")  # fmt: skip
    add("folder", nargs="?", metavar="DST", help="folder to write (a run: default RUN/export)")
    add("--to", choices=(*_WEIGHTS, *_GRAPHS), default="native",
        help="format (default: native); official needs all three networks")  # fmt: skip
    add(
        "--dtype",
        choices=options.DTYPES,
        help="of the weights (default: unchanged; of graphs: float32)",
    )
    add("--license", metavar="SPDX", help="license of the weights (default: as in the source)")
    add("--overwrite", action="store_true", help="replace DST once the new folder is complete")

    source = parser.add_argument_group("source options")
    options.add_network(source)
    source.add_argument("--step", type=options.count, metavar="N",
        help="step of a run's checkpoint (default: the newest)")  # fmt: skip
    source.add_argument("--model", metavar="NAME",
        help="a name of `ijepa-zoo list`, if SOURCE does not record one")  # fmt: skip
    options.add_img_size(source)
    for name in _SIZES:
        kind = float if name == "mlp_ratio" else options.positive
        option = f"--{name.replace('_', '-')}"
        source.add_argument(option, type=kind, metavar="N", help="default: that of the model")

    graph = parser.add_argument_group("options of onnx and torch-export")
    options.add_feature_options(graph)
    graph.add_argument("--quantize", choices=("int8",),
        help="onnx: linear layers in 8 bits, faster on CPUs")  # fmt: skip
    graph.add_argument("--dynamic-size", action="store_true",
        help="accept images of any size that is a multiple of the patch size")  # fmt: skip
    graph.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_export)
    return [parser]


def _list(args: argparse.Namespace) -> int:
    from ..models.factory import list_models
    from ..weights.registry import checkpoints

    rows = [("model", "network", "parameters", "input", "data, epochs", "license of the weights")]
    for checkpoint in checkpoints():
        size = "x".join(map(str, checkpoint.input_size[1:]))
        trained = f"{checkpoint.data}, {checkpoint.epochs:g}"
        first = checkpoint.name, checkpoint.network, _millions(checkpoint.model)
        rows.append((*first, size, trained, checkpoint.license))
    released = {checkpoint.model for checkpoint in checkpoints()}
    for name in () if args.pretrained else list_models():
        if name not in released:
            rows.append((name, "-", _millions(name), "-", "no released weights", "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


@cache
def _millions(name: str) -> str:
    from ..models.factory import create_model

    skip: dict[str, Any] = {"device": "meta", "weight_init": "skip"}
    state = create_model(name, pretrained=False, **skip).state_dict()
    return f"{sum(tensor.numel() for tensor in state.values()) / 1e6:.1f} M"


def _export(args: argparse.Namespace) -> int:
    to_graph = args.to in _GRAPHS
    is_run = os.path.isfile(os.path.join(args.source, "config.yaml"))
    unused = [
        *(() if to_graph else _OF_GRAPHS),
        *(_OF_CHECKPOINTS if is_run else ["step"]),
    ]
    if given := [name for name in unused if getattr(args, name) not in (None, False)]:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        kind = "a run" if is_run else "weights"
        raise SettingsError(f"{shown}: not for {kind} ({args.source}) with --to {args.to}")
    if args.folder is None and (to_graph or not is_run or args.to != "native"):
        raise SettingsError(
            f"name the folder to write: ijepa-zoo export {args.source} DST --to {args.to}"
        )
    sizes = {name: getattr(args, name) for name in ("img_size", *_SIZES)}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    write = _export_graph if to_graph else _export_weights
    folder = write(args, is_run, sizes)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    if args.to == "native":
        print(f'load it with ijepa_zoo.create_model("local-dir:{folder}")')
    if to_graph:
        _print_graph(json.loads((folder / "serving.json").read_text(encoding="utf-8")))
    return 0


def _export_weights(args: argparse.Namespace, is_run: bool, sizes: dict[str, Any]) -> Path:
    import torch

    from ..train import export_run
    from ..weights.export import export

    given = {name: getattr(args, name) for name in ("to", "network", "license", "overwrite")}
    given |= {"dtype": getattr(torch, args.dtype) if args.dtype else None, **sizes}
    if is_run:
        return export_run(args.source, args.folder, step=args.step, **given)
    return export(args.source, args.folder, model_name=args.model, **given)


def _export_graph(args: argparse.Namespace, is_run: bool, sizes: dict[str, Any]) -> Path:
    from ..deploy import check_request, export_graph

    given: dict[str, Any] = {name: getattr(args, name) for name in ("quantize", "overwrite")}
    given["dtype"] = args.dtype or "float32"
    check_request(args.folder, args.to, **given)
    return export_graph(
        _open_run(args) if is_run else _open_encoder(args, sizes),
        args.folder,
        args.to,
        **options.feature_options(args),
        output="features" if args.layers or args.pool else "auto",
        dynamic_size=args.dynamic_size,
        license=args.license,
        progress=not args.quiet,
        **given,
    )


def _open_run(args: argparse.Namespace) -> Any:
    from ..train import load_run

    networks, _ = load_run(args.source, args.step)
    encoder = getattr(networks, args.network or "target_encoder")
    if args.img_size:
        size = args.img_size
        encoder.set_input_size((size, size) if isinstance(size, int) else size)
    return encoder


def _open_encoder(args: argparse.Namespace, sizes: dict[str, Any]) -> Any:
    from ..models.factory import create_model

    source = args.source
    if args.model:
        return create_model(args.model, checkpoint=source, network=args.network, **sizes)
    if os.path.isfile(source):
        raise SettingsError(f"{source} does not record its architecture: add --model NAME")
    name = f"local-dir:{source}" if os.path.isdir(source) else source
    return create_model(name, network=args.network, **sizes)


def _print_graph(record: dict[str, Any]) -> None:
    for name in ("input", "output"):
        tensor = record[name]
        print(f"{name}: {tensor['name']} {tensor['dtype']} {tensor['shape']}")
    error, cosine = record["checked"]["relative_error"], record["checked"]["lowest_cosine"]
    print(f"checked: relative error {error:.1g}, cosine {cosine:.6f} to the model in float32")
    if not record["license"]:
        print("the license of the weights is unknown: name it with --license", file=sys.stderr)
