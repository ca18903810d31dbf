import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import several_processes
import torch

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import CheckpointError, RunError
from ijepa_zoo.train import checkpoint_folder
from ijepa_zoo.train.checkpoint import Checkpoints, read_checkpoint

ALONE = Distributed()


def make(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "encoder.a.weight": torch.randn(300, 7, generator=generator),
        "target_encoder.a.weight": torch.randn(3, 2, generator=generator).bfloat16(),
        "optimizer.encoder.a.weight.step": torch.tensor(float(step)),
    }


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make(step), {"config": {"lr": 0.1, "scale": [0.3, 1.0]}, "at": step})
    checkpoints.wait()


def assert_holds(tensors, step):
    expected = make(step)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def assert_loads(checkpoints, step):
    tensors = {name: torch.zeros_like(value) for name, value in make(step).items()}
    about = checkpoints.load(step, tensors)
    assert about == {"config": {"lr": 0.1, "scale": [0.3, 1.0]}, "at": step}
    assert_holds(tensors, step)


@pytest.fixture
def two_saved(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, ALONE)
    assert checkpoints.complete() == []
    assert checkpoints.choose() is None
    save(checkpoints, 5, 600)
    return checkpoints


def test_round_trip(two_saved):
    assert two_saved.complete() == [5, 600]
    assert two_saved.choose() == 600
    for step in (5, 600):
        assert two_saved.choose(step) == step
        assert_loads(two_saved, step)


def test_read_without_a_process_group(two_saved):
    for folder, step in ((two_saved.folder, 600), (two_saved.folder / "step-000000005", 5)):
        tensors, about = read_checkpoint(folder)
        assert about["at"] == step
        assert_holds(tensors, step)
    assert list(read_checkpoint(folder, only=("target_encoder.",))[0]) == [
        "target_encoder.a.weight"
    ]
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        read_checkpoint(two_saved.folder.parent)


def test_later_updates_are_not_seen(tmp_path, monkeypatch):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    go_on, write = threading.Event(), FileSystemWriter.write_data

    def slow(*args):
        assert go_on.wait(20)
        return write(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    checkpoints = Checkpoints(tmp_path, ALONE)
    for step in (1, 2):  # the second reuses the memory of the first
        go_on.clear()
        tensors = make(step)
        checkpoints.save(step, tensors, {})
        for tensor in tensors.values():
            tensor.add_(1)
        assert step not in checkpoints.complete()  # `save` did not wait for the disk
        go_on.set()
        checkpoints.wait()
        assert_holds(read_checkpoint(tmp_path)[0], step)


@pytest.mark.parametrize(
    ("keep", "every", "expected"),
    [(2, None, [50, 60]), (1, 20, [20, 40, 60]), (3, 10**6, [40, 50, 60])],
)
def test_retention(tmp_path, keep, every, expected):
    checkpoints = Checkpoints(tmp_path, ALONE, keep, every)
    save(checkpoints, 10, 20, 30, 40, 50, 60)
    assert checkpoints.complete() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:09d}" for s in expected]


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    seen, replace, remove = [], os.replace, shutil.rmtree

    def watched(function):
        def call(*args, **kwargs):
            whole = [s for s in checkpoints.complete() if not _broken(tmp_path, s)]
            seen.append(whole)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", watched(replace))
    monkeypatch.setattr(shutil, "rmtree", watched(remove))
    save(checkpoints, 1, 2, 3)
    assert seen[0] == []
    assert all(seen[1:])
    assert checkpoints.complete() == [3]


def _broken(folder, step):
    try:
        checkpoint_folder.verify(folder / f"step-{step:09d}")
    except CheckpointError as error:
        return str(error)
    return None


def _damage(folder, how):
    file = {"metadata": folder / ".metadata", "about": folder / "checkpoint.json"}.get(
        how, folder / "__0_0.distcp"
    )
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[:-1])
    elif how == "missing":
        file.unlink()
    elif how == "edited":
        file = folder / "checkpoint.json"
        file.write_text(file.read_text().replace('"at": 600', '"at": 601'))
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    return file


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "metadata", "about", "edited"])
def test_damage_is_named_and_passed_over_only_when_told(two_saved, how):
    file = _damage(two_saved.folder / "step-000000600", how)
    for choice in ("latest", 600):
        with pytest.raises(CheckpointError, match=str(file)):
            two_saved.choose(choice)
    with pytest.raises(CheckpointError, match=r"step 5 is whole: --resume-from previous"):
        two_saved.choose()
    with pytest.raises(CheckpointError, match=str(file)):
        read_checkpoint(two_saved.folder)
    with pytest.warns(UserWarning, match="going on from step 5"):
        assert two_saved.choose("previous") == 5
    assert_loads(two_saved, 5)
    save(two_saved, 7)  # the part of the run after step 5 is given up with it
    assert two_saved.complete() == [5, 7]
    with pytest.warns(UserWarning, match=r"^step 7 is undamaged: .* by --resume-from 5$"):
        assert two_saved.choose("previous") == 7


