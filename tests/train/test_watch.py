import math

import pytest
import torch

from ijepa_zoo import create_ijepa
from ijepa_zoo.distributed import Distributed
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train.data import normalize
from ijepa_zoo.train.monitor import CollapseWatch, Monitor
from ijepa_zoo.train.optim import make_optimizer, set_rates
from ijepa_zoo.train.regularizers import VarianceCovariance

# rankme and spread of real runs at the same steps, the first ones at initialization
SHIPPED = (  # examples/pretrain_nano: far below initialization at first, and healthy
    [20, 3.09, 4.55, 6.87, 9.35, 12.0, 15.1, 18.6, 22.2, 26.1, 29.9, 46.3, 56.1, 60.8, 62.1],
    [0.1, 0.054, 0.085, 0.121, 0.151, 0.178, 0.209, 0.246, 0.289, 0.34, 0.4, 0.68, 0.82, 0.87,
     0.88],
)  # fmt: skip
SLOW_COLLAPSE = (  # a small ViT on CIFAR-10 with the published settings: loss 0.40 -> 0.01
    [2.86, 2.85, 2.79, 2.71, 2.68, 2.72, 2.78, 2.89, 2.99, 3.0, 2.79, 2.5, 2.25, 2.07, 1.95, 1.87],
    [0.166, 0.164, 0.154, 0.142, 0.137, 0.136, 0.135, 0.142, 0.152, 0.154, 0.138, 0.115, 0.096,
     0.0826, 0.0735, 0.0672],
)  # fmt: skip


def rows_of(curve, lr=lambda number: 1e-3):
    initial, *rows = [
        {"rankme": rank, "spread": spread, "cosine": 1 - spread**2} for rank, spread in zip(*curve)
    ]
    return initial, [{"step": 20.0 * i + 19, "lr": lr(i), **row} for i, row in enumerate(rows)]


def warnings_of(watch, rows):
    return [text for row in rows for text in watch.update(int(row["step"]) + 1, row)]


def test_slow_collapse_warns_once_with_numbers_and_settings():
    initial, rows = rows_of(SLOW_COLLAPSE)
    (text,) = warnings_of(CollapseWatch(initial), rows)
    assert text.startswith("step 300: ")
    for value in ("rankme 1.87 (best 3,", "spread 0.0672 (best 0.166, at initialization 0.166)"):
        assert value in text
    for setting in ("optim.lr (now 0.001)", "optim.momentum", "regularizer_weight", "warmup"):
        assert setting in text


def test_healthy_run_is_silent_though_it_starts_below_initialization():
    initial, rows = rows_of(SHIPPED)
    assert warnings_of(CollapseWatch(initial), rows) == []


@pytest.mark.parametrize(("metric", "fallen"), [("rankme", 3.0), ("spread", 0.3), ("cosine", 0.95)])
def test_each_metric_alone_warns_and_a_second_onset_warns_again(metric, fallen):
    well = {"rankme": 40.0, "spread": 0.7, "cosine": 0.5}
    low = {**well, metric: fallen}
    watch = CollapseWatch()
    texts = [
        watch.update(i, row)
        for i, row in enumerate([well] * 5 + [low] * 6 + [well] * 2 + [low] * 4)
    ]
    assert [i for i, found in enumerate(texts) if found] == [7, 15]


def test_low_metrics_that_recover_do_not_warn():
    watch = CollapseWatch({"rankme": 40.0})
    assert warnings_of(watch, [{"step": i, "rankme": 3.0 * 1.1**i} for i in range(20)]) == []


