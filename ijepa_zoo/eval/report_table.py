"""Which figures of several results stand side by side: rows, columns and what tells them apart."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .result import MOST_FREQUENT, Result
from .words import counted

_MODEL, _RANDOM, _PIXELS, _CONSTANT = range(4)  # order of the rows


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        figure: The figure.
        result: The result that it is of.
        own: Whether it is that result's own figure; else one of its baselines.
    """

    figure: float
    result: Result
    own: bool = True


@dataclass(frozen=True)
class Table:
    """Figures of models and baselines.

    Attributes:
        rows: Their names: models, the best first, then baselines.
        columns: Names of tasks, with data and method.
        cells: By row and column.
        baselines: The rows without learned weights.
        constants: Those of them that look at no image.
        left_out: Number of results that a newer one has replaced.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    baselines: frozenset[str]
    constants: frozenset[str]
    left_out: int

    def column(self, column: str) -> dict[str, Cell]:
        """The figures of a column by row, in the order of the rows."""
        return {row: self.cells[row, column] for row in self.rows if (row, column) in self.cells}

    def best(self, column: str) -> float | None:
        """The best figure of those that look at images; None where there are fewer than two."""
        seen = [cell for row, cell in self.column(column).items() if row not in self.constants]
        if len(seen) < 2:
            return None
        return max(seen, key=lambda cell: _sign(cell.result) * cell.figure).figure


def compare(results: Sequence[Result]) -> Table:
    """Put results side by side.

    Results of one column whose settings differ have rows of their own, marked by what differs from
    the settings that most have. Of several that differ in nothing but the seed the newest counts.
    """
    columns: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.task, r.method, _fed(r), r.date)):
        columns.setdefault(_column(result, results), []).append(result)
    cells: dict[tuple[str, str], Cell] = {}
    kinds: dict[str, int] = {}
    for column, own in columns.items():
        usual = _usual(own)
        for result in own:
            row = _row(result, results, _marks(result, usual))
            cells[row, column] = Cell(result.figure, result)
            kinds[row] = _kind(result.model["name"])
    left_out = len(results) - len(cells)
    for column, own in columns.items():
        for row, kind, cell in _baselines(own):
            if (row, column) not in cells:
                cells[row, column] = cell
                kinds[row] = kind
    baselines = frozenset(row for row, kind in kinds.items() if kind != _MODEL)
    constants = frozenset(row for row in baselines if kinds[row] == _CONSTANT)
    places = _places(cells, tuple(columns))
    places |= dict.fromkeys(constants, 0.0)
    rows = tuple(sorted(kinds, key=lambda row: (kinds[row], places[row])))
    return Table(rows, tuple(columns), cells, baselines, constants, left_out)


def settings(result: Result) -> dict[str, str]:
    """Settings that decide a figure, in words; those that a result does not tell are left out."""
    protocol = result.protocol
    values: dict[str, tuple[Any, Callable[[Any], str]]] = {
        "epochs": (protocol.get("epochs"), lambda n: counted(n, "epoch")),
        "batch": (protocol.get("batch_size"), lambda n: f"batches of {n}"),
        "precision": (result.machine.get("precision"), str),
        "images": (result.images.get("fit"), lambda n: f"{n:,} images to fit"),
        "range": (protocol.get("max_depth"), lambda n: f"depths up to {n:g}"),
    }
    return {name: say(value) for name, (value, say) in values.items() if value is not None}


def _usual(results: Sequence[Result]) -> dict[str, str]:
    """The setting of each kind that most results have; of two equally frequent the newer one."""
    found: dict[str, Counter[str]] = {}
    for result in reversed(results):
        for name, value in settings(result).items():
            found.setdefault(name, Counter())[value] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in found.items()}


def _marks(result: Result, usual: Mapping[str, str]) -> list[str]:
    own = settings(result)
    if _kind(result.model["name"]) == _PIXELS:
        own.pop("precision", None)  # of an encoder
    return [value for name, value in own.items() if value != usual[name]]


def _baselines(results: Sequence[Result]) -> list[tuple[str, int, Cell]]:
    """Rows, kinds and figures of a column's baselines, those of the newest result first."""
    usual, found = _usual(results), []
    there = {(r.model["name"], *_marks(r, usual)) for r in results}
    for result in reversed(results):
        marks = _marks(result, usual)
        for name, value in result.baselines.items():
            measure, _, what = name.rpartition(" of ")
            kind = _CONSTANT if measure else _kind(name)
            own = kind != _CONSTANT and (name, *marks) in there
            if own or measure.casefold() not in ("", result.measure.casefold()):
                continue
            row = what if kind == _CONSTANT else _marked(name, marks)
            found.append((row, kind, Cell(value, result, own=False)))
        if result.most_frequent is not None:
            cell = Cell(result.most_frequent, result, own=False)
            found.append((MOST_FREQUENT, _CONSTANT, cell))
    return found