def test_all_damaged(two_saved):
    for step in (5, 600):
        _damage(two_saved.folder / f"step-{step:09d}", "flipped")
    for choice in ("latest", "previous"):
        with pytest.raises(CheckpointError, match=r"No other checkpoint in .* is whole"):
            two_saved.choose(choice)


def test_unknown_step_and_newer_format(two_saved):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 6: it has \[5, 600\]"):
        two_saved.choose(6)
    file = two_saved.folder / "step-000000600" / "checkpoint.json"
    content = json.loads(file.read_text()) | {"format": 2}
    del content["sha256"]
    content["sha256"] = checkpoint_folder._seal(content)
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="format 2, this version of ijepa_zoo reads 1"):
        two_saved.choose()


def test_a_checkpoint_under_another_name_is_damaged(two_saved):
    two_saved.folder.joinpath("step-000000600").rename(two_saved.folder / "step-000000700")
    with pytest.raises(
        CheckpointError, match=r"700/checkpoint\.json is damaged: it is of step 600"
    ):
        two_saved.choose()


@pytest.mark.parametrize("text", ["[]", "7", '{"sha256": 1}', "[" * 100_000, None])
def test_a_description_of_another_kind(two_saved, text):
    file = two_saved.folder / "step-000000600" / "checkpoint.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    said = "is missing" if text is None else "is damaged"
    with pytest.raises(CheckpointError, match=rf"{file} {said}.*step 5 is whole"):
        two_saved.choose()


def test_what_to_resume_from_is_checked(two_saved):
    assert two_saved.choose(np.int64(5)) == 5
    for wrong in ("5", "Latest", None, 5.0, True):
        with pytest.raises(ValueError, match="must be 'latest', 'previous' or the step"):
            two_saved.choose(wrong)


