"""Whole runs in one process: stop, resume, refuse, export."""

import json
import shutil
import signal
from pathlib import Path

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
from ijepa_zoo.data import open_images
from ijepa_zoo.errors import CheckpointError, DataError, RunError, SettingsError
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train import Interrupted, NonFiniteLossError, Trainer, export_run, plot_run
from ijepa_zoo.train.checkpoint import checkpoint_steps
from ijepa_zoo.train.logger import read_log

IMAGES = pictures()


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, whole):
    stop_after(monkeypatch, 5, tmp_path, number=signal.SIGUSR1)
    assert checkpoint_steps(tmp_path / "checkpoints") == [4, 6]
    torch.manual_seed(123)  # global state must not matter
    np.random.seed(5)
    train(tmp_path, change(CONFIG, runtime={"workers": 2}, log={"keep": 3}))
    assert same_state(whole, tmp_path)
    assert rows(whole) == rows(tmp_path)


def test_after_going_back_and_a_crash_the_log_has_no_gap(tmp_path, monkeypatch, whole):
    config = change(CONFIG, log={"keep": 9})
    stop_after(monkeypatch, 7, tmp_path, config)
    with monkeypatch.context() as patch:
        after_updates(patch, 2, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, config, resume_from=4)
    train(tmp_path, config)
    assert rows(tmp_path) == rows(whole)
    assert same_state(tmp_path, whole)


def test_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    after_updates(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt, match="without saving") as stop:
        train(tmp_path)
    assert not isinstance(stop.value, Interrupted)


