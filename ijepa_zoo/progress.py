"""Progress: a bar in a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS = 30.0  # between two lines


class _Lines:
    """A stream on which a bar is written as lines instead of over itself."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(
    show: bool, total: int, description: str, unit: str = "image", initial: int = 0
) -> Any:
    """tqdm's bar with rate and time left; where standard error is not a terminal, lines."""
    if not show or sys.stderr.isatty():
        return tqdm(
            total=total, initial=initial, desc=description, unit=unit, smoothing=0.05,
            disable=not show,
        )  # fmt: skip
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, file=_Lines(sys.stderr),
        mininterval=_SECONDS, maxinterval=_SECONDS, delay=_SECONDS, leave=False,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}",
    )  # fmt: skip


def skip(bar: Any, done: int) -> None:
    """Count what was done before, which is not part of the rate."""
    if not bar.disable:
        bar.initial += done
        bar.update(done)
