"""`ijepa-zoo bench`."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .status import DONE, FAILED, INTERRUPTED, USAGE, complain, count, positive

if TYPE_CHECKING:
    from ..bench import BenchResult


_PRECISIONS = ("fp32", "bf16", "fp8")
_LEAST_ROUNDS = 3  # as in `bench.timing`, whose import would load torch for --help


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench`."""
    kinds = parser.add_subparsers(required=True, metavar="BENCH", dest="bench")
    for name, kind in _KINDS.items():
        own = kinds.add_parser(name, help=kind.what, description=f"Measure {kind.what}.")
        kind.add_arguments(own)
        _add_shared(own, kind)
        own.set_defaults(run=_bench)


@dataclass(frozen=True)
class _Kind:
    """What is measured, its own arguments, the contenders, and for how long by default."""

    what: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    others: tuple[str, ...] = ()
    seconds: float = 60.0
    rounds: int = 30
    threads: int | None = None


def _add_shared(parser: argparse.ArgumentParser, kind: _Kind) -> None:
    """What every bench takes; it stands last in the help."""
    add = parser.add_argument
    if kind.others:
        add("--vs", nargs="+", choices=kind.others, default=(), metavar="|".join(kind.others),
            help="take turns with others, on the same inputs")  # fmt: skip
    if "published" in kind.others:
        add("--published-path", type=Path, metavar="DIR", help="clone of the published code")
    threads = "torch's choice" if kind.threads is None else kind.threads
    add("--threads", type=positive, default=kind.threads, metavar="N",
        help=f"CPU threads (default: {threads})")  # fmt: skip
    add("--seconds", type=_positive_number, default=kind.seconds, metavar="S",
        help="time for the rounds; set-up and agreement checks come on top "
        f"(default: {kind.seconds:g})")  # fmt: skip
    add("--rounds", type=_rounds, default=kind.rounds, metavar="N",
        help=f"most rounds, at least {_LEAST_ROUNDS} (default: {kind.rounds})")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="default: bench-BENCH-DATE.json here")
    add("--quiet", action="store_true", help="no progress bar")


def _add_step(parser: argparse.ArgumentParser, model: str) -> None:
    """What a training step is made of."""
    add = parser.add_argument
    _add_model(parser, model)
    add("--img-size", type=positive, metavar="N", help="default: the model's own image size")
    add("--batch-size", type=positive, default=16, metavar="N", help="images of a step (16)")


def _train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_step(parser, "vit_tiny16_ijepa")
    add("--precision", choices=_PRECISIONS, default="fp32",
        help="ours (default fp32); --vs bf16 compares with ours in bf16")  # fmt: skip
    add("--compile", action="store_true", help="compile the blocks (ours)")
    add("--predictor-context", choices=("repeated", "shared"),
        help="shared: a cheaper predictor, not the paper's")  # fmt: skip
    add("--published-precision", choices=("fp32", "bf16"), default="fp32",
        help="fp32 as released (default), or bf16 for its autocast")  # fmt: skip


