import json
import os
import resource
import shutil
import signal
import threading

import pytest
import several_processes
import torch

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import CheckpointError, RunError, SettingsError
from ijepa_zoo.train.checkpoint import (
    CheckpointManager,
    checkpoint_path,
    checkpoint_steps,
    read_checkpoint,
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


def assert_holds(tensors, step):
    expected = make(step)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def assert_loads(manager, step):
    tensors = {name: torch.zeros_like(value) for name, value in make(step).items()}
    assert manager.load(step, tensors) == EXTRA
    assert_holds(tensors, step)


@pytest.fixture
def manager(tmp_path):
    """Checkpoints of steps 5 and 600."""
    manager = CheckpointManager(tmp_path / "checkpoints", ALONE)
    assert manager.select() is None
    save(manager, 5, 600)
    return manager


def newest(manager):
    return checkpoint_path(manager.folder, 600)


def test_round_trip(manager):
    assert checkpoint_steps(manager.folder) == [5, 600]
    assert manager.select() == manager.select("previous") == 600
    for step in (5, 600):
        assert manager.select(step) == step
        assert_loads(manager, step)
        assert_holds(read_checkpoint(checkpoint_path(manager.folder, step)), step)
    read = read_checkpoint(newest(manager), ("target_encoder.",))
    assert list(read) == ["target_encoder.a.weight"]


def test_later_updates_are_not_seen(tmp_path, monkeypatch):
    from torch.distributed.checkpoint import FileSystemWriter

    resume, write = threading.Event(), FileSystemWriter.write_data

    def slow(*args):
        assert resume.wait(20)
        return write(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    manager = CheckpointManager(tmp_path, ALONE)
    for step in (1, 2):
        resume.clear()
        tensors = make(step)
        manager.save(step, tensors, {})
        for tensor in tensors.values():
            tensor.add_(1)
        assert step not in checkpoint_steps(tmp_path)  # `save` did not wait for the disk
        resume.set()
        manager.wait()
        assert_holds(read_checkpoint(checkpoint_path(tmp_path, step)), step)


@pytest.mark.parametrize(
    ("keep", "every", "expected"),
    [(2, None, [50, 60]), (1, 20, [20, 40, 60]), (3, 10**6, [40, 50, 60])],
)
def test_retention(tmp_path, keep, every, expected):
    folder = tmp_path / "checkpoints"
    save(CheckpointManager(folder, ALONE, keep, every), 10, 20, 30, 40, 50, 60)
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{s:09d}" for s in expected]


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path, ALONE, keep=1)
    intact_then, delete = [], shutil.rmtree

    def watched(path, **options):
        intact = []
        for step in checkpoint_steps(tmp_path):
            verify(checkpoint_path(tmp_path, step))
            intact.append(step)
        intact_then.append(intact)
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    save(manager, 1, 2, 3)
    assert intact_then == [[2], [3]]


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content)


FILES = ["__0_0.distcp", ".metadata", "state.json", "manifest.json"]


@pytest.mark.parametrize(
    ("name", "how"),
    [("__0_0.distcp", "flipped"), (".metadata", "truncated"), ("state.json", "flipped"),
     ("manifest.json", "truncated"), ("manifest.json", "missing"), ("__0_0.distcp", "missing")],
)  # fmt: skip
def test_damage_is_named_and_skipped_only_on_request(manager, name, how):
    damage(newest(manager) / name, how)
    named = r"step-000000600" if name == "manifest.json" else rf"step-000000600/{name}"
    for choice in ("latest", 600):
        with pytest.raises(CheckpointError, match=rf"{named}.*step 5 with --resume-from previous"):
            manager.select(choice)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(newest(manager))
    with pytest.warns(UserWarning, match=named):
        assert manager.select("previous") == 5
    assert_loads(manager, 5)
    manager.delete_after(5)  # what was done later is done again
    save(manager, 7)
    assert checkpoint_steps(manager.folder) == [5, 7]
    for step in (5, 7):
        damage(checkpoint_path(manager.folder, step) / "__0_0.distcp", "flipped")
    for choice in ("latest", "previous"):
        with pytest.raises(CheckpointError, match="no earlier checkpoint"):
            manager.select(choice)
    with pytest.raises(CheckpointError, match=r"step 6: it has \[5, 7\]"):
        manager.select(6)
    with pytest.raises(SettingsError, match="'newest'"):
        manager.select("newest")


def test_swapped_files_and_folders_are_noticed(manager):
    one, other = checkpoint_path(manager.folder, 5), newest(manager)
    for name in FILES:
        shutil.copy(one / name, manager.folder / "kept")
        shutil.copy(other / name, one / name)
        with pytest.raises(CheckpointError, match="step-000000005"):
            manager.select(5)
        (manager.folder / "kept").replace(one / name)
    assert manager.select(5) == 5
    other.rename(checkpoint_path(manager.folder, 700))
    with pytest.raises(CheckpointError, match="step-000000700 has the checkpoint of step 600"):
        manager.select()


def test_other_networks_are_refused(manager):
    tensors = make(5)
    tensors["encoder.b"] = tensors.pop("optimizer.encoder.a.weight.step")
    tensors["encoder.a.weight"] = torch.zeros(30, 7)
    with pytest.raises(CheckpointError) as caught:
        manager.load(5, tensors)
    for text in ("encoder.b", "encoder.a.weight.step", "[300, 7] instead of [30, 7]"):
        assert text in str(caught.value)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import ALONE, CheckpointManager, make, save

