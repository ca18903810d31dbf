"""The folder of one evaluation: found by its settings, locked, resumed by epoch."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import torch
from filelock import FileLock, Timeout
from torch import nn

from ..data.loading import usable_cpus
from ..distributed import Distributed
from ..encode import hash_texts
from ..errors import RunError
from ..parts import whole_file
from ..progress import skip
from .results import RESULT, Result, read_result

if TYPE_CHECKING:
    from .dense_training import DenseProbe
    from .probe import Probe

STATE = "state.pt"


def run_once(
    probe: Probe | DenseProbe,
    source: Any,
    method: str,
    protocol: dict[str, Any],
    work: Callable[[Any, Path], Result],
) -> tuple[Result, Path]:
    """The result of an evaluation, from its folder if it is finished, and the folder.

    `work` takes the probe without broken images and the folder; it returns the result, with the
    seconds of earlier sessions.
    """
    distributed = probe.distributed
    identity = {key: value for key, value in source.settings.items() if key != "versions"}
    settings = json.dumps({**probe.settings(), **identity, **protocol}, sort_keys=True)
    name = re.sub(r"[^\w.]+", "-", f"{probe.name}-{method}-{source.about['name']}").strip("-.")
    folder = Path(probe.config.out) / f"{name[-100:]}-{hash_texts([settings])[:8]}"
    lock = FileLock(folder / ".lock", timeout=0)

    def begin() -> Result | None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"another process evaluates in {folder} now: wait for it, or change --out"
            ) from None
        return read_result(folder / RESULT) if (folder / RESULT).exists() else None

    try:
        result, message = distributed.run_on_main(begin), "finished before; remove it to repeat"
        if result is None:
            started, message = time.perf_counter(), "finished"
            result = work(probe.without_broken(), folder)
            seconds = result.seconds + time.perf_counter() - started
            result = replace(result, seconds=seconds, **_about_run(distributed, source.settings))
        if distributed.is_main:
            result.write(folder)  # a finished one too: its row may have been removed
            (folder / STATE).unlink(missing_ok=True)
            print(f"{folder}: {message}", file=sys.stderr)
    finally:
        lock.release()
    return result, folder


def _about_run(distributed: Distributed, settings: dict[str, Any]) -> dict[str, Any]:
    """Hardware, versions and date of a result."""
    cuda = distributed.device.type == "cuda"
    return {
        "runtime": {
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "processes": distributed.world_size,
            "cpus": usable_cpus(),
            "precision": settings.get("precision", "float32"),
        },
        "versions": {
            "ijepa_zoo": sys.modules["ijepa_zoo"].__version__,  # a layer above: not imported
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "numpy", "pillow")},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class EpochState:
    """The state of an unfinished evaluation after its last finished epoch."""

    path: Path
    distributed: Distributed = field(default_factory=Distributed)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state, in rank 0 alone; tensors and plain values only."""
        with whole_file(self.path) as file:
            torch.save(state, file)

    def load(self) -> dict[str, Any] | None:
        """The last state, its tensors on the CPU; None if there is none."""
        if not self.distributed.run_on_main(self._exists):
            return None
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def _exists(self) -> bool:
        """Whether there is a state; raise RunError if its checksums do not match."""
        if not self.path.exists():
            return False
        try:
            with ZipFile(self.path) as file:
                damaged = file.testzip()
            found = torch.load(self.path, map_location="meta", weights_only=True)
            if "module" not in found:
                damaged = "it is of another version of the package"
        except Exception as error:  # whatever zip and pickle raise for damaged bytes
            damaged = f"{type(error).__name__}: {error}"
        if damaged is not None:
            raise RunError(f"'{self.path}' cannot be resumed ({damaged}): remove it to start again")
        return True


def train_epochs(
    probe: Probe | DenseProbe,
    loader: Any,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_epoch: Callable[[Iterator[Any], int], list[float]],
    epochs: int,
    folder: Path,
) -> tuple[list[float], float]:
    """Train from the last finished epoch to the end; the state is saved after each.

    `loader` has `training`, `steps`, `batch_size` and `bar`; `train_epoch` takes its batches and
    the number of an epoch, and returns losses. Returns the last losses, and the seconds of earlier
    sessions.
    """
    distributed, started = probe.distributed, time.perf_counter()
    state = EpochState(folder / STATE, distributed)
    losses: list[float] = []
    earlier, done = 0.0, 0
    if (found := state.load()) is not None:
        module.load_state_dict(found["module"])
        optimizer.load_state_dict(found["optimizer"])
        done, earlier, losses = found["epoch"], found["seconds"], found["losses"]
    skip(loader.bar, done * loader.steps * loader.batch_size)
    batches = loader.training(done, epochs)
    module.train()
    for epoch in range(done, epochs):
        losses = train_epoch(batches, epoch)
        shown = {"epoch": f"{epoch + 1}/{epochs}", "loss": f"{min(losses):.3g}"}
        loader.bar.set_postfix(**shown, refresh=False)
        if distributed.is_main:
            seconds = earlier + time.perf_counter() - started
            kept = {"epoch": epoch + 1, "losses": losses, "seconds": seconds}
            tensors = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            state.save({**kept, **tensors})
    module.eval()
    return losses, earlier
