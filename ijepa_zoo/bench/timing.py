"""Timing several ways to do the same work so that the comparison survives a busy machine.

The ways take turns, the order alternates from round to round, and the ratio is taken within each
round: what slows the machine down for a while then slows both sides of a pair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from ..progress import progress_bar

OURS = "ijepa_zoo"
Work = Callable[[], object]
_LEAST_ROUNDS = 3  # quartiles and a range of ratios need some


@dataclass(frozen=True)
class Summary:
    """What a list of measurements was like.

    Attributes:
        median: The middle one.
        quartiles: A quarter lies below the first, a quarter above the second.
        range: Least and greatest.
        count: How many.
    """

    median: float
    quartiles: tuple[float, float]
    range: tuple[float, float]
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """Summarise measurements; a single one is its own quartiles."""
        low, middle, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        )
        return cls(middle, (low, high), (min(values), max(values)), len(values))

    def as_json(self) -> dict[str, object]:
        """Names and values, lists in the place of tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Timings:
    """The measurements of several contenders that took turns.

    Attributes:
        samples: By contender, the figures of its run in every round: `seconds` and what the work
            itself reported.
    """

    samples: Mapping[str, list[dict[str, float]]]

    def summary(self, contender: str, figure: str = "seconds") -> Summary:
        """Of one figure of one contender."""
        return Summary.of([run[figure] for run in self.samples[contender]])

    def ratio(self, other: str, figure: str = "seconds") -> Summary:
        """`other` over ours, round by round; above 1 ours is faster."""
        pairs = zip(self.samples[other], self.samples[OURS])
        return Summary.of([theirs[figure] / ours[figure] for theirs, ours in pairs])

    def ratios(self) -> dict[str, dict[str, object]]:
        """The ratio of every other contender's time to ours, for a result."""
        return {name: self.ratio(name).as_json() for name in self.samples if name != OURS}


def take_turns(
    contenders: Mapping[str, Work],
    *,
    seconds: float,
    rounds: int,
    warmup: int = 1,
    progress: bool = False,
    what: str = "bench",
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Run each contender once per round, in alternating order, until time or rounds are used up.

    Args:
        contenders: Work by name, ours first. Figures that it returns in a mapping are kept; work
            that times itself, in another process say, returns `seconds`.
        seconds: Rounds are begun until so much time has passed; at least three are run.
        rounds: Most rounds.
        warmup: Rounds before, which are not kept.
        progress: Show a progress bar, where standard error is a terminal.
        what: The bar's words.
        clock: Seconds from any start.

    Raises:
        ValueError: `seconds` or `rounds` is too small.
    """
    if seconds <= 0 or rounds < _LEAST_ROUNDS:
        raise ValueError(
            f"seconds is {seconds} and rounds {rounds}; use more than 0 and at least "
            f"{_LEAST_ROUNDS}"
        )
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    order = list(contenders)
    with progress_bar(progress, warmup + rounds, what, "round") as bar:
        for _ in range(warmup):
            for name in order:
                contenders[name]()
            bar.update()
        started = clock()
        for number in range(rounds):
            if number >= _LEAST_ROUNDS and clock() - started >= seconds:
                break
            for name in order if number % 2 == 0 else reversed(order):
                begun = clock()
                reported = contenders[name]()
                figures = reported if isinstance(reported, Mapping) else {}
                samples[name].append({"seconds": clock() - begun, **figures})
            bar.update()
    return Timings(samples)


def repeated(work: Callable[[], object], times: int) -> Work:
    """Work that does `work` several times and reports the seconds of one: for what is short."""

    def run() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(times):
            work()
        return {"seconds": (time.perf_counter() - started) / times}

    return run


def time_phases(
    make: Callable[[], Iterator[str]],
    device: torch.device,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Milliseconds of the phases of a piece of work, medians.

    Args:
        make: Begins the work, as a generator that does a phase and then gives its name.
        device: Waited for after every phase, so the sum is more than the work takes undivided.
        repeats: How often it is done.
        clock: Seconds from any start.
    """
    taken: dict[str, list[float]] = {}
    for _ in range(repeats):
        finish(device)
        started = clock()
        for name in make():
            finish(device)
            now = clock()
            taken.setdefault(name, []).append(1000 * (now - started))
            started = now
    return {name: statistics.median(values) for name, values in taken.items()}


def finish(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Compute on `count` CPU threads; None for torch's own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
