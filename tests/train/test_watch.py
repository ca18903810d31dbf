import math

import pytest
import torch

from ijepa_zoo import create_ijepa
from ijepa_zoo.distributed import Distributed
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train.data import normalize
from ijepa_zoo.train.monitor import Monitor
from ijepa_zoo.train.optim import make_optimizer, set_rates
from ijepa_zoo.train.regularizers import VarianceCovariance
from ijepa_zoo.train.watch import CollapseWatch

# Figures of real runs: rankme and spread at the same steps, the first ones at initialisation.
SHIPPED = (  # examples/pretrain_scenes: far below initialisation at first, and healthy
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


def test_slow_collapse_is_announced_once_with_numbers_and_advice():
    initial, rows = rows_of(SLOW_COLLAPSE)
    watch = CollapseWatch(initial)
    (text,) = warnings_of(watch, rows)
    assert text.startswith("step 300: the features are collapsing: rankme 1.87 (highest 3,")
    assert "spread 0.0672 (highest 0.166, at initialisation 0.166)" in text
    assert "cosine 0.995 (lowest 0.972" in text
    for advice in ("lower optim.lr (now 0.001)", "0.995", "regularizer_weight", "warmup", "mask."):
        assert advice in text


def test_healthy_run_is_silent_though_it_starts_below_initialisation():
    initial, rows = rows_of(SHIPPED)
    assert warnings_of(CollapseWatch(initial), rows) == []


@pytest.mark.parametrize(("figure", "fallen"), [("rankme", 3.0), ("spread", 0.3), ("cosine", 0.95)])
def test_each_figure_alone_warns_and_a_second_onset_warns_again(figure, fallen):
    well = {"rankme": 40.0, "spread": 0.7, "cosine": 0.5}
    watch = CollapseWatch()
    values = (
        [well] * 5 + [{**well, figure: fallen}] * 6 + [well] * 2 + [{**well, figure: fallen}] * 4
    )
    texts = [watch.update(i, row) for i, row in enumerate(values)]
    assert [i for i, found in enumerate(texts) if found] == [7, 15]


def test_low_figures_that_recover_do_not_warn():
    watch = CollapseWatch({"rankme": 40.0})
    assert warnings_of(watch, [{"step": i, "rankme": 3.0 * 1.1**i} for i in range(20)]) == []


def test_warmup_has_more_patience():
    initial, fallen = {"rankme": 40.0}, {"rankme": 3.0}
    rising = [{"step": i, "lr": 1e-4 * (i + 1), **fallen} for i in range(12)]
    watch = CollapseWatch(initial)
    assert [bool(watch.update(i, row)) for i, row in enumerate(rising)].index(True) == 7
    # rows without figures of the monitor carry the learning rate too
    falling = CollapseWatch(initial)
    for i in range(3):
        falling.update(i, {"lr": 1e-3})
        found = falling.update(i, {"lr": 1e-3, **fallen})
    assert found


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_loss(noise):
    torch.manual_seed(0)
    usual = [0.4 * math.exp(-i / 10) + 0.005 * (1 + i / 60) for i in range(200)]
    losses = [v * (1 + noise * float(torch.rand(()))) for v in usual]
    watch = CollapseWatch()
    normal = [{"step": i, "loss": v} for i, v in enumerate(losses)]
    assert warnings_of(watch, normal) == []  # falls, then doubles and more, slowly
    single = [{"step": 200, "loss": 0.2}, {"step": 201, "loss": usual[-1]}]
    assert warnings_of(watch, single) == []
    jumped = [{"step": 202 + i, "loss": 0.06} for i in range(60)]
    (text,) = warnings_of(watch, jumped)
    assert text.startswith("step 205: the loss jumped from 0.0")
    assert "to 0.06 and stays there" in text
    again = [{"step": 300 + i, "loss": 0.3} for i in range(30)]
    assert len(warnings_of(watch, again)) == 1


def test_probes_no_better_than_at_initialisation():
    initial = {"knn": 17.8, "linear": 20.7}
    stuck = [{"step": i, "knn": 17.5 + i % 2, "linear": 20.5 + i % 3 * 0.4} for i in range(12)]
    (text,) = warnings_of(CollapseWatch(initial), stuck)
    assert text.startswith("step 8: the features are no better than at initialisation: knn 1")
    assert "(then 17.8 %), linear" in text
    gains = [{"step": i, "knn": 17.0, "linear": 21.0 + 0.2 * i} for i in range(20)]
    assert warnings_of(CollapseWatch(initial), gains) == []
    warming = [{**row, "lr": 1e-5 * (i + 1)} for i, row in enumerate(stuck)]
    assert warnings_of(CollapseWatch(initial), warming) == []


def test_figures_that_are_not_finite():
    watch = CollapseWatch({"rankme": 5.0, "knn": 10.0})
    bad = {"rankme": math.nan, "spread": math.nan, "knn": math.nan}
    assert "rankme, spread, knn cannot be measured" in watch.update(1, bad)[0]
    assert watch.update(2, {"loss": 1.0}) == watch.update(3, bad) == []


@pytest.mark.parametrize("curve", [SLOW_COLLAPSE, SHIPPED])
def test_replay_goes_on_as_if_never_stopped(curve):
    initial, rows = rows_of(curve, lr=lambda number: 1e-3 / (number + 1))
    rows = [{**row, "loss": 0.1 if i < 9 else 1.0, "knn": 5.0} for i, row in enumerate(rows * 4)]
    whole = CollapseWatch({**initial, "knn": 5.0})
    texts = [whole.update(i, row) for i, row in enumerate(rows)]
    assert sum(map(len, texts)) > 1
    for stop in range(len(rows)):
        resumed = CollapseWatch({**initial, "knn": 5.0})
        resumed.replay(rows[:stop])
        assert [resumed.update(i, rows[i]) for i in range(stop, len(rows))] == texts[stop:]


def train(lr, momentum, regularizer, steps=75):
    """A tiny real run; the watch's warnings."""
    torch.manual_seed(0)
    model = create_ijepa(
        "vit_nano8_64_ijepa", pretrained=False, img_size=32, patch_size=4, embed_dim=48, depth=2,
        num_heads=3, predictor_embed_dim=24, predictor_depth=1, regularizer=regularizer,
    ).train()  # fmt: skip
    # colour, and waves of all lengths and directions: something to tell images apart by
    grid = torch.arange(32.0)
    waves = torch.rand(2, 320, 3, 1) * 0.8
    phase = waves[0] * grid, waves[1] * grid
    pictures = torch.sin(
        phase[0].unsqueeze(-1) + phase[1].unsqueeze(-2) + 6 * torch.rand(320, 3, 1, 1)
    )
    pictures = (90 * pictures * torch.rand(320, 1, 1, 1) + 128).to(torch.uint8)
    monitor = Monitor(pictures[:64], None, (0.5,), (0.25,))
    masks = MultiBlockMasks((8, 8), min_keep=4)
    optimizer = make_optimizer(model.encoder, model.predictor)
    alone = Distributed()
    watch = CollapseWatch(monitor.measure(model, alone))
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
        row = {"lr": lr, "loss": loss.item()}
        if step % 5 == 4:
            texts += watch.update(step + 1, row | monitor.measure(model, alone))
    return texts


def test_real_collapse_is_seen_and_a_regularised_run_is_not_accused():
    collapsing = train(lr=3e-3, momentum=0.98, regularizer=None)
    assert any("the features are collapsing" in text for text in collapsing)
    healthy = train(lr=1e-3, momentum=0.98, regularizer=VarianceCovariance(0.1, "residuals"))
    assert healthy == []