def test_files_in_the_way(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    for name in ("step-000000003.partial", "step-000000002.deleted", "step-000000001.partial"):
        (tmp_path / name).write_text("")
    (tmp_path / "step-000000003.deleted").mkdir()
    (tmp_path / "step-000000003.deleted/remains").write_text("")
    save(checkpoints, 2, 3, 3, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000004"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file is no folder.*move it away"):
        Checkpoints(tmp_path / "file", ALONE)


def test_other_networks_are_refused(two_saved):
    tensors = make(5)
    tensors["encoder.b"] = tensors.pop("optimizer.encoder.a.weight.step")
    tensors["encoder.a.weight"] = torch.zeros(30, 7)
    with pytest.raises(CheckpointError) as caught:
        two_saved.load(5, tensors)
    for text in (
        "lacks encoder.b",
        "has no optimizer.encoder.a.weight.step",
        "encoder.a.weight [300, 7], here [30, 7]",
    ):
        assert text in str(caught.value)


def test_settings_must_be_plain(tmp_path):
    with pytest.raises(TypeError):
        Checkpoints(tmp_path, ALONE).save(1, make(1), {"lr": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, ALONE, keep=0)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import ALONE, Checkpoints, make
from ijepa_zoo.train import checkpoint_folder

checkpoints = Checkpoints(Path(sys.argv[1]), ALONE)
checkpoints.save(1, make(1), {}, wait=True)
if sys.argv[3] == "writing":
    from torch.distributed.checkpoint.filesystem import FileSystemWriter as place
    name = "finish"
else:
    place, name = os, "replace"
setattr(place, name, lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL))
checkpoints.save(2, make(2), {}, wait=True)
"""


@pytest.mark.parametrize("moment", ["writing", "naming"])
def test_killed_while_saving(tmp_path, moment):
    here = os.path.dirname(__file__)
    [(status, _)] = several_processes.finish(
        several_processes.start(KILLED, 1, tmp_path, here, moment)
    )
    assert status == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path, ALONE)
    assert (tmp_path / "step-000000002.partial").is_dir()
    with pytest.warns(UserWarning, match="ended while it was saving step 2; going on from step 1"):
        assert checkpoints.choose() == 1
    assert_holds(read_checkpoint(tmp_path)[0], 1)
    checkpoints.save(2, make(2), {}, wait=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]


def test_killed_while_saving_the_first(tmp_path):
    (tmp_path / "step-000000002.partial").mkdir()
    with pytest.warns(UserWarning, match="saving step 2; starting anew"):
        assert Checkpoints(tmp_path, ALONE).choose() is None


def assert_fails_and_keeps(checkpoints, reason):
    checkpoints.save(7, {**make(7), "large": torch.zeros(2**20)}, {})
    with pytest.raises(RunError, match=reason) as caught:
        checkpoints.wait()
    assert "Those of steps [5, 600] are intact" in str(caught.value)
    assert [p.name for p in checkpoints.folder.glob("*.partial")] == []
    assert checkpoints.choose() == 600
    assert_loads(checkpoints, 600)


def test_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a small tmpfs")
    try:
        checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE)
        save(checkpoints, 5, 600)
        assert_fails_and_keeps(checkpoints, "No space left|MiB free on the disk")
        with pytest.raises(RunError, match=r"cannot write checkpoint .*step-000000008"):
            checkpoints.save(8, {"large": torch.zeros(2**20)}, {}, wait=True)
        save(checkpoints, 9)
        assert checkpoints.choose() == 9
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_file_size_limit(two_saved):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        assert_fails_and_keeps(two_saved, "File too large|MiB free on the disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_failure_is_raised_by_the_next_save(two_saved):
    shutil.rmtree(two_saved.folder)
    two_saved.folder.write_text("in the way")
    two_saved.save(7, make(7), {})
    with pytest.raises(RunError, match="step-000000007"):
        two_saved.save(8, make(8), {})


def test_what_cannot_be_deleted_is_said(two_saved, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    two_saved.save(700, make(700), {})
    with pytest.raises(RunError, match=r"cannot delete checkpoints .*: Permission denied"):
        two_saved.wait()
    assert two_saved.choose() == 700


def test_torch_that_cannot_read_what_a_later_one_wrote(two_saved, monkeypatch):
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    def refuse(self):
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(FileSystemReader, "read_metadata", refuse)
    for read in (lambda: read_checkpoint(two_saved.folder), lambda: two_saved.load(5, make(5))):
        with pytest.raises(CheckpointError, match=r"written by torch 2\..* or a later one"):
            read()


AT_EXIT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import ALONE, Checkpoints, make
Checkpoints(Path(sys.argv[1]), ALONE).save(3, make(3), {})
"""


def test_the_end_of_the_program_waits_for_a_save(tmp_path):
    script = AT_EXIT.replace("sys.argv[2]", repr(os.path.dirname(__file__)))
    path = os.pathsep.join([str(several_processes.ROOT), str(several_processes.ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, check=True)
    assert_holds(read_checkpoint(tmp_path)[0], 3)


RESHARD = """
import sys
from pathlib import Path
import torch
import ijepa_zoo
from ijepa_zoo.train.checkpoint import Checkpoints
from ijepa_zoo.train.config import RuntimeConfig
from ijepa_zoo.train.optim import make_optimizer
from ijepa_zoo.train.parallel import parallelize
from ijepa_zoo.distributed import init_distributed

def state(distributed, parallel, seed):
    # 2 x 2 patches of width 48: not every tensor can be shared out evenly
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
            tensors[f"optimizer.{name}.{key}"] = value if key == "step" else value.copy_(parameter)
    return tensors

folder, loaded, saved, parallel = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
with init_distributed("cpu", 60) as distributed:
    checkpoints = Checkpoints(folder, distributed)
    tensors = state(distributed, parallel, seed=saved)
    if loaded:
        assert checkpoints.choose() == loaded
        assert checkpoints.load(loaded, tensors) == {"step": loaded}
    checkpoints.save(saved, tensors, {"step": saved})
    for tensor in tensors.values():
        tensor.zero_()
    checkpoints.wait()
    assert checkpoints.complete()[-1] == saved
"""


def test_other_numbers_of_processes_and_other_sharding(tmp_path):
    chain = [(2, "ddp"), (2, "fsdp2"), (1, "ddp"), (4, "fsdp2"), (2, "ddp"), (4, "ddp"), (1, "ddp")]
    states = []
    for step, (world, parallel) in enumerate(chain, 1):
        several_processes.run(RESHARD, world, tmp_path, step - 1, step, parallel)
        tensors, about = read_checkpoint(tmp_path)
        assert about == {"step": step}
        states.append(tensors)
        files = list((tmp_path / f"step-{step:09d}").glob("*.distcp"))
        sizes = [file.stat().st_size for file in files]
        assert len(files) == world
        assert max(sizes) < 1.5 * sum(sizes) / world  # everybody writes a part
    assert len(states[0]) > 100
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[name], value) for name, value in states[0].items())


UNABLE = """
import os, sys
from pathlib import Path
import torch
from ijepa_zoo.errors import CheckpointError, RunError
from ijepa_zoo.train.checkpoint import Checkpoints
from ijepa_zoo.distributed import init_distributed
from torch.distributed.checkpoint.filesystem import FileSystemWriter

with init_distributed("cpu", 30) as distributed:
    checkpoints = Checkpoints(Path(sys.argv[1]), distributed)
    tensors = {"a": torch.ones(9), "b": torch.ones(9)}
    checkpoints.save(1, tensors, {}, wait=True)
    if distributed.rank == 1:
        def write_data(*args):
            raise OSError(28, "No space left on device")
        FileSystemWriter.write_data = write_data
    checkpoints.save(2, tensors, {})
    try:
        checkpoints.wait()
    except RunError as error:
        assert "No space left on device. Those of steps [1] are intact" in str(error), error
    else:
        raise AssertionError("one process could not write, and nobody said so")
    (file,) = (Path(sys.argv[1]) / "step-000000001").glob("__1*")
    distributed.barrier()
    if distributed.rank == 0:
        file.write_bytes(b"")
    try:
        checkpoints.choose()
    except CheckpointError as error:
        assert str(file) in str(error), error
    else:
        raise AssertionError("a truncated file was not noticed by every process")
"""


def test_every_process_learns_of_a_failure(tmp_path):
    several_processes.run(UNABLE, 2, tmp_path)
