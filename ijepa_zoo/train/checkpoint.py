"""Training checkpoints: `torch.distributed.checkpoint`, written in the background, with hashes.

A checkpoint is a folder `step-000000600` with torch's files (one per process), `state.json` and
`manifest.json`, the size and SHA-256 of every file. It is written as `step-000000600.partial` and
renamed when it is complete. Tensors are stored by name with their global shape, so any number of
processes reads them, sharded or not.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from ..distributed import Distributed
from ..errors import CheckpointError, RunError, some
from .parallel import own_part

ResumeFrom = int | Literal["latest", "previous"]

LAST_SAVED = "last_checkpoint.txt"  # beside the folder, so that moved checkpoints are detected
_NAME = re.compile(r"step-(\d{9,})")
_MANIFEST, _STATE = "manifest.json", "state.json"
_WRITE_TIMEOUT = timedelta(minutes=30)  # until the slowest disk has written
_READERS = 4  # files that are hashed at a time
_ALONE = "torch.distributed is disabled, unavailable or uninit"  # a warning of torch


class CheckpointManager:
    """Saves the checkpoints of a run and loads them. Every process calls its methods together."""

    def __init__(
        self, folder: Path, distributed: Distributed, keep: int = 2, keep_every: int | None = None
    ) -> None:
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._distributed = distributed
        self._group: Any = None
        if distributed.world_size > 1:  # separate from training's, since saving is concurrent
            self._group = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT)
        pinned = distributed.device.type == "cuda"
        self._stager = BlockingAsyncStager(cache_staged_state_dict=pinned)
        self._writer = ThreadPoolExecutor(1, "checkpoint")  # Python waits for it at exit
        self._pending: Future[None] | None = None
        warnings.filterwarnings("ignore", _ALONE)  # permanently: filters are not thread-safe
        if distributed.is_main:
            _delete_unfinished(folder)

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: dict[str, Any]) -> None:
        """Copy the state to the CPU and write it in the background."""
        state = json.dumps({"step": step, "extra": extra})
        self.wait()
        staged = self._stager.stage(own_part(tensors, self._distributed))
        self._pending = self._writer.submit(self._write, step, staged, state)

    def wait(self) -> None:
        """Return when the last save is complete."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, which a resumed run repeats."""

        def delete() -> None:
            for saved in checkpoint_steps(self.folder):
                if saved > step:
                    _delete(checkpoint_path(self.folder, saved))

        self._distributed.run_on_main(delete)

    def load(
        self, step: int, tensors: Mapping[str, Tensor], folder: Path | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint into tensors in place, sharded in any way."""
        path = checkpoint_path(folder or self.folder, step)
        read_checkpoint(path, tensors, self._group)
        return _read_json(path / _STATE)["extra"]

    def _write(self, step: int, tensors: dict[str, Any], state: str) -> None:
        """Write a checkpoint, in the background."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        target = checkpoint_path(self.folder, step)
        partial = target.with_suffix(".partial")
        # The tensors are in main memory: looking ahead would wait for the GPU's stream.
        writer = FileSystemWriter(partial, per_thread_copy_ahead=0)
        group = self._group
        try:
            save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
            manifest = self._manifest(partial)
            if self._distributed.is_main:
                (partial / _STATE).write_text(state, encoding="utf-8")
                manifest[_STATE] = _entry(partial / _STATE)
                (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                if target.exists():  # the run was resumed from before it
                    _delete(target)
                partial.rename(target)
                (self.folder.parent / LAST_SAVED).write_text(str(step), encoding="utf-8")
                _delete_old(self.folder, self.keep, self.keep_every)
        except (OSError, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)  # make room
            cause: BaseException = error
            if isinstance(error, CheckpointException):  # on all processes, with every failure
                cause = next(iter(error.failures.values()))[0]
            reason = str(cause).partition("\n")[0]
            raise RunError(
                f"cannot write checkpoint {target}: {reason}; checkpoints before it, "
                f"{checkpoint_steps(self.folder)}, are intact"
            ) from error

    def _manifest(self, partial: Path) -> dict[str, Any]:
        """Sizes and hashes of all files; every process hashes those that it wrote."""
        rank = self._distributed.rank
        own = list(partial.glob(f"__{rank}_*")) + [partial / ".metadata"] * (rank == 0)
        entries = {file.name: _entry(file) for file in own}
        if self._group is None:
            return entries
        gathered: list[Any] = [None] * self._distributed.world_size
        dist.all_gather_object(gathered, entries, group=self._group)
        return {name: entry for part in gathered for name, entry in part.items()}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return folder / f"step-{step:09d}"


def split_checkpoint(path: Path) -> tuple[Path, ResumeFrom]:
    """Folder of the checkpoints, and which: of a run's folder, or of one of its checkpoints."""
    name = _NAME.fullmatch(path.name)
    return (path.parent, int(name[1])) if name else (path / "checkpoints", "latest")


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(name[1]) for file in folder.iterdir() if (name := _NAME.fullmatch(file.name)))


def select_checkpoint(folder: Path, resume_from: ResumeFrom = "latest") -> int | None:
    """Choose a checkpoint and compare its files with its manifest."""
    steps = checkpoint_steps(folder)
    if isinstance(resume_from, int) and resume_from not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {resume_from}: it has {steps}")
    if not steps:
        return None
    if resume_from != "previous":
        chosen = steps[-1] if resume_from == "latest" else resume_from
        try:
            verify(checkpoint_path(folder, chosen))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; take the newest intact one with --resume-from previous, or branch from "
                f"another one (--init {folder}/step-..., of {steps})"
            ) from error
        return chosen
    for step in reversed(steps):
        try:
            verify(checkpoint_path(folder, step))
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
        else:
            return step
    raise CheckpointError(
        f"no checkpoint in {folder} is intact: restore one, or start a new run in another folder"
    )


