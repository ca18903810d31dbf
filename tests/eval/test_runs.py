"""Folders of evaluations: the same settings find them again, and states resume by epoch."""

import csv
import resource
import signal
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from test_results import RESULT

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import RunError
from ijepa_zoo.eval.runs import EpochState, add_baselines, once, run_folder


def content(size=1000):
    return {
        "epoch": 2,
        "heads": {"a.weight": torch.arange(float(size)), "half": torch.ones(3).bfloat16()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 3)}}, "groups": [{"lr": 0.1}]},
        "losses": [1.0, float("inf")],
    }


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.equal(other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def test_other_settings_have_another_folder(tmp_path):
    folders = [run_folder(tmp_path, "a b/c", "knn", "m", {"lr": lr}) for lr in (1, 1, 2)]
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].parent == tmp_path
    assert folders[0].name.startswith("a-b-c-knn-m-")


def test_a_finished_evaluation_is_not_repeated(tmp_path):
    folder, alone = tmp_path / "one", Distributed()
    first = once(folder, alone, "float32", lambda: replace(RESULT, value=1.0))
    (tmp_path / "results.csv").unlink()
    assert once(folder, alone, "float32", lambda: RESULT) == first
    assert first.runtime["precision"] == "float32"
    more = add_baselines(folder, first, {"chance": 5.0}, alone)
    assert more.baselines == {**RESULT.baselines, "chance": 5.0}
    assert once(folder, alone, "float32", lambda: RESULT) == more
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert float(row["value"]) == 1.0
    with FileLock(folder / ".lock"), pytest.raises(RunError, match=str(folder)):
        once(folder, alone, "float32", lambda: RESULT)


def test_the_state_that_was_saved_is_loaded(tmp_path):
    state = EpochState(tmp_path / "state.pt")
    assert state.load() is None
    state.save(content())
    found = state.load()
    assert found.pop("version")
    assert_same(found, content())
    state.remove()
    assert state.load() is None


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_changed_byte_or_a_cut_is_noticed(tmp_path, share):
    state = EpochState(tmp_path / "state.pt")
    state.save(content(10_000))
    whole = state.path.read_bytes()
    where = int(len(whole) * share)
    for damaged in (whole[:where] + bytes([whole[where] ^ 64]) + whole[where + 1 :], whole[:where]):
        state.path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"state\.pt"):
            state.load()
    torch.save({"epoch": 1, "version": 1}, state.path)  # of another version
    with pytest.raises(RunError, match=r"state\.pt"):
        state.load()


def test_a_full_disk_keeps_the_previous_state(tmp_path):
    state = EpochState(tmp_path / "state.pt")
    state.save(content())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            state.save(content(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_same(state.load(), {**content(), "version": 2})
