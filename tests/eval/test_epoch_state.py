"""States of unfinished runs: complete or absent, read by one process, never copied whole."""

import tracemalloc
from pathlib import Path

import pytest
import several_processes
import torch

from ijepa_zoo.errors import RunError
from ijepa_zoo.eval.epoch_state import EpochState


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


def test_what_was_saved_is_loaded(tmp_path):
    state = EpochState(tmp_path / "run" / "state.pt", {"lr": 1})
    assert state.load() is None
    state.save(content())
    assert_same(state.load(3), content())
    with pytest.raises(RunError, match="lr: 1 then, 2 now"):
        EpochState(state.path, {"lr": 2}).load()
    with pytest.raises(RunError, match="its epoch is 2"):
        state.load(1)
    state.remove()
    assert state.load() is None


@pytest.mark.parametrize("place", [0.3, 0.9])
def test_a_changed_byte_or_a_cut_is_noticed(tmp_path, place):
    state = EpochState(tmp_path / "state.pt", {})
    state.save(content(10_000))
    whole = state.path.read_bytes()
    where = int(len(whole) * place)
    for damaged in (whole[:where] + bytes([whole[where] ^ 64]) + whole[where + 1 :], whole[:where]):
        state.path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"state\.pt.* is damaged"):
            state.load()


def test_the_state_is_not_copied_whole(tmp_path):
    heads = {str(i): torch.rand(250_000) for i in range(40)}  # 40 MB
    state = EpochState(tmp_path / "state.pt", {})
    tracemalloc.start()
    state.save({"epoch": 1, "heads": heads})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_a_disk_that_is_full_is_told_and_keeps_the_state_before(tmp_path):
    script = """
        import resource, signal, sys
        sys.path.insert(0, sys.argv[2])
        import test_epoch_state as t
        state = t.EpochState(t.Path(sys.argv[1]), {})
        state.save(t.content())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            state.save(t.content(100_000))
        except OSError as error:
            assert error.filename == sys.argv[1] and "make room" in error.strerror, error
        else:
            raise AssertionError("it was written")
        t.assert_same(state.load(), t.content())
    """
    (ended,) = several_processes.finish(
        several_processes.start(script, 1, tmp_path / "state.pt", Path(__file__).parent)
    )
    assert ended[0] == 0, ended[1]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_one_process_reads_it_for_all(tmp_path):
    state = EpochState(tmp_path / "state.pt", {})
    state.save(content())
    script = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import test_epoch_state as t
        from ijepa_zoo.distributed import init_distributed
        with init_distributed("cpu") as distributed:
            if distributed.rank:
                t.torch.load = None
            state = t.EpochState(t.Path(sys.argv[1]), {}, distributed)
            t.assert_same(state.load(2), t.content())
    """
    several_processes.run(script, 2, state.path, Path(__file__).parent)
