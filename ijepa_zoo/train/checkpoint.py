"""Training checkpoints: one safetensors file with every tensor, the step and the settings.

A file is written under a temporary name, flushed to the disk and renamed, so a name that ends in
`.safetensors` is always a whole checkpoint; the previous one stays beside it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..weights.layouts import CheckpointError

_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")
_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `step` updates.

    Attributes:
        step: Updates done.
        config: The run's settings, JSON values.
        tensors: `encoder.*`, `predictor.*`, `target_encoder.*` and `optimizer.*`.
    """

    step: int
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def network(self, name: str) -> dict[str, torch.Tensor]:
        """State dict of one network: `encoder`, `predictor` or `target_encoder`."""
        start = f"{name}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into `folder` and remove all but the newest two.

    Args:
        folder: The run's folder; must exist.
        checkpoint: What to write.

    Returns:
        The file written.

    Raises:
        OSError: The file could not be written, e.g. a full disk; older checkpoints stay untouched.
    """
    path = folder / f"checkpoint-{checkpoint.step:09d}.safetensors"
    temporary = path.with_suffix(".partial")
    metadata = {"step": str(checkpoint.step), "config": json.dumps(checkpoint.config)}
    tensors = {k: v.detach().contiguous() for k, v in checkpoint.tensors.items()}
    try:
        save_file(tensors, temporary, metadata)
        _sync(temporary)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write checkpoint {temporary}: {error}") from error
    os.replace(temporary, path)
    _sync(folder)
    for old in list_checkpoints(folder)[:-_KEEP]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a run's folder, oldest step first."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the newest one of a folder.

    Args:
        path: A checkpoint file or a run's folder.

    Raises:
        FileNotFoundError: There is no checkpoint at `path`.
        CheckpointError: The file is broken. Nothing else is read in its place.
    """
    if path.is_dir():
        found = list_checkpoints(path)
        if not found:
            raise FileNotFoundError(f"{path} holds no checkpoint-*.safetensors")
        path = found[-1]
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Checkpoint(int(metadata["step"]), json.loads(metadata["config"]), tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        others = [str(p) for p in list_checkpoints(path.parent) if p != path]
        hint = f"delete it to go on from {others[-1]}" if others else "there is no older one"
        raise CheckpointError(
            f"checkpoint {path} is broken or not a training checkpoint "
            f"({type(error).__name__}: {error}); {hint}"
        ) from error


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk (folders cannot be opened on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