def test_finished_run_is_left_alone(whole):
    def times():
        files = [*whole.glob("export/**/*"), *whole.glob("checkpoints/**/*"), whole / "log.csv"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    train(whole)
    assert times() == before


@pytest.mark.parametrize(
    ("config", "images", "named"),
    [
        (change(CONFIG, optim={"lr": 0.1}), IMAGES, r"optim\.lr: 0\.001 then, 0\.1 now.*--init"),
        (change(CONFIG, optim={"duration": "12 steps"}), IMAGES, r"optim\.duration"),
        (CONFIG, IMAGES[:30], "40 then, 30 now"),
        (CONFIG, IMAGES[::-1], "40 then, 40 now, or other names"),
    ],
)
def test_other_settings_and_images_are_refused(whole, config, images, named):
    with pytest.raises(RunError, match=named):
        train(whole, config, images)


def test_folders_in_use_are_refused(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match=str(tmp_path)):
        train(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("keep me")
    with pytest.raises(RunError, match=r"mine\.txt"):
        train(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


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


def test_export_makes_a_model_with_the_transform_of_training(whole, tmp_path):
    model = ijepa_zoo.create_model(f"local-dir:{whole}")
    tensors, _ = state(whole)
    assert torch.equal(model.norm.bias, tensors["target_encoder.norm.bias"])
    context = ijepa_zoo.create_model(f"local-dir:{whole}", network="encoder")
    assert torch.equal(context.norm.bias, tensors["encoder.norm.bias"])
    again = ijepa_zoo.create_ijepa(f"local-dir:{whole}")
    assert torch.equal(again.predictor.mask_token, tensors["predictor.mask_token"])
    assert tuple(model.pretrained_cfg["mean"]) == CONFIG.data.mean == (0.4, 0.5, 0.6)
    with pytest.raises(CheckpointError, match=r"step 7: it has \[8, 9\]"):
        export_run(whole, tmp_path / "export", step=7)


def test_export_of_an_unfinished_run_is_replaced_at_its_end(tmp_path, monkeypatch, whole):
    def bias(folder=tmp_path):
        return ijepa_zoo.create_model(f"local-dir:{folder}").norm.bias

    stop_after(monkeypatch, 6, tmp_path)
    with pytest.raises(CheckpointError, match="`ijepa-zoo export"):
        bias()
    export_run(tmp_path)
    before, newest = bias(), state(tmp_path)[0]["target_encoder.norm.bias"]
    assert torch.equal(before, newest)
    assert not torch.equal(bias(export_run(tmp_path, tmp_path / "earlier", step=4)), newest)
    train(tmp_path)
    assert torch.equal(bias(), state(whole)[0]["target_encoder.norm.bias"])
    assert not torch.equal(bias(), before)


def test_loss_that_is_not_finite_names_step_rank_and_images(tmp_path, monkeypatch):
    original, calls = IJepa.forward, []

    def forward(self, images, context, targets):
        calls.append(1)
        loss = original(self, images, context, targets)
        return loss * float("nan") if len(calls) == 6 else loss  # part 2 of step 2

    monkeypatch.setattr(IJepa, "forward", forward)
    with pytest.raises(NonFiniteLossError, match=r"step 2 is nan on rank 0 \(images ") as error:
        train(tmp_path)
    trainer = Trainer(CONFIG, open_images(IMAGES))
    trainer.step = 2
    named = [trainer.images.name(int(i)) for i in next(trainer.batches())[1].indices]
    assert f"(images {', '.join(named)})" in str(error.value)


@pytest.mark.parametrize(("every", "named"), [(4, "step 1 is nan"), (1, "not finite after step 1")])
def test_ruined_weights_are_never_saved_nor_exported(tmp_path, every, named):
    optim = {"lr": 1e30, "start_lr": 1e30, "regularizer_weight": 0.0}
    with pytest.raises(NonFiniteLossError, match=named):
        train(tmp_path, change(CONFIG, optim=optim, log={"save_every": f"{every} steps"}))
    assert checkpoint_steps(tmp_path / "checkpoints") == []
    assert not (tmp_path / "export").exists()


def test_starts_from_weights_at_another_size_and_with_other_channels(tmp_path, monkeypatch, whole):
    grey = change(
        CONFIG,
        model={"img_size": 48, "patch_size": 6, "in_chans": 1},
        data={"mean": (0.5,), "std": (0.25,)},
        optim={"duration": "3 steps", "warmup": "0 steps"},
    )
    options = {"images": IMAGES[..., 0], "init": export_run(whole, tmp_path / "start")}
    stop_after(monkeypatch, 1, tmp_path / "run", grey, **options)
    tensors, about = state(tmp_path / "run")
    assert tensors["encoder.patch_embed.proj.weight"].shape == (24, 1, 6, 6)
    name = "encoder.blocks.0.attn.qkv.weight"
    assert (tensors[name] - state(whole)[0][name]).abs().max() < 0.01
    shutil.rmtree(tmp_path / "start")  # resuming does not need it
    train(tmp_path / "run", grey, **options)
    assert about["initial"] == state(tmp_path / "run")[1]["initial"] != {}


def test_broken_images_are_named_and_stop_the_run_above_a_share(tmp_path):
    folder, run = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i, picture in enumerate(IMAGES):
        Image.fromarray(picture).save(folder / f"{i:02}.png")
    (folder / "07.png").write_bytes(b"no image")
    (folder / "19.png").write_bytes((folder / "19.png").read_bytes()[:60])
    train(run, change(CONFIG, data={"max_broken": 0.2}), str(folder))
    lines = (run / "broken-0.jsonl").read_text().splitlines()
    named = [Path(json.loads(line)["image"]).name for line in lines]
    assert sorted(named) == ["07.png", "19.png"]
    with pytest.raises(DataError, match=r"broken-\*\.jsonl"):
        train(tmp_path / "stops", change(CONFIG, data={"max_broken": 0.0}), str(folder))


def test_seed_and_precision_matter_and_the_regularizer_is_logged(whole, tmp_path):
    short = {"duration": "2 steps", "warmup": "1 steps"}
    train(tmp_path / "a", change(CONFIG, optim=short, seed=1))
    train(tmp_path / "b", change(CONFIG, optim={**short, "precision": "bf16"}))
    train(tmp_path / "c", change(CONFIG, optim={**short, "regularizer_weight": 0.0}))
    first, *others = (rows(folder)[0] for folder in (whole, *(tmp_path / n for n in "abc")))
    losses = [float(row["loss"]) for row in (first, *others)]
    assert losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=0.02)
    assert float(first["regularizer"]) == pytest.approx(losses[0] - losses[3], rel=1e-3)
    assert others[2]["regularizer"] == ""


def test_rows_are_means_over_their_steps(whole, tmp_path):
    log = {"log_every": 3, "monitor_every": 100, "keep": 1, "keep_every": "3 steps"}
    train(tmp_path, change(CONFIG, log=log))
    for name in ("loss", "regularizer", "mask-A"):
        single = np.array([float(row[name]) for row in rows(whole)])
        means = [float(row[name]) for row in rows(tmp_path)]
        assert means == pytest.approx(single.reshape(3, 3).mean(1), rel=1e-6)
    assert all(0 < row["data_wait"] < 1 for row in read_log(tmp_path))
    assert checkpoint_steps(tmp_path / "checkpoints") == [3, 6, 9]
    assert [float(row["step"]) for row in rows(whole) if row["rankme"]] == [3, 7, 8]


def test_settings_for_small_data_resume_exactly_and_accumulate(tmp_path, monkeypatch):
    optim = {"target_layers": 2, "position_noise": 0.25, "duration": "3 steps"}
    model = {"predictor_context": "shared", "predictor_depth": 2}
    config = change(CONFIG, model=model, mask={"per_image": 2}, optim=optim)
    train(tmp_path / "whole", config)
    stop_after(monkeypatch, 1, tmp_path / "stopped", config)
    train(tmp_path / "stopped", config)
    assert same_state(tmp_path / "whole", tmp_path / "stopped")
    free = change(config, optim={"regularizer_weight": 0.0})
    for micro in (4, 2):
        train(tmp_path / str(micro), change(free, runtime={"micro_batch_size": micro}))
    one, two = ([float(r["loss"]) for r in rows(tmp_path / str(micro))] for micro in (4, 2))
    assert one == pytest.approx(two, rel=1e-5)
    images = open_images(IMAGES)
    with pytest.raises(SettingsError, match="target_layers"):
        Trainer(change(config, optim={"target_layers": 3}), images)
    (batch, *_), *_ = Trainer(config, images).batches()
    assert len(batch.images) * 2 == len(batch.context) == len(batch.targets)
    assert not torch.equal(batch.context[0], batch.context[1])
