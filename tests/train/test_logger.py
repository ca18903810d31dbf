import csv
import json
import os
import resource
import sys
from contextlib import contextmanager

import pytest
from small_run import CONFIG, change

from ijepa_zoo.errors import MissingPackageError, RunError
from ijepa_zoo.train.logger import COLUMNS, Meter, RunLogger, read_initial, read_log

OFFICIAL = "epoch,itr,loss,mask-A,mask-B,time (ms)"


def row(step, **metrics):
    values = {"step": float(step), "epoch": step // 4 + 1.0, "itr": float(step % 4), "mask-A": 48.0}
    return {**values, "loss": 0.1 / (step + 1), "mask-B": 9.0, "time (ms)": 12.5, **metrics}


def write(folder, steps, first_step=0, to=("csv",)):
    with RunLogger(folder, first_step, change(CONFIG, log={"to": to})) as log:
        for step in steps:
            log.event(step, "warning", f"at {step}")
            log.write(row(step))


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_first_columns_are_the_official_ones(tmp_path):
    with RunLogger(tmp_path, 0, CONFIG) as log:
        log.write(row(5, rankme=12.5, knn=float("nan")))
    header, line = (tmp_path / "log.csv").read_text().splitlines()
    assert header.startswith(OFFICIAL + ",step,lr,")
    assert "images_per_second,mfu,data_wait,grad_encoder" in header
    assert line.startswith("2,1,0.0166666667,48,9,12.5,5,")
    (found,) = csv.DictReader([header, line])
    assert (found["rankme"], found["knn"], found["spread"]) == ("12.5", "nan", "")
    (read,) = read_log(tmp_path)
    assert read == pytest.approx(row(5, rankme=12.5, knn=float("nan")), rel=1e-8, nan_ok=True)


def test_unknown_columns_are_an_error(tmp_path):
    with RunLogger(tmp_path, 0, CONFIG) as log, pytest.raises(ValueError, match="spred"):
        log.write(row(0, spred=1.0))
    assert read_log(tmp_path) == []


def test_events_are_kept_and_shown(tmp_path, capsys):
    name = os.fsdecode("ü\udcff.png".encode("utf-8", "surrogateescape"))  # not UTF-8
    with RunLogger(tmp_path, 0, CONFIG) as log:
        log.event(3, "warning", f"the loss jumped\n– {name}")
    with RunLogger(tmp_path, 4, CONFIG):
        pass
    assert "warning: the loss jumped" in capsys.readouterr().err
    (event,) = events(tmp_path)
    assert (event["step"], event["kind"]) == (3, "warning")
    assert event["text"] == f"the loss jumped\n– {name}"
    assert event["time"].endswith("+00:00")


def test_metrics_at_initialization(tmp_path, capsys):
    assert read_initial(tmp_path) == {}
    with RunLogger(tmp_path, 0, CONFIG) as log:
        log.initial({"rankme": 3.0, "knn": float("nan")})
        log.event(0, "warning", "not metrics")
        log.final({"rankme": 12.0, "ema_distance": 0.5}, {"rankme": 3.0})
    assert read_initial(tmp_path) == {"rankme": 3.0}
    assert "rankme 12\n" in capsys.readouterr().err


def test_resumed_run_drops_lost_rows_and_events(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    write(whole, range(12))
    write(resumed, range(9))
    write(resumed, range(6, 12), first_step=6)
    assert (resumed / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    assert [event["step"] for event in events(resumed)] == list(range(12))


def test_line_cut_off_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, range(3))
    for name in ("log.csv", "events.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-9])
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1]
    write(tmp_path, [3], first_step=3)
    assert [r["step"] for r in read_log(tmp_path)] == [0, 1, 3]
    assert [event["step"] for event in events(tmp_path)] == [0, 1, 3]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("log.csv", b"0.05,", b"0.x5,"),
        ("log.csv", b"0.05,", b""),
        ("log.csv", b"0.05,", b"\xff\x00,"),
        ("log.csv", b",1,", b",nan,"),
        ("events.jsonl", b'"step": 1', b'"stop": 1'),
        ("events.jsonl", b'"step": 1', b'"step 1'),
    ],
)
def test_damage_is_named_and_left_as_it_is(tmp_path, name, old, new):
    write(tmp_path, range(3))
    path = tmp_path / name
    damaged = path.read_bytes().replace(old, new)
    path.write_bytes(damaged)
    number = 3 if name == "log.csv" else 2
    with pytest.raises(RunError, match=rf"{name}, line {number}"):
        RunLogger(tmp_path, 3, CONFIG)
    assert path.read_bytes() == damaged


