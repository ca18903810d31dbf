"""Loader processes: which signals they heed, and what is said when one dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ..errors import DistributedError

T = TypeVar("T")


def heed_the_run_alone(worker: int) -> None:
    """A run that is asked to stop ends its step first, and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # where the sender of a signal is known
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_the_end, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_end(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def name_deaths(loaded: Iterable[T]) -> Iterator[T]:
    """What a loader gives.

    Raises:
        DistributedError: One of its processes died.
    """
    try:
        yield from loaded
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        what = str(error).splitlines()[0].rstrip(" .")
        raise DistributedError(
            f"a loader process died: {what}. Mostly memory or shared memory (/dev/shm) is short: "
            "lower machine.workers or machine.micro_batch_size"
        ) from error
