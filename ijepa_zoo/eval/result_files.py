"""Results from the files that evaluations have left; damaged ones are named."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import DataError
from .result import RESULT, Head, Result


def read_result(path: Path) -> Result:
    """Read a `result.json`.

    Raises:
        DataError: It is no result, or a damaged one.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it and evaluate again") from error
    known = {entry.name for entry in fields(Result)}
    if not isinstance(content, dict) or not {"task", "figure", "heads"} <= content.keys() <= known:
        raise DataError(f"{path} is no result of `ijepa-zoo eval`, or of another version")
    try:
        content["heads"] = [Head(**head) for head in content["heads"]]
        if content.get("interval") is not None:
            content["interval"] = tuple(content["interval"])
        for name in _FIGURES_BY_NAME:  # JSON has null for those that are not finite
            found = content.get(name, {}).items()
            content[name] = {k: math.nan if v is None else v for k, v in found}
        result = Result(**content)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is no whole result ({error}): remove it and evaluate again"
        ) from error
    if wrong := [words for fits, words in _checks(result) if not fits]:
        raise DataError(
            f"{path} is no whole result ({'; '.join(wrong)}): remove it and evaluate again"
        )
    return result


def find_results(places: Iterable[str | Path]) -> list[tuple[Path, Result]]:
    """All results in files and folders, with everything below them.

    Raises:
        DataError: A place holds none, or a damaged one.
    """
    found: dict[Path, Result] = {}
    for place in map(Path, places):
        files = sorted(place.rglob(RESULT)) if place.is_dir() else [place]
        if not files:
            raise DataError(f"{place} holds no {RESULT}: name folders that `--out` has named")
        for file in files:
            if not file.is_file():
                raise DataError(f"{file} does not exist: name a {RESULT}, or a folder of them")
            found.setdefault(file.resolve(), read_result(file))
    return list(found.items())


_TEXTS = ("task", "method", "chosen", "selection", "measure", "unit", "date")
_TABLES = ("model", "protocol", "data", "images", "machine", "versions")
_FIGURES_BY_NAME = ("others", "per_class", "baselines")


def _checks(result: Result) -> Iterator[tuple[bool, str]]:
    """Whether each part of a result that was read has its type, and what is wrong if not."""
    yield _number(result.figure), f"the figure is {result.figure!r}, not a number"
    for name in _TEXTS:
        yield isinstance(getattr(result, name), str), f"{name} is no text"
    for name in _TABLES:
        yield isinstance(getattr(result, name), dict), f"{name} is no table"
    for name in ("name", "weights", "weights_hash"):
        model = result.model if isinstance(result.model, dict) else {}
        yield isinstance(model.get(name), str), f"the model's {name} is no text"
    if isinstance(result.images, dict):
        whole = all(type(count) is int for count in result.images.values())
        yield whole, "images are no whole numbers"
    yield type(result.seed) is int, "the seed is no whole number"
    yield isinstance(result.higher_is_better, bool), "higher_is_better is neither true nor false"
    span = result.interval
    yield span is None or (len(span) == 2 and all(map(_number, span))), "the interval is not two"
    for name in _FIGURES_BY_NAME:
        figures = getattr(result, name).values()
        yield all(_number(v) or v != v for v in figures), f"{name} are not all numbers"
    yield _number(result.seconds), "seconds are no number"
    for name in ("paper", "images_per_second"):
        value = getattr(result, name)
        yield value is None or _number(value), f"{name} is no number"
    yield result.check is None or isinstance(result.check, dict), "check is no table"
    notes = isinstance(result.notes, list) and all(isinstance(n, str) for n in result.notes)
    yield notes, "notes are no texts"
    for head in result.heads:
        values = (head.held_out, head.test, head.loss)
        fits = isinstance(head.name, str) and all(v is None or _number(v) for v in values)
        yield fits, f"the figures of head {head.name!r} are no numbers"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
