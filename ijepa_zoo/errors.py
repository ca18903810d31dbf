"""Errors that a user can fix. Their text is one sentence: what was wrong, and what to do."""

from collections.abc import Iterable


class UserError(Exception):
    """Base class; the command line prints the text and ends with `exit_code`."""

    exit_code = 1


class SettingsError(UserError, ValueError):
    """An argument, option or setting with a wrong value."""

    exit_code = 2


class DataError(UserError, ValueError):
    """Images, labels or data sets that do not exist or cannot be used."""


class ImageError(DataError):
    """One image that cannot be decoded; the text is the reason, without the image's name."""


class CheckpointError(UserError, RuntimeError):
    """Weights or a training checkpoint that do not exist, are damaged or do not fit."""


class FetchError(UserError, RuntimeError):
    """A download that failed."""


class RunError(UserError, RuntimeError):
    """An output that is in use, holds other results, or work that cannot be finished."""


class DistributedError(UserError, RuntimeError):
    """Processes or devices that do not fit together."""


class MissingPackageError(UserError, ImportError):
    """An optional package that is not installed."""


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names in alphabetical order, for a message."""
    listed = sorted(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def option(name: str) -> str:
    """Name of an argument in Python and on the command line: `max_depth (--max-depth)`."""
    return f"{name} (--{name.replace('_', '-')})"
