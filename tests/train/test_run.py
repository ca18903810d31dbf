"""Whole runs in one process: stop, resume, refuse, export."""

import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from small_run import (
    CONFIG,
    after_updates,
    change,
    pictures,
    rows,
    same_state,
    state,
    stop_after,
    train,
)

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, DataError, RunError, SettingsError
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train import NonFiniteLossError, export_run, plot_run
from ijepa_zoo.train.checkpoint import CheckpointManager, checkpoint_steps, read_checkpoint
from ijepa_zoo.train.logger import read_log
from ijepa_zoo.train.optim import Schedule

IMAGES = pictures()


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, whole):
    stop_after(monkeypatch, 5, tmp_path, number=signal.SIGUSR1)
    assert checkpoint_steps(tmp_path / "checkpoints") == [4, 6]
    torch.manual_seed(123)  # global state must not matter
    np.random.seed(5)
    train(tmp_path, change(CONFIG, runtime={"workers": 2}, log={"keep": 3}))
    assert same_state(whole, tmp_path)
    assert rows(whole) == rows(tmp_path)


def test_a_run_without_its_first_row_resumes(tmp_path, monkeypatch, whole):
    """Earlier versions had the metrics before the first step in another file."""
    stop_after(monkeypatch, 5, tmp_path)
    log = tmp_path / "log.csv"
    header, _, *others = log.read_text().splitlines(keepends=True)
    log.write_text("".join([header, *others]))
    (tmp_path / "events.jsonl").write_text('{"step": 0, "kind": "initial", "metrics": {}}\n')
    train(tmp_path)
    assert rows(tmp_path) == rows(whole)
    assert read_log(tmp_path)[0]["step"] == 0