def _features(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model(parser, "vit_base16_ijepa")
    _add_photographs(parser, 500)
    add("--precision", choices=("float32", "bfloat16", "float16", "bfloat16-weights"),
        default="float32", help="ours, as in `ijepa-zoo features`")  # fmt: skip
    add("--other-precision", choices=("float32", "bfloat16", "float16"), default="float32",
        help="the others', by autocast")  # fmt: skip
    add("--batch-size", type=positive, default=32, metavar="N")
    add("--workers", type=count, metavar="N", help="processes that decode, ours and timm's")
    add("--compile", action="store_true", help="compile the models of all")


def _load(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "vit_huge14_ijepa", device=False)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights in memory; the files are float32")  # fmt: skip


def _masks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch-size", type=positive, default=128, metavar="N", help="images (128)")
    add("--grid", type=positive, default=16, metavar="N", help="patches of a side (16)")
    add("--mode", choices=("published", "unbiased"), default="published")


def _data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_photographs(parser, 64)
    add("--batch-size", type=positive, default=16, metavar="N", help="images (16)")
    add("--img-size", type=positive, default=224, metavar="N", help="side of the crops (224)")


def _eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model(parser, "vit_base16_ijepa")
    add("--task", default="cifar100", help="whose protocol gives the heads (cifar100)")
    add("--classes", type=positive, metavar="N", help="default: the task's")
    add("--batch-size", type=positive, metavar="N", help="of the heads (default: the protocol's)")
    add("--images", type=positive, default=32, metavar="N", help="of the encoder's pass (32)")
    add("--precision", choices=("auto", "float32", "bfloat16", "float16", "bfloat16-weights"),
        default="auto", help="of the encoder (auto: bfloat16 on a GPU)")  # fmt: skip


def _scaling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = ("vit_tiny16_ijepa", "vit_small16_ijepa", "vit_base16_ijepa")
    add("--models", nargs="+", default=models, metavar="NAME", help="default: tiny, small, base")
    for option, values in (("img-sizes", (112, 160, 224)), ("batch-sizes", (4, 8, 16))):
        add(f"--{option}", nargs="+", type=positive, default=values, metavar="N",
            help=f"default: {' '.join(map(str, values))}")  # fmt: skip
    add("--ranks", nargs="+", type=positive, default=(1, 2, 4), metavar="N",
        help="processes on this machine (default: 1 2 4)")  # fmt: skip
    add("--precision", choices=_PRECISIONS, default="fp32", help="default fp32")
    add("--device", default="auto", help="auto (default), cpu, cuda, ...")
    add("--plot", type=Path, metavar="FILE", help="draw a .png file")
    many = parser.add_argument_group("model of many GPUs", "computed, not measured").add_argument
    many("--gpu-model", default="vit_huge14_ijepa", metavar="NAME", help="vit_huge14_ijepa")
    many("--gpu-batch-size", type=positive, default=128, metavar="N",
        help="images of each in weak scaling, and of the step of --step-ms (128)")  # fmt: skip
    many("--gpus", nargs="+", type=positive, default=(8, 16, 32, 64, 128, 256), metavar="N",
        help="default: 8 16 32 64 128 256")  # fmt: skip
    many("--step-ms", type=_positive_number, metavar="MS",
        help="step on one GPU, from `bench train` (default: roofline of an H200)")  # fmt: skip
    many("--bandwidth-gb-s", type=_positive_number, default=100.0, metavar="GB/S",
        help="bus bandwidth as nccl-tests reports it (100, a guess)")  # fmt: skip


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_step(parser, "vit_small16_ijepa")
    add("--precision", choices=_PRECISIONS, default="fp32", help="default fp32")
    add("--folder", type=Path, metavar="DIR",
        help="on the disk to measure (default: the system's temporary folder)")  # fmt: skip


def _add_model(parser: argparse.ArgumentParser, default: str, device: bool = True) -> None:
    parser.add_argument("--model", default=default, metavar="NAME", help=f"default: {default}")
    if device:
        parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")


def _add_photographs(parser: argparse.ArgumentParser, images: int) -> None:
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="your photographs (default: made up ones)")
    add("--images", type=positive, default=images, metavar="N", help=f"made up ones ({images})")


_PUBLISHED, _LIBRARIES = ("published",), ("timm", "transformers")
_KINDS = {
    "train": _Kind("a training step, without loading images", _train, (*_PUBLISHED, "bf16")),
    "scaling": _Kind(
        "training steps of growing models, images, batches and numbers of processes",
        *(_scaling, (), 60.0, 10),
    ),
    "features": _Kind(
        "features of a folder of photographs, and of pixels in memory",
        *(_features, _LIBRARIES, 120.0, 10),
    ),
    "load": _Kind("loading a model from a local file", _load, _LIBRARIES, 120.0, 5),
    "masks": _Kind("sampling the masks of a batch", _masks, _PUBLISHED),
    "data": _Kind("JPEG files to training crops, in one process", _data, _PUBLISHED, threads=1),
    "checkpoint": _Kind(
        "training steps while a checkpoint is saved in the background",
        *(_checkpoint, (), 120.0, 10),
    ),
    "eval": _Kind("the heads of a linear probe beside the encoder's pass", _eval),
}


def _bench(args: argparse.Namespace) -> int:
    from torch import OutOfMemoryError

    from ..bench import DisagreementError
    from ..bench.fresh import FreshProcessError
    from ..rendezvous import ProcessError
    from ..weights.layouts import CheckpointError

    try:
        _refuse_out(args.out)
        result = _run(args)
        print(result)
        print(f"written: {result.save(args.out)}")
        return DONE
    except KeyboardInterrupt:
        print("\ninterrupted; a bench keeps nothing", file=sys.stderr)
        return INTERRUPTED
    except (DisagreementError, FreshProcessError, CheckpointError, OSError) as error:
        return complain(error, FAILED)
    except OutOfMemoryError as error:
        return complain(f"{error}\nTry a smaller --batch-size", FAILED)
    except (ProcessError, ValueError, ImportError) as error:
        return complain(error, USAGE)


def _run(args: argparse.Namespace) -> "BenchResult":
    from .. import bench

    own = {"bench", "run", "out", "quiet"}
    words: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in own}
    result: BenchResult = getattr(bench, args.bench)(**words, progress=not args.quiet)
    return result


def _refuse_out(out: Path | None) -> None:
    """Refuse a result file that cannot be written, before anything is measured."""
    folder = Path(".") if out is None else out.parent
    words = "the current folder" if out is None else f"--out {out}: {folder}"
    if not folder.is_dir():
        raise ValueError(f"{words} is no folder: make it first, or name a file in another one")
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it, such as {out}/bench.json")
    if out is not None and out.exists() and not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: name another file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{words} cannot be written in: name a file elsewhere, --out FILE")


def _rounds(text: str) -> int:
    if count(text) < _LEAST_ROUNDS:
        raise argparse.ArgumentTypeError(f"must be at least {_LEAST_ROUNDS}")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not number > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return number
