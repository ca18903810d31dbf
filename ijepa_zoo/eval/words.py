"""How messages and notes say numbers, names and options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NAMED = 3  # examples in a sentence


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 epoch`, `2 epochs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def some(names: Sequence[str]) -> str:
    """The first of the names, and dots for the others."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def option(name: str) -> str:
    """An argument as Python and as the command line call it: `max_depth (--max-depth)`."""
    return f"{name} (--{name.replace('_', '-')})"


def data_name(data: Any) -> str:
    """What a person calls data: the last part of a folder's path; empty where they have no name."""
    if not isinstance(data, str | os.PathLike):
        return ""
    text = os.fspath(data)
    return Path(text).resolve().name if Path(text).exists() else str(text)


def other_epochs(epochs: int, usual: int, whose: str) -> list[str]:
    """A note where a training is not as long as its source has it; none where it is.

    Args:
        epochs: Epochs of this training.
        usual: Those of its source.
        whose: What the source is called.
    """
    if epochs == usual:
        return []
    return [f"{counted(epochs, 'epoch')} instead of the {whose}'s {usual}"]
