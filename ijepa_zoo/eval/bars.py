"""Progress bars of evaluations."""

from __future__ import annotations

from typing import Any


def progress_bar(show: bool, total: int, what: str, unit: str = "img", done: int = 0) -> Any:
    """A bar with rate and time left, where standard error is a terminal: pipes stay readable.

    Args:
        show: False for no bar.
        total: What is to be done, in units.
        what: What the bar calls it.
        unit: The unit.
        done: What was done before.
    """
    from tqdm import tqdm

    hide = None if show else True  # None leaves it to tqdm, which asks for a terminal
    return tqdm(total=total, initial=done, desc=what, unit=unit, smoothing=0.05, disable=hide)
