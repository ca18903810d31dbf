"""Results: a JSON file, a row of results.csv, and a table of several results."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import DataError, SettingsError
from ..parts import whole_file

RESULT, TABLE = "result.json", "results.csv"
TEST_SET = "the test set"


@dataclass(frozen=True)
class Head:
    """One head of a grid, or one setting of a classifier."""

    name: str  # its settings
    val: float | None = None  # metric on held-out training images, if measured
    test: float | None = None  # metric on the test set, if measured
    loss: float | None = None  # mean training loss of the last epoch


@dataclass(frozen=True)
class Result:
    """One evaluation of one model on one task.

    Attributes:
        task: Name of the task.
        method: `linear`, `attentive`, `knn`, `logreg`, `finetune`, `depth` or `segmentation`.
        model: `name`, `architecture`, `weights`, `weights_hash`, `image_size`, `parameters`.
        value: The test metric of the chosen head, in `unit`.
        chosen: Name of that head.
        selection: The images by which it was chosen.
        heads: Metrics of every head.
        protocol: Settings that were used, as plain values.
        data: Names, sizes and fingerprints of the data.
        images: Images by use: `train`, `val`, `test`.
        seed: The seed.
        metric: What `value` is.
        unit: Its unit, empty for none.
        higher_is_better: Whether a larger value is the better one.
        interval: 95 % interval of `value`.
        metrics: Further test metrics of the chosen head.
        paper: The paper's value for these weights and this protocol.
        baselines: Values of the same protocol without learned weights.
        notes: Differences to the protocol, and warnings.
        runtime: Hardware, processes, precision.
        versions: Of libraries.
        seconds: Time of all sessions together.
        date: UTC, ISO 8601.
    """

    task: str
    method: str
    model: dict[str, Any]
    value: float
    chosen: str
    selection: str
    heads: list[Head]
    protocol: dict[str, Any]
    data: dict[str, Any]
    images: dict[str, int]
    seed: int
    metric: str = "top-1 accuracy"
    unit: str = "%"
    higher_is_better: bool = True
    interval: tuple[float, float] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    paper: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    runtime: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    date: str = ""

    def write(self, folder: Path) -> Path:
        """Write `result.json` into the folder, then a row into `results.csv` beside the folder.

        Returns:
            The JSON file.

        Raises:
            DataError: `results.csv` is another table; the JSON file is written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / RESULT) as file:
            text = json.dumps(_finite(asdict(self)), indent=1, allow_nan=False)
            file.write(text.encode() + b"\n")
        low, high = self.interval or (None, None)
        row = {
            "result": os.path.join(folder.name, RESULT),
            "date": self.date,
            "task": self.task,
            "method": self.method,
            "model": self.model["name"],
            "weights_hash": self.model["weights_hash"],
            "metric": self.metric,
            "value": self.value,
            "low": low,
            "high": high,
            "paper": self.paper,
            "chosen": self.chosen,
            "selection": self.selection,
            "features": self.protocol.get("features"),
            "epochs": self.protocol.get("epochs"),
            "train_images": self.images.get("train"),
            "test_images": self.images.get("test"),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
        }
        path = folder.parent / TABLE
        with FileLock(f"{path}.lock"):
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            table = csv.DictReader(io.StringIO(text))
            if text and table.fieldnames != list(row):
                raise DataError(f"{path} is not a table of this version: move it away")
            rows = [old for old in table if old["result"] != row["result"]]
            rewritten = io.StringIO()
            writer = csv.DictWriter(rewritten, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, row])
            with whole_file(path) as file:
                file.write(rewritten.getvalue().encode())
        return folder / RESULT

    def table(self) -> str:
        """Text for the terminal."""
        unit = f" ({self.unit})" if self.unit else ""
        chosen = next(head for head in self.heads if head.name == self.chosen)
        rows = [
            [f"{self.metric}{unit}", "val", "test"],
            [self.chosen, self.show(chosen.val), self.show(self.value) + self._interval()],
        ]
        numbers = {k: v for k, v in self.metrics.items() if isinstance(v, int | float)}
        rows += [[f"  {name}", "", f"{value:.4g}"] for name, value in numbers.items()]
        rows += [[name, "", self.show(value)] for name, value in self._references().items()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
        images = ", ".join(f"{number:,} {name}" for name, number in self.images.items())
        return "\n".join(
            [
                f"{self.task}, {self.method}: {self.model['name']} ({self.model['weights']})",
                *lines,
                f"{len(self.heads)} heads, chosen by {self.selection}; images: {images}",
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def show(self, value: float | None) -> str:
        """A value of this result's metric; empty for none."""
        return "" if value is None else f"{value:.1f}" if self.unit == "%" else f"{value:.4g}"

    def _interval(self) -> str:
        return " ({}-{})".format(*map(self.show, self.interval)) if self.interval else ""

    def _references(self) -> dict[str, float]:
        """Values to compare with: the paper's, those of untrained models, chance."""
        paper = {} if self.paper is None else {"paper": self.paper}
        test = self.data.get("test", {})
        has_chance = self.metric == "top-1 accuracy" and "most_frequent" in test
        chance = {"most frequent class": test["most_frequent"]} if has_chance else {}
        return {**paper, **self.baselines, **chance}


def read_result(path: Path) -> Result:
    """Read a `result.json`.

    Raises:
        DataError: It is not a result of this version, or damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        content = {f.name: content[f.name] for f in fields(Result)}
        content["heads"] = [Head(**head) for head in content["heads"]]
        content["value"] = math.nan if content["value"] is None else content["value"]
        content["interval"] = content["interval"] and tuple(content["interval"])
        return Result(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not a result of this version of `ijepa-zoo eval`, or damaged "
            f"({type(error).__name__}: {error}): move it away and evaluate again"
        ) from error


def write_report(places: Iterable[str | Path], out: str | Path = "report.md") -> Path:
    """Write results as one Markdown table, grouped by task, data and method, the best first.

    Args:
        places: `result.json` files, or folders with such files anywhere below them.
        out: Markdown file to write.

    Raises:
        DataError: A place holds no result, or a damaged one.
        SettingsError: `out` is a folder.
    """
    out = Path(out)
    if out.is_dir() or out.suffix.lower() not in (".md", ".txt"):
        raise SettingsError(f"'{out}' is not a Markdown file to write, such as report.md")
    found: dict[Path, Result] = {}
    for place in map(Path, places):
        files = sorted(place.rglob(RESULT)) if place.is_dir() else [place]
        if not files or not files[0].exists():
            raise DataError(f"{place} has no {RESULT} in it: give folders named by --out")
        found |= {file.resolve(): read_result(file) for file in files}
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as file:
        file.write(_markdown([*found.values()]).encode())
    return out


def _markdown(results: Sequence[Result]) -> str:
    """A row for each result; bold is the best of its group."""
    names = ("task", "data", "method", "model", "metric", "value", "paper", "baselines", "settings")
    rows = [names, ("---",) * len(names)]
    for group, members in groupby(sorted(results, key=_rank), key=_group):
        found = list(members)
        for result in found:
            best = len(found) > 1 and result.value == found[0].value
            value = result.show(result.value)
            shown = (f"**{value}**" if best else value) + result._interval()
            compared = {k: result.show(v) for k, v in result._references().items()}
            paper = compared.pop("paper", "")
            baselines = ", ".join(f"{name} {value}" for name, value in compared.items())
            about = (result.model["name"], result.metric, shown, paper, baselines)
            rows.append((*group, *about, _settings(result)))
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "".join(f"| {line} |\n" for line in cells)


def _group(result: Result) -> tuple[str, str, str]:
    """Task, data and method: results with equal ones are compared."""
    train, test = (result.data.get(part, {}) for part in ("train", "test"))
    data = f"{train.get('name', '')} {test.get('fingerprint', '')[:6]}".strip()
    cached = ", cached" if result.protocol.get("features") == "cached" else ""
    return result.task, data, f"{result.method}{cached}"


def _rank(result: Result) -> tuple[Any, ...]:
    value = -result.value if result.higher_is_better else result.value
    return *_group(result), value if math.isfinite(value) else math.inf


def _settings(result: Result) -> str:
    shown = {
        "": result.chosen,
        "px": "x".join(map(str, result.model.get("image_size", ()))),
        "epochs": result.protocol.get("epochs"),
        "batch": result.protocol.get("batch_size"),
        "images": result.images.get("train"),
        "precision": result.runtime.get("precision"),
        "seed": result.seed,
    }
    if result.selection == TEST_SET:
        shown["chosen on"] = "test"
    return ", ".join(f"{key} {value}".strip() for key, value in shown.items() if value is not None)


def data_name(data: Any) -> str:
    """Name of data in results: the last part of a path; empty for objects."""
    if not isinstance(data, str | os.PathLike):
        return ""
    path = Path(data)
    return path.resolve().name if path.exists() else str(data)


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
