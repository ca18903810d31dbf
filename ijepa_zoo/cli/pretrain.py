"""`ijepa-zoo pretrain` and `ijepa-zoo plot`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path

from ..distributed import read_environment
from ..errors import SettingsError
from ..train import (
    Interrupted,
    PretrainConfig,
    describe_config,
    dry_run,
    load_config,
    plot_run,
    pretrain,
    recipe_table,
)
from ..weights.registry import checkpoints
from .options import RESUME, Commands, is_main_process

STOPPED, INTERRUPTED = 75, 130
_CHANGE = re.compile(r"(seed|[a-z]+\.[a-z_]+)=")


def add_pretrain(commands: Commands) -> list[argparse.ArgumentParser]:
    """`pretrain`."""
    parser = commands.add_parser(
        "pretrain",
        help="pretrain on your own images",
        description="Pretrain without labels. The same command resumes after an interruption. "
        "Several processes: torchrun --nproc-per-node N -m ijepa_zoo pretrain ... Exit status "
        "75: stopped by SIGTERM or SIGUSR1 and saved; 130: stopped by Ctrl-C and saved.",
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="RECIPE | KEY=VALUE",
        help="a recipe and changes of its settings: optim.lr=5e-4 data.value_range=0,4095",
    )  # fmt: skip
    add("--config", metavar="FILE", help="instead of a recipe: a YAML file of settings")
    add("--data", nargs="+", metavar="DATA",
        help="folders, tar shards, lists, .npy, hfds/NAME or MODULE:ATTRIBUTE")  # fmt: skip
    add("--out", metavar="RUN", help="folder of the run; an unfinished run in it is resumed")
    add("--init", metavar="WEIGHTS",
        help="start from NAME.TAG, a checkpoint, hf-hub:REPO or a ViT of timm; an encoder alone "
        "gets a new predictor")  # fmt: skip
    add("--resume-optimizer", action="store_true",
        help="with --init RUN, or --init RUN/checkpoints/STEP: continue that run in a new folder, "
        "with its optimizer and step")  # fmt: skip
    add("--resume-from", type=_checkpoint, default="latest", metavar="WHICH",
        help="latest (default), previous or a step")  # fmt: skip
    add("--dry-run", action="store_true", help="run a few steps; print memory, speed and duration")
    add("--recipes", action="store_true", help="list the recipes")
    add("--settings", action="store_true", help="print all settings of the recipe")
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_pretrain, interrupted=RESUME)
    return [parser]


def add_plot(commands: Commands) -> list[argparse.ArgumentParser]:
    """`plot`."""
    parser = commands.add_parser("plot", help="curves and masks of a pretraining run, a PNG")
    parser.add_argument("run_folder", metavar="RUN", help="folder of a pretraining run")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/plot.png")
    parser.set_defaults(run=_plot)
    return [parser]


def _pretrain(args: argparse.Namespace) -> int:
    if args.recipes:
        print("\n".join(f"{name:20} {purpose}" for name, purpose in recipe_table()))
        return 0
    config = _config(args)
    if args.settings:
        print(describe_config(config), end="")
        return 0
    data, out = args.data, args.out
    if not data:
        raise SettingsError("name the images: --data FOLDER")
    if not out and not args.dry_run:
        raise SettingsError("name a folder for the run: --out runs/NAME")
    if args.dry_run:
        args.interrupted = "interrupted"  # there is nothing to resume
        init = None if args.resume_optimizer else args.init  # of a branch the sizes are the same
        if report := dry_run(config, data, init=init):
            print(report)
        return 0
    try:
        folder = pretrain(
            config,
            data,
            out,
            init=args.init,
            resume_optimizer=args.resume_optimizer,
            resume_from=args.resume_from,
            progress=not args.quiet,
        )
    except Interrupted as stop:
        print(f"ijepa-zoo: {stop}", file=sys.stderr)
        return INTERRUPTED if stop.signal == signal.SIGINT else STOPPED
    if is_main_process():
        print(f"done: {folder}")
        print(f"curves: ijepa-zoo plot {out}")
        print(f"features: ijepa-zoo features IMAGES --model local-dir:{folder} --out FILE")
    return 0


def _config(args: argparse.Namespace) -> PretrainConfig:
    # --data also takes the changes after it
    behind = [w for w in args.data or () if _CHANGE.match(w) and not os.path.exists(w)]
    args.data = [word for word in args.data or () if word not in behind]
    words = [*args.words, *behind]
    changes = [word for word in words if "=" in word]
    # released weights imply their model
    released = [f"model.name={c.model}" for c in checkpoints() if c.name == args.init]
    sources = [word for word in words if "=" not in word]
    if args.config:
        sources.append(args.config)
    if len(sources) != 1:
        raise SettingsError(
            f"name one recipe, or one file with --config (given: {', '.join(sources) or 'none'}); "
            "`ijepa-zoo pretrain --recipes` lists the recipes"
        )
    environment = read_environment(os.environ)
    return load_config(sources[0], [*released, *changes], environment[1] if environment else 1)


def _plot(args: argparse.Namespace) -> int:
    print(plot_run(Path(args.run_folder), Path(args.out) if args.out else None))
    return 0


def _checkpoint(text: str) -> str | int:
    if text in ("latest", "previous"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not latest, previous or a step")
    return int(text)
