"""The folder of one evaluation, and what a result says about the machine."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..data.loading import usable_cpus
from ..distributed import Distributed
from ..encode import hash_texts
from ..errors import RunError
from .result import RESULT, Result
from .result_files import read_result


def run_folder(out: str | Path, task: str, method: str, model: str, settings: Any) -> Path:
    """The folder of an evaluation among others: the same settings find it again, no others do.

    Args:
        out: Folder of all evaluations.
        task: Name of the task.
        method: Name of the probe.
        model: Name of the model.
        settings: Plain values; everything that decides the numbers.
    """
    shown = re.sub(r"[^\w.]+", "-", f"{task}-{method}-{model}").strip("-.")[-100:]
    return Path(out) / f"{shown}-{hash_texts([json.dumps(settings, sort_keys=True)])[:8]}"


def claim(folder: Path, distributed: Distributed, stack: ExitStack) -> Result | None:
    """Keep other evaluations out of the folder, for all processes.

    Returns:
        The result that is in it already, None where there is work to do.

    Raises:
        RunError: Another process works on it, or the folder cannot be written.
        DataError: There is a damaged result in it.
    """
    refusal, finished = None, None
    if distributed.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout:
            refusal = f"another process evaluates in {folder} now: wait for it, or change --out"
        except OSError as error:
            refusal = f"the folder {folder} cannot be used: {error.strerror or error}"
        if refusal is None and (folder / RESULT).exists():
            finished = read_result(folder / RESULT)
    refusal, finished = distributed.broadcast_object((refusal, finished))
    if refusal is not None:
        raise RunError(refusal)
    return finished


def once(
    folder: Path, distributed: Distributed, precision: str, work: Callable[[], Result]
) -> Result:
    """The result that is in the folder, or that of `work`, which is then written there.

    Args:
        folder: See `run_folder`.
        distributed: All of them must call this.
        precision: Of the encoder, for the record.
        work: Makes the result.

    Raises:
        RunError: Another process works on it.
        DataError: The table beside the folder is another one; the result is written.
    """
    with ExitStack() as stack:
        if (finished := claim(folder, distributed, stack)) is not None:
            if distributed.rank == 0:
                finished.enter(folder)  # a table that was in the way the first time may be gone
                print(f"done before: {folder / RESULT}; remove it to repeat", file=sys.stderr)
            return finished
        result = replace(work(), **about_run(distributed, precision))
        if distributed.rank == 0:
            result.write(folder)
        return result


def about_run(distributed: Distributed, precision: str) -> dict[str, Any]:
    """The fields of a :class:`Result` that tell where and when: machine, versions, date."""
    cuda = distributed.device.type == "cuda"
    name = torch.cuda.get_device_name(distributed.device) if cuda else _cpu_name()
    return {
        "machine": {
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