def test_logs_of_other_programs_are_refused_and_those_with_fewer_columns_read(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"{OFFICIAL}\n1,0,0.5,48,9,100\n")
    with pytest.raises(RunError, match=r"log\.csv, line 1"):
        read_log(tmp_path)
    path.write_text(f"{OFFICIAL},step\n1,0,0.5,48,9,100,0\n")
    write(tmp_path, [1], first_step=1)
    assert [row["loss"] for row in read_log(tmp_path)] == [0.5, 0.05]


@contextmanager
def full_disk(path, bytes_left):
    """Files cannot grow beyond the present size of `path` and a bit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("bytes_left", [-200, 0, 40])
def test_full_disk_names_the_log_and_costs_no_earlier_row(tmp_path, bytes_left):
    with RunLogger(tmp_path, 0, CONFIG) as log:
        for step in range(20):
            log.write(row(step))
    path = tmp_path / "log.csv"
    with (
        full_disk(path, bytes_left),
        pytest.raises(OSError, match=r"log\.csv"),
        RunLogger(tmp_path, 20, CONFIG) as log,
    ):
        log.write(row(20))
    write(tmp_path, [20], first_step=20)
    assert [r["step"] for r in read_log(tmp_path)] == list(range(21))


def test_slow_data_gives_one_advice(tmp_path):
    for _ in range(2):  # each process
        with RunLogger(tmp_path, 0, CONFIG) as log:
            for step, share in enumerate((0.9, 0.05, 0.3, 0.4)):
                log.write(row(step, data_wait=share))
        (advice,) = events(tmp_path)
        assert (advice["kind"], advice["step"]) == ("advice", 2)
        assert "runtime.workers" in advice["text"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=f"pip install {name}"):
        RunLogger(tmp_path, 0, change(CONFIG, log={"to": ("csv", name)}))
    assert not list(tmp_path.iterdir())


def test_only_csv_unless_asked(tmp_path):
    write(tmp_path, range(2))
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv", "events.jsonl"}


def test_tensorboard_has_every_metric_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(4), to=("csv", "tensorboard"))
    write(tmp_path, range(2, 5), first_step=2, to=("csv", "tensorboard"))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("loss")] == list(range(5))
    assert set(board.Tags()["scalars"]) == row(0).keys() - {"step"}


def test_wandb_has_settings_and_rows_and_keeps_its_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs, logged = [], []
    init = wandb.init

    def recorded(**options):
        run = init(**options)
        log = run.log

        def log_both(data, step):
            logged.append((step, data["loss"]))
            log(data, step=step)

        run.log = log_both
        runs.append(run)
        return run

    monkeypatch.setattr(wandb, "init", recorded)
    folder = tmp_path / "first"
    folder.mkdir()
    write(folder, range(3), to=("csv", "wandb"))
    write(folder, [3], first_step=3, to=("csv", "wandb"))
    first, second = runs
    assert (first.name, first.project) == ("first", "ijepa_zoo")
    assert first.config["optim"]["batch_size"] == CONFIG.optim.batch_size
    assert first.id == second.id == (folder / "wandb.id").read_text()
    assert logged == [(step, row(step)["loss"]) for step in range(4)]
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 2


def test_meter_averages_since_the_last_row():
    meter = Meter(batch_size=8, epoch_steps=4, flops_per_image=5e9, peak_flops=1e12, world_size=2)
    for step in range(6):
        metrics = {"loss": float(step), "lr": step / 10, "context_tokens": 40.0 + step}
        meter.update(metrics, seconds=0.1 + 0.1 * step, waited=0.05)
        if step == 2:
            first = meter.row(3)
    expected = {
        "loss": 1.0, "lr": 0.2, "mask-A": 41.0, "step": 2.0, "epoch": 1.0, "itr": 2.0,
        "time (ms)": 200.0, "images_per_second": 40.0, "data_wait": 0.25, "mfu": 40 * 5e9 / 2e12,
    }  # fmt: skip
    assert first == pytest.approx(expected)
    second = meter.row(6)
    assert (second["loss"], second["lr"], second["step"]) == (4.0, 0.5, 5.0)
    assert (second["epoch"], second["itr"]) == (2.0, 1.0)
    assert second["images_per_second"] == pytest.approx(24 / 1.5)
    assert first.keys() <= set(COLUMNS)
    unknown = Meter(8, 4, 5e9, peak_flops=None, world_size=1)
    unknown.update({"loss": 1.0}, 0.1, 0.0)
    assert "mfu" not in unknown.row(1)
