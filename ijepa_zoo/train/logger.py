"""The log of a run: rows in `log.csv`, TensorBoard or wandb, events in `events.jsonl`.

The first columns of `log.csv` are those of the official repository.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from ..errors import MissingPackageError, RunError, SettingsError
from .config import LogConfig, PretrainConfig

COLUMNS = (
    *("epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)"),
    *("step", "lr", "weight_decay", "momentum", "images_per_second", "mfu", "data_wait"),
    *("grad_encoder", "grad_predictor", "update_encoder", "update_predictor"),
    "regularizer",
    *("rankme", "spread", "cosine", "ema_distance", "position_variance", "image_variance"),
    *("knn", "linear"),
)
_CSV, _EVENTS = "log.csv", "events.jsonl"
_OFFICIAL = {"context_tokens": "mask-A", "target_tokens": "mask-B"}
_MEANS = ("loss", "regularizer", "context_tokens", "target_tokens")
_SLOW_DATA = 0.1  # share of the time that the advice starts at


class RunLogger:
    """Writer of a run's log; a context manager, used by rank 0 only.

    Rows and events of the steps from `first_step` on are removed: a resumed run repeats them. So
    is a last line that a crash cut off.

    Args:
        folder: The run's folder; must exist.
        first_step: Updates done so far.
        config: Settings; `log.to` says where rows go.

    Raises:
        MissingPackageError: TensorBoard or wandb is not installed.
        RunError: The existing log is damaged; it is left as it is.
        OSError: The log cannot be written; earlier rows stay.
    """

    def __init__(self, folder: Path, first_step: int, config: PretrainConfig) -> None:
        check_log_targets(config.log)
        self._csv, self._events = folder / _CSV, folder / _EVENTS
        rows = [_csv_line(row) for row in read_log(folder) if row["step"] < first_step]
        events = [json.dumps(e) for e in _read_events(self._events) if e["step"] < first_step]
        _replace(self._csv, [",".join(COLUMNS), *rows])
        _replace(self._events, events)
        self._rows, self._advised = 0, False
        self._board: Any = None
        self._wandb: Any = None
        if "tensorboard" in config.log.to:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides earlier values of the steps from purge_step on
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        if "wandb" in config.log.to:
            self._wandb = _wandb_run(folder, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error[0] is not None))

    def write(self, row: dict[str, float]) -> None:
        """Log a row, and advise once if updates wait for data.

        Args:
            row: Values by column, see `COLUMNS`. `step` is required: updates done before the last.

        Raises:
            ValueError: A column is unknown.
            OSError: The row cannot be written, e.g. because the disk is full.
        """
        if unknown := row.keys() - set(COLUMNS):
            raise ValueError(f"not columns of the log: {unknown}")
        step, values = int(row["step"]), {k: v for k, v in row.items() if k != "step"}
        _append(self._csv, _csv_line(row))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        self._rows += 1  # the first one includes the start of the loader
        if self._rows > 1 and not self._advised and row.get("data_wait", 0.0) > _SLOW_DATA:
            self._advised = True
            self.event(step, "advice", _data_advice(row["data_wait"]))

    def event(self, step: int, kind: str, text: str) -> None:
        """Write an event to `events.jsonl` and stderr.

        Args:
            step: Its update, as in `write`.
            kind: One word such as `warning`, `skipped` or `advice`.
            text: What happened.
        """
        self._record(step, kind, text=text)
        shown = text.encode(errors="backslashreplace").decode()  # file names that are not UTF-8
        tqdm.write(f"{kind}: {shown}", file=sys.stderr)

    def initial(self, metrics: dict[str, float]) -> None:
        """Log and show the metrics at initialization; `read_initial` returns them."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._record(0, "initial", metrics=finite)
        tqdm.write(f"at initialization: {_listed(metrics)}", file=sys.stderr)

    def final(self, metrics: dict[str, float], initial: dict[str, float]) -> None:
        """Show the metrics at the end beside those at initialization."""
        if shown := {name: value for name, value in metrics.items() if name in initial}:
            tqdm.write(f"at initialization: {_listed(initial)}", file=sys.stderr)
            tqdm.write(f"at the end:        {_listed(shown)}", file=sys.stderr)

    def _record(self, step: int, kind: str, **content: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"step": int(step), "kind": kind, **content, "time": time}
        _append(self._events, json.dumps(entry))


