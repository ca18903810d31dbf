"""The log of a run: rows in `log.csv`, and in TensorBoard or wandb.

The first columns of `log.csv` are those of the official repository. Its first row, of step -1, has
the metrics before the first update. `broken` counts the images that could not be decoded so far.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from ..errors import MissingPackageError, RunError
from ..parts import whole_file
from .config import LogConfig, PretrainConfig

COLUMNS = (
    "epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)",
    "step", "lr", "weight_decay", "momentum", "images_per_second", "mfu", "data_wait", "broken",
    "grad_encoder", "grad_predictor", "regularizer",
    "rankme", "spread", "cosine", "ema_distance", "position_variance", "image_variance",
    "knn", "linear",
)  # fmt: skip
_CSV = "log.csv"
_OFFICIAL = {"context_tokens": "mask-A", "target_tokens": "mask-B"}
_MEANS = ("loss", "regularizer", "context_tokens", "target_tokens")


class RunLogger:
    """Writer of a run's log; a context manager, used by rank 0 only.

    Rows of the steps from `first_step` on are removed, since a resumed run repeats them; at step 0
    all are.
    """

    def __init__(self, folder: Path, first_step: int, config: PretrainConfig) -> None:
        self._csv = folder / _CSV
        rows = [row for row in read_log(folder) if first_step and row["step"] < first_step]
        with whole_file(self._csv) as file:
            file.write("\n".join([",".join(COLUMNS), *map(_csv_line, rows), ""]).encode())
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
        """Log values by column, see `COLUMNS`; `step` is the number of updates before the last."""
        with self._csv.open("a", encoding="utf-8", newline="") as file:
            file.write(f"{_csv_line(row)}\n")
        step = max(0, int(row["step"]))  # TensorBoard and wandb have no step -1
        values = {name: value for name, value in row.items() if name != "step"}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def initial(self, metrics: dict[str, float]) -> None:
        """Log and show the metrics before the first update."""
        self.write({"step": -1.0, **metrics})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        tqdm.write(f"at initialization: {shown}", file=sys.stderr)

    def final(self, metrics: dict[str, float], initial: dict[str, float]) -> None:
        """Show the metrics at the end, beside those at initialization if they are known."""
        shown = []
        for name, value in metrics.items():
            before = f" (was {initial[name]:.4g})" if name in initial else ""
            shown.append(f"{name} {value:.4g}{before}")
        tqdm.write(f"at the end: {', '.join(shown)}", file=sys.stderr)


class Meter:
    """Means over the steps since the last row; `peak_rate` is images/s at the peak FLOP/s."""

    def __init__(self, batch_size: int, epoch_steps: int, peak_rate: float | None) -> None:
        self.batch_size, self.epoch_steps = batch_size, epoch_steps
        self.peak_rate = peak_rate
        self._steps: list[dict[str, float]] = []
        self._seconds = self._waited = 0.0

    def update(self, metrics: dict[str, float], seconds: float, waited: float) -> None:
        """Add a step: its metrics, its time, and the part of it spent waiting for data."""
        self._steps.append(metrics)
        self._seconds += seconds
        self._waited += waited

    def row(self, step: int) -> dict[str, float]:
        """The row of the log after `step` updates; starts the next window.

        Loss, regularizer, numbers of tokens and times are means, other values those of the last
        step; `data_wait` and `mfu` are shares of the time and of the devices' peak FLOP/s.
        """
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
        if self.peak_rate:
            row["mfu"] = rate / self.peak_rate
        self._steps, self._seconds, self._waited = [], 0.0, 0.0
        return row


def check_log_targets(log: LogConfig) -> None:
    """Check that the packages for `log.to` are installed."""
    for name in {*log.to} - {"csv"}:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is not a package
            raise MissingPackageError(f"log.to={name} needs {name}: pip install {name}")


def read_log(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's `log.csv`, oldest first, each with the columns that were measured."""
    path = folder / _CSV
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # only up to the last line break: a crash can truncate the rest
        reader = csv.DictReader(text.split("\n")[:-1])
        rows = [{k: float(v) for k, v in line.items() if k in COLUMNS and v} for line in reader]
        if all("step" in row for row in rows):
            return rows
        reason = "a row has no step"
    except ValueError as error:
        reason = str(error)
    raise RunError(f"{path} is damaged ({reason}): repair it or move it away")


def _csv_line(row: Mapping[str, float]) -> str:
    return ",".join(f"{row[name]:.9g}" if name in row else "" for name in COLUMNS)


def _wandb_run(folder: Path, config: PretrainConfig) -> Any:
    """A run of wandb, the same one on resume; it ignores rows of steps that it has."""
    import wandb

    id_file = folder / "wandb.id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="ascii")
    return wandb.init(
        project="ijepa_zoo",
        name=folder.resolve().name,
        id=id_file.read_text(encoding="ascii"),
        resume="allow",
        config=config.model_dump(mode="json"),
        dir=str(folder),
    )
