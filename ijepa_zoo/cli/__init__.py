"""The command `ijepa-zoo`. Every subcommand calls public functions of the package.

Nothing here imports torch before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import UserError

FAILED, INTERRUPTED = 1, 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COMMANDS = {  # module here, help
    "list": ("models", "models and their weights"),
    "features": ("images", "features of images into a file"),
    "predict": ("images", "classes of images into a table"),
    "pretrain": ("pretrain", "pretrain on your own images"),
    "export": ("models", "weights for other libraries, or a model for servers"),
    "plot": ("pretrain", "curves and masks of a pretraining run, a PNG"),
    "eval": ("eval", "the paper's probes on your data"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit status: 0 done, 1 error, 2 wrong usage, 3 done but some images failed, 75 stopped by
        SIGTERM or SIGUSR1 and saved, 130 interrupted.

    Raises:
        Exception: Any error but a `UserError`, a full disk and a wrong path, which are the user's.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    logging.getLogger("ijepa_zoo").setLevel(logging.INFO)  # such as prefixes that are removed
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters of file names
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return args.run(args)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or args.interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (UserError, OSError) as error:
        # of the system, a wrong path or a full disk
        if not (isinstance(error, UserError) or error.filename or error.errno in _DISK_FULL):
            raise
        if args.debug:
            traceback.print_exc()
        print(f"ijepa-zoo: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", FAILED)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse; the recipe and settings of `pretrain` may be before, between and after its options."""
    parser = _parser(next((word for word in argv if not word.startswith("-")), None))
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words += rest
    return args


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of all commands; only the given one has its options."""
    parser = argparse.ArgumentParser(prog="ijepa-zoo", description="I-JEPA encoders for timm code")
    parser.add_argument("--version", action="version", version=__version__)
    help_debug = "print the traceback of every error"
    parser.add_argument("--debug", action="store_true", help=help_debug)
    parser.set_defaults(interrupted="interrupted")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, purpose) in _COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=purpose)
            continue
        for own in getattr(import_module(f".{module}", __name__), f"add_{name}")(commands):
            own.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help=help_debug
            )
    return parser
