"""Metrics of features during training, and the warning of collapse."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_zoo import create_ijepa
from ijepa_zoo.distributed import Distributed
from ijepa_zoo.metrics import knn_accuracy, linear_accuracy, mean_cosine, rankme, spread
from ijepa_zoo.train.data import normalize
from ijepa_zoo.train.monitor import CollapseWatch, Monitor
from ijepa_zoo.train.optim import make_optimizer, set_rates

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def tiny(**options):
    torch.manual_seed(0)
    return create_ijepa(
        "vit_nano8_64_ijepa", pretrained=False, img_size=32, embed_dim=48, depth=2, num_heads=3,
        predictor_embed_dim=24, predictor_depth=1, **options,
    ).train()  # fmt: skip


def pictures(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def measure(model, images, labels=None, **options):
    known = torch.ones(len(images), dtype=torch.bool)
    return Monitor(images, known, labels, MEAN, STD, **options).measure(model, Distributed())


def updated():
    model = tiny()
    optimizer = make_optimizer(model.encoder, model.predictor)
    context = torch.arange(6).expand(2, -1)
    targets = torch.tensor([[8, 9], [12, 13]]).expand(2, 2, 2)
    set_rates(optimizer, lr=3e-3, weight_decay=0.4)
    model(pictures(2).float() / 255, context, targets).backward()
    optimizer.step()
    model.update_target(0.9)
    return model


def test_metrics_are_those_of_the_target_encoder():
    model, images, labels = updated(), pictures(23), torch.arange(23) % 4
    labels[5] = -1
    metrics = measure(model, images, labels, batch_size=8)
    with torch.no_grad():
        tokens = model.target_encoder.encode(normalize(images, MEAN, STD))
    features, known = tokens.mean(1), labels >= 0
    encoder, target = (
        torch.cat([p.detach().flatten() for p in network.parameters()])
        for network in (model.encoder, model.target_encoder)
    )
    # sums of squares of a two-way analysis of variance
    values = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:]).double().numpy()
    values -= values.mean((0, 1))
    expected = {
        "rankme": rankme(features),
        "spread": spread(features),
        "cosine": mean_cosine(features),
        "knn": knn_accuracy(features[known], labels[known]),
        "linear": linear_accuracy(features[known], labels[known]),
        "ema_distance": float((encoder - target).norm() / target.norm()),
        "position_variance": 23 * (values.mean(0) ** 2).sum() / (values**2).sum(),
        "image_variance": 16 * (values.mean(1) ** 2).sum() / (values**2).sum(),
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert metrics["ema_distance"] > 0


def test_images_that_are_not_known_do_not_count():
    model, images, labels = updated(), pictures(9), torch.arange(9) % 3
    known = torch.arange(9) % 4 > 0
    found = Monitor(images, known, labels, MEAN, STD, 4).measure(model, Distributed())
    assert found == pytest.approx(measure(model, images[known], labels[known]), rel=1e-5)


def test_the_distance_holds_one_difference_at_a_time():
    alive, most = weakref.WeakSet(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.sub.Tensor:
                alive.add(result.untyped_storage())
                most.append(len(alive))
            return result

    model, monitor = updated(), Monitor(pictures(2), torch.tensor([True, True]), None, MEAN, STD)
    with Watch():
        monitor.measure(model, Distributed())
    assert len(most) > 20
    assert max(most) <= 2


def test_without_classes_no_accuracy_and_broken_features_are_nan():
    model, images = tiny(), pictures(6)
    for labels in (None, torch.full((6,), 3), torch.full((6,), -1)):
        assert not {"knn", "linear"} & measure(model, images, labels).keys()
    model.target_encoder.norm.weight.data.fill_(torch.nan)
    metrics = measure(model, images, torch.arange(6))
    assert all(math.isnan(metrics[k]) for k in ("rankme", "spread", "cosine", "knn", "linear"))


# --- collapse: rank and spread of real runs at the same steps, the first ones at initialization

SHIPPED = (  # the shipped model: far below initialization at first, and healthy
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


def warnings_of(rows, initial=None, replayed=()):
    """Warnings by number of the row."""
    watch = CollapseWatch(initial)
    watch.replay(replayed)
    found = ((i, watch.update(i, row)) for i, row in enumerate(rows, len(replayed)))
    return {i: text for i, text in found if text is not None}


def rows_of(curve):
    rows = [{"rankme": rank, "spread": s, "cosine": 1 - s**2} for rank, s in zip(*curve)]
    return rows[0], [{"step": i, "lr": 1e-3 / (i + 1), **row} for i, row in enumerate(rows[1:])]


def test_slow_collapse_warns_once_with_numbers_and_settings_and_shipped_run_is_silent():
    initial, rows = rows_of(SLOW_COLLAPSE)
    ((number, text),) = warnings_of(rows, initial).items()
    assert number == 14
    for value in ("rankme 1.87 (best 3,", "spread 0.0672 (best 0.166, at initialization 0.166)"):
        assert value in text
    for setting in ("optim.lr (now 6.7e-05)", "optim.momentum", "regularizer_weight", "warmup"):
        assert setting in text
    initial, rows = rows_of(SHIPPED)
    assert warnings_of(rows, initial) == {}


@pytest.mark.parametrize(("metric", "fallen"), [("rankme", 3.0), ("spread", 0.3), ("cosine", 0.95)])
def test_each_metric_alone_warns_and_a_second_onset_warns_again_also_after_a_replay(metric, fallen):
    low = {**WELL, metric: fallen}
    other = [{"loss": 0.3}]  # rows without metrics of the monitor change nothing
    rows = [WELL] * 5 + [low] * 2 + other + [low] * 4 + [WELL] * 2 + other + [low] * 4
    rows = [{"step": i, **row} for i, row in enumerate(rows)]
    assert list(warnings_of(rows)) == [8, 17]
    for stop in range(len(rows)):
        expected = [i for i in (8, 17) if i >= stop]
        assert list(warnings_of(rows[stop:], replayed=rows[:stop])) == expected


def test_warmup_has_more_patience_and_recovery_does_not_warn():
    recovering = [{"rankme": 3.0 * 1.1**i} for i in range(20)]
    assert warnings_of(recovering, {"rankme": 40.0}) == {}
    rising = [{"lr": 1e-4 * (i + 1), "rankme": 3.0} for i in range(12)]
    assert list(warnings_of(rising, {"rankme": 40.0})) == [7]
    # rows without metrics of the monitor carry the learning rate too
    constant = [{"lr": 1e-3}, {"lr": 1e-3, "rankme": 3.0}] * 3
    assert list(warnings_of(constant, {"rankme": 40.0})) == [5]
