"""The command ``ijepa-zoo``: thin, every subcommand calls the package's own functions."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .eval import add_eval
from .export import add_export
from .features import add_features
from .pretrain import add_plot, add_pretrain
from .status import FAILED, INTERRUPTED, complain
from .weights import add_convert, add_list


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit status: 0 done, 1 error, 2 wrong usage, 3 done but some images failed, 75 stopped by
        SIGTERM or SIGUSR1 and saved, 130 interrupted.
    """
    args = _parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may be beyond its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = args.run(args)
        return status
    except KeyboardInterrupt as stop:
        what = str(stop) or "interrupted; the same command goes on where it was"
        print(f"\n{what}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # of our own output: a full disk
        return complain(error, FAILED)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; words of `pretrain` may stand before, between and after its options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ijepa-zoo", description="I-JEPA encoders for timm code")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_list(commands.add_parser("list", help="models and their weights"))
    add_features(
        commands.add_parser(
            "features",
            help="features of images into a file",
            description="Extract features of images into FILE, with an index beside it. Images "
            "that cannot be read are listed and the rest goes on. The same command after an "
            "interruption goes on where it was. torchrun -m ijepa_zoo.cli features ... shares the "
            "work. Exit status: 0 done, 1 error, 2 wrong usage, 3 done but some images failed.",
        )
    )
    add_convert(
        commands.add_parser(
            "convert",
            help="weights into the layout of another library",
            description="Copy weights into a folder that another library loads without this "
            "package. Tensors are copied as they are. official needs all three networks.",
        )
    )
    add_pretrain(
        commands.add_parser(
            "pretrain",
            help="pretrain on your own images",
            description="Pretrain without labels. The same command goes on after an interruption. "
            "torchrun --nproc_per_node N -m ijepa_zoo.cli pretrain ... shares the work. Exit "
            "status: 0 done, 1 error, 2 wrong usage, 75 stopped by SIGTERM or SIGUSR1 and saved, "
            "130 stopped by Ctrl-C and saved.",
        )
    )
    add_export(
        commands.add_parser("export", help="a run's weights into a folder, or a model for servers")
    )
    add_plot(commands.add_parser("plot", help="curves and masks of a pretraining run, a PNG"))
    add_eval(
        commands.add_parser(
            "eval",
            help="the paper's probes on your data",
            description="Measure a frozen encoder with the paper's probes. The same command after "
            "an interruption goes on at the last epoch. torchrun --nproc-per-node N -m "
            "ijepa_zoo.cli eval ... shares the work. Exit status: 0 done, 1 error, 2 wrong usage.",
        )
    )
    return parser


def _version() -> str:
    from .. import __version__

    return __version__
