"""What an evaluation found: a JSON file, a row of a table, lines for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..extraction.parts import whole_file

RESULT, TABLE = "result.json", "results.csv"
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_SHOWN = 12  # heads in the terminal


class ResultError(ValueError):
    """A result that cannot be read; the text says which and why."""


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of an accuracy, in percent.

    Wilson's score interval (E. B. Wilson, "Probable inference, the law of succession, and
    statistical inference", JASA 22, 1927): unlike the normal approximation it stays in 0..100 and
    holds for small numbers and accuracies near the ends.

    Args:
        right: Right answers.
        total: Answers, at least 1.

    Raises:
        ValueError: There are no answers, or more right ones than answers.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} right answers of {total}: give 0 <= right <= total, total >= 1")
    share, spread = right / total, _Z * _Z / total
    middle = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = middle - half, middle + half
    return 100 * max(low / (1 + spread), 0.0), 100 * min(high / (1 + spread), 1.0)


@dataclass(frozen=True)
class Head:
    """One head of a grid, or one setting of a classifier.

    Attributes:
        name: What tells it from the others.
        held_out: Its figure on the training images held out to choose by; None: not measured.
        test: Its figure on the test set; None where it did not read the test set.
        loss: Mean training loss of its last epoch.
    """

    name: str
    held_out: float | None = None
    test: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Result:
    """One evaluation of one model on one task.

    Attributes:
        task: Name of the task.
        method: `linear`, `knn`, `lowshot`, `finetune` or `dense depth`.
        model: `name`, `architecture`, `weights`, `weights_hash`, `image_size`, `parameters`.
        figure: The test figure of the chosen head, in `unit`.
        chosen: Name of that head.
        selection: What it was chosen by, in words.
        heads: Every head's figures.
        protocol: Settings that were used, as plain values.
        data: Names and fingerprints of the data.
        images: Images by use: `fit`, `choose`, `test`.
        seed: The seed.
        measure: What `figure` is.
        unit: Its unit, empty for none.
        higher_is_better: Whether a larger figure is the better one.
        interval: 95 % interval of `figure`.
        others: Further test figures of the chosen head.
        paper: The paper's figure for these weights.
        baselines: Test figures of the same protocol without learned weights; of another measure
            where the name is "MEASURE of NAME".
        check: Convex solution beside SGD on cached features.
        notes: What a reader must know: differences to the protocol, warnings.
        machine: Hardware, processes, precision.
        versions: Of libraries.
        seconds: Time that it took, over all its sessions.
        images_per_second: Rate of encoding; None where features came from a cache.
        date: UTC, ISO 8601.
    """

    task: str
    method: str
    model: dict[str, Any]
    figure: float
    chosen: str
    selection: str
    heads: list[Head]
    protocol: dict[str, Any]
    data: dict[str, Any]
    images: dict[str, int]
    seed: int
    measure: str = "top-1 accuracy"
    unit: str = "%"
    higher_is_better: bool = True
    interval: tuple[float, float] | None = None
    others: dict[str, float] = field(default_factory=dict)
    paper: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    check: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    images_per_second: float | None = None
    date: str = ""

    def write(self, folder: Path) -> Path:
        """Write `result.json` into the folder, then a row into `results.csv` beside the folder.

        Returns:
            The JSON file.

        Raises:
            ResultError: `results.csv` is another table; the JSON file is written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RESULT
        with whole_file(path) as file:  # first: a table that is refused costs no figures
            file.write(json.dumps(_plain(asdict(self)), indent=1, allow_nan=False).encode() + b"\n")
        self.enter(folder)
        return path

    def enter(self, folder: Path) -> None:
        """See that `results.csv` beside the folder has this result's row.

        Raises:
            ResultError: `results.csv` is another table.
        """
        _append(folder.parent / TABLE, self.row(folder / RESULT))

    def row(self, path: Path) -> dict[str, Any]:
        """The result as one line of a table."""
        low, high = self.interval or (None, None)
        return {
            "date": self.date,
            "task": self.task,
            "method": self.method,
            "model": self.model["name"],
            "weights_hash": self.model["weights_hash"],
            "measure": self.measure,
            "figure": self.figure,
            "low": low,
            "high": high,
            "paper": self.paper,
            "chosen": self.chosen,
            "selection": self.selection,
            "fed": self.protocol.get("fed"),
            "epochs": self.protocol.get("epochs"),
            "fit_images": self.images.get("fit"),
            "test_images": self.images.get("test"),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "result": os.path.relpath(path, path.parents[1]),
        }

    def table(self) -> str:
        """What the terminal shows."""
        lines = [f"{self.task}, {self.method}: {self.model['name']} ({self.model['weights']})"]
        rows = [[self.measured, "held out", "test"]]
        rows += [
            [_mark(h, self.chosen), self.show(h.held_out), self.show(h.test)] for h in self._best()
        ]
        left = len(self.heads) + 1 - len(rows)
        if left:
            rows.append([f"  and {left} more in {RESULT}", "", ""])
        span = "  [{}, {}]".format(*map(self.show, self.interval)) if self.interval else ""
        rows.append(["test figure of the chosen head", "", f"{self.show(self.figure)}{span}"])
        rows += [[f"  {name}", "", f"{value:.4g}"] for name, value in self.others.items()]
        if self.paper is not None:
            rows.append(["the paper's figure", "", self.show(self.paper)])
        rows += [[f"{name}", "", self.show(value)] for name, value in self.baselines.items()]
        lines += _columns(rows)
        lines.append(f"chosen by {self.selection}; images: {_counts(self.images)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    @property
    def measured(self) -> str:
        """The measure with its unit, and which way is better where that is down."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.measure}{unit}{'' if self.higher_is_better else ', lower is better'}"

    def show(self, value: float | None) -> str:
        """A figure of this result's measure; empty for none."""
        return "" if value is None else f"{value:.1f}" if self.unit == "%" else f"{value:.4g}"

    def _best(self) -> list[Head]:
        """The heads to show, the best first, the chosen one among them."""
        sign = -1 if self.higher_is_better else 1

        def rank(head: Head) -> float:
            value = head.test if head.held_out is None else head.held_out
            return math.inf if value is None else sign * value

        ranked = sorted(self.heads, key=lambda head: (head.name != self.chosen, rank(head)))
        return ranked[:_SHOWN]


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a line, in the place of an earlier one of the same folder; one process at a time."""
    with FileLock(f"{path}.lock"):
        rows: list[dict[str, Any]] = []
        if path.exists():
            rows = _rows_of(path, list(row))
            if {k: "" if v is None else str(v) for k, v in row.items()} in rows:
                return
            rows = [old for old in rows if old["result"] != row["result"]]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
        with whole_file(path) as table:
            table.write(text.getvalue().encode())


def _rows_of(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    refusal = f"move it away; the new figures are in the {RESULT} of their own folder"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns:
                raise ResultError(f"{path} is no table of this version: {refusal}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as error:
        raise ResultError(f"{path} is no table ({error}): {refusal}") from error
    if any(None in row or None in row.values() for row in rows):
        raise ResultError(f"{path} has lines of more or fewer cells than its first: {refusal}")
    return rows


def _plain(value: Any) -> Any:
    """The value with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _mark(head: Head, chosen: str) -> str:
    return f"{'>' if head.name == chosen else ' '} {head.name}"


def _counts(images: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in images.items())


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