manager = CheckpointManager(Path(sys.argv[1]), ALONE)
save(manager, 1)
if sys.argv[3] == "writing":
    from torch.distributed.checkpoint import FileSystemWriter as owner
    name = "finish"
else:
    owner, name = Path, "rename"
setattr(owner, name, lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL))
save(manager, 2)
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_while_saving(tmp_path, moment):
    here = os.path.dirname(__file__)
    folder = tmp_path / "checkpoints"
    [(status, _)] = several_processes.finish(
        several_processes.start(KILLED, 1, folder, here, moment)
    )
    assert status == -signal.SIGKILL
    assert (folder / "step-000000002.partial").is_dir()
    manager = CheckpointManager(folder, ALONE)
    assert manager.select() == 1
    assert [p.name for p in folder.iterdir()] == ["step-000000001"]
    assert_loads(manager, 1)


def assert_fails_and_keeps(manager):
    manager.save(7, {**make(7), "large": torch.zeros(2**20)}, {})
    with pytest.raises(RunError, match=r"step-000000007.*\[5, 600\]"):
        manager.wait()
    assert sorted(p.name for p in manager.folder.iterdir()) == ["step-000000005", "step-000000600"]
    assert manager.select() == 600
    assert_loads(manager, 600)


def test_full_disk(manager):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        assert_fails_and_keeps(manager)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    save(manager, 900)
    assert manager.select() == 900


def test_a_failure_is_raised_by_the_next_save(manager):
    shutil.rmtree(manager.folder)
    manager.folder.write_text("in the way")
    manager.save(7, make(7), {})
    with pytest.raises(RunError, match="step-000000007"):
        manager.save(8, make(8), {})


RESHARD = """
import sys
from pathlib import Path
import torch
import ijepa_zoo
from ijepa_zoo.train.checkpoint import CheckpointManager
from ijepa_zoo.train.config import RuntimeConfig
from ijepa_zoo.train.optim import make_optimizer
from ijepa_zoo.train.parallel import parallelize
from ijepa_zoo.distributed import init_distributed

def state(distributed, parallel, seed):
    # 2 x 2 patches of width 48: not every tensor can be sharded evenly
    torch.manual_seed(seed)
    model = ijepa_zoo.create_ijepa("vit_nano8_64_ijepa", pretrained=False, img_size=32,
        patch_size=8, embed_dim=48, depth=2, num_heads=3, predictor_embed_dim=24,
        predictor_depth=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    parallelize(model, RuntimeConfig(parallel=parallel), distributed, "fp32")
    optimizer = make_optimizer(model.encoder, model.predictor)
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            filled = value if key == "step" else value.copy_(parameter.detach())
            tensors[f"optimizer.{name}.{key}"] = filled
    return tensors

folder, loaded, saved, parallel = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
with init_distributed("cpu", 60) as distributed:
    manager = CheckpointManager(folder, distributed)
    tensors = state(distributed, parallel, seed=saved)
    if loaded:
        assert manager.select() == loaded
        assert manager.load(loaded, tensors) == {"step": loaded}
    manager.save(saved, tensors, {"step": saved})
    for tensor in tensors.values():
        tensor.zero_()
    manager.wait()
"""


def test_other_numbers_of_processes_and_other_sharding(tmp_path):
    chain = [(2, "ddp"), (2, "fsdp2"), (1, "ddp"), (3, "fsdp2")]
    folder, states = tmp_path / "checkpoints", []
    for step, (world, parallel) in enumerate(chain, 1):
        several_processes.run(RESHARD, world, folder, step - 1, step, parallel)
        path = checkpoint_path(folder, step)
        states.append(read_checkpoint(path))
        files = list(path.glob("*.distcp"))
        sizes = [file.stat().st_size for file in files]
        assert len(files) == world
        assert max(sizes) < 1.5 * sum(sizes) / world  # every process writes a part
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest.keys() == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert len(states[0]) > 100
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[name], value) for name, value in states[0].items())


UNABLE = """
import sys
from pathlib import Path
import torch
from ijepa_zoo.errors import CheckpointError, RunError
from ijepa_zoo.train.checkpoint import CheckpointManager
from ijepa_zoo.distributed import init_distributed
from torch.distributed.checkpoint import FileSystemWriter

with init_distributed("cpu", 30) as distributed:
    manager = CheckpointManager(Path(sys.argv[1]), distributed)
    tensors = {"a": torch.ones(9), "b": torch.ones(9)}
    manager.save(1, tensors, {})
    manager.wait()
    if distributed.rank == 1:
        def write_data(*args):
            raise OSError(28, "No space left on device")
        FileSystemWriter.write_data = write_data
    manager.save(2, tensors, {})
    try:
        manager.wait()
    except RunError as error:
        assert "No space left on device" in str(error) and "[1]" in str(error), error
    else:
        raise AssertionError("one process could not write, and no error was raised")
    (file,) = (Path(sys.argv[1]) / "step-000000001").glob("__1*")
    distributed.barrier()
    if distributed.rank == 0:
        file.write_bytes(b"")
    try:
        manager.select()
    except CheckpointError as error:
        assert str(file) in str(error), error
    else:
        raise AssertionError("a truncated file was not noticed by every process")
"""


def test_every_process_gets_the_error_of_one(tmp_path):
    several_processes.run(UNABLE, 2, tmp_path / "checkpoints")
