"""Items in order from worker processes, on Linux and as on macOS and Windows."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from inputs import png, put

from ijepa_zoo.data.loading import load_in_order, usable_cpus
from ijepa_zoo.errors import DataError, RunError


class Squares:
    def __getitem__(self, index: int) -> int:
        if index == 13:
            raise DataError("13 is not an image")
        if index == 17:
            raise KeyError("a fault of the code")
        if index == 19:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01 * (index % 3))
        return index * index


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_in_order(workers: int) -> None:
    order = [5, 3, 4, 0, 3, *range(10)]
    assert list(load_in_order(Squares(), order, workers)) == [i * i for i in order]
    assert list(load_in_order(Squares(), [], workers)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_after_the_items_before_them(workers: int) -> None:
    items = load_in_order(Squares(), [1, 2, 13, 3], workers)
    assert [next(items), next(items)] == [1, 4]
    with pytest.raises(DataError, match=r"^13 is not an image$"):
        next(items)
    with pytest.raises(KeyError, match="a fault of the code"):
        list(load_in_order(Squares(), [17], workers))


def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(RunError):
        list(load_in_order(Squares(), [19, 1], 1))


def test_workers_outlast_signals_to_their_group() -> None:
    """Work that is asked to stop ends its step first."""

    class Signalled:
        def __getitem__(self, index: int) -> int:
            for name in ("INT", "TERM", "USR1"):  # from a process that is not the loader's
                subprocess.run(["kill", f"-{name}", str(os.getpid())], check=True)
            time.sleep(0.05)
            return index

    gc.collect()  # a loader that failed would be ended in the worker, by a thread of its own
    assert list(load_in_order(Signalled(), [1, 2, 3], 1)) == [1, 2, 3]


def test_cpus_are_shared_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert usable_cpus() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert usable_cpus() == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


# As on macOS and Windows: what POSIX and Linux add is missing, and workers are spawned.
ELSEWHERE = """
import os, signal, sys, multiprocessing
for module, names in ((os, ("sched_getaffinity", "fork", "mkfifo")),
                      (signal, ("SIGUSR1", "SIGUSR2", "pthread_sigmask", "sigwaitinfo"))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.modules["resource"] = None
multiprocessing.set_start_method("spawn", force=True)
import ijepa_zoo
from ijepa_zoo.data import loading, open_images
loading.sys = type("sys", (), {"platform": "win32"})

def work():
    images = open_images(sys.argv[1])
    print([target for _, target, _ in loading.load_in_order(images, [2, 0, 1], 1)])
"""


@pytest.mark.parametrize("guard", [True, False])
def test_macos_and_windows(tmp_path: Path, guard: bool) -> None:
    put(tmp_path, {"i/a/1.png": png(), "i/b/2.png": png(), "i/c/3.png": png()})
    script = tmp_path / "script.py"
    script.write_text(ELSEWHERE + ('if __name__ == "__main__":\n    work()' if guard else "work()"))
    command = [sys.executable, str(script), str(tmp_path / "i")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.strip() == "[2, 0, 1]") == guard, done.stderr
    assert ('if __name__ == "__main__":' in done.stderr) == (not guard)