def test_after_going_back_and_ending_at_once_the_log_has_no_gap(tmp_path, monkeypatch, whole):
    config = change(CONFIG, log={"keep": 9})
    stop_after(monkeypatch, 7, tmp_path, config)
    with monkeypatch.context() as patch:
        after_updates(patch, 2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
        with pytest.raises(KeyboardInterrupt, match="without saving"):
            train(tmp_path, config, resume_from=4)
    train(tmp_path, config)
    assert rows(tmp_path) == rows(whole)
    assert same_state(tmp_path, whole)


def test_finished_run_is_left_alone(whole):
    def times():
        files = [*whole.glob("export/**/*"), *whole.glob("checkpoints/**/*"), whole / "log.csv"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    train(whole)
    assert times() == before


LONGER = change(CONFIG, optim={"duration": "11 steps", "lr": 5e-4})
BRANCH = {"resume_optimizer": True}


@pytest.mark.parametrize(
    ("config", "options", "error", "named"),
    [
        (LONGER, {}, RunError, r"optim\.lr: 0\.001 then, 0\.0005 now.*--init"),
        (CONFIG, {"images": IMAGES[:30]}, RunError, "40 then, 30 now"),
        (CONFIG, {"images": IMAGES[::-1]}, RunError, "40 then, 40 now, or other names"),
        (change(LONGER, model={"predictor_embed_dim": 24}), BRANCH, CheckpointError, "predictor"),
        (LONGER, {**BRANCH, "init": "step-000000007"}, CheckpointError, "step 7"),
        (CONFIG, BRANCH, SettingsError, "ends before or at step 9"),
        (LONGER, {**BRANCH, "init": None}, SettingsError, "--init RUN"),
        (LONGER, {**BRANCH, "init": "none"}, CheckpointError, "none has no checkpoints"),
    ],
)
def test_other_settings_and_images_are_refused(tmp_path, whole, config, options, error, named):
    folder = tmp_path if "resume_optimizer" in options else whole
    with pytest.raises(error, match=named):
        train(folder, config, **{"init": whole, **options})


def test_folders_in_use_are_refused(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match=str(tmp_path)):
        train(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("keep me")
    with pytest.raises(RunError, match=r"mine\.txt"):
        train(tmp_path)


def test_a_run_without_its_checkpoints_is_not_started_over(tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(RunError, match=str(run / "checkpoints")):
        train(run)
    assert (run / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    shutil.copytree(whole / "checkpoints", run / "checkpoints")
    train(run)


def test_settings_that_are_gone_or_damaged_are_not_guessed(tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    settings = run / "config.yaml"
    text = settings.read_text()
    for damaged in ("seed: [", None, "machine:\n  workers: 2\n"):  # the last one is of version 0.1
        settings.unlink() if damaged is None else settings.write_text(damaged)
        for action in (train, export_run, plot_run):
            with pytest.raises(RunError, match=r"0\.1" if damaged and "m" in damaged else "config"):
                action(run)
    settings.write_text(text.replace("depth: 2", "depth: 3"))
    with pytest.raises(CheckpointError, match=r"blocks\.2"):
        export_run(run)


def test_export_of_an_unfinished_run_is_replaced_at_its_end(tmp_path, monkeypatch, whole):
    def bias(folder=tmp_path):
        model = ijepa_zoo.create_model(f"local-dir:{folder}")
        assert tuple(model.pretrained_cfg["mean"]) == CONFIG.data.mean  # for its transform
        return model.norm.bias

    stop_after(monkeypatch, 6, tmp_path)
    with pytest.raises(CheckpointError, match="`ijepa-zoo export"):
        bias()
    export_run(tmp_path)
    before, newest = bias(), state(tmp_path)[0]["target_encoder.norm.bias"]
    assert torch.equal(before, newest)
    assert not torch.equal(bias(export_run(tmp_path, tmp_path / "earlier", step=4)), newest)
    with pytest.raises(CheckpointError, match=r"step 5: it has \[4, 7\]"):
        export_run(tmp_path, step=5)
    train(tmp_path)
    assert torch.equal(bias(), state(whole)[0]["target_encoder.norm.bias"])
    assert not torch.equal(bias(), before)
    export_run(tmp_path, step=8, overwrite=True)
    train(tmp_path)
    assert torch.equal(bias(), state(whole)[0]["target_encoder.norm.bias"])


def test_loss_that_is_not_finite_names_step_and_rank(tmp_path, monkeypatch):
    original, calls = IJepa.forward, []

    def forward(self, images, context, targets):
        calls.append(1)
        loss = original(self, images, context, targets)
        return loss * float("nan") if len(calls) == 6 else loss  # part 2 of step 2

    monkeypatch.setattr(IJepa, "forward", forward)
    with pytest.raises(NonFiniteLossError, match="step 2 is nan on rank 0; the step"):
        train(tmp_path)


def test_an_error_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    write = CheckpointManager._write
    monkeypatch.setattr(CheckpointManager, "_write", lambda *args: [time.sleep(1), write(*args)])
    after_updates(monkeypatch, 5, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path)
    assert checkpoint_steps(tmp_path / "checkpoints") == [4]  # before the folder is unlocked


@pytest.mark.parametrize(("every", "named"), [(4, "step 1 is nan"), (1, "not finite after step 1")])
def test_ruined_weights_are_never_saved_nor_exported(tmp_path, every, named):
    optim = {"lr": 1e30, "start_lr": 1e30, "regularizer_weight": 0.0}
    with pytest.raises(NonFiniteLossError, match=named):
        train(tmp_path, change(CONFIG, optim=optim, log={"save_every": f"{every} steps"}))
    assert checkpoint_steps(tmp_path / "checkpoints") == []
    assert not (tmp_path / "export").exists()


def test_a_checkpoint_of_ruined_weights_is_not_exported(tmp_path, monkeypatch, whole):
    def ruined(checkpoint, tensors):
        read_checkpoint(checkpoint, tensors)
        tensors["encoder.norm.weight"].fill_(torch.nan)

    monkeypatch.setattr("ijepa_zoo.train.export.read_checkpoint", ruined)
    with pytest.raises(CheckpointError, match=r"encoder\.norm\.weight"):
        export_run(whole, tmp_path / "export")


def test_broken_images_are_named_and_stop_the_run_above_a_share(tmp_path, capsys):
    folder, run = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i, picture in enumerate(IMAGES):
        Image.fromarray(picture).save(folder / f"{i:02}.png")
    (folder / "07.png").write_bytes(b"no image")
    (folder / "19.png").write_bytes((folder / "19.png").read_bytes()[:60])
    train(run, change(CONFIG, data={"max_broken": 0.2}), str(folder))
    shown = capsys.readouterr().err
    for name in ("07.png", "19.png"):
        assert len(re.findall(rf"broken image.*{name}: ", shown)) == 1
    counts = [row["broken"] for row in read_log(run)[1:]]
    assert counts == sorted(counts)
    assert counts[-1] == state(run)[1]["broken"] >= 2
    with pytest.raises(DataError, match=r"data\.max_broken="):
        train(tmp_path / "stops", change(CONFIG, data={"max_broken": 0.0}), str(folder))
    with pytest.raises(DataError, match=r"data\.held_out"):  # before the first step
        train(tmp_path / "one", change(CONFIG, data={"held_out": 1}), str(folder))
    assert not checkpoint_steps(tmp_path / "one" / "checkpoints")


def test_the_regularizers_part_of_the_loss_is_logged(whole, tmp_path):
    train(tmp_path, change(CONFIG, optim={"duration": "3 steps", "regularizer_weight": 0.0}))
    first, plain = rows(whole)[0], rows(tmp_path)[0]
    term = float(first["loss"]) - float(plain["loss"])
    assert float(first["regularizer"]) == pytest.approx(term, rel=1e-3)
    assert plain["regularizer"] == ""


def test_rows_are_means_over_their_steps(whole, tmp_path):
    log = {"log_every": 3, "monitor_every": 100, "keep": 1, "keep_every": "3 steps"}
    train(tmp_path, change(CONFIG, log=log))
    for name in ("loss", "regularizer", "mask-A"):
        single = np.array([float(row[name]) for row in rows(whole)])
        means = [float(row[name]) for row in rows(tmp_path)]
        assert means == pytest.approx(single.reshape(3, 3).mean(1), rel=1e-6)
    assert all(0 < row["data_wait"] < 1 for row in read_log(tmp_path)[1:])
    assert checkpoint_steps(tmp_path / "checkpoints") == [3, 6, 9]
    assert [float(row["step"]) for row in rows(whole) if row["rankme"]] == [3, 7, 8]


def test_branch_keeps_optimizer_and_step(tmp_path, monkeypatch, whole):
    branch, source = tmp_path / "branch", tmp_path / "source"
    stop_after(monkeypatch, 5, source)
    checkpoint = source / "checkpoints" / "step-000000004"
    stop_after(monkeypatch, 2, branch, init=checkpoint, resume_optimizer=True)
    shutil.rmtree(source)
    train(branch, init=checkpoint, resume_optimizer=True)  # resumes from its own checkpoint
    assert same_state(branch, whole)
    assert rows(branch) == rows(whole)[4:]
    assert read_log(branch)[0] == read_log(whole)[0]
    assert read_log(branch)[0].keys() > {"step", "rankme", "spread"}
    train(tmp_path / "longer", LONGER, init=f"local-dir:{whole}", resume_optimizer=True)
    lr = [float(row["lr"]) for row in rows(tmp_path / "longer")]
    assert lr == pytest.approx([Schedule.of(LONGER.optim, 32).rates(n)["lr"] for n in (9, 10)])
