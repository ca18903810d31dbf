"""Folders of evaluations: the same settings find them again, and states resume by epoch."""

import csv
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import several_processes
import torch
from filelock import FileLock
from test_results import RESULT

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import DataError, RunError
from ijepa_zoo.eval.runs import EpochState, once, run_folder


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
    table = tmp_path / "results.csv"
    table.write_text("my,own\n1,2\n")

    def run():
        return once(tmp_path / "one", Distributed(), "float32", lambda: replace(RESULT, value=1.0))

    for _ in range(2):  # the result is there, but its row is not
        with pytest.raises(DataError, match=r"results\.csv"):
            run()
    table.unlink()
    first, again = run(), once(tmp_path / "one", Distributed(), "float32", lambda: RESULT)
    assert first == again
    assert first.runtime["precision"] == "float32"
    (row,) = csv.DictReader(table.open())
    assert float(row["value"]) == 1.0


def test_a_folder_in_use_is_named(tmp_path):
    (tmp_path / "one").mkdir()
    with FileLock(tmp_path / "one" / ".lock"), pytest.raises(RunError, match=str(tmp_path / "one")):
        once(tmp_path / "one", Distributed(), "float32", lambda: RESULT)


def test_the_state_that_was_saved_is_loaded(tmp_path):
    state = EpochState(tmp_path / "run" / "state.pt")
    assert state.load() is None
    state.save(content())
    assert_same(state.load(), content())
    state.remove()
    assert state.load() is None


@pytest.mark.parametrize("place", [0.3, 0.9])
def test_a_changed_byte_or_a_cut_is_noticed(tmp_path, place):
    state = EpochState(tmp_path / "state.pt")
    state.save(content(10_000))
    whole = state.path.read_bytes()
    where = int(len(whole) * place)
    for damaged in (whole[:where] + bytes([whole[where] ^ 64]) + whole[where + 1 :], whole[:where]):
        state.path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"state\.pt"):
            state.load()


def test_a_state_of_another_version_is_named(tmp_path):
    state = EpochState(tmp_path / "state.pt")
    torch.save({"epoch": 1}, state.path)
    with pytest.raises(RunError, match=r"state\.pt"):
        state.load()


def test_the_state_is_not_copied_whole(tmp_path):
    heads = {str(i): torch.rand(250_000) for i in range(40)}  # 40 MB
    tracemalloc.start()
    EpochState(tmp_path / "state.pt").save({"epoch": 1, "heads": heads})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_a_full_disk_keeps_the_previous_state(tmp_path):
    script = """
        import resource, signal, sys
        sys.path.insert(0, sys.argv[2])
        import test_runs as t
        state = t.EpochState(t.Path(sys.argv[1]))
        state.save(t.content())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            state.save(t.content(100_000))
        except OSError as error:
            assert error.filename == sys.argv[1], error
        else:
            raise AssertionError("it was written")
        t.assert_same(state.load(), t.content())
    """
    (ended,) = several_processes.finish(
        several_processes.start(script, 1, tmp_path / "state.pt", Path(__file__).parent)
    )
    assert ended[0] == 0, ended[1]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_several_processes_load_one_state_and_one_error(tmp_path):
    state = EpochState(tmp_path / "state.pt")
    state.save(content())
    script = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import test_runs as t
        from ijepa_zoo.distributed import init_distributed
        with init_distributed("cpu") as distributed:
            state = t.EpochState(t.Path(sys.argv[1]), distributed)
            t.assert_same(state.load(), t.content())
            distributed.barrier()
            if distributed.is_main:
                state.path.write_bytes(state.path.read_bytes()[:-9])
            distributed.barrier()
            with t.pytest.raises(t.RunError):
                state.load()
    """
    several_processes.run(script, 2, state.path, Path(__file__).parent)
