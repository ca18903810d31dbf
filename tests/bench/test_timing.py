"""The timing core, on a clock that the test moves."""

import numpy as np
import pytest
import torch

from ijepa_zoo.bench.timing import (
    OURS,
    Summary,
    Timings,
    repeated,
    take_turns,
    time_phases,
    use_threads,
)


class Clock:
    """Each piece of work moves it by as much as it is told to take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds, log=None, name=""):
        seconds = iter(seconds)

        def run():
            self.now += next(seconds)
            if log is not None:
                log.append(name)

        return run


def test_contenders_take_turns_in_alternating_order():
    clock, log = Clock(), []
    contenders = {
        OURS: clock.work([1.0] * 9, log, "a"), "other": clock.work([2.0] * 9, log, "b"),
    }  # fmt: skip
    take_turns(contenders, seconds=100, rounds=4, warmup=1, clock=clock)
    assert "".join(log) == "ab" + "abbaabba"


def test_ratio_is_taken_pair_by_pair():
    """The machine is ten times slower in the second round: the pairs do not notice."""
    clock = Clock()
    contenders = {OURS: clock.work([1, 10, 2]), "other": clock.work([3, 20, 4])}
    timings = take_turns(contenders, seconds=100, rounds=3, warmup=0, clock=clock)
    assert timings.summary(OURS).median == 2
    assert timings.summary("other").median == 4
    assert timings.ratio("other") == Summary(2.0, (2.0, 2.5), (2.0, 3.0), 3)
    assert timings.ratios() == {"other": timings.ratio("other").as_json()}


@pytest.mark.parametrize(("seconds", "rounds"), [(1, 3), (30, 3), (70, 7), (1000, 12)])
def test_rounds_end_with_the_time(seconds, rounds):
    clock = Clock()
    done = take_turns(
        {OURS: clock.work([10] * 20)}, seconds=seconds, rounds=12, warmup=1, clock=clock
    )
    assert len(done.samples[OURS]) == rounds


def test_work_may_time_itself_and_report_more():
    clock = Clock()
    done = take_turns(
        {OURS: lambda: {"seconds": 5.0, "bytes": 7.0}}, seconds=1, rounds=3, clock=clock
    )
    assert done.samples[OURS] == [{"seconds": 5.0, "bytes": 7.0}] * 3
    assert done.summary(OURS, "bytes").median == 7


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds 2; use"):
        take_turns({OURS: lambda: None}, seconds=1, rounds=2)


def test_summary_has_the_quartiles_of_numpy():
    values = np.random.default_rng(0).random(11)
    found = Summary.of(values.tolist())
    assert (*found.quartiles, found.median) == pytest.approx(np.percentile(values, (25, 75, 50)))
    assert found.range == (values.min(), values.max())
    assert Summary.of([3.0]) == Summary(3.0, (3.0, 3.0), (3.0, 3.0), 1)


def test_figures_of_a_ratio_can_be_others_than_seconds():
    runs = {OURS: [{"bytes": 2.0}, {"bytes": 4.0}], "other": [{"bytes": 6.0}, {"bytes": 4.0}]}
    assert Timings(runs).ratio("other", "bytes").range == (1.0, 3.0)


def test_phases_are_timed_one_by_one():
    clock = Clock()
    durations = iter([1, 2, 3, 4, 5, 6])

    def work():
        for name in ("forward", "backward"):
            clock.now += next(durations)
            yield name

    found = time_phases(work, torch.device("cpu"), repeats=3, clock=clock)
    assert found == {"forward": 3000.0, "backward": 4000.0}


def test_short_work_is_repeated():
    calls = []
    assert repeated(lambda: calls.append(1), 5)()["seconds"] > 0
    assert len(calls) == 5


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with use_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
