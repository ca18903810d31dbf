"""The folder of a run: its lock, its settings, and checks that it may be used."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..data.files import refuse_inside
from ..distributed import Distributed
from ..errors import RunError
from ..parts import whole_file
from ..weights.export import check_destination
from ..weights.writers import WRITTEN
from .checkpoint import LAST_SAVED, checkpoint_steps
from .config import PretrainConfig, describe_config, named_values, parse_config
from .precision import resolve_precision

_SETTINGS = "config.yaml"
_FREE = ("log.", "runtime.", "data.max_broken")  # the weights do not depend on these
_OLD = re.compile(r"^(machine:|  cut:)", re.MULTILINE)  # names of settings in version 0.1


def open_folder(out: str | Path, data: Any, distributed: Distributed, stack: ExitStack) -> Path:
    """Create a run's folder and lock it; rank 0 holds the lock for all."""
    folder = Path(out)
    refuse_inside(folder, data)

    def lock() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout:
            raise RunError(
                f"another process is training in {folder}: wait for it, or choose another folder"
            ) from None

    distributed.run_on_main(lock)
    return folder


def check_run(out: Path, config: PretrainConfig, device: torch.device) -> PretrainConfig:
    """Resolve `optim.precision=auto`, and refuse a folder that has a run of other settings."""
    check_destination(out / "export", WRITTEN, overwrite=True)
    if not checkpoint_steps(out / "checkpoints"):
        _check_not_lost(out)
        return resolve_precision(config, device)
    before = read_settings(out)
    config = resolve_precision(config, device, before)
    if differing := differences(before, config):
        raise RunError(
            f"{out} has a run with other settings ({'; '.join(differing)}): use those settings to "
            f"resume it, another folder for a new run, or --init {out} --resume-optimizer and "
            "another folder to continue it with these"
        )
    return config


def write_settings(out: Path, config: PretrainConfig) -> None:
    """Write the settings into a run's folder."""
    with whole_file(out / _SETTINGS) as file:
        file.write(describe_config(config).encode())


def read_settings(run: Path) -> PretrainConfig:
    """Settings of a run."""
    path = run / _SETTINGS
    try:
        text = path.read_text(encoding="utf-8")
        if _OLD.search(text):
            raise RunError(
                f"{run} is a run of ijepa-zoo 0.1, which has other settings: resume, export or "
                "plot it with that version"
            )
        return parse_config(text, str(path))
    except FileNotFoundError:
        raise RunError(f"{run} is not a pretraining run: it has no {_SETTINGS}") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged, or of another version: {error}") from error


def differences(before: PretrainConfig, now: PretrainConfig) -> list[str]:
    """Changed settings that affect the result, as `optim.lr: 0.001 then, 0.0005 now`."""
    then = named_values(before)
    return [
        f"{name}: {then[name]} then, {value} now"
        for name, value in named_values(now).items()
        if then[name] != value and not name.startswith(_FREE)
    ]


def _check_not_lost(out: Path) -> None:
    """Refuse to start over in the folder of a run whose checkpoints were moved away."""
    if (out / _SETTINGS).exists():
        read_settings(out)  # runs of 0.1 are refused
    if (out / LAST_SAVED).exists():
        raise RunError(
            f"{out} had a checkpoint of step {(out / LAST_SAVED).read_text()} but has no "
            f"checkpoints: move them back to {out / 'checkpoints'}, mount their disk, or use "
            "another folder for a new run"
        )
