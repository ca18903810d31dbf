"""The folder of one evaluation: found by its settings, locked, resumed by epoch."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..data.loading import usable_cpus
from ..distributed import Distributed
from ..encode import hash_texts
from ..errors import RunError
from ..extract import whole_file
from .results import RESULT, Result, read_result


def run_folder(out: str | Path, task: str, method: str, model: str, settings: Any) -> Path:
    """The folder of an evaluation: the same settings find it again, no others do.

    Args:
        out: Folder of all evaluations.
        task: Name of the task.
        method: Name of the probe.
        model: Name of the model.
        settings: Plain values; everything that decides the metrics.
    """
    shown = re.sub(r"[^\w.]+", "-", f"{task}-{method}-{model}").strip("-.")[-100:]
    return Path(out) / f"{shown}-{hash_texts([json.dumps(settings, sort_keys=True)])[:8]}"


def once(
    folder: Path, distributed: Distributed, precision: str, work: Callable[[], Result]
) -> Result:
    """The result that is in the folder, or that of `work`, which is then written there.

    Args:
        folder: See `run_folder`.
        distributed: All processes call this.
        precision: Of the encoder, for the record.
        work: Makes the result.

    Raises:
        RunError: Another process works in the folder, or it cannot be written.
        DataError: The table beside the folder is another one; the result is written.
    """
    with ExitStack() as stack:
        finished = distributed.run_on_main(lambda: _lock(folder, stack))
        if finished is not None:
            if distributed.is_main:
                finished.write_row(folder)  # a table that was in the way may be gone
                print(f"done before: {folder / RESULT}; remove it to repeat", file=sys.stderr)
            return finished
        result = replace(work(), **_about_run(distributed, precision))
        if distributed.is_main:
            result.write(folder)
        return result


def _lock(folder: Path, stack: ExitStack) -> Result | None:
    """Keep other evaluations out of the folder; returns the result that is in it already."""
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
    """The fields of a result that tell where and when."""
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


@dataclass(frozen=True)
class EpochState:
    """The state of an unfinished evaluation; after a kill it is that of the last whole epoch.

    Attributes:
        path: The file.
        distributed: The processes that load it together.
    """

    path: Path
    distributed: Distributed = field(default_factory=Distributed)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state, in rank 0 alone; tensors and plain values only.

        Raises:
            OSError: It cannot be written; the previous state is still there.
        """
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(self.path, temporary) as file:
                torch.save({**state, "sha256": _digest(state)}, file)
        except (OSError, RuntimeError) as error:
            # torch.save raises an error of its own about the file that it could not write
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = f"{cause.strerror or cause}: make room and repeat the command, which resumes"
            raise OSError(cause.errno, reason, str(self.path)) from cause

    def load(self) -> dict[str, Any] | None:
        """The last state, its tensors on the CPU; None where there is none.

        Rank 0 verifies the file, then the others read it too.

        Raises:
            RunError: It is damaged.
        """
        own: list[dict[str, Any]] = []

        def verify() -> bool:
            if self.path.exists():
                own.append(_read(self.path))
            return bool(own)

        if not self.distributed.run_on_main(verify):
            return None
        state: dict[str, Any] = own[0] if own else torch.load(self.path, map_location="cpu")
        del state["sha256"]
        return state

    def remove(self) -> None:
        """Remove it when the evaluation is finished."""
        self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        wrong = state["sha256"] != _digest({k: v for k, v in state.items() if k != "sha256"})
        reason = "its content has changed since it was written"
    except Exception as error:  # damaged bytes: whatever pickle and zip stumble over
        wrong, reason = True, type(error).__name__
    if wrong:
        raise RunError(
            f"'{path}', the state of an unfinished evaluation, is damaged ({reason}): remove it to "
            "start again"
        )
    return state


def _digest(state: Any) -> str:
    """SHA-256 of tensors and plain values, without a copy of the tensors."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)};".encode())
            for item in value.items():
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)};".encode())
            for entry in value:
                add(entry)
        else:
            digest.update(f"{value!r};".encode("utf-8", "backslashreplace"))

    add(state)
    return digest.hexdigest()
