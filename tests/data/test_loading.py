"""Items in order from worker processes, on Linux and as on macOS and Windows."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from inputs import png, put

from ijepa_zoo.data.loading import load_in_order, usable_cpus
from ijepa_zoo.errors import DataError, RunError


class Squares:
    def __getitem__(self, index):
        if index == 13:
            raise DataError("13 is not an image")
        if index == 17:
            raise KeyError("a fault of the code")
        if index == 19:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01 * (index % 3))
        return index * index


class Signalled:
    """Receives signals from a process that is not the loader's."""

    def __getitem__(self, index):
        for name in ("INT", "TERM", "USR1"):
            subprocess.run(["kill", f"-{name}", str(os.getpid())], check=True)
        time.sleep(0.05)
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_in_order_and_errors_after_them(workers):
    order = [5, 3, 4, 0, 3, *range(10), 13, 3]
    items = load_in_order(Squares().__getitem__, order, workers)
    assert [next(items) for _ in order[:-2]] == [i * i for i in order[:-2]]
    with pytest.raises(DataError, match=r"^13 is not an image$"):
        next(items)
    with pytest.raises(KeyError, match="a fault of the code"):
        list(load_in_order(Squares().__getitem__, [17], workers))
    assert list(load_in_order(Squares().__getitem__, [], workers)) == []


def test_workers_outlast_signals_to_their_group_and_a_killed_one_is_an_error():
    gc.collect()  # a loader that failed would be ended in the worker, by a thread of its own
    assert list(load_in_order(Signalled().__getitem__, [1, 2], 1)) == [1, 2]
    with pytest.raises(RunError):
        list(load_in_order(Squares().__getitem__, [19, 1], 1))


def test_cpus_are_shared_under_torchrun(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert usable_cpus() == 6
    for name, value, expected in (
        ("LOCAL_WORLD_SIZE", "7", 1),
        ("LOCAL_WORLD_SIZE", "2", 3),
        ("SLURM_CPUS_PER_TASK", "6", 6),
        ("TORCHELASTIC_RUN_ID", "a", 3),
    ):
        monkeypatch.setenv(name, value)
        assert usable_cpus() == expected


# As on macOS and Windows: what POSIX and Linux add is missing, and workers are not forked.
ELSEWHERE = """
import os, signal, sys, multiprocessing
for module, name in ((os, "sched_getaffinity"), (signal, "SIGUSR1"), (signal, "SIGUSR2")):
    if hasattr(module, name):
        delattr(module, name)
sys.modules["resource"] = None
from ijepa_zoo.data import loading, open_images
loading.sys = type("sys", (), {"platform": "win32"})

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    images = open_images(sys.argv[1])
    print([target for _, target, _ in loading.load_in_order(images.__getitem__, [2, 0, 1], 1)])
"""


def test_macos_and_windows(tmp_path):
    put(tmp_path, {"i/a/1.png": png(), "i/b/2.png": png(), "i/c/3.png": png()})
    (tmp_path / "script.py").write_text(ELSEWHERE)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "i")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[2, 0, 1]"], done.stderr
