"""Stopping a run from outside without losing anything."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [  # Windows has no SIGUSR1
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved its state.

    Attributes:
        signal: The signal that asked; SIGTERM where another process received it.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect stop signals instead of ending in the middle of an update; a second Ctrl-C ends it.

    Outside the main thread, where Python allows no handlers, signals keep their meaning.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt(
                "stopped without saving; the same command goes on from the last checkpoint"
            )
        received.append(number)

    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
