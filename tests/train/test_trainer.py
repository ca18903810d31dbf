import csv
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import ijepa_zoo
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train import PretrainConfig, Trainer, pretrain
from ijepa_zoo.train.checkpoint import CheckpointError, load_checkpoint

CONFIG = PretrainConfig(
    "vit_nano8_64_ijepa",
    network={"embed_dim": 24, "depth": 2, "num_heads": 2, "predictor_embed_dim": 12,
             "predictor_depth": 1},
    steps=9,
    batch_size=6,
    warmup_steps=3,
    momentum=0.9,
    min_keep=4,
    regularizer_weight=0.1,
    precision="fp32",
)  # fmt: skip
QUIET = {"progress": False, "log_every": 1, "monitor_every": 4, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)


def log_without_speed(folder):
    with (folder / "log.csv").open() as file:
        return [{**row, "images_per_second": ""} for row in csv.DictReader(file)]


def interrupt_after(monkeypatch, updates, action):
    """Run `action` at the end of update number `updates`."""
    done, original = [], IJepa.update_target

    def update_target(self, momentum):
        original(self, momentum)
        done.append(momentum)
        if len(done) == updates:
            action()

    monkeypatch.setattr(IJepa, "update_target", update_target)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_is_exact(tmp_path, monkeypatch, images, number):
    pretrain(CONFIG, images, tmp_path / "whole", **QUIET)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, lambda: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt, match=r"after step 5 of 9.*again"):
            pretrain(CONFIG, images, tmp_path / "parts", **QUIET)
    assert load_checkpoint(tmp_path / "parts").step == 5
    torch.manual_seed(123)  # global state must not matter
    np.random.seed(5)
    pretrain(CONFIG, images, tmp_path / "parts", **QUIET)
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    assert whole.step == parts.step == 9
    assert whole.tensors.keys() == parts.tensors.keys()
    assert any(name.endswith("exp_avg_sq") for name in whole.tensors)
    for name, value in whole.tensors.items():
        assert torch.equal(value, parts.tensors[name]), name
    assert log_without_speed(tmp_path / "whole") == log_without_speed(tmp_path / "parts")


def test_crash_goes_back_to_the_last_checkpoint(tmp_path, monkeypatch, images):
    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(CONFIG, images, tmp_path / "parts", **QUIET)
    assert load_checkpoint(tmp_path / "parts").step == 4
    pretrain(CONFIG, images, tmp_path / "parts", **QUIET)
    pretrain(CONFIG, images, tmp_path / "whole", **QUIET)
    rows = log_without_speed(tmp_path / "parts")
    assert [int(row["step"]) for row in rows] == list(range(9))
    assert rows == log_without_speed(tmp_path / "whole")


def test_finished_run_is_left_alone(tmp_path, images):
    first = pretrain(CONFIG, images, tmp_path, **QUIET)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = pretrain(CONFIG, images, tmp_path, **QUIET)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)


def test_other_settings_are_refused(tmp_path, images):
    pretrain(CONFIG, images, tmp_path, **QUIET)
    with pytest.raises(CheckpointError, match=r"lr: 0.001 there, 0.1 now.*another folder"):
        pretrain(replace(CONFIG, lr=0.1), images, tmp_path, **QUIET)


def test_log(tmp_path, images):
    pretrain(CONFIG, images, tmp_path, **QUIET)
    rows = log_without_speed(tmp_path)
    assert [bool(row["rankme"]) for row in rows] == [i in (3, 7, 8) for i in range(9)]
    assert float(rows[0]["lr"]) == pytest.approx(CONFIG.rates(0)["lr"], rel=1e-5)
    assert float(rows[8]["momentum"]) == pytest.approx(CONFIG.rates(8)["momentum"], rel=1e-5)
    assert all(float(row["context_tokens"]) > 4 for row in rows)


def test_training_lowers_the_loss(images):
    trainer = Trainer(replace(CONFIG, steps=60, warmup_steps=5, lr=3e-3), images)
    losses = [trainer.update()["loss"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_seed_decides_everything(images):
    def weights(config):
        trainer = Trainer(config, images)
        trainer.update()
        return trainer.model.encoder.blocks[0].attn.qkv.weight

    first = weights(CONFIG)
    assert torch.equal(first, weights(CONFIG))
    assert not torch.equal(first, weights(replace(CONFIG, seed=1)))


def test_bf16_is_close_to_fp32(images):
    losses = {
        precision: Trainer(replace(CONFIG, precision=precision), images).update()["loss"]
        for precision in ("fp32", "bf16")
    }
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_loss_that_is_not_finite_stops_before_the_update(images):
    trainer = Trainer(CONFIG, images)
    with torch.no_grad():
        trainer.model.predictor.mask_token.fill_(float("nan"))
    before = trainer.model.encoder.norm.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        trainer.update()
    assert torch.equal(trainer.model.encoder.norm.weight, before)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((2, 64, 64, 3), np.float32),
        np.zeros((0, 64, 64, 3), np.uint8),
    ],
)
def test_images_are_checked(bad):
    with pytest.raises(ValueError, match=r"uint8 \[n, H, W, 3\]"):
        Trainer(CONFIG, bad)


def test_config_is_checked():
    with pytest.raises(ValueError, match="warmup_steps=20"):
        PretrainConfig("vit_nano8_64_ijepa", steps=10, warmup_steps=20)
    with pytest.raises(ValueError, match="'fp32' or 'bf16'"):
        PretrainConfig("vit_nano8_64_ijepa", precision="fp16")


def test_images_of_another_size_are_resized():
    images = np.zeros((8, 80, 100, 3), np.uint8)
    assert Trainer(CONFIG, images).batch().shape == (6, 3, 64, 64)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"lr": np.float32(1e-3)}, {}, "settings must be plain"),
        ({}, {"monitor_every": 0}, "must be at least 1"),
        ({}, {"checkpoint_every": 0}, "must be at least 1"),
    ],
)
def test_what_would_fail_at_the_first_checkpoint_fails_before_the_first_step(
    images, tmp_path, change, options, message
):
    with pytest.raises(ValueError, match=message):
        pretrain(replace(CONFIG, **change), images, tmp_path, **{**QUIET, **options})
    with pytest.raises(ValueError, match="at least two"):
        pretrain(CONFIG, images[:1], tmp_path, **QUIET)


def test_a_log_that_is_none_is_left_alone(images, tmp_path):
    (tmp_path / "log.csv").write_text("notes\nof mine\n")
    with pytest.raises(ValueError, match=r"log\.csv is no log of a run"):
        pretrain(CONFIG, images, tmp_path, **QUIET)
    assert (tmp_path / "log.csv").read_text() == "notes\nof mine\n"


def test_a_checkpoint_of_a_run_loads_like_any_other(tmp_path, images):
    trained = pretrain(CONFIG, images, tmp_path, **QUIET)
    path = max(tmp_path.glob("checkpoint-*.safetensors"))
    size = {key: CONFIG.network[key] for key in ("embed_dim", "depth", "num_heads")}
    for network in ("encoder", "target_encoder"):
        loaded = ijepa_zoo.create_model(CONFIG.model, checkpoint=path, network=network, **size)
        expected = getattr(trained, network).state_dict()
        assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)
    again = ijepa_zoo.create_ijepa(CONFIG.model, checkpoint=path, **CONFIG.network)
    assert torch.equal(again.predictor.mask_token, trained.predictor.mask_token)
    default = ijepa_zoo.create_model(CONFIG.model, checkpoint=path, **size)
    assert torch.equal(default.norm.bias, trained.target_encoder.norm.bias)
