import math

import pytest
import torch
from small_run import CONFIG, change, pictures, step_batches
from torch import nn
from torch.nn.utils import get_total_norm

from ijepa_zoo.data import open_images
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train import NonFiniteLossError, Trainer
from ijepa_zoo.train.config import OptimConfig
from ijepa_zoo.train.data import normalize
from ijepa_zoo.train.networks import build_networks
from ijepa_zoo.train.optim import Schedule, make_optimizer, set_rates


def networks():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    predictor = nn.ModuleDict({"proj": nn.Linear(3, 4)})
    predictor.register_parameter("mask_token", nn.Parameter(torch.ones(1, 1, 3)))
    return encoder, predictor


def test_groups_stand_in_the_official_order():
    encoder, predictor = networks()
    groups = make_optimizer(encoder, predictor).param_groups
    assert [group["decayed"] for group in groups] == [True, True, False, False]
    shapes = [[tuple(p.shape) for p in group["params"]] for group in groups]
    assert shapes == [[(3, 4)], [(1, 1, 3), (4, 3)], [(3,), (3,), (3,)], [(4,)]]


def test_decay_is_decoupled_and_spares_biases_and_norms():
    encoder, predictor = networks()
    optimizer = make_optimizer(encoder, predictor)
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    for parameter in [*encoder.parameters(), *predictor.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    set_rates(optimizer, lr=0.1, weight_decay=0.5)
    optimizer.step()
    after = dict(encoder.named_parameters())
    assert torch.allclose(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


def test_rates_of_the_official_schedulers():
    optim = OptimConfig(
        batch_size=10, duration="300 steps", warmup="40 steps", start_lr=2e-4, lr=1e-3,
        final_lr=1e-6, weight_decay=0.04, final_weight_decay=0.4, momentum=0.996,
    )  # fmt: skip
    rates = [Schedule.of(optim, images=100).rates(step) for step in range(400)]
    lr, decay, momentum = ([r[name] for r in rates] for name in ("lr", "weight_decay", "momentum"))
    assert lr[0] == pytest.approx(2e-4 + 8e-4 / 40)
    assert lr[39] == 1e-3 == max(lr)
    assert lr == sorted(lr[:40]) + sorted(lr[40:], reverse=True)
    assert lr[169] == pytest.approx((1e-3 + 1e-6) / 2)
    assert lr[299:] == [pytest.approx(1e-6)] * 101
    assert decay == sorted(decay)
    assert decay[149] == pytest.approx(0.22)
    assert decay[299:] == [pytest.approx(0.4)] * 101
    assert (momentum[0], momentum[150], momentum[350]) == (0.996, pytest.approx(0.998), 1.0)


def test_rates_of_the_papers_text_and_of_other_lengths():
    optim = OptimConfig(
        batch_size=10, duration="1e3 images", warmup="0 steps", schedule_scale=1.25,
        weight_decay_schedule="linear",
    )  # fmt: skip
    schedule = Schedule.of(optim, images=99)
    assert (schedule.steps, schedule.epoch_steps, schedule.horizon) == (100, 9, 125)
    assert schedule.rates(0)["lr"] == pytest.approx(
        1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi / 125))
    )
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


def test_clipping_equals_a_plain_loop():
    optim = {"clip_grad": 0.05, "regularizer_weight": 0.0}
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
        assert torch.nn.utils.clip_grad_norm_(trained, 0.05) > 0.1
        rates = trainer.schedule.rates(step)
        set_rates(optimizer, lr=rates["lr"], weight_decay=rates["weight_decay"])
        optimizer.step()
        model.update_target(rates["momentum"])
    for name, parameter in model.named_parameters():
        found = trainer.model.get_parameter(name)
        assert torch.allclose(found, parameter, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("limit", [None, 0.05])
def test_a_gradient_that_is_not_finite_updates_nothing(monkeypatch, limit):
    original, calls = IJepa.forward, []

    def forward(self, images, context, targets):
        calls.append(1)
        loss = original(self, images, context, targets)
        root = (0 * self.encoder.norm.bias.sum()).sqrt()  # 0, its derivative is NaN
        return loss + root if len(calls) == 4 else loss  # the second micro-batch of step 1

    monkeypatch.setattr(IJepa, "forward", forward)
    trainer = Trainer(change(CONFIG, optim={"clip_grad": limit}), open_images(pictures()))
    trainer.train_step(step_batches(trainer.data, 0))
    before = {name: value.clone() for name, value in trainer.tensors().items()}
    with pytest.raises(NonFiniteLossError, match=r"step 1 .*nan"):
        trainer.train_step(step_batches(trainer.data, 1))
    assert trainer.step == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.tensors().items())
    trainer.train_step(step_batches(trainer.data, 1))
    assert not torch.equal(trainer.tensors()["encoder.norm.bias"], before["encoder.norm.bias"])
