"""The processes that share a run: joining them, and exchanging values between them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .rendezvous import Place, ProcessError, Survey, choose_device, meet, read_place

_NCCL_MARGIN = 60.0  # NCCL's own watchdog kills without a word: ours must come first
_PUT_DOWN = 0.1  # seconds that gloo's threads get at the end; they need some microseconds


class _LostError(RuntimeError):
    """An exchange with the other processes failed; the message says which."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: Number of this process.
        world: How many there are.
        local_rank: Number of this process on its machine.
        device: Where its networks live.
        local_world: How many there are on its machine.
        lost: Set when the others are lost: nothing more may wait for them.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    local_world: int = 1
    lost: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    _group: Any = field(default=None, repr=False)  # gloo; for everything on the CPU
    _timeout: float = field(default=600.0, repr=False)

    @classmethod
    def alone(cls, device: str = "auto") -> Processes:
        """A single process, whatever the environment says."""
        return cls(0, 1, 0, choose_device(device, Place()))

    def sum(self, tensor: Tensor, what: str = "the exchange of sums") -> Tensor:
        """Sum over the processes of a tensor of equal shape; the same result on all of them.

        Args:
            tensor: On the CPU or on `device`.
            what: Names the exchange in the message if a process is lost.
        """
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.detach().clone()
        with waiting(what):
            dist.all_reduce(total, group=self._group_for(tensor))
        return total

    def gather(self, tensor: Tensor, what: str = "the exchange of figures") -> Tensor:
        """Rows `[m, ...]` of all processes in the order of the ranks, `[world * m, ...]`."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        mine = tensor.detach().contiguous()
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        with waiting(what):
            dist.all_gather(rows, mine, group=self._group_for(tensor))
        return torch.cat(rows)

    def share(self, value: Any, what: str = "a value of process 0") -> Any:
        """Process 0's value (any picklable object), on every process."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with waiting(what):
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def barrier(self, what: str) -> None:
        """Return when every process has come here; `what` names the place in messages."""
        self.sum(torch.zeros(1), what)

    def to_host(self, tensor: Tensor) -> Arrival:
        """Start copying a tensor to the CPU; `read` it there while the device goes on working."""
        return Arrival(tensor, self._timeout)

    def _group_for(self, tensor: Tensor) -> Any:
        return None if tensor.is_cuda else self._group


class Arrival:
    """A tensor on its way from the device to the CPU."""

    def __init__(self, tensor: Tensor, timeout: float) -> None:
        self._host, self._timeout = tensor.detach(), timeout
        self._done: torch.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.Event(tensor.device)
            self._done.record()

    def read(self) -> Tensor:
        """The tensor on the CPU, as soon as the device has come so far.

        A GPU that waits for a lost process never comes so far, and synchronising with it could
        not be ended: hence the polling.
        """
        limit = time.monotonic() + self._timeout
        while self._done is not None and not self._done.query():
            if time.monotonic() > limit:
                raise _LostError(f"the GPU, which waits for them or works for {self._timeout:g} s")
            time.sleep(1e-4)
        return self._host


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Name the exchange that is under way, for the message if a process is lost in it."""
    try:
        yield
    except RuntimeError as error:
        if _tells_of_a_loss(error):
            raise _LostError(what) from error
        raise


def _tells_of_a_loss(error: BaseException) -> bool:
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and ("gloo" in text or "connection closed by peer" in text)
    )


@contextmanager
def join_processes(device: str = "auto", timeout: float = 600.0) -> Iterator[Processes]:
    """Join the other processes of the job, as `torchrun` or Slurm started them.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; where none is set, this is a
    single process and needs no process group. Within the context no process goes on alone: when
    one fails, dies or hangs, the others leave with a `ProcessError` that names it.

    Args:
        device: `auto` for the GPU of this process, or the CPU where there is none; otherwise
            `cuda`, `cpu` or another name of torch's.
        timeout: Seconds after which a process that does not answer is lost.

    Raises:
        ProcessError: The environment is wrong, the processes do not find each other within a
            minute, a GPU is missing, or a process is lost later.
    """
    place = read_place(os.environ)
    chosen = choose_device(device, place)
    if place.world == 1:
        yield Processes(0, 1, place.local_rank, chosen)
        return

    survey, neighbours = meet(place, chosen)
    lost = threading.Event()
    try:
        group = _connect(place, survey, chosen, timeout)
        yield Processes(
            place.rank, place.world, place.local_rank, chosen, neighbours, lost, group, timeout
        )
    except BaseException as error:
        if not isinstance(error, _LostError) and not _tells_of_a_loss(error):
            survey.end(f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        lost.set()
        what = str(error) if isinstance(error, _LostError) else "the other processes"
        cause = error.__cause__ or error
        raise ProcessError(survey.explain(what, timeout, str(cause).strip())) from cause
    finally:
        if chosen.type == "cpu":
            disconnect()
    disconnect()  # only here for a GPU: after a loss its group would wait for the lost process


def disconnect() -> None:
    """Leave the process groups, and let gloo's threads put down what they still hold."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    # A network that still refers to the group keeps its threads. One that is about to free a
    # tensor of the last exchange needs Python for it, and aborts a process that ends meanwhile
    # (https://github.com/pytorch/pytorch/pull/179291).
    time.sleep(_PUT_DOWN)


def _connect(place: Place, survey: Survey, device: torch.device, timeout: float) -> Any:
    """Make the group for gradients (torch's default) and the one for small exchanges."""
    import torch.distributed as dist

    seconds = timeout + (_NCCL_MARGIN if device.type == "cuda" else 0.0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=survey.part("gradients"),
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=seconds),
    )
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
