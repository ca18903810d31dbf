"""Training checkpoints: `torch.distributed.checkpoint`, in the background, with checksums.

Tensors are stored by name with their global shape, so any number of processes reads them, sharded
or not. `checkpoint_folder` has the layout on disk.
"""

from __future__ import annotations

import atexit
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor

from ..distributed import Distributed
from ..errors import CheckpointError, RunError, SettingsError
from . import checkpoint_folder as layout
from .parallel import own_part

_LONGEST_WRITE = timedelta(minutes=30)  # processes wait for the slowest disk; a dead one ends it
_EXIT = 60.0  # seconds that the end of the program waits for a save together with others


class Checkpoints:
    """The checkpoints of a run. Every process makes one, and calls its methods together.

    Args:
        folder: Where they lie; on a disk that all processes see. Made by the first `save`.
        distributed: The processes of the run.
        keep: How many of the newest stay.
        keep_every: Those at multiples of so many steps stay too; None for none.

    Raises:
        CheckpointError: `folder` is there and is no folder.
        ValueError: `keep` or `keep_every` is below 1.
    """

    def __init__(
        self, folder: Path, distributed: Distributed, keep: int = 2, keep_every: int | None = None
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise SettingsError(f"keep is {keep} and keep_every {keep_every}: at least 1")
        layout.refuse_a_file(folder)
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._distributed = distributed
        self._group: Any = None
        if distributed.world_size > 1:  # of its own: saving must not mix with training's exchanges
            import torch.distributed as dist
            from torch.distributed.device_mesh import init_device_mesh

            self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
            self._mesh = init_device_mesh("cpu", (distributed.world_size,))
        self._thread = Thread()
        self._pending: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}  # the same memory for every save
        _accept_single_process()

    def save(
        self, step: int, tensors: Mapping[str, Tensor], about: dict[str, Any], wait: bool = False
    ) -> None:
        """Copy the state to the CPU and write it in the background.

        Waits for the save before, if that is still under way. A failure is raised by the next
        `save` or `wait`; then everything earlier is intact.

        Args:
            step: Updates done.
            tensors: By name; sharded ones (DTensor) on every process, others equal on all.
            about: JSON values to keep with them.
            wait: Return when the checkpoint is complete.

        Raises:
            RunError: This save, with `wait`, or the one before it failed.
            TypeError: `about` holds other than JSON values.
        """
        text = json.dumps(about)
        self.wait()
        staged = self._copy(own_part(tensors, self._distributed))
        self._start(lambda: self._write(step, staged, text))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is complete.

        Raises:
            RunError: It failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
            atexit.unregister(self._finish)

    def _start(self, job: Callable[[], None]) -> None:
        """Run `job` in the background."""
        pending: Future[None] = Future()

        def run() -> None:
            try:
                job()
                pending.set_result(None)
            except BaseException as error:  # raised by wait()
                pending.set_exception(error)

        self._pending, self._thread = pending, Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        atexit.register(self._finish)

    def _finish(self) -> None:
        """Wait for the save at the end of the program; not for ever, as others may have ended."""
        self._thread.join(_EXIT if self._distributed.world_size > 1 else None)

    def complete(self) -> list[int]:
        """Steps whose checkpoints were written to the end, oldest first."""
        return layout.steps(self.folder)

    def choose(self, resume_from: int | Literal["latest", "previous"] = "latest") -> int | None:
        """The step to go on from, after comparing its checkpoint with its checksums.

        A `.partial` folder of a crash during saving is announced and passed over.

        Args:
            resume_from: `latest`; `previous` for the newest that is not damaged, which is the
                latest where that is whole (it is announced then); or a step.

        Returns:
            A step for `load`, or None if nothing was saved yet.

        Raises:
            CheckpointError: The checkpoint is damaged or not there; names the file, and what can
                be used instead.
            ValueError: `resume_from` is none of these.
        """
        resume_from = layout.choice(resume_from)
        answer: int | str | None = None
        if self._distributed.rank == 0:
            try:
                answer = layout.choose(self.folder, resume_from)
            except CheckpointError as error:
                answer = str(error)
        answer = self._distributed.broadcast_object(answer)
        if isinstance(answer, str):
            raise CheckpointError(answer)
        return answer

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read a checkpoint that `choose` named into tensors in place, sharded in any way.

        Args:
            step: The checkpoint's step.
            tensors: By name, the same names and global shapes as were saved.

        Returns:
            The `about` that was saved.

        Raises:
            CheckpointError: Names or shapes differ; lists them.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        folder = layout.path(self.folder, step)
        reader, stored = _open(folder)
        layout.compare(stored, tensors, folder)
        load(
            dict(tensors),
            storage_reader=reader,
            process_group=self._group,
            no_dist=self._group is None,
        )
        return dict(layout.read(folder)["about"])

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Copies on the CPU, through pinned memory from a GPU."""
        from torch.distributed.tensor import DTensor

        copies: dict[str, Any] = {}
        for name, tensor in tensors.items():
            local = tensor.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            if name not in self._copies:
                new = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._copies[name] = new
            copy = copies[name] = self._copies[name].copy_(local, non_blocking=True)
            # In a group of one process the shard is the whole tensor.
            if isinstance(tensor, DTensor) and self._group is not None:
                sizes: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride()}
                copies[name] = DTensor.from_local(copy, self._mesh, tensor.placements, **sizes)
        if self._distributed.device.type == "cuda":
            torch.cuda.synchronize(self._distributed.device)
        return copies

    def _write(self, step: int, tensors: dict[str, Any], about: str) -> None:
        """Write, in the background; all processes end with the same error or with none."""
        partial = layout.path(self.folder, step, layout.PARTIAL)
        reason = self._agree(lambda: layout.prepare(partial))
        reason = reason or self._write_tensors(partial, tensors)
        reason = reason or self._agree(lambda: layout.complete(partial, step, json.loads(about)))
        if reason is not None:
            self._agree(lambda: shutil.rmtree(partial, ignore_errors=True))  # make room
            saved = self.complete()
            raise RunError(
                f"cannot write checkpoint {layout.path(self.folder, step)}: {reason}. "
                + (f"Those of steps {saved} are intact" if saved else "There is none before it")
            )
        keep = self.keep, self.keep_every
        if reason := self._agree(lambda: layout.thin_out(self.folder, step, *keep)):
            raise RunError(f"cannot delete checkpoints in {self.folder} that are due: {reason}")

    def _write_tensors(self, path: Path, tensors: dict[str, Any]) -> str | None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            save(
                tensors,
                storage_writer=FileSystemWriter(path),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            causes = [failure[0] for failure in error.failures.values()]
            return "; ".join(dict.fromkeys(layout.reason(cause, self.folder) for cause in causes))
        return None

    def _agree(self, action: Callable[[], None]) -> str | None:
        """Let process 0 act; why it failed, on every process."""
        box: list[str | None] = [None]
        try:
            if self._distributed.rank == 0:
                box = ["process 0 failed"]  # stays if another error passes through here
                action()
                box = [None]
        except OSError as error:
            box = [layout.reason(error, self.folder)]
        finally:
            if self._group is not None:
                import torch.distributed as dist

                dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def read_checkpoint(
    folder: Path, only: tuple[str, ...] = ("",)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read whole tensors in one process, without a process group, after checking the checksums.

    Args:
        folder: A run's `checkpoints` folder, for the newest, or a checkpoint's own.
        only: Beginnings of the names to read; all by default.

    Returns:
        Tensors by name, and the `about` that was saved with them.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = layout.newest(folder)
    about = layout.verify(folder)["about"]
    reader, stored = _open(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(only)
    }
    _accept_single_process()
    load(dict(tensors), storage_reader=reader, no_dist=True)
    return tensors, dict(about)


def _open(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """What reads a checkpoint, and the sizes and types of its tensors by name."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    reader = FileSystemReader(folder)
    try:
        return reader, reader.read_metadata().state_dict_metadata
    except (
        ValueError,
        TypeError,
        AttributeError,
        ImportError,
    ) as error:  # older torch than wrote it
        raise CheckpointError(
            f"checkpoint {folder} was written by torch {layout.read(folder)['torch']}, and torch "
            f"{torch.__version__} cannot read it ({error}): use that version or a later one"
        ) from error


def _accept_single_process() -> None:
    """Silence torch's notice of it; for good, as filters must not change while a thread saves."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
