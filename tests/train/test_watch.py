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


WELL = {"rankme": 40.0, "spread": 0.7, "cosine": 0.5}


def rows_of(curve):
    initial, *rows = [
        {"rankme": rank, "spread": spread, "cosine": 1 - spread**2} for rank, spread in zip(*curve)
    ]
    return initial, [{"step": 20.0 * i + 19, "lr": 1e-3 / (i + 1), **r} for i, r in enumerate(rows)]


def warnings_of(watch, rows):
    """Warnings by number of the row."""
    found = ((i, watch.update(i, row)) for i, row in enumerate(rows))
    return {i: text for i, text in found if text is not None}


def test_slow_collapse_warns_once_with_numbers_and_settings():
    initial, rows = rows_of(SLOW_COLLAPSE)
    ((number, text),) = warnings_of(CollapseWatch(initial), rows).items()
    assert number == 14
    for value in ("rankme 1.87 (best 3,", "spread 0.0672 (best 0.166, at initialization 0.166)"):
        assert value in text
    for setting in ("optim.lr (now 6.7e-05)", "optim.momentum", "regularizer_weight", "warmup"):
        assert setting in text


def test_healthy_run_is_silent_though_it_starts_below_initialization():
    initial, rows = rows_of(SHIPPED)
    assert warnings_of(CollapseWatch(initial), rows) == {}


@pytest.mark.parametrize(("metric", "fallen"), [("rankme", 3.0), ("spread", 0.3), ("cosine", 0.95)])
def test_each_metric_alone_warns_and_a_second_onset_warns_again(metric, fallen):
    low = {**WELL, metric: fallen}
    other = [{"loss": 0.3}]  # rows without metrics of the monitor change nothing
    rows = [WELL] * 5 + [low] * 2 + other + [low] * 4 + [WELL] * 2 + other + [low] * 4
    assert list(warnings_of(CollapseWatch(), rows)) == [8, 17]


def test_low_metrics_that_recover_do_not_warn():
    recovering = [{"rankme": 3.0 * 1.1**i} for i in range(20)]
    assert warnings_of(CollapseWatch({"rankme": 40.0}), recovering) == {}


def test_warmup_has_more_patience():
    rising = [{"lr": 1e-4 * (i + 1), "rankme": 3.0} for i in range(12)]
    assert list(warnings_of(CollapseWatch({"rankme": 40.0}), rising)) == [7]
    # rows without metrics of the monitor carry the learning rate too
    constant = [{"lr": 1e-3}, {"lr": 1e-3, "rankme": 3.0}] * 3
    assert list(warnings_of(CollapseWatch({"rankme": 40.0}), constant)) == [5]


def test_replay_resumes_as_if_never_stopped():
    initial, rows = rows_of(SLOW_COLLAPSE)
    rows += [{"step": 999.0, **WELL}, *rows]
    texts = warnings_of(CollapseWatch(initial), rows)
    assert len(texts) == 2
    for stop in range(len(rows)):
        resumed = CollapseWatch(initial)
        resumed.replay(rows[:stop])
        later = {i: text for i, text in texts.items() if i >= stop}
        assert warnings_of(resumed, rows[stop:]).keys() == {i - stop for i in later}


def train(lr, momentum, regularizer, steps=60):
    """Whether a tiny real run has a warning."""
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
            texts.append(watch.update(step + 1, monitor.measure(model, Distributed())))
    return any(texts)


def test_real_collapse_is_seen_and_a_regularized_run_is_not_accused():
    assert train(lr=3e-3, momentum=0.98, regularizer=None)
    assert not train(lr=1e-3, momentum=0.98, regularizer=VarianceCovariance(0.1))
