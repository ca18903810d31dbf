"""Rates, parameter groups, one update, and the term against collapse."""

import math

import numpy as np
import pytest
import torch
from small_run import CONFIG, PLAIN, change, pictures, step_batches
from torch.nn.utils import clip_grad_norm_, get_total_norm

from ijepa_zoo.data import open_images
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train import NonFiniteLossError, Trainer
from ijepa_zoo.train.config import OptimConfig
from ijepa_zoo.train.data import normalize
from ijepa_zoo.train.networks import build_networks
from ijepa_zoo.train.optim import Schedule, make_optimizer, set_rates
from ijepa_zoo.train.regularizers import VarianceCovariance


def test_rates_of_the_official_schedulers():
    optim = OptimConfig(batch_size=10, duration="300 steps", warmup="40 steps")
    rates = [Schedule.of(optim, images=100).rates(step) for step in range(400)]
    lr, decay, momentum = ([r[name] for r in rates] for name in ("lr", "weight_decay", "momentum"))
    assert lr[0] == pytest.approx(2e-4 + 8e-4 / 40)
    assert lr[39] == 1e-3 == max(lr)
    assert lr == sorted(lr[:40]) + sorted(lr[40:], reverse=True)
    assert lr[169] == pytest.approx((1e-3 + 1e-6) / 2)
    assert lr[299:] == [pytest.approx(1e-6)] * 101
    assert (decay[149], decay[299], decay[399]) == pytest.approx((0.22, 0.4, 0.4))
    assert (momentum[0], momentum[150], momentum[350]) == (0.996, pytest.approx(0.998), 1.0)


def test_rates_of_the_papers_text_and_of_other_lengths():
    optim = OptimConfig(
        batch_size=10, duration="1e3 images", warmup="0 steps", schedule_scale=1.25,
        weight_decay_schedule="linear",
    )  # fmt: skip
    schedule = Schedule.of(optim, images=99)
    assert (schedule.steps, schedule.epoch_steps, schedule.horizon) == (100, 9, 125)
    first = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi / 125))
    assert schedule.rates(0)["lr"] == pytest.approx(first)
    assert schedule.rates(24)["weight_decay"] == pytest.approx(0.04 + 0.2 * 0.36)
    for warmup, last in (("0 steps", 1e-6), ("1 steps", 1e-3)):  # one batch, one step
        optim = OptimConfig(batch_size=10, duration="1 steps", warmup=warmup)
        assert Schedule.of(optim, images=10).rates(0)["lr"] == pytest.approx(last)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 200}, "optim.batch_size=200"),
        ({"duration": "0 epochs"}, "optim.duration=0 epochs"),
        ({"duration": "9 steps", "warmup": "1 epochs"}, "optim.warmup=1 epochs"),
    ],
)
def test_durations_that_do_not_fit_the_images(changes, named):
    with pytest.raises(SettingsError, match=named):
        Schedule.of(OptimConfig(**{"batch_size": 10, **changes}), images=100)


def test_groups_stand_in_the_official_order():
    name = "vit_small_patch14_reg4_dinov2"
    model = build_networks(change(CONFIG, model={"name": name, "img_size": 64, "patch_size": 8}))
    optimizer = make_optimizer(model.encoder, model.predictor)
    set_rates(optimizer, lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0, 0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 4
    tokens = {"encoder.pos_embed", "encoder.cls_token", "encoder.reg_token"}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            assert names[parameter].startswith(("encoder", "predictor")[number % 2])
            decayed = parameter.ndim > 1 and names[parameter] not in tokens
            assert decayed == (number < 2), names[parameter]


def test_clipping_equals_a_plain_loop():
    optim = {**PLAIN, "clip_grad": 0.05}
    config = change(CONFIG, optim=optim, runtime={"micro_batch_size": 2})
    trainer = Trainer(config, open_images(pictures()))
    model = build_networks(config).train()
    optimizer = make_optimizer(model.encoder, model.predictor)
    for step in range(3):
        batches = step_batches(trainer.data, step)
        metrics = trainer.train_step(batches).metrics
        optimizer.zero_grad()
        for batch in batches:
            pixels = normalize(batch.images, config.data.mean, config.data.std)
            (model(pixels, batch.context, batch.targets) / len(batches)).backward()
        for network in ("encoder", "predictor"):
            norm = get_total_norm([p.grad for p in getattr(model, network).parameters()])
            assert metrics[f"grad_{network}"] == pytest.approx(norm.item(), rel=1e-4)
        trained = [*model.encoder.parameters(), *model.predictor.parameters()]
        assert clip_grad_norm_(trained, 0.05) > 0.1
        rates = trainer.schedule.rates(step)
        set_rates(optimizer, lr=rates["lr"], weight_decay=rates["weight_decay"])
        optimizer.step()
        model.update_target(rates["momentum"])
    for name, parameter in model.named_parameters():
        found = trainer.model.get_parameter(name)
        assert torch.allclose(found, parameter, rtol=1e-5, atol=1e-7), name


def test_a_gradient_that_is_not_finite_updates_nothing(monkeypatch):
    original, calls = IJepa.forward, []

    def forward(self, images, context, targets):
        calls.append(1)
        loss = original(self, images, context, targets)
        root = (0 * self.encoder.norm.bias.sum()).sqrt()  # 0, its derivative is NaN
        return loss + root if len(calls) == 4 else loss  # the second micro-batch of step 1

    monkeypatch.setattr(IJepa, "forward", forward)
    trainer = Trainer(CONFIG, open_images(pictures()))
    trainer.train_step(step_batches(trainer.data, 0))
    before = {name: value.clone() for name, value in trainer.tensors().items()}
    with pytest.raises(NonFiniteLossError, match=r"step 1 .*nan"):
        trainer.train_step(step_batches(trainer.data, 1))
    assert trainer.step == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.tensors().items())
    trainer.train_step(step_batches(trainer.data, 1))
    assert not torch.equal(trainer.tensors()["encoder.norm.bias"], before["encoder.norm.bias"])


@pytest.mark.parametrize("over", ["images", "residuals"])
def test_variance_covariance_is_the_formula(over):
    """VICReg equations 1-4 with NumPy's covariance, in float32 under autocast."""
    tokens = (torch.randn(7, 5, 6) * 0.7).bfloat16()
    whole = tokens.double()
    means = whole.mean(1)
    samples = means if over == "images" else (whole - means[:, None]).reshape(35, 6)
    covariance = np.cov(samples, rowvar=False)
    expected = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
    expected += 0.2 * ((covariance - np.diag(np.diag(covariance))) ** 2).sum() / 6
    term = VarianceCovariance(0.3, over, covariance_share=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert term(tokens).item() == pytest.approx(0.3 * expected, rel=1e-5)
    assert term.value.item() == term(tokens).item()
    assert VarianceCovariance(1.0, "images")(torch.ones(2, 3, 4)).isfinite()
    with pytest.raises(SettingsError, match="two images"):
        VarianceCovariance(1.0, "images")(torch.ones(1, 3, 4))
