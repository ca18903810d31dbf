"""The log of a run: `log.csv`, `log.jsonl` and, where TensorBoard is installed, its files.

The first columns of `log.csv` are those of the official repository, so what reads that reads
this. `log.jsonl` holds the same rows, and between them the events: warnings, interruptions.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from ..errors import RunError, SettingsError

COLUMNS = (
    *("epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)"),
    *("step", "lr", "weight_decay", "momentum", "images_per_second"),
    *("grad_encoder", "grad_predictor", "update_encoder", "update_predictor"),
    "regularizer",
    *("rankme", "spread", "cosine", "ema_distance", "knn", "linear"),
)
_PUBLISHED = {"context_tokens": "mask-A", "target_tokens": "mask-B"}
_DAMAGED = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(csv.Error, OverflowError, RecursionError),
)
_CSV, _JSONL = "log.csv", "log.jsonl"


class RunLog:
    """Writer of a run's log; a context manager. One process of a run has it.

    What an earlier process logged of the steps from `first_step` on is removed: a run that goes on
    from a checkpoint does them again.

    Args:
        folder: The run's folder; must exist.
        first_step: Updates done so far.

    Raises:
        RunError: The log that is there is damaged; it is left as it is.
        OSError: The log cannot be written; what is there stays.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._csv, self._jsonl = folder / _CSV, folder / _JSONL
        header = ",".join(COLUMNS)
        lines = [line for row, line in _csv_lines(self._csv) if row["step"] < first_step]
        events = [line for entry, line in _json_lines(self._jsonl) if entry["step"] < first_step]
        _replace(self._csv, [header, *lines])
        _replace(self._jsonl, events)
        self._board = _tensorboard(folder / "tensorboard", first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, row: dict[str, float]) -> None:
        """Log one update.

        Args:
            row: Values by column (see `COLUMNS`); `context_tokens` and `target_tokens` are
                written as `mask-A` and `mask-B`. `step` is needed: updates done before this one.

        Raises:
            ValueError: There is no such column.
            OSError: The row cannot be written, e.g. a full disk; the rows before it are intact.
        """
        row = {_PUBLISHED.get(name, name): float(value) for name, value in row.items()}
        if unknown := row.keys() - set(COLUMNS):
            raise SettingsError(
                f"the log has no column {', '.join(sorted(unknown))}; it has {', '.join(COLUMNS)}"
            )
        ordered = {name: row[name] for name in COLUMNS if name in row}
        finite = {k: v if math.isfinite(v) else None for k, v in ordered.items()}
        _append(self._jsonl, json.dumps(finite))
        _append(self._csv, ",".join(f"{row[k]:.9g}" if k in row else "" for k in COLUMNS))
        if self._board is not None:
            for name, value in ordered.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))

    def event(self, step: int, kind: str, text: str) -> None:
        """Log something in words, and show it on stderr.

        Args:
            step: The update that it belongs to, as in `write`.
            kind: One word: `warning`, `skipped`.
            text: What happened.

        Raises:
            OSError: It cannot be written; what was written before is intact.
        """
        self._record(step, kind, text)
        shown = text.encode(errors="backslashreplace").decode()  # names that are not UTF-8
        tqdm.write(f"{kind}: {shown}", file=sys.stderr)

    def initial(self, figures: dict[str, float]) -> None:
        """Log and show what was measured before the first step; `read_initial` gives it back."""
        self._record(0, "initial", json.dumps(figures))
        tqdm.write(f"at initialisation: {_listed(figures)}", file=sys.stderr)

    def final(self, figures: dict[str, float], initial: dict[str, float]) -> None:
        """Show what was measured after the last step, beside the same before the first."""
        kept = {name: value for name, value in figures.items() if name in initial}
        if kept:
            tqdm.write(f"at initialisation: {_listed(initial)}", file=sys.stderr)
            tqdm.write(f"at the end:        {_listed(kept)}", file=sys.stderr)

    def _record(self, step: int, kind: str, text: str) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"step": int(step), "event": kind, "text": text, "time": time}
        _append(self._jsonl, json.dumps(entry, ensure_ascii=False))


