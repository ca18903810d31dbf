"""What all commands share: exit statuses, complaints and the types of arguments."""

import argparse
import sys

DONE, FAILED, USAGE, SOME_IMAGES_FAILED, STOPPED, INTERRUPTED = 0, 1, 2, 3, 75, 130


def complain(error: object, status: int) -> int:
    """Say what was wrong; returns the exit status."""
    print(f"ijepa-zoo: error: {error}", file=sys.stderr)
    return status


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not count(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def layers(text: str) -> str | list[int]:
    """Which blocks: last, last4 or their indices."""
    if text in ("last", "last4"):
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither last, last4 nor block indices such as 3,7,11"
        ) from None