class Meter:
    """Means over the steps since the last row.

    Args:
        batch_size: Images of a step, over all processes.
        epoch_steps: Steps of an epoch.
        flops_per_image: See `training_flops`.
        peak_flops: Of a device, see `peak_flops`; None if unknown.
        world_size: Number of devices.
    """

    def __init__(
        self,
        batch_size: int,
        epoch_steps: int,
        flops_per_image: float,
        peak_flops: float | None,
        world_size: int,
    ) -> None:
        self.batch_size, self.epoch_steps = batch_size, epoch_steps
        self.flops_per_image = flops_per_image
        self.peak_flops = peak_flops and peak_flops * world_size
        self._steps: list[dict[str, float]] = []
        self._seconds = self._waited = 0.0

    def update(self, metrics: dict[str, float], seconds: float, waited: float) -> None:
        """Add a step.

        Args:
            metrics: Its metrics and rates.
            seconds: Time of the whole step.
            waited: Part of that time spent waiting for data.
        """
        self._steps.append(metrics)
        self._seconds += seconds
        self._waited += waited

    def row(self, step: int) -> dict[str, float]:
        """The row of the log after `step` updates; starts the next window.

        Loss, regularizer, numbers of tokens and times are means, other values those of the last
        step. `data_wait` is the share of the time spent waiting for data, `mfu` the achieved share
        of the devices' peak FLOP/s. Empty if all steps were skipped.
        """
        if not self._steps:
            return {}
        values = dict(self._steps[-1])
        for name in _MEANS:
            if name in values:
                values[name] = math.fsum(s[name] for s in self._steps) / len(self._steps)
        rate = self.batch_size * len(self._steps) / self._seconds
        row = {_OFFICIAL.get(name, name): value for name, value in values.items()} | {
            "epoch": (step - 1) // self.epoch_steps + 1.0,
            "itr": (step - 1.0) % self.epoch_steps,
            "step": step - 1.0,
            "time (ms)": 1000 * self._seconds / len(self._steps),
            "images_per_second": rate,
            "data_wait": self._waited / self._seconds,
        }
        if self.peak_flops:
            row["mfu"] = rate * self.flops_per_image / self.peak_flops
        self._steps, self._seconds, self._waited = [], 0.0, 0.0
        return row


def check_log_targets(log: LogConfig) -> None:
    """Check that the packages for `log.to` are installed.

    Raises:
        MissingPackageError: One of them is not.
    """
    for name in log.to:
        if name == "csv":
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise MissingPackageError(f"log.to={name} needs {name}: pip install {name}")


def read_log(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's `log.csv`, oldest first; empty if there is none.

    Each row has the columns that were measured at its step. A last line that a crash cut off is
    left out.

    Raises:
        RunError: The log is damaged.
    """
    path = folder / _CSV
    header, *lines = _whole_lines(path) or ["step"]
    names, rows = header.split(","), []
    if not {"step"} <= set(names) <= set(COLUMNS):
        raise RunError(f"{path}, line 1: {header[:80]!r} is not the header of a run's log")
    for number, line in enumerate(lines, 2):
        try:
            row = {k: float(v) for k, v in zip(names, line.split(","), strict=True) if v}
            int(row["step"])
        except (ValueError, KeyError, OverflowError) as error:
            raise _damaged(path, number, line) from error
        rows.append(row)
    return rows


def read_initial(folder: Path) -> dict[str, float]:
    """A run's metrics at initialization, from `events.jsonl`; empty if there are none.

    Raises:
        RunError: The file is damaged.
    """
    found: dict[str, float] = {}
    for event in _read_events(folder / _EVENTS):
        if event["kind"] == "initial":
            found = event["metrics"]
    return found


def _read_events(path: Path) -> list[dict[str, Any]]:
    events = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            event = json.loads(line)
            event["step"], event["kind"] = int(event["step"]), str(event["kind"])
            if event["kind"] == "initial":
                event["metrics"] = {k: float(v) for k, v in event["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _damaged(path, number, line) from error
        events.append(event)
    return events


def _damaged(path: Path, number: int, line: str) -> RunError:
    return RunError(f"{path}, line {number} is damaged: {line[:80]!r}: delete that line")


def _whole_lines(path: Path) -> list[str]:
    """Lines up to the last line break; a crash can cut off what follows it."""
    if not path.exists():
        return []
    return path.read_bytes().decode(errors="backslashreplace").split("\n")[:-1]


def _csv_line(row: dict[str, float]) -> str:
    return ",".join(f"{row[name]:.9g}" if name in row else "" for name in COLUMNS)


def _listed(metrics: dict[str, float]) -> str:
    units = {"knn": " %", "linear": " %"}
    return ", ".join(f"{k} {value:.4g}{units.get(k, '')}" for k, value in metrics.items())


def _append(path: Path, line: str) -> None:
    _write(path, "a", f"{line}\n")


def _replace(path: Path, lines: Iterable[str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    _write(partial, "w", "".join(f"{line}\n" for line in lines))
    partial.replace(path)


def _write(path: Path, mode: str, text: str) -> None:
    try:
        with path.open(mode, encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        reason = f"cannot write the log: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from error


def _data_advice(share: float) -> str:
    text = (
        f"waiting for data takes {share:.0%} of the time: use more runtime.workers if cores are "
        "idle, or images with fewer pixels on disk"
    )
    if importlib.util.find_spec("torchcodec") is None:
        text += ", or decode JPEG files faster: pip install torchcodec"
    return text


def _wandb_run(folder: Path, config: PretrainConfig) -> Any:
    """A run of wandb, the same one on resume; it ignores rows of steps that it has."""
    import wandb

    id_file = folder / "wandb.id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="ascii")
    try:
        return wandb.init(
            project="ijepa_zoo",
            name=folder.resolve().name,
            id=id_file.read_text(encoding="ascii"),
            resume="allow",
            config=config.model_dump(mode="json"),
            dir=str(folder),
        )
    except wandb.Error as error:
        raise SettingsError(
            f"log.to=wandb: {error}: run `wandb login`, or set WANDB_MODE=offline"
        ) from error
