"""Checkpoints: written in the background, hashed, and complete or not there."""

import os
import resource
import signal
import threading

import pytest
import several_processes
import torch
from small_run import saved_tensors

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import CheckpointError, RunError
from ijepa_zoo.train.checkpoint import (
    CheckpointManager,
    checkpoint_path,
    checkpoint_steps,
    read_checkpoint,
    select_checkpoint,
    verify,
)

ALONE = Distributed()
EXTRA = {"broken": 3, "initial": {"rankme": 1.5}}


def make(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "encoder.a.weight": torch.randn(300, 7, generator=generator),
        "target_encoder.a.weight": torch.randn(3, 2, generator=generator).bfloat16(),
        "optimizer.encoder.a.weight.step": torch.tensor(float(step)),
    }


def save(manager, *steps):
    for step in steps:
        manager.save(step, make(step), EXTRA)
    manager.wait()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_loads(manager, step):
    tensors = {name: torch.zeros_like(value) for name, value in make(step).items()}
    assert manager.load(step, tensors) == EXTRA
    assert same(tensors, make(step))


@pytest.fixture
def manager(tmp_path):
    """Checkpoints of steps 5 and 600."""
    manager = CheckpointManager(tmp_path / "checkpoints", ALONE)
    assert select_checkpoint(manager.folder) is None
    save(manager, 5, 600)
    return manager


def test_round_trip(manager):
    assert checkpoint_steps(manager.folder) == [5, 600]
    assert select_checkpoint(manager.folder, 5) == 5
    assert select_checkpoint(manager.folder) == select_checkpoint(manager.folder, "previous") == 600
    for step in (5, 600):
        assert_loads(manager, step)
        assert same(saved_tensors(checkpoint_path(manager.folder, step)), make(step))
    part = {"encoder.a.weight": torch.zeros(300, 7)}  # one network
    read_checkpoint(checkpoint_path(manager.folder, 600), part)
    assert torch.equal(part["encoder.a.weight"], make(600)["encoder.a.weight"])
    with pytest.raises(CheckpointError, match=r"step 6: it has \[5, 600\]"):
        select_checkpoint(manager.folder, 6)


def test_later_updates_are_not_seen(tmp_path, monkeypatch):
    from torch.distributed.checkpoint import FileSystemWriter

    resume, write = threading.Event(), FileSystemWriter.write_data
    monkeypatch.setattr(
        FileSystemWriter, "write_data", lambda *args: resume.wait(20) and write(*args)
    )
    manager, tensors = CheckpointManager(tmp_path, ALONE), make(1)
    manager.save(1, tensors, {})
    for tensor in tensors.values():
        tensor.add_(1)
    assert checkpoint_steps(tmp_path) == []  # `save` did not wait for the disk
    resume.set()
    manager.wait()
    assert same(saved_tensors(checkpoint_path(tmp_path, 1)), make(1))


def damage(checkpoint, name, how):
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
    elif how == "truncated":
        del content[-1]
    elif how == "swapped":
        content = (checkpoint.parent / "step-000000005" / name).read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how"),
    [("__0_0.distcp", "flipped"), (".metadata", "truncated"), ("__0_0.distcp", "missing"),
     ("state.json", "missing"), ("manifest.json", "truncated"), ("manifest.json", "missing"),
     ("__0_0.distcp", "swapped"), ("state.json", "swapped"), ("manifest.json", "swapped")],
)  # fmt: skip
def test_damage_is_named_and_skipped_only_on_request(manager, name, how):
    newest = checkpoint_path(manager.folder, 600)
    damage(newest, name, how)
    named = "step-000000600" if (name, how) == ("manifest.json", "swapped") else f"600/{name}"
    for choice in ("latest", 600):
        with pytest.raises(CheckpointError, match=f"{named}.*--resume-from prev"):
            select_checkpoint(manager.folder, choice)
    with pytest.raises(CheckpointError, match=named):
        verify(newest)
    with pytest.warns(UserWarning, match=named):
        assert select_checkpoint(manager.folder, "previous") == 5
    manager.delete_after(5)  # what was done later is done again
    assert checkpoint_steps(manager.folder) == [5]
    checkpoint_path(manager.folder, 5).rename(newest)
    with pytest.raises(CheckpointError, match="step-000000600 has the checkpoint of step 5"):
        select_checkpoint(manager.folder)
    with pytest.warns(UserWarning, match="600"):  # noqa: SIM117
        with pytest.raises(CheckpointError, match="no checkpoint"):
            select_checkpoint(manager.folder, "previous")


def test_full_disk(manager):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        manager.save(7, {**make(7), "large": torch.zeros(2**20)}, {})
        with pytest.raises(RunError, match=r"step-000000007.*\[5, 600\]"):
            manager.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(list(manager.folder.iterdir())) == 2
    assert_loads(manager, 600)
    save(manager, 900)
    assert select_checkpoint(manager.folder) == 900


def test_files_that_cannot_be_read_after_writing_are_no_checkpoint(manager, monkeypatch):
    def unreadable(*args):
        raise OSError(5, "Input/output error")

    manager.keep = 1
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", unreadable)
        manager.save(700, make(700), {})
        with pytest.raises(RunError, match=r"step-000000700: .*Input/output.*\[5, 600\]"):
            manager.wait()
    assert select_checkpoint(manager.folder) == 600


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import ALONE, CheckpointManager, save

manager = CheckpointManager(Path(sys.argv[1]), ALONE, keep=1)
save(manager, 1)
Path.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
save(manager, 2)
"""


def test_killed_while_saving(tmp_path):
    folder = tmp_path / "checkpoints"
    processes = several_processes.start(KILLED, 1, folder, os.path.dirname(__file__))
    [(status, _)] = several_processes.finish(processes)
    assert status == -signal.SIGKILL
    assert (folder / "step-000000002.partial").is_dir()
    assert select_checkpoint(folder) == 1
    manager = CheckpointManager(folder, ALONE)
    assert [p.name for p in folder.iterdir()] == ["step-000000001"]
    assert_loads(manager, 1)
