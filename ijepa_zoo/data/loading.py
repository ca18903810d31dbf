"""Load items of a dataset in a given order, ahead of their use, in worker processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from ..errors import RunError, UserError

T = TypeVar("T")


def usable_cpus() -> int:
    """CPUs of this process: those it may use, divided by the ranks of the node under torchrun."""
    is_linux = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    if "SLURM_CPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return cpus  # Slurm binds each task to its CPUs
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def load_in_order(
    load: Callable[[int], T],
    order: Sequence[int],
    workers: int | None = None,
    pin_memory: bool = False,
) -> Iterator[T]:
    """`load(i)` for each number of `order`; 0 `workers` load in this process, None is one per CPU.

    A `UserError` of `load` is raised here, without its traceback in the worker.
    """
    workers = min(len(order), usable_cpus() if workers is None else workers)
    loader = DataLoader(
        _Caught(load),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # forked workers share a list of millions of images with this process, others copy it
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    try:
        for found in loader:
            if isinstance(found, UserError):
                raise found
            yield found
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise RunError(
            f"a process that decodes images ended ({str(error).splitlines()[0]}): memory or shared "
            "memory (/dev/shm) is short, so use fewer workers or smaller batches"
        ) from error


class _Caught(Dataset[Any]):
    """Returns a `UserError` instead of raising it, so that the main process raises it."""

    def __init__(self, load: Callable[[int], Any]) -> None:
        self.load = load

    def __getitem__(self, index: int) -> Any:
        try:
            return self.load(index)
        except UserError as error:
            return error


def _ignore_signals(worker: int) -> None:
    """Keep workers alive on signals to the process group: the main process ends its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # where the sender of a signal is known
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End on a SIGTERM of the main process, as DataLoader sends it, and ignore all others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