def verify(folder: Path) -> None:
    """Compare the files of a checkpoint with its manifest."""
    manifest = _read_json(folder / _MANIFEST)
    names = sorted({*manifest, _STATE, ".metadata", *(file.name for file in folder.glob("__*"))})
    with ThreadPoolExecutor(_READERS) as pool:
        intact = pool.map(lambda name: _is_intact(folder / name, manifest.get(name)), names)
        for name, is_intact in zip(names, intact):
            if not is_intact:
                raise CheckpointError(f"{folder / name} is missing or damaged")
    step = _read_json(folder / _STATE)["step"]
    if checkpoint_path(folder.parent, step).name != folder.name:
        raise CheckpointError(f"{folder} has the checkpoint of step {step}")


def read_checkpoint(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Read a checkpoint into tensors in place: all of it, or all of some of its networks."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    entries: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    wanted = {name: list(tensor.shape) for name, tensor in tensors.items()}
    networks = {name.partition(".")[0] for name in wanted}
    stored = {
        name: list(entry.size)
        for name, entry in entries.items()
        if name.partition(".")[0] in networks
    }
    names = [name for name in stored.keys() | wanted if stored.get(name) != wanted.get(name)]
    if names:
        differences = [f"{name} {stored.get(name)} instead of {wanted.get(name)}" for name in names]
        raise CheckpointError(
            f"{folder} does not match the networks of the settings: {some(differences)}; use the "
            "settings of its run, or another folder"
        )
    warnings.filterwarnings("ignore", _ALONE)
    load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is missing or damaged")
    return content


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def _is_intact(file: Path, entry: dict[str, Any] | None) -> bool:
    try:
        return _entry(file) == entry
    except OSError:
        return False


def _delete_old(folder: Path, keep: int, keep_every: int | None) -> None:
    steps = checkpoint_steps(folder)
    kept = {*steps[-keep:], *(saved for saved in steps if keep_every and saved % keep_every == 0)}
    for saved in steps:
        if saved not in kept:
            _delete(checkpoint_path(folder, saved))


def _delete(checkpoint: Path) -> None:
    """Rename first: a checkpoint that is half deleted must not look damaged."""
    unfinished = checkpoint.with_suffix(".deleted")
    checkpoint.rename(unfinished)
    shutil.rmtree(unfinished)


def _delete_unfinished(folder: Path) -> None:
    """Delete checkpoints that were being written or deleted during a crash."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.suffix in (".partial", ".deleted") and _NAME.fullmatch(path.stem):
                shutil.rmtree(path)
