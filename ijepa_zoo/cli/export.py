"""`ijepa-zoo export`: a pretraining run's weights, or any model for servers."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FetchError, RunError, SettingsError
from .status import DONE, FAILED, USAGE, complain, count, layers, positive

_GRAPH_OPTIONS = ("layers", "pool", "quantize", "img_size", "checkpoint", "network")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of `export`."""
    add = parser.add_argument
    add("source", metavar="RUN|NAME|FOLDER",
        help="a pretraining run; for onnx and torch-export also a model of `ijepa-zoo list`, a "
        "folder with weights or hf-hub:REPO")  # fmt: skip
    add("folder", nargs="?", metavar="DST", help="folder to write (native: default RUN/export)")
    add("--to", choices=("native", "onnx", "torch-export"), default="native",
        help="native (default): all networks of a run, for this package; onnx, torch-export: "
        "uint8 pixels to features, for servers without it")  # fmt: skip
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32")
    add("--license", metavar="SPDX", help="licence of the weights, for the folder's record")
    add("--overwrite", action="store_true", help="replace DST once the new folder is whole")
    add("--step", type=count, metavar="N", help="native: which checkpoint (default: the newest)")
    graph = parser.add_argument_group("onnx and torch-export")
    add = graph.add_argument
    add("--layers", type=layers, help="last (default), last4 or block indices: 3,7,11 or, from "
        "the end, --layers=-4,-1")  # fmt: skip
    add("--pool", choices=("avg", "none"), help="mean over patches (default: avg), or maps")
    add("--quantize", choices=("int8",), help="onnx: linear layers in 8 bits, faster on CPUs")
    add("--img-size", type=positive, metavar="N", help="default: the model's own image size")
    add("--checkpoint", metavar="PATH", help="your own weights, or hf-hub:REPO")
    add("--network", choices=("target_encoder", "encoder"), help="default: the target encoder")
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:

    try:
        return _native(args) if args.to == "native" else _graph(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing is written") from None
    except (RunError, CheckpointError, FetchError, OSError) as error:
        return complain(error, FAILED)
    except (ValueError, TypeError, ImportError) as error:
        return complain(error, USAGE)


def _refuse_existing(folder: str | Path, overwrite: bool) -> None:
    """As Python does, in the words of the command line."""
    if os.path.exists(folder) and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another name, or add --overwrite")


def _native(args: argparse.Namespace) -> int:
    import torch

    from ..train import export_run

    given = [name for name in _GRAPH_OPTIONS if getattr(args, name) is not None]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SettingsError(f"{options}: only with --to onnx or --to torch-export")
    run = Path(args.source)
    if not run.is_dir() or ((run / "config.json").exists() and not (run / "config.yaml").exists()):
        raise SettingsError(
            f"{args.source} is no folder of a pretraining run. Other weights are copied by "
            f"`ijepa-zoo convert {args.source} DST --to native`, and written for servers by "
            f"`ijepa-zoo export {args.source} DST --to onnx`"
        )
    _refuse_existing(args.folder or run / "export", args.overwrite)
    folder = export_run(
        run,
        args.folder,
        step=args.step,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        license=args.license,
        overwrite=args.overwrite,
    )
    print(f'{folder}  for create_model("local-dir:{folder}")')
    return DONE


def _graph(args: argparse.Namespace) -> int:
    from ..models.factory import create_model
    from ..serving import export_graph
    from ..serving.export import check_request

    if args.step is not None:
        raise SettingsError(
            f"--step is for native: `ijepa-zoo export {args.source} DST --step {args.step}`, then "
            f"`ijepa-zoo export DST SERVED --to {args.to}`"
        )
    if args.folder is None:
        raise SettingsError(
            f"name the folder to write: ijepa-zoo export {args.source} DST --to {args.to}"
        )
    _refuse_existing(args.folder, args.overwrite)
    options: dict[str, Any] = {"dtype": args.dtype or "float32", "quantize": args.quantize}
    check_request(args.folder, args.to, overwrite=args.overwrite, **options)
    model = create_model(
        _source(args.source),
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
    _show(folder)
    return DONE


def _source(source: str) -> str:
    """What `create_model` calls it: a folder that is there is one."""
    if os.path.isfile(source):
        raise SettingsError(
            f"{source} is a file: name its model, and the file by --checkpoint {source}"
        )
    return f"local-dir:{source}" if os.path.isdir(source) else source


def _show(folder: Path) -> None:
    record = json.loads((folder / "serving.json").read_text(encoding="utf-8"))
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    for name in ("input", "output"):
        tensor = record[name]
        print(f"{name}: {tensor['name']} {tensor['dtype']} {tensor['shape']}")
    worst = max(check["relative_error"] for check in record["checked"]["batches"])
    cosine = record["checked"]["lowest_cosine"]
    print(f"checked: relative error {worst:.1g}, cosine {cosine:.6f} to the model in float32")
    if not record["license"]:
        print("licence unknown: name it by --license", file=sys.stderr)