def _places(cells: Mapping[tuple[str, str], Cell], columns: Sequence[str]) -> dict[str, float]:
    """How far down each row is in its columns, 0 to 1, on average."""
    places: dict[str, list[float]] = {}
    for column in columns:
        own = [(row, cell) for (row, place), cell in cells.items() if place == column]
        own.sort(key=lambda item: -_sign(item[1].result) * item[1].figure)
        for place, (row, _) in enumerate(own):
            places.setdefault(row, []).append(place / max(len(own) - 1, 1))
    return {row: sum(found) / len(found) for row, found in places.items()}


def _kind(name: str) -> int:
    if name == "raw pixels":
        return _PIXELS
    return _RANDOM if name.endswith("random weights") else _MODEL


def _row(result: Result, results: Sequence[Result], marks: list[str]) -> str:
    """The model's name, with what tells it from models of the same name, and the marks."""
    name = result.model["name"]
    same = [other for other in results if other.model["name"] == name]
    told = [_size(result.model)] if len({_size(other.model) for other in same}) > 1 else []
    alike = [other.model for other in same if _size(other.model) == _size(result.model)]
    if len({model["weights_hash"] for model in alike}) > 1:
        random = _kind(name) == _RANDOM
        told.append(f"seed {result.seed}" if random else result.model["weights_hash"][:6])
    return _marked(name, told + marks)


def _marked(name: str, marks: Sequence[str]) -> str:
    return f"{name} ({', '.join(marks)})" if marks else name


def _size(model: Mapping[str, Any]) -> str:
    """Image size of a model in pixels; older results do not have it."""
    size = model.get("image_size") or []
    return f"{' x '.join(map(str, size))} px" if size else "image size unknown"


def _column(result: Result, results: Sequence[Result]) -> str:
    method = "" if result.task.startswith(result.method) else f", {result.method}"
    fed = ", cached" if _fed(result) == "cached" else ""
    on_test = ", chosen on test" if result.selection == "the test set" else ""
    return f"{result.task}{_data(result, results)}{method}{fed}{on_test}: {result.measured}"


def _fed(result: Result) -> str:
    return str(result.protocol.get("fed"))


def _data(result: Result, results: Sequence[Result]) -> str:
    """What tells the data of a task from others of that task: their name, or a short hash.

    Older results have no name: they take that of a newer one of the same data.
    """
    same = [
        (_data_hash(other), _data_name(other)) for other in results if other.task == result.task
    ]
    if len({data for data, _ in same}) == 1:
        return ""
    known = {data: name for data, name in same if name}
    mine = _data_hash(result)
    name = _data_name(result) or known.get(mine, "")
    alike = {data for data, other in same if (other or known.get(data, "")) == name}
    told = [name] if name else ["data"] if len(alike) > 1 else ["other data"]
    return f" ({' '.join(told + ([mine] if len(alike) > 1 else []))})"


def _data_name(result: Result) -> str:
    train = result.data.get("train")
    return str(train.get("name", "")) if isinstance(train, dict) else ""


def _data_hash(result: Result) -> str:
    """A short hash of the data's fingerprints, however a method records them."""
    prints = {
        name: part.get("fingerprint") if isinstance(part, dict) else part
        for name, part in result.data.items()
    }
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:6]


def _sign(result: Result) -> int:
    return 1 if result.higher_is_better else -1
