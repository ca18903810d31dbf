"""The folder of one evaluation: found by its settings, locked, resumed by epoch."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from filelock import FileLock, Timeout

from ..data.loading import usable_cpus
from ..distributed import Distributed
from ..encode import hash_texts
from ..errors import RunError
from ..parts import whole_file
from .results import RESULT, Result, read_result

_VERSION = 2  # of the states of unfinished evaluations


def run_folder(out: str | Path, task: str, method: str, model: str, settings: Any) -> Path:
    """The folder of an evaluation, a function of its settings."""
    shown = re.sub(r"[^\w.]+", "-", f"{task}-{method}-{model}").strip("-.")[-100:]
    return Path(out) / f"{shown}-{hash_texts([json.dumps(settings, sort_keys=True)])[:8]}"


def once(
    folder: Path, distributed: Distributed, precision: str, work: Callable[[], Result]
) -> Result:
    """The result of the folder, or that of `work`, which is then written there."""
    with ExitStack() as stack:
        finished = distributed.run_on_main(lambda: _lock(folder, stack))
        if finished is not None:
            if distributed.is_main:
                finished.write_row(folder)  # the table may have been removed
                print(f"finished before: {folder}; remove it to repeat", file=sys.stderr)
            return finished
        result = replace(work(), **_about_run(distributed, precision))
        if distributed.is_main:
            result.write(folder)
            print(f"result: {folder}", file=sys.stderr)
        return result


def _lock(folder: Path, stack: ExitStack) -> Result | None:
    """Lock the folder; returns the result of a finished evaluation."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(folder / ".lock", timeout=0))
    except Timeout:
        raise RunError(
            f"another process evaluates in {folder} now: wait for it, or change --out"
        ) from None
    except OSError as error:
        raise RunError(f"{folder} cannot be used: {error.strerror or error}") from error
    return read_result(folder / RESULT) if (folder / RESULT).exists() else None


def _about_run(distributed: Distributed, precision: str) -> dict[str, Any]:
    """Hardware, versions and date of a result."""
    cuda = distributed.device.type == "cuda"
    name = torch.cuda.get_device_name(distributed.device) if cuda else _cpu_name()
    return {
        "runtime": {
            "device": name,
            "processes": distributed.world_size,
            "cpus": usable_cpus(),
            "precision": precision,
        },
        "versions": {
            "ijepa_zoo": sys.modules["ijepa_zoo"].__version__,  # a layer above: not imported
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "numpy", "pillow")},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def add_baselines(
    folder: Path, result: Result, values: dict[str, float], distributed: Distributed
) -> Result:
    """Add baselines to a finished result, also in its folder."""
    result = replace(result, baselines={**result.baselines, **values})
    if distributed.is_main:
        with FileLock(folder / ".lock"):
            result.write(folder)
    return result


@dataclass(frozen=True)
class EpochState:
    """The state of an unfinished evaluation after its last finished epoch."""

    path: Path
    distributed: Distributed = field(default_factory=Distributed)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state, in rank 0 alone; tensors and plain values only."""
        with whole_file(self.path) as file:
            torch.save({**state, "version": _VERSION}, file)

    def load(self) -> dict[str, Any] | None:
        """The last state, its tensors on the CPU; None if there is none."""
        if not self.distributed.run_on_main(self._exists):
            return None
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return state

    def _exists(self) -> bool:
        """Whether there is a state; raise RunError if its checksums do not match."""
        if not self.path.exists():
            return False
        try:
            with ZipFile(self.path) as file:
                damaged = file.testzip()
            found = torch.load(self.path, map_location="meta", weights_only=True)
            if found["version"] != _VERSION:
                damaged = "it is of another version of the package"
        except Exception as error:  # whatever zip and pickle raise for damaged bytes
            damaged = f"{type(error).__name__}: {error}"
        if damaged is not None:
            raise RunError(f"'{self.path}' cannot be resumed ({damaged}): remove it to start again")
        return True

    def remove(self) -> None:
        """Remove it when the evaluation is finished."""
        self.path.unlink(missing_ok=True)