def test_warmup_has_more_patience():
    initial, fallen = {"rankme": 40.0}, {"rankme": 3.0}
    rising = [{"lr": 1e-4 * (i + 1), **fallen} for i in range(12)]
    watch = CollapseWatch(initial)
    assert [bool(watch.update(i, row)) for i, row in enumerate(rising)].index(True) == 7
    # rows without metrics of the monitor carry the learning rate too
    falling = CollapseWatch(initial)
    for i in range(3):
        falling.update(i, {"lr": 1e-3})
        found = falling.update(i, {"lr": 1e-3, **fallen})
    assert found


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_jumps_of_the_loss(noise):
    torch.manual_seed(0)
    usual = [0.4 * math.exp(-i / 10) + 0.005 * (1 + i / 60) for i in range(200)]
    losses = [v * (1 + noise * float(torch.rand(()))) for v in usual]
    watch = CollapseWatch()
    normal = [{"step": i, "loss": v} for i, v in enumerate(losses)]
    assert warnings_of(watch, normal) == []  # falls, then doubles and more, slowly
    single = [{"step": 200, "loss": 0.2}, {"step": 201, "loss": usual[-1]}]
    assert warnings_of(watch, single) == []
    (text,) = warnings_of(watch, [{"step": 202 + i, "loss": 0.06} for i in range(60)])
    assert text.startswith("step 205: ")
    assert "to 0.06" in text
    assert len(warnings_of(watch, [{"step": 300 + i, "loss": 0.3} for i in range(30)])) == 1


def test_replay_resumes_as_if_never_stopped():
    initial, rows = rows_of(SLOW_COLLAPSE, lr=lambda number: 1e-3 / (number + 1))
    rows = [{**row, "loss": 0.1 if i < 25 else 1.0} for i, row in enumerate(rows * 4)]
    whole = CollapseWatch(initial)
    texts = [whole.update(i, row) for i, row in enumerate(rows)]
    assert sum(map(len, texts)) > 1
    for stop in range(len(rows)):
        resumed = CollapseWatch(initial)
        resumed.replay(rows[:stop])
        assert [resumed.update(i, rows[i]) for i in range(stop, len(rows))] == texts[stop:]


def train(lr, momentum, regularizer, steps=75):
    """A tiny real run; its warnings."""
    torch.manual_seed(0)
    model = create_ijepa(
        "vit_nano8_64_ijepa", pretrained=False, img_size=32, patch_size=4, embed_dim=48, depth=2,
        num_heads=3, predictor_embed_dim=24, predictor_depth=1, regularizer=regularizer,
    ).train()  # fmt: skip
    # color, and waves of all lengths and directions: something to tell images apart by
    grid, waves = torch.arange(32.0), torch.rand(2, 320, 3, 1) * 0.8
    phase = (waves[0] * grid).unsqueeze(-1) + (waves[1] * grid).unsqueeze(-2)
    pictures = torch.sin(phase + 6 * torch.rand(320, 3, 1, 1))
    pictures = (90 * pictures * torch.rand(320, 1, 1, 1) + 128).to(torch.uint8)
    monitor = Monitor(pictures[:64], None, (0.5,), (0.25,))
    masks = MultiBlockMasks((8, 8), min_keep=4)
    optimizer = make_optimizer(model.encoder, model.predictor)
    watch = CollapseWatch(monitor.measure(model, Distributed()))
    texts = []
    for step in range(steps):
        context, targets = masks.sample(32, seed=0, step=step)
        chosen = 64 + torch.randperm(256)[:32]
        set_rates(optimizer, lr=lr, weight_decay=0.04)
        optimizer.zero_grad()
        loss = model(normalize(pictures[chosen], (0.5,), (0.25,)), context, targets)
        loss.backward()
        optimizer.step()
        model.update_target(momentum)
        if step % 5 == 4:
            row = {"lr": lr, "loss": loss.item(), **monitor.measure(model, Distributed())}
            texts += watch.update(step + 1, row)
    return texts


def test_real_collapse_is_seen_and_a_regularized_run_is_not_accused():
    collapsing = train(lr=3e-3, momentum=0.98, regularizer=None)
    assert any("collapsing" in text for text in collapsing)
    healthy = train(lr=1e-3, momentum=0.98, regularizer=VarianceCovariance(0.1, "residuals"))
    assert healthy == []
