"""How messages and notes say numbers, names and options."""

from __future__ import annotations

from collections.abc import Sequence

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


def other_epochs(epochs: int, usual: int, whose: str) -> list[str]:
    """A note where a training is not as long as its source has it; none where it is.

    Args:
        epochs: Epochs of this training.
        usual: Those of its source.
        whose: What the source is called.
    """
    if epochs == usual:
        return []
    return [f"{counted(epochs, 'epoch')} in the place of the {whose}'s {usual}"]
