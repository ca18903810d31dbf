"""Progress of long work: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, TextIO

_SECONDS = 30.0  # between two lines


def progress_bar(show: bool, total: int, what: str, unit: str = "img", done: int = 0) -> Any:
    """A bar with rate and time left; lines with the same where standard error is no terminal.

    Args:
        show: False for neither.
        total: What is to be done, in units; 0 where it is not known.
        what: What the bar calls it.
        unit: The unit.
        done: What was done before.
    """
    from tqdm import tqdm

    if show and not sys.stderr.isatty():
        return ProgressLines(total, what, unit, done)
    return tqdm(total=total, initial=done, desc=what, unit=unit, smoothing=0.05, disable=not show)


def skip(bar: Any, done: int) -> None:
    """Count what was done before, which is of no rate.

    Args:
        bar: See `progress_bar`.
        done: How much, in units.
    """
    if isinstance(bar, ProgressLines):
        bar.skip(done)
    else:
        bar.update(done)


class ProgressLines:
    """Count, rate and time left as a line of their own, at most every 30 seconds.

    Work that ends sooner prints nothing, so that pipes and log files stay readable. It has those
    methods of tqdm's bars that this package calls.

    Args:
        total: What is to be done, in units; 0 where it is not known.
        what: What the lines call it.
        unit: The unit.
        done: What was done before.
        clock: Seconds.
        file: Where lines go; default: standard error.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str = "img",
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        file: TextIO | None = None,
    ) -> None:
        self.total, self.what, self.unit, self.n = total, what, unit, done
        self._first, self._clock, self._file = done, clock, file or sys.stderr
        self._started = self._shown = clock()
        self._more = ""

    def update(self, count: int = 1) -> None:
        """Count, and print a line where the last one is old enough."""
        self.n += count
        now = self._clock()
        if now - self._shown >= _SECONDS:
            self._shown = now
            print(self._line(now - self._started), file=self._file, flush=True)

    def skip(self, done: int) -> None:
        """Count what was done before."""
        self.n += done
        self._first += done

    def set_description(self, what: str) -> None:
        """What the next lines call the work."""
        self.what = what

    def set_postfix(
        self, shown: Mapping[str, str] | None = None, refresh: bool = True, **values: str
    ) -> None:
        """What the next lines say at their end."""
        named = {**(shown or {}), **values}
        self._more = "".join(f", {name} {value}" for name, value in named.items())

    def _line(self, seconds: float) -> str:
        rate = (self.n - self._first) / seconds
        line = f"{self.what}: {self.n:,}"
        if self.total:
            line += f" of {self.total:,}"
        line += f" {self.unit}, {rate:.3g} {self.unit}/s"
        if self.total > self.n and rate > 0:
            line += f", {_time((self.total - self.n) / rate)} left"
        return line + self._more

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left to close."""


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
