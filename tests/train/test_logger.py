import csv
import json
import os
import resource
import sys
import types
from contextlib import contextmanager

import pytest

from ijepa_zoo.errors import RunError
from ijepa_zoo.train.logger import COLUMNS, RunLog, read_events, read_initial, read_log

PUBLISHED = "epoch,itr,loss,mask-A,mask-B,time (ms)"


def row(step, **figures):
    return {
        "step": float(step),
        "epoch": step // 4 + 1.0,
        "itr": float(step % 4),
        "loss": 0.1 / (step + 1),
        "context_tokens": 48.0,
        "target_tokens": 9.0,
        "time (ms)": 12.5,
        "lr": 1e-3 / 3,
        **figures,
    }


def write_rows(log, steps):
    for step in steps:
        log.write(row(step))


def write(folder, steps, first_step=0):
    with RunLog(folder, first_step) as log:
        write_rows(log, steps)


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@contextmanager
def full_disk(bytes_left, path):
    """Files cannot grow beyond the present size of `path` and a bit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_first_columns_are_the_published_ones(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write(row(5, rankme=12.5, knn=33.0))
    header, line = (tmp_path / "log.csv").read_text().splitlines()
    assert header.startswith(PUBLISHED + ",step,lr,weight_decay,momentum,images_per_second,")
    assert line.startswith("2,1,0.0166666667,48,9,12.5,5,0.000333333333,")
    (found,) = csv.DictReader([header, line])
    assert (found["rankme"], found["knn"], found["spread"]) == ("12.5", "33", "")
    entry = json.loads((tmp_path / "log.jsonl").read_text())
    assert entry["loss"] == 0.1 / 6
    assert entry["mask-A"] == 48
    (read,) = read_log(tmp_path)
    assert read == pytest.approx({k: v for k, v in entry.items()}, rel=1e-8)
    assert "spread" not in read


def test_no_log_has_no_rows(tmp_path):
    assert read_log(tmp_path) == read_events(tmp_path, "warning") == []


def test_events_stand_between_the_rows_and_on_stderr(tmp_path, capsys):
    with RunLog(tmp_path, 0) as log:
        log.event(0, "initial", '{"rankme": 3.5}')
        log.write(row(0))
        log.event(1, "warning", "the loss jumped\nfrom 1 to 2 – ü")
    assert "warning: the loss jumped\nfrom 1 to 2 – ü\n" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("event") for line in lines] == ["initial", None, "warning"]
    assert lines[2]["time"].endswith("+00:00")
    assert read_events(tmp_path, "warning") == [(1, "the loss jumped\nfrom 1 to 2 – ü")]
    assert json.loads(read_events(tmp_path, "initial")[0][1]) == {"rankme": 3.5}


def test_names_that_are_not_utf8_can_be_logged(tmp_path, capsys):
    name = os.fsdecode("ü\udcff.png".encode("utf-8", "surrogateescape"))
    for first in (0, 1):
        with RunLog(tmp_path, first) as log:
            log.event(first, "warning", f"{name} is broken")
    assert "ü\\udcff.png is broken" in capsys.readouterr().err
    assert read_events(tmp_path, "warning") == [(i, f"{name} is broken") for i in (0, 1)]


def test_figures_at_initialisation(tmp_path):
    assert read_initial(tmp_path) == {}
    with RunLog(tmp_path, 0) as log:
        log.event(0, "initial", '{"rankme": 1, "knn": 2.5}')
        log.event(0, "initial", '{"rankme": 3, "knn": null}')
        log.event(0, "warning", "no JSON")
    assert read_initial(tmp_path) == {"rankme": 3.0}


def test_a_resumed_run_drops_what_was_lost(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    write(whole, range(12))
    with RunLog(resumed, 0) as log:
        for step in range(9):
            log.event(step, "warning", f"at {step}")
            log.write(row(step, loss=5.0 if step >= 6 else 0.1 / (step + 1)))
    write(resumed, range(6, 12), first_step=6)
    assert (resumed / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    assert [step for step, _ in read_events(resumed, "warning")] == list(range(6))
    assert [json.loads(x)["step"] for x in (resumed / "log.jsonl").open() if "loss" in x] == list(
        range(12)
    )


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, range(3))
    for name in ("log.csv", "log.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-9])
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1]
    write(tmp_path, [3], first_step=3)
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1, 3]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("log.csv", b"0.05,", b"0.x5,"),
        ("log.csv", b"0.05,", b""),
        ("log.csv", b"0.05,", b"\xff\x00,"),
        ("log.jsonl", b'"step": 1.0', b'"stop": 1.0'),
        ("log.jsonl", b'"step": 1.0', b'"step 1.0'),
        ("log.csv", b"0.05,", b'"0.05,'),
        ("log.csv", b"0.05,", b"0.05\r,"),
        ("log.csv", b",1,", b",nan,"),
        ("log.jsonl", b'"step": 1.0', b'"step": 1e400'),
        ("log.jsonl", b'"step": 1.0', b'"step": ' + b"[" * 100_000),
        ("log.jsonl", b'"step": 1.0', b'"event": "warning", "step": 1.0'),
    ],
)
def test_damage_is_named_and_left_as_it_is(tmp_path, name, old, new):
    write(tmp_path, range(3))
    path = tmp_path / name
    damaged = path.read_bytes().replace(old, new)
    path.write_bytes(damaged)
    number = 3 if name == "log.csv" else 2
    with pytest.raises(RunError, match=rf"{name}, line {number} is damaged.*Delete that line"):
        RunLog(tmp_path, 3)
    assert path.read_bytes() == damaged


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "log.csv").write_text(f"{PUBLISHED}\n1,0,0.5,48,9,100\n")
    with pytest.raises(RunError, match=r"line 1: the columns are.*move the file away"):
        read_log(tmp_path)


def test_unknown_figures_are_refused_before_anything_is_written(tmp_path):
    with RunLog(tmp_path, 0) as log, pytest.raises(ValueError, match="no column spred; it has"):
        log.write(row(0, spred=1.0))
    assert read_log(tmp_path) == []
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write(row(0, rankme=float("nan"), knn=float("inf")))

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["rankme"] is None
    (read,) = read_log(tmp_path)
    assert read["rankme"] != read["rankme"]
    assert read["knn"] == float("inf")


@pytest.mark.parametrize("bytes_left", [0, 40, 300])
def test_full_disk_costs_no_row_that_is_there(tmp_path, bytes_left):
    with RunLog(tmp_path, 0) as log:
        write_rows(log, range(20))
        before = read_log(tmp_path)
        path = tmp_path / "log.jsonl"
        events = path.read_text()
        with full_disk(bytes_left, path), pytest.raises(OSError, match="cannot write the log"):
            write_rows(log, range(20, 24))
        kept = read_log(tmp_path)
        assert kept[:20] == before
        assert path.read_text().startswith(events)
        assert all(json.loads(line) for line in path.read_text().splitlines())
        with full_disk(-200, path), pytest.raises(OSError, match="cannot write the log"):
            RunLog(tmp_path, 24)
        assert read_log(tmp_path) == kept
        assert not list(tmp_path.glob("*.partial"))
        log.write(row(len(kept)))  # there is room again
    assert read_log(tmp_path)[:-1] == kept
    write(tmp_path, [30], first_step=30)
    assert read_log(tmp_path)[-1]["step"] == 30


def test_tensorboard_gets_every_figure(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RunLog(tmp_path, 7) as log:
        log.write({"step": 7, "loss": 0.5, "context_tokens": 48})
    expected = [(str(tmp_path / "tensorboard"), 7), ("loss", 0.5, 7), ("mask-A", 48.0, 7), "closed"]
    assert calls == expected


def test_tensorboard_files_can_be_read(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(4))
    write(tmp_path, range(2, 5), first_step=2)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("loss")] == list(range(5))
    assert set(board.Tags()["scalars"]) < set(COLUMNS)
