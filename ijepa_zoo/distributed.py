"""Processes started by torchrun or Slurm: environment, devices and collectives."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DistributedError, UserError

T = TypeVar("T")

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_groups = itertools.count()  # started by this process; all processes start the same ones


@dataclass(frozen=True)
class Distributed:
    """This process among those of the run; by default the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the processes of a tensor of equal shape; the same on all of them."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Rows `[m, ...]` of all processes in the order of ranks, `[world_size * m, ...]`."""
        if self.world_size == 1:
            return tensor
        own = tensor.detach().contiguous()
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own)
        return torch.cat(rows)

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """As `all_gather`, of numbers of rows that may differ between processes."""
        if self.world_size == 1:
            return rows
        counts = self.all_gather(torch.tensor([len(rows)])).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = torch.split(self.all_gather(padded), max(1, max(counts)))
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values of a tensor of equal shape, in place on the other processes."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, any picklable object, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all processes, any picklable objects, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0; every process returns its value or raises its error.

        The value must be picklable; errors are a `UserError` or an `OSError`.
        """
        outcome: Any = None
        if self.is_main:
            try:
                outcome = function()
            except (UserError, OSError) as error:
                if self.world_size == 1:
                    raise
                outcome = error
        outcome = self.broadcast_object(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_reduce(torch.zeros(1))


@contextmanager
def init_distributed(device: str = "auto", timeout: float = 600.0) -> Iterator[Distributed]:
    """Initialize torch.distributed in processes started by torchrun or Slurm.

    When a process fails, torchrun ends the others, and so does Slurm with
    `srun --kill-on-bad-exit=1`. A collective raises after `timeout` seconds.
    """
    found = read_environment(os.environ)
    if found is None:
        yield Distributed(device=choose_device(device))
        return
    rank, world_size, local_rank, local_world_size = found
    chosen = choose_device(device, local_rank, world_size)
    owns_group = not dist.is_initialized()
    if owns_group:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        # Each group has its own name, so that a process never finds addresses of an earlier group.
        store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"ijepa_zoo {next(_groups)}", _store(rank, world_size, limit)
        )
        store.set_timeout(limit)
        if chosen.type == "cuda":
            refuse_shared_gpu(store, str(torch.cuda.get_device_properties(chosen).uuid))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
    yield Distributed(rank, world_size, local_rank, local_world_size, chosen)
    if owns_group:  # not after an error, when destroying the group would wait for the others
        dist.destroy_process_group()
        # gloo's threads may still free a tensor of the last collective, which crashes a process
        # that exits meanwhile (https://github.com/pytorch/pytorch/pull/179291)
        time.sleep(0.1)


@lru_cache(maxsize=1)
def _store(rank: int, world_size: int, timeout: timedelta) -> Any:
    """The store of the job, kept open, since it may be closed when a process opens it again."""
    from torch.distributed.rendezvous import rendezvous  # not in builds without distributed

    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return store


def read_environment(environment: MutableMapping[str, str]) -> tuple[int, int, int, int] | None:
    """Rank, world size, local rank and local world size; None for a single process.

    Under srun without torchrun, torch's variables are added to `environment` from Slurm's.
    """
    if not any(environment.get(name) for name in _TORCHRUN):
        if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) == 1:
            return None
        environment.update(_from_slurm(environment))
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in _TORCHRUN[:3])
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE") or 1)
        fits = 0 <= rank < world_size and 0 <= local_rank < world_size
    except (KeyError, ValueError):
        fits = False
    if not fits or not all(environment.get(name) for name in _TORCHRUN):
        found = ", ".join(f"{name}={environment.get(name)}" for name in _TORCHRUN)
        raise DistributedError(
            f"{found} are not those of a process of a job: start with torchrun --nproc-per-node "
            "NUMBER_OF_GPUS -m ijepa_zoo COMMAND ..."
        )
    return rank, world_size, local_rank, local_world_size


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables of a Slurm step; the first host of `node[01-04],x` is `node01`."""
    nodes = environment.get("SLURM_STEP_NODELIST", "127.0.0.1")
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    # steps of one job may run at the same time, on the same node
    job, step = (int(environment.get(f"SLURM_{name}") or 0) for name in ("JOB_ID", "STEP_ID"))
    return {
        "RANK": environment.get("SLURM_PROCID", ""),
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
        "LOCAL_WORLD_SIZE": tasks[0] if tasks else "1",
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20_000 + (job + 1009 * step) % 20_000),
    }


def refuse_shared_gpu(store: Any, uuid: str) -> None:
    """Raise a `DistributedError` if an earlier process of the group has the same GPU."""
    if store.add(f"GPU {uuid}", 1) > 1:
        raise DistributedError(
            f"several processes of a node have the same GPU ({uuid}): start one process per GPU, "
            "with the device cuda instead of a numbered one"
        )


def choose_device(name: str = "auto", local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device of this process, `auto` or torch's name; a GPU becomes the current one."""
    if name == "auto":
        mps = world_size == 1 and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.zeros(1, device=device).cpu()
            return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise DistributedError(f"device {name!r} cannot be used here: {reason}") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index
    if index is None:
        index = 0 if count == 1 else local_rank  # some launchers show a process its own GPU only
    if index >= count:
        raise DistributedError(
            f"device {name!r} of process {local_rank} needs GPU {index}, and torch "
            f"{torch.__version__} finds {count}: see nvidia-smi and CUDA_VISIBLE_DEVICES, start "
            "fewer processes, or use the device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def copy_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the CPU; calling the result waits for the copy."""
    if not tensor.is_cuda:
        return tensor.detach
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.detach(), non_blocking=True)
    done = torch.Event(tensor.device)
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait
