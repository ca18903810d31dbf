"""The log of a run, and its picture."""

import csv
import sys

import numpy as np
import pytest
from small_run import CONFIG, change

from ijepa_zoo.errors import MissingPackageError, RunError, SettingsError
from ijepa_zoo.train import describe_config, plot_run
from ijepa_zoo.train.data import mask_sampler, sample_masks
from ijepa_zoo.train.logger import Meter, RunLogger, check_log_targets, read_log

OFFICIAL = "epoch,itr,loss,mask-A,mask-B,time (ms)"


def row(step, **metrics):
    values = {"step": float(step), "epoch": step // 4 + 1.0, "itr": float(step % 4), "mask-A": 48.0}
    return {**values, "loss": 0.1 / (step + 1), "mask-B": 9.0, "time (ms)": 12.5, **metrics}


def write(folder, steps, first_step=0, to=("csv",)):
    with RunLogger(folder, first_step, change(CONFIG, log={"to": to})) as log:
        for step in steps:
            log.write(row(step))


def test_first_columns_are_the_official_ones(tmp_path):
    with RunLogger(tmp_path, 0, CONFIG) as log:
        log.write(row(5, rankme=12.5, knn=float("nan")))
    header, line = (tmp_path / "log.csv").read_text().splitlines()
    assert header.startswith(OFFICIAL + ",step,lr,")
    assert line.startswith("2,1,0.0166666667,48,9,12.5,5,")
    (found,) = csv.DictReader([header, line])
    assert (found["rankme"], found["knn"], found["spread"]) == ("12.5", "nan", "")
    (read,) = read_log(tmp_path)
    assert read == pytest.approx(row(5, rankme=12.5, knn=float("nan")), rel=1e-8, nan_ok=True)


def test_metrics_before_the_first_step_are_kept_and_shown(tmp_path, capsys):
    with RunLogger(tmp_path, 0, CONFIG) as log:
        log.initial({"rankme": 3.0})
        log.write(row(0))
        log.final({"rankme": 12.0, "ema_distance": 0.5}, {"rankme": 3.0})
    shown = capsys.readouterr().err
    assert "at initialization: rankme 3" in shown
    assert "rankme 12 (was 3)" in shown
    with RunLogger(tmp_path, 1, CONFIG):
        first, second = read_log(tmp_path)
    assert first == {"step": -1.0, "rankme": 3.0}
    assert second["step"] == 0
    with RunLogger(tmp_path, 0, CONFIG):  # started again, maybe with other networks
        assert read_log(tmp_path) == []


def test_resumed_run_drops_lost_rows_and_refuses_damage(tmp_path):
    write(tmp_path, range(12))
    path = tmp_path / "log.csv"
    whole = path.read_bytes()
    write(tmp_path, range(6, 12), first_step=6)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-9])  # cut off by a crash
    assert [r["step"] for r in read_log(tmp_path)] == list(range(11))
    write(tmp_path, [11], first_step=11)
    assert path.read_bytes() == whole
    for damaged in (whole.replace(b"0.05,", b"0.x5,"), b"\xff\n", whole.replace(b"step", b"")):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"log\.csv"):
            RunLogger(tmp_path, 12, CONFIG)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=f"pip install {name}"):
        check_log_targets(change(CONFIG, log={"to": ("csv", name)}).log)


def test_tensorboard_has_every_metric_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLogger(tmp_path, 0, change(CONFIG, log={"to": ("csv", "tensorboard")})) as log:
        log.initial({"rankme": 3.0})
        for step in range(4):
            log.write(row(step))
    write(tmp_path, range(2, 5), first_step=2, to=("csv", "tensorboard"))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("loss")] == list(range(5))
    assert [point.step for point in board.Scalars("rankme")] == [0]
    assert set(board.Tags()["scalars"]) == row(0).keys() - {"step"} | {"rankme"}


def test_wandb_has_settings_and_rows_and_keeps_its_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from unittest.mock import Mock

    monkeypatch.setattr(wandb, "init", Mock())
    write(tmp_path, range(3), to=("csv", "wandb"))
    write(tmp_path, [3], first_step=3, to=("wandb",))
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first["config"]["optim"]["batch_size"] == CONFIG.optim.batch_size
    assert first["id"] == second["id"] == (tmp_path / "wandb.id").read_text()
    logged = wandb.init.return_value.log.call_args_list
    assert [call.kwargs["step"] for call in logged] == [0, 1, 2, 3]
    assert logged[3].args[0]["loss"] == row(3)["loss"]


def test_meter_averages_since_the_last_row():
    meter = Meter(batch_size=8, epoch_steps=4, peak_rate=400.0)
    for step in range(6):
        metrics = {"loss": float(step), "lr": step / 10, "context_tokens": 40.0 + step}
        meter.update(metrics, seconds=0.1 + 0.1 * step, waited=0.05)
        if step == 2:
            first = meter.row(3)
    expected = {
        "loss": 1.0, "lr": 0.2, "mask-A": 41.0, "step": 2.0, "epoch": 1.0, "itr": 2.0,
        "time (ms)": 200.0, "images_per_second": 40.0, "data_wait": 0.25, "mfu": 0.1,
    }  # fmt: skip
    assert first == pytest.approx(expected)
    second = meter.row(6)
    names = ("loss", "lr", "step", "epoch", "itr", "images_per_second")
    assert [second[name] for name in names] == pytest.approx([4, 0.5, 5, 2, 1, 24 / 1.5])


# --- plot


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # of matplotlib's own
def test_what_was_logged_is_plotted(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda *args, **kw: [figures.append(args), save(*args)])
    (tmp_path / "config.yaml").write_text(describe_config(CONFIG))
    with pytest.raises(SettingsError, match=r"log\.csv"):
        plot_run(tmp_path)
    with RunLogger(tmp_path, 0, CONFIG) as log:
        log.initial({"rankme": 3.0})
        for step in range(20):
            log.write(row(step, images_per_second=50.0, lr=1e-3, rankme=4.0 + step, spread=0.2))
    assert plot_run(tmp_path) == tmp_path / "plot.png"
    curves, masks = figures[0][0].subfigs
    lines = [len(axis.lines) for axis in curves.axes]
    assert lines == [1, 2, 1, 0, 0, 1, 0, 0, 1]  # rank has a line at its first value
    assert curves.axes[1].lines[1].get_ydata().tolist() == [3.0, *range(4, 24)]
    assert [len(axis.images) for axis in masks.axes] == [1] * 8
    sampler = mask_sampler(CONFIG.mask, (8, 8))
    for step, axis in enumerate(masks.axes):  # the run's own
        context, _ = sample_masks(sampler, CONFIG, step, slice(0, CONFIG.group_size))
        white = np.flatnonzero(np.asarray(axis.images[0].get_array()) == 1)
        assert set(white) <= set(context[0].tolist())
    for out in ("plot.jpg", ".", "none/plot.png"):
        with pytest.raises(SettingsError, match=r"not a \.png file"):
            plot_run(tmp_path, tmp_path / out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        plot_run(tmp_path)
