"""Options that several commands share, and the types of arguments."""

from __future__ import annotations

import argparse
import os
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DTYPES = ("float32", "float16", "bfloat16")
RESUME = "interrupted: run the same command again to resume"


def add_model_options(
    parser: argparse.ArgumentParser, required: bool = True
) -> argparse._ArgumentGroup:
    """The model that computes features, and its weights; returns the group."""
    group = parser.add_argument_group("model options")
    names = "a name of `ijepa-zoo list` or of timm, local-dir:FOLDER or hf-hub:REPO"
    group.add_argument("--model", required=required, metavar="NAME[.TAG]",
        help=f"required: {names}" if required else names,
    )  # fmt: skip
    group.add_argument("--checkpoint", metavar="PATH", help="your own weights, or hf-hub:REPO")
    add_network(group)
    add_img_size(group)
    return group


def add_network(parser: argparse._ActionsContainer) -> None:
    """Which encoder of a checkpoint."""
    parser.add_argument("--network", choices=("target_encoder", "encoder"),
        help="which encoder of the weights (default: target_encoder)")  # fmt: skip


def add_img_size(parser: argparse._ActionsContainer) -> None:
    """Image size of a model."""
    parser.add_argument("--img-size", type=size, metavar="N|H,W",
        help="image size in pixels (default: that of the model)")  # fmt: skip


def add_pixel_options(group: argparse._ActionsContainer) -> None:
    """How image files become channels of 8 bits."""
    group.add_argument("--value-range", type=value_range, metavar="LOW,HIGH",
        help="values that become 0 and 255 in images of more than 8 bits, negative ones as "
        "--value-range=-1,1 (default: by data type)",
    )  # fmt: skip
    group.add_argument("--bands", type=bands, metavar="0,1,2",
        help="bands or pages of the files that become the channels")  # fmt: skip


def add_run_options(
    parser: argparse.ArgumentParser, batch_size: str | None = None
) -> argparse._ArgumentGroup:
    """Options of a run; `batch_size` is the default in the help, None for no such option."""
    group = parser.add_argument_group("run options")
    if batch_size is not None:
        group.add_argument("--batch-size", type=positive, metavar="N",
            help=f"images per batch (default: {batch_size})")  # fmt: skip
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    group.add_argument("--precision", default="auto",
        choices=("auto", "float32", "bfloat16", "float16", "bfloat16-weights"),
        help="of the computation (default: auto, half precision on a CUDA GPU, else float32)",
    )  # fmt: skip
    group.add_argument("--workers", type=count, metavar="N",
        help="processes that decode images (default: one per CPU)")  # fmt: skip
    return group


def add_feature_options(group: argparse._ActionsContainer) -> None:
    """Which features of the model."""
    group.add_argument("--layers", type=layers, metavar="WHICH",
        help="last (default), last4, or block indices such as 3,7,11 (from the end: "
        "--layers=-4,-1)")  # fmt: skip
    group.add_argument("--pool", choices=("auto", "avg", "cls", "cls_avg", "map", "none"),
        help="avg: mean over patches; cls: class token; cls_avg: both; map: attention pooling; "
        "none: maps; auto (default): as the model's global_pool, avg for I-JEPA")  # fmt: skip


def feature_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_feature_options` as arguments of `FeatureExtractor`."""
    pool = None if args.pool == "none" else args.pool or "auto"
    return {"layers": args.layers or "last", "pool": pool}


def open_model(args: argparse.Namespace) -> Any:
    """The model of `add_model_options`, in evaluation mode."""
    from ..models.factory import create_named_model

    size = {"img_size": args.img_size} if args.img_size else {}
    weights = {"checkpoint": args.checkpoint, "network": args.network}
    return create_named_model(args.model, **weights, **size).eval()


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those of torchrun or Slurm."""
    from ..distributed import read_environment

    found = read_environment(os.environ)
    return found is None or found[0] == 0


def count(text: str) -> int:
    """A non-negative integer; argparse turns a ValueError into an error that names the option."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def positive(text: str) -> int:
    """A positive integer."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def size(text: str) -> int | tuple[int, int]:
    """Side of a square, or height and width, in pixels."""
    if "," not in text:
        return positive(text)
    height, width = map(positive, text.split(","))
    return height, width


def value_range(text: str) -> tuple[float, float]:
    """The lowest and the highest value."""
    low, high = map(float, text.split(","))
    if not low < high:
        raise ValueError
    return low, high


def bands(text: str) -> tuple[int, ...]:
    """Numbers of bands, from 0."""
    return tuple(map(count, text.split(",")))


def layers(text: str) -> str | list[int]:
    """Which blocks: last, last4 or their indices."""
    return text if text in ("last", "last4") else list(map(int, text.split(",")))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    return tuple(map(float, text.split(",")))
