"""`ijepa-zoo pretrain` and `ijepa-zoo plot`."""

import argparse
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

from ..errors import (
    CheckpointError,
    DistributedError,
    FetchError,
    ImageError,
    RunError,
    SettingsError,
)
from .status import DONE, FAILED, INTERRUPTED, STOPPED, USAGE, complain, count

if TYPE_CHECKING:
    from ..train import PretrainConfig

_CHANGE = re.compile(r"(seed|[a-z]+\.[a-z_]+)=")


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    """Arguments of `pretrain`."""
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="RECIPE | KEY=VALUE",
        help="a recipe's name (see --recipes) and changes to it: optim.lr=5e-4 machine.workers=4",
    )
    add("--config", metavar="FILE", help="your own YAML, or one of the published code, as recipe")
    add("--data", nargs="+", metavar="DATA", help="folders, tar shards, lists, .npy, "
        "hf-dataset:NAME or MODULE:ATTRIBUTE")  # fmt: skip
    add("--out", metavar="RUN", help="the run's folder; an unfinished run in it is continued")
    add("--init", metavar="WEIGHTS", help="NAME.TAG or a checkpoint of all three networks")
    add("--resume-optimizer", action="store_true", help="with --init: its optimizer state too")
    add("--resume-from", type=_checkpoint, default="latest", metavar="WHICH",
        help="latest (default), previous or a step")  # fmt: skip
    add("--skip-nonfinite", type=count, default=0, metavar="N",
        help="leave out up to N steps whose loss is not finite (default 0)")  # fmt: skip
    add("--dry-run", action="store_true", help="two steps with the largest masks, then a report")
    add("--recipes", action="store_true", help="list the recipes")
    add("--settings", action="store_true", help="all settings of the recipe, and what they mean")
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_pretrain)


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Arguments of `plot`."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", help="the folder of a pretraining run")
    add("--out", metavar="FILE", help="default: RUN/plot.png")
    parser.set_defaults(run=_plot)


def _pretrain(args: argparse.Namespace) -> int:
    from ..train import recipe_table

    if args.recipes:
        for name, what in recipe_table():
            print(f"{name:20} {what}")
        return DONE
    from torch import OutOfMemoryError

    from ..train import Interrupted, NonFiniteLossError

    try:
        return _run_pretrain(args)
    except KeyboardInterrupt as stop:
        if args.dry_run:
            print("\ninterrupted; a dry run keeps nothing", file=sys.stderr)
            return INTERRUPTED
        if not isinstance(stop, Interrupted):
            raise
        print(f"ijepa-zoo: {stop}", file=sys.stderr)
        return INTERRUPTED if stop.signal == signal.SIGINT else STOPPED
    except OutOfMemoryError as error:
        hint = "use a smaller machine.micro_batch_size, or machine.activation_checkpointing=true"
        return complain(f"{error}\nTry {hint}", FAILED)
    except (ImageError, NonFiniteLossError, DistributedError, RunError) as error:
        return complain(error, FAILED)
    except (CheckpointError, FetchError, OSError) as error:
        return complain(error, FAILED)
    except (ValueError, ImportError) as error:
        return complain(error, USAGE)


def _run_pretrain(args: argparse.Namespace) -> int:
    from ..rendezvous import read_place
    from ..train import dry_run, explained, pretrain

    config = _config(args)
    if args.settings:
        print(explained(config), end="")
        return DONE
    data, out = _places(args)
    if args.dry_run:
        report = dry_run(config, data, init=args.init)
        if report is not None:
            print(report)
        return DONE
    folder = pretrain(
        config,
        data,
        out,
        init=args.init,
        resume_optimizer=args.resume_optimizer,
        resume_from=args.resume_from,
        skip_nonfinite=args.skip_nonfinite,
        progress=not args.quiet,
    )
    if read_place(os.environ).rank == 0:
        print(f"done: {folder}")
        print(f"curves: ijepa-zoo plot {out}")
        print(f"features: ijepa-zoo features IMAGES --model local-dir:{folder} --out FILE")
    return DONE


def _config(args: argparse.Namespace) -> "PretrainConfig":
    from ..rendezvous import read_place
    from ..train import load_config
    from ..weights.catalog import checkpoints

    if args.data:  # --data takes all words behind it
        behind = [word for word in args.data if _CHANGE.match(word) and not os.path.exists(word)]
        args.words += behind
        args.data = [word for word in args.data if word not in behind]
    names = [word for word in args.words if "=" not in word]
    changes = [word for word in args.words if "=" in word]
    released = [record for record in checkpoints() if record.name == args.init]
    if released:  # weights with a name bring their model
        changes.insert(0, f"model.name={released[0].model}")
    if len(names) + bool(args.config) != 1:
        given = ", ".join([*names, *([args.config] if args.config else [])]) or "none"
        raise SettingsError(
            f"name one recipe, or one file with --config (given: {given}); "
            "`ijepa-zoo pretrain --recipes` lists the recipes"
        )
    return load_config(args.config or names[0], changes, read_place(os.environ).world)


def _places(args: argparse.Namespace) -> tuple[list[str], str]:
    """Images and run folder; a file of the published code names its own."""
    from ..train.settings import published_places

    own = published_places(args.config) if args.config else None
    data = args.data or ([own.data] if own else None)
    out = args.out or (own.out if own else None)
    if not data:
        raise SettingsError("name the images: --data FOLDER (or shards, a list, ...)")
    if not (out or args.dry_run):
        raise SettingsError("name a folder for the run: --out runs/NAME")
    for option, given, name in (("--data", args.data, data[0]), ("--out", args.out, out or "")):
        if not given and name.startswith("$"):
            raise SettingsError(f"{args.config} has no folder yet but {name}: give it by {option}")
    return data, out or ""


def _plot(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..train import plot_run

    try:
        print(plot_run(Path(args.run_folder), Path(args.out) if args.out else None))
    except (RunError, ImportError, OSError, ValueError) as error:
        return complain(error, FAILED)
    return DONE


def _checkpoint(text: str) -> str | int:
    if text in ("latest", "previous"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither latest, previous nor a step")
    return int(text)
