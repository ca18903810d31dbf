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

from ..errors import DataError
from ..extract import whole_file

RESULT, TABLE = "result.json", "results.csv"
_SHARE = "most_frequent"  # in the record of the data
_SHOWN = 5  # heads in the terminal
_CLASSES = 3  # of the best, and of the worst, there
MOST_FREQUENT = "most frequent class"
NOTHING_CHOSEN = "nothing: it is the state after the last epoch"


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
        method: `linear`, `attentive`, `knn`, `logreg`, `finetune` or `dense depth`.
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
        per_class: Its test figure for each class, by name; NaN where no pixel has the class.
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
    per_class: dict[str, float] = field(default_factory=dict)
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
            DataError: `results.csv` is another table; the JSON file is written.
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
            DataError: `results.csv` is another table.
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
        span = "  [{}, {}]".format(*map(self.show, self.interval)) if self.interval else ""
        figures = [[self._figure_name, "", f"{self.show(self.figure)}{span}"]]
        figures += [[f"  {name}", "", f"{value:.4g}"] for name, value in self.others.items()]
        figures += self._class_rows()
        if self.paper is not None:
            figures.append(["the paper's figure", "", self.show(self.paper)])
        figures += [[name, "", self.show(value)] for name, value in self.baselines.items()]
        if self.most_frequent is not None:
            figures.append([MOST_FREQUENT, "", self.show(self.most_frequent)])
        if self.selection == NOTHING_CHOSEN:
            rows = [[self.measured, "test"], *([name, value] for name, _, value in figures)]
        else:
            rows = [[self.measured, "held out", "test"], *self._head_rows(), *figures]
        about = f"{self._title}: {_named(self.model)}"
        last = f"{self.choice}; images: {_counts(self.images)}"
        return "\n".join([about, *_columns(rows), last, *(f"note: {n}" for n in self.notes)])

    @property
    def choice(self) -> str:
        """What the head was chosen by, as a clause."""
        if self.selection == NOTHING_CHOSEN:
            return "state after the last epoch; nothing was chosen"
        return f"chosen by {self.selection}"

    @property
    def most_frequent(self) -> float | None:
        """Chance level: share of the most frequent class in the test set, in percent, if known."""
        test = self.data.get("test")
        share = test.get(_SHARE) if isinstance(test, dict) else None
        return float(share) if isinstance(share, int | float) and self.unit == "%" else None

    @property
    def _title(self) -> str:
        told = self.task.startswith(self.method)
        return self.task if told else f"{self.task}, {self.method}"

    @property
    def _figure_name(self) -> str:
        if self.selection == NOTHING_CHOSEN:
            return "test figure"
        what = "setting" if self.method in ("knn", "logreg") else "head"
        return f"test figure of the chosen {what}"

    def _head_rows(self) -> list[list[str]]:
        shown = self._best()
        rows = [[_mark(h, self.chosen), self.show(h.held_out), self.show(h.test)] for h in shown]
        left = len(self.heads) - len(shown)
        return [*rows, [f"  and {left} more in {RESULT}", "", ""]] if left else rows

    def _class_rows(self) -> list[list[str]]:
        """The classes, of many the best and the worst."""
        known = [(value, name) for name, value in self.per_class.items() if value == value]
        known.sort(reverse=self.higher_is_better)
        shown = known if len(known) <= 2 * _CLASSES else known[:_CLASSES] + known[-_CLASSES:]
        rows = [[f"  class {name}", "", self.show(value)] for value, name in shown]
        left = len(self.per_class) - len(shown)
        return [*rows, [f"  and {left} more in {RESULT}", "", ""]] if left else rows

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
    """Add a line, instead of an earlier one of the same folder; one process at a time."""
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
                raise DataError(f"{path} is no table of this version: {refusal}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as error:
        raise DataError(f"{path} is no table ({error}): {refusal}") from error
    if any(None in row or None in row.values() for row in rows):
        raise DataError(f"{path} has lines of more or fewer cells than its first: {refusal}")
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


def _named(model: dict[str, Any]) -> str:
    """A model's name with its weights, which often repeat the name."""
    name, weights = model["name"], model["weights"].removesuffix(f" of {model['name']}")
    return f"{name} ({weights})"


def _counts(images: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in images.items())


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
