"""`ijepa-zoo eval`: the paper's probes, one command each."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, DistributedError, FetchError, RunError, SettingsError
from .status import DONE, FAILED, USAGE, complain, count, positive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..eval import Result

_WEIGHTS = ("checkpoint", "network", "img_size", "random")
_RUN = ("seed", "device", "workers", "precision")
_CHOICE = ("test", "baseline", "select_on_test")
_CLASSES = (
    "  classes: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val); or DIR/CLASS/*.jpg, of\n"
    "  which 20 % become the test set"
)
_SCENES = (
    "  scenes: CLEVR's folder, with DIR/images/{train,val} and DIR/scenes/*.json; or\n"
    "  scenes:TRAIN,TEST, which renders so many"
)
_PAIRS = (
    "  --task dense: NYU Depth v2, as DIR/nyu_depth_v2_labeled.mat and DIR/splits.mat or as a\n"
    "  copy with nyu_train.txt; or pairs of the same name, DIR/train/rgb/1.jpg and\n"
    "  DIR/train/depth/1.png, and DIR/test; or scenes:TRAIN,TEST"
)
_TRAINING = ("epochs", "batch_size", "micro", "grad_checkpointing")


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The commands below `eval`."""
    commands = parser.add_subparsers(required=True, metavar="PROBE")
    linear = _add_probe(commands, "linear", "linear heads on frozen features", _CLASSES,
        "--model MODEL --data photos --cached")  # fmt: skip
    linear.add_argument("--task", default="classes", help="imagenet1k, cifar100, cifar10, "
        "places205, inat18, or classes (default) for any labelled images; count, depth of "
        "scenes")  # fmt: skip
    _add_linear(linear)
    counting = _add_probe(commands, "count", "number of objects in CLEVR's scenes", _SCENES,
        "--model MODEL --data scenes:5000,1000 --cached")  # fmt: skip
    counting.set_defaults(task="count")
    _add_linear(counting)
    depth = _add_probe(commands, "depth", "distance of the nearest object; dense depth maps",
        f"{_SCENES}\n{_PAIRS}", "--task dense --model MODEL --data nyu")  # fmt: skip
    depth.add_argument("--task", choices=("clevr", "dense"), default="clevr",
        help="clevr (default): class of distance; dense: a depth for every pixel")  # fmt: skip
    _add_linear(depth)
    depth.add_argument("--max-depth", type=float, metavar="M", help="dense: farther does not count")
    depth.add_argument("--depth-scale", type=float, metavar="N", help="dense: units in a metre")
    depth.set_defaults(run=_depth)
    knn = _add_probe(commands, "knn", "nearest neighbours among frozen features", _CLASSES,
        "--model MODEL --data photos --baseline")  # fmt: skip
    knn.add_argument("--task", default="classes", help="as for linear; count, depth of scenes")
    _add_common(knn)
    _add_choice(knn)
    knn.set_defaults(run=_knn)
    finetune = _add_probe(commands, "finetune", "train all weights, the paper's full recipe",
        _CLASSES, "--model MODEL --data photos --epochs 20")  # fmt: skip
    finetune.add_argument("--task", default="classes", help="as for linear")
    _add_common(finetune)
    _add_training(finetune)
    finetune.set_defaults(run=_finetune)
    lowshot = _add_probe(commands, "lowshot", "few labels: frozen, or --finetune", _CLASSES,
        "--model MODEL --data photos --list one_percent.txt")  # fmt: skip
    lowshot.add_argument("--task", default="classes", help="as for linear")
    lowshot.add_argument("--finetune", action="store_true",
        help="train all weights by the paper's recipe; default: logistic regression")  # fmt: skip
    _add_common(lowshot).add_argument("--list", required=True, metavar="FILE",
        help="names of the training images, one a line, as ImageNet's 1 %% has them")  # fmt: skip
    _add_training(lowshot)
    lowshot.set_defaults(run=_lowshot)
    report = commands.add_parser("report", help="one table of several results")
    report.add_argument("results", nargs="+", metavar="RESULT", help="folders or result.json files")
    report.add_argument("--out", default="report.md", metavar="FILE", help="default: report.md")
    report.add_argument("--no-picture", action="store_true", help="the table alone, no PNG")
    report.set_defaults(run=_report)