def _listed(figures: dict[str, float]) -> str:
    units = {"knn": " %", "linear": " %"}
    return ", ".join(f"{k} {value:.4g}{units.get(k, '')}" for k, value in figures.items())


def read_log(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's `log.csv`, oldest first; empty where there is none.

    Each row has the columns that were measured at its step. A last line that a crash cut off is
    left out.

    Raises:
        RunError: The log is damaged.
    """
    return [row for row, _ in _csv_lines(folder / _CSV)]


def read_events(folder: Path, kind: str) -> list[tuple[int, str]]:
    """Step and text of the events of one kind in a run's `log.jsonl`, oldest first.

    Raises:
        RunError: The log is damaged.
    """
    entries = (entry for entry, _ in _json_lines(folder / _JSONL))
    return [(e["step"], e["text"]) for e in entries if e.get("event") == kind]


def read_initial(folder: Path) -> dict[str, float]:
    """Figures at initialisation, as the last event `initial` of `log.jsonl` has them in JSON.

    Empty where there is none.

    Raises:
        RunError: The log is damaged.
    """

    def parse(line: str) -> dict[str, float]:
        entry = _entry(line)
        if entry.get("event") != "initial":
            return {}
        figures = json.loads(entry["text"])
        return {name: float(value) for name, value in figures.items() if value is not None}

    path = folder / _JSONL
    found = [figures for figures, _ in _parse(path, _whole_lines(path), 1, parse) if figures]
    return found[-1] if found else {}


def _csv_lines(path: Path) -> list[tuple[dict[str, float], str]]:
    """Rows of a log and the lines they stand in."""
    lines = _whole_lines(path)
    if lines and lines[0] != ",".join(COLUMNS):
        raise RunError(
            f"{path}, line 1: the columns are {lines[0][:200]!r}, not those of a run's log: "
            "move the file away"
        )

    def parse(line: str) -> dict[str, float]:
        (values,) = csv.reader([line])
        row = {name: float(v) for name, v in zip(COLUMNS, values, strict=True) if v}
        if not 0 <= row.get("step", -1) < math.inf:
            raise SettingsError("it has no step")
        return row

    return _parse(path, lines[1:], 2, parse)


def _json_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    return _parse(path, _whole_lines(path), 1, _entry)


def _entry(line: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(line)
    entry["step"] = int(entry["step"])
    if "event" in entry and not isinstance(entry.get("text"), str):
        raise SettingsError("it has no text")
    return entry


def _parse(
    path: Path, lines: Iterable[str], first: int, parse: Callable[[str], dict[str, Any]]
) -> list[tuple[dict[str, Any], str]]:
    parsed = []
    for number, line in enumerate(lines, first):
        try:
            parsed.append((parse(line), line))
        except _DAMAGED as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RunError(
                f"{path}, line {number} is damaged: {line[:80]!r} ({reason}). "
                "Delete that line, or move the file away"
            ) from error
    return parsed


def _whole_lines(path: Path) -> list[str]:
    """Lines that were written to their end; a crash can only cut off the last one."""
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", errors="backslashreplace")
    return text.split("\n")[:-1]


def _append(path: Path, line: str) -> None:
    """Add a line as a whole or not at all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        data = f"{line}\n".encode(errors="backslashreplace")  # what JSON writes, too
        try:
            written = os.write(descriptor, data)
            if written < len(data):  # the disk is full: the next write says so
                os.write(descriptor, data[written:])
        except OSError as error:
            os.ftruncate(descriptor, size)
            reason = error.strerror or error
            raise OSError(error.errno, f"cannot write the log: {reason}", str(path)) from error
    finally:
        os.close(descriptor)


def _replace(path: Path, lines: list[str]) -> None:
    """Write a file beside the old one and put it in its place when it is on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OSError(error.errno, f"cannot write the log: {reason}", str(path)) from error


def _tensorboard(folder: Path, first_step: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # steps from purge_step on, which a lost part of the run has shown, disappear
    return SummaryWriter(str(folder), purge_step=first_step)
