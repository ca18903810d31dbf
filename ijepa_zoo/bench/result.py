"""What a bench found: figures with everything that is needed to repeat them, as text and JSON."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from .machine import machine, versions
from .timing import OURS

_FEW_PAIRS = 5  # fewer do not tell how far a ratio varies
# key of a figure -> its words, with other figures, and what it is multiplied with where it is shown
_SHOWN = {
    "images_per_second": ("images/s", 1.0),
    "tflop_per_second": ("TFLOP/s", 1.0),
    "fraction_of_peak": ("of the measured {peak_precision} peak", 1.0),
    "mfu": ("MFU of the bf16 data sheet", 1.0),
    "mfu_fp8": ("MFU of the fp8 data sheet", 1.0),
    "peak_memory_bytes": ("MiB at most", 2**-20),
    "peak_over_file": ("file sizes at most", 1.0),
    "host_syncs": ("host syncs", 1.0),
    "compiled_graphs": ("compiled graphs", 1.0),
    "bytes_exchanged": ("MiB exchanged", 2**-20),
    "exchange_hidden": ("of the exchange hidden", 1.0),
    "over_encoder": ("of the encoder's time", 1.0),
    "start_seconds": ("s until the first batch", 1.0),
    "steps_stalled": ("steps stalled at most", 1.0),
    "steps_lost": ("steps lost in all", 1.0),
    "copy_seconds": ("s standing still", 1.0),
    "save_seconds": ("s until it is whole", 1.0),
    "bytes_written": ("MiB written", 2**-20),
}


class DisagreementError(RuntimeError):
    """The contenders compute different things, so their times say nothing."""


def agreed(what: str, difference: float, tolerance: float, shown: str = "") -> dict[str, Any]:
    """A comparison of outputs before a timing, as results record it.

    Args:
        what: What was compared, in words.
        difference: Between ours and the other's.
        tolerance: The most that it may be.
        shown: Values for the message.

    Raises:
        DisagreementError: It is more, or no number.
    """
    if not difference <= tolerance:
        raise DisagreementError(
            f"{what} differ by {difference:.1e}, more than {tolerance:.0e}: the contenders compute "
            f"different things, so their times say nothing{shown and f' ({shown})'}"
        )
    return {"what": what, "difference": difference, "tolerance": tolerance}


@dataclass(frozen=True)
class BenchResult:
    """Figures of a bench.

    Attributes:
        bench: Its name, such as `train`.
        settings: What was asked for, by the names of the arguments.
        results: Figures by contender, ours first; `seconds` is a summary, see `Summary`.
        ratios: By other contender, its time over ours, pair by pair.
        agreement: By other contender, what was compared before the timing, how far it differed and
            how far it might have.
        extra: Figures that belong to no contender.
        resolved: What settings that were `auto` became.
        machine: What it was measured on.
        versions: Of the packages.
        date: ISO date.
    """

    bench: str
    settings: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]
    ratios: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    agreement: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=machine)
    versions: Mapping[str, str] = field(default_factory=versions)
    date: str = field(default_factory=lambda: date.today().isoformat())

    @property
    def command(self) -> str:
        """The command that measures this again; folders by their last name only."""
        words = ["ijepa-zoo", "bench", self.bench]
        for name, value in self.settings.items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(option)
            elif isinstance(value, list | tuple):
                words += [option, *map(str, value)] if value else []
            elif value is not None and value is not False:
                words += [option, value.name if isinstance(value, Path) else str(value)]
        return shlex.join(words)

    def save(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Write the JSON file.

        Args:
            out: A file; a folder or None (this one) for `bench-NAME-DATE.json` in it.

        Returns:
            The file.

        Raises:
            OSError: It cannot be written.
        """
        path = Path(out or ".")
        if path.is_dir():
            path /= f"bench-{self.bench}-{self.date}.json"
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        return path

    def as_json(self) -> dict[str, Any]:
        """Everything, of plain types."""
        whole = asdict(self)
        settings = {
            name: value.name if isinstance(value, Path) else value
            for name, value in self.settings.items()
        }
        return {
            "bench": whole.pop("bench"),
            "command": self.command,
            "date": whole.pop("date"),
            **whole,
            "settings": settings,
        }

    def __str__(self) -> str:
        """The figures, a line for each contender and ratio."""
        settings = ", ".join(
            f"{name} {_plain(self.resolved.get(name, value) if value == 'auto' else value)}"
            for name, value in self.settings.items()
            if _given(value)
        )
        where, threads = self.machine.get("gpu", self.machine["cpu"]), self.machine["threads"]
        lines = [
            f"{self.bench}: {settings}",
            f"on {where}, {threads} CPU thread{'' if threads == 1 else 's'}",
        ]
        for name, found in self.agreement.items():
            lines.append(
                f"{name} agrees: {found['what']} differ by {found['difference']:.1e} (at most "
                f"{found['tolerance']:.1e})"
            )
        width = max(len(name) for name in self.results)
        for name, figures in self.results.items():
            lines.append(f"{name:{width}}  {shown(figures)}")
            for group in (value for key, value in figures.items() if key.startswith("phases")):
                phases = ", ".join(f"{phase} {ms:.4g}" for phase, ms in group.items())
                lines.append(f"{'':{width}}  ms: {phases}")
        for name, ratio in self.ratios.items():
            low, high = ratio["range"]
            lines.append(
                f"{name} takes {ratio['median']:.3g} times as long as {OURS} ({low:.3g} to "
                f"{high:.3g}, {ratio['count']} pairs){_caution(ratio)}"
            )
        for name, value in self.extra.items():
            lines += _lines(name, value)
        return "\n".join(lines)


def shown(figures: Mapping[str, Any]) -> str:
    """A contender's figures in a line: time with quartiles, then the others."""
    parts = []
    if "seconds" in figures:
        seconds = figures["seconds"]
        low, high = (duration(value) for value in seconds["quartiles"])
        parts.append(f"{duration(seconds['median'])} (quartiles {low} to {high})")
    for key, (words, factor) in _SHOWN.items():
        if figures.get(key) is not None:
            parts.append(f"{figures[key] * factor:.4g} {words.format_map(figures)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds or milliseconds, with four digits."""
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"


def _caution(ratio: Mapping[str, Any]) -> str:
    """Why a ratio says little, where it does."""
    low, high = ratio["range"]
    words = ["no clear difference"] if low <= 1 <= high else []
    words += ["few pairs"] if ratio["count"] < _FEW_PAIRS else []
    return f": {', '.join(words)}" if words else ""


def _given(value: Any) -> bool:
    return value is not None and value is not False and value != () and value != []


def _lines(name: str, value: Any) -> list[str]:
    """A value in a line; a mapping of mappings with a line for each, indented."""
    if not isinstance(value, dict) or not any(isinstance(part, dict) for part in value.values()):
        return [f"{name}: {_plain(value)}"]
    inner = [line for key, part in value.items() for line in _lines(key, part)]
    return [f"{name}:", *(f"  {line}" for line in inner)]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    return value.name if isinstance(value, Path) else str(value)