def _add_probe(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    what: str,
    layout: str,
    example: str,
) -> argparse.ArgumentParser:
    """A command with the layout of its data and an example below its options."""
    return commands.add_parser(
        name,
        help=what,
        description=what.capitalize() + ".",
        epilog=f"layout of --data:\n{layout}\n\nexample:\n  ijepa-zoo eval {name} "
        + example.replace("MODEL", "vit_nano8_64_ijepa"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_common(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """What every probe takes; returns the group of those options that must be given."""
    required = parser.add_argument_group("required options")
    required.add_argument("--model", required=True, metavar="NAME",
        help="a model of `ijepa-zoo list`, a timm name, a folder or a pretraining run")  # fmt: skip
    required.add_argument("--data", required=True, metavar="DATA",
        help="folder, hf-dataset:NAME, ...; for count and depth also scenes:TRAIN,TEST, which "
        "renders so many scenes")  # fmt: skip
    add = parser.add_argument
    add("--out", default="results", metavar="DIR", help="of all evaluations (default: results)")
    add("--checkpoint", metavar="PATH", help="your own weights, or hf-hub:REPO")
    add("--network", choices=("target_encoder", "encoder"), help="default: the target encoder")
    add("--random", action="store_true", help="random weights, by the seed, in their place")
    add("--img-size", type=positive, metavar="N", help="default: the model's own image size")
    add("--seed", type=count, default=0, metavar="N", help="default: 0")
    add("--device", default="auto", help="auto (default), cpu, cuda, ...")
    add("--workers", type=count, metavar="N", help="processes that decode (default: one per CPU)")
    add("--precision", default="auto", help="of the encoder: float32, bfloat16, float16 or "
        "bfloat16-weights; auto (default) is bfloat16 on a GPU, float32 elsewhere",
        choices=("auto", "float32", "bfloat16", "float16", "bfloat16-weights"))  # fmt: skip
    add("--quiet", action="store_true", help="no progress")
    return required


def _add_test(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--test", metavar="DATA", help="the test images, if not in --data")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    _add_test(parser)
    add = parser.add_argument
    add("--baseline", action="store_true", help="also random weights and raw pixels")
    add("--select-on-test", action="store_true",
        help="choose on the test set, as much of the literature does")  # fmt: skip


def _add_linear(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    _add_choice(parser)
    add = parser.add_argument
    add("--cached", action="store_true", help="encode each image once, then train in minutes")
    add("--epochs", type=positive, metavar="N", help="default: the protocol's")
    add("--batch-size", type=positive, metavar="N",
        help="default: the protocol's; learning rates grow with it")  # fmt: skip
    parser.set_defaults(run=_linear)


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_test(parser)
    add = parser.add_argument
    add("--epochs", type=positive, metavar="N", help="default: the recipe's")
    add("--batch-size", type=positive, metavar="N",
        help="default: the recipe's; learning rates grow with it")  # fmt: skip
    add("--micro", type=positive, metavar="N", help="images of a pass of a process")
    add("--grad-checkpointing", action="store_true", help="less memory, slower")


def _linear(args: argparse.Namespace) -> int:
    from ..eval import evaluate_linear

    names = (*_CHOICE, "cached", "epochs", "batch_size", *_RUN, *_WEIGHTS)
    return _evaluated(
        args, lambda: evaluate_linear(args.task, *_places(args), **_given(args, names))
    )


def _knn(args: argparse.Namespace) -> int:
    from ..eval import evaluate_knn

    names = (*_CHOICE, *_RUN, *_WEIGHTS)
    return _evaluated(args, lambda: evaluate_knn(args.task, *_places(args), **_given(args, names)))


def _depth(args: argparse.Namespace) -> int:
    if args.task == "dense":
        return _evaluated(args, lambda: _dense(args))
    named = {"--max-depth": args.max_depth, "--depth-scale": args.depth_scale}
    given = [name for name, value in named.items() if value is not None]
    if given:
        verb = "is" if len(given) == 1 else "are"
        return complain(f"{' and '.join(given)} {verb} for depth maps: use --task dense", USAGE)
    args.task = "depth"
    return _linear(args)


def _dense(args: argparse.Namespace) -> "Result":
    from ..eval import evaluate_dense_depth

    if args.test:
        raise SettingsError("--test holds for classes: DATA holds training and test pairs")
    own = ("cached", "baseline", "select_on_test", "epochs", "batch_size")
    names = (*own, "max_depth", "depth_scale", *_RUN, *_WEIGHTS)
    return evaluate_dense_depth(*_places(args), **_given(args, names))


def _finetune(args: argparse.Namespace) -> int:
    from ..eval import evaluate_finetune

    names = ("test", *_TRAINING, *_RUN, *_WEIGHTS)
    return _evaluated(
        args, lambda: evaluate_finetune(args.task, *_places(args), **_given(args, names))
    )


def _lowshot(args: argparse.Namespace) -> int:
    from ..eval import evaluate_lowshot

    names = ("test", "finetune", *_TRAINING, *_RUN, *_WEIGHTS)
    model, data, out = _places(args)
    return _evaluated(
        args,
        lambda: evaluate_lowshot(args.task, model, data, args.list, out, **_given(args, names)),
    )


def _places(args: argparse.Namespace) -> tuple[str, str, str]:
    return args.model, args.data, args.out


def _given(args: argparse.Namespace, names: "Iterable[str]") -> dict[str, Any]:
    return {**{name: getattr(args, name) for name in names}, "progress": not args.quiet}


def _evaluated(args: argparse.Namespace, evaluate: "Callable[[], Result]") -> int:
    """Evaluate and show the result, or say what was wrong."""
    from torch import OutOfMemoryError

    from ..rendezvous import read_place

    try:
        result = evaluate()
    except OutOfMemoryError as error:
        return complain(f"{error}\nTry a smaller --img-size or --precision bfloat16", FAILED)
    except (RunError, DistributedError, FloatingPointError) as error:
        return complain(error, FAILED)
    except (CheckpointError, FetchError, OSError) as error:
        return complain(error, FAILED)
    except (TypeError, ValueError, ImportError) as error:
        return complain(error, USAGE)
    if read_place(os.environ).rank == 0:
        print(result.table())
        print(f"all figures: {os.path.join(args.out, 'results.csv')} and the files that it names")
    return DONE


def _report(args: argparse.Namespace) -> int:
    from ..eval import write_report

    try:
        written = write_report(args.results, args.out, picture=not args.no_picture)
    except (ImportError, OSError, ValueError) as error:
        return complain(error, FAILED)
    print(*(path for path in written if path is not None), sep="\n")
    return DONE
