import json
import math

import pytest
import several_processes
import torch

from ijepa_zoo import create_ijepa
from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.metrics import knn_accuracy, linear_accuracy, mean_cosine, rankme, spread
from ijepa_zoo.train.monitor import Monitor
from ijepa_zoo.train.optim import make_optimizer, set_rates

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def tiny():
    torch.manual_seed(0)
    return create_ijepa(
        "vit_nano8_64_ijepa", pretrained=False, img_size=32, patch_size=8, embed_dim=48, depth=2,
        num_heads=3, predictor_embed_dim=24, predictor_depth=1,
    ).train()  # fmt: skip


def pictures(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def measure(model, images, labels=None, **options):
    return Monitor(images, labels, MEAN, STD, **options).measure(model, Distributed())


def one_update(module, model, optimizer):
    """An update with the same images and masks whatever the number of processes."""
    context = torch.arange(6).expand(2, -1)
    targets = torch.tensor([[8, 9], [12, 13]]).expand(2, 2, 2)
    set_rates(optimizer, lr=3e-3, weight_decay=0.4)
    module(pictures(2).float() / 255, context, targets).backward()
    optimizer.step()
    model.update_target(0.9)


def updated():
    model = tiny()
    optimizer = make_optimizer(model.encoder, model.predictor)
    one_update(model, model, optimizer)
    return model


def shares_by_numpy(model, pixels):
    """Sums of squares of a two-way analysis of variance."""
    with torch.no_grad():
        tokens = model.target_encoder.encode(pixels)
    tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:]).double().numpy()
    total = ((tokens - tokens.mean((0, 1))) ** 2).sum()
    position = ((tokens.mean(0) - tokens.mean((0, 1))) ** 2).sum() * len(tokens)
    image = ((tokens.mean(1) - tokens.mean((0, 1))) ** 2).sum() * tokens.shape[1]
    return {"position_variance": position / total, "image_variance": image / total}


def test_metrics_are_those_of_the_target_encoder():
    model = updated()
    images, labels = pictures(23), torch.arange(23) % 4
    labels[5] = -1
    metrics = measure(model, images, labels, batch_size=8)
    pixels = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        features = model.target_encoder.encode(pixels).mean(1)
    known = labels >= 0
    encoder, target = (
        torch.cat([p.detach().flatten() for p in network.parameters()])
        for network in (model.encoder, model.target_encoder)
    )
    expected = {
        "rankme": rankme(features),
        "spread": spread(features),
        "cosine": mean_cosine(features),
        "knn": knn_accuracy(features[known], labels[known]),
        "linear": linear_accuracy(features[known], labels[known]),
        "ema_distance": float((encoder - target).norm() / target.norm()),
        **shares_by_numpy(model, pixels),
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert metrics["ema_distance"] > 0


def test_without_classes_no_accuracy_and_broken_features_are_nan():
    model, images = tiny(), pictures(6)
    for labels in (None, torch.full((6,), 3), torch.full((6,), -1)):
        assert not {"knn", "linear"} & measure(model, images, labels).keys()
    with pytest.raises(SettingsError, match=r"data\.held_out"):
        measure(model, images[:1])
    model.target_encoder.norm.weight.data.fill_(torch.nan)
    metrics = measure(model, images, torch.arange(6))
    assert all(math.isnan(metrics[k]) for k in ("rankme", "spread", "cosine", "knn", "linear"))


RANK = """
    import json, sys
    from pathlib import Path
    import torch
    from train import test_monitor as t
    from ijepa_zoo.train.config import RuntimeConfig
    from ijepa_zoo.train.monitor import Monitor
    from ijepa_zoo.train.optim import make_optimizer
    from ijepa_zoo.train.parallel import parallelize
    from ijepa_zoo.distributed import init_distributed

    with init_distributed("cpu", 60) as distributed:
        results = {}
        for parallel in ("ddp", "fsdp2"):
            model = t.tiny()
            module = parallelize(model, RuntimeConfig(parallel=parallel), distributed, "fp32")
            monitor = Monitor(t.pictures(11), torch.arange(11) % 3, t.MEAN, t.STD, 4)
            t.one_update(module, model, make_optimizer(model.encoder, model.predictor))
            results[parallel] = monitor.measure(model, distributed)
        if distributed.rank == 1:
            Path(sys.argv[1]).write_text(json.dumps(results))
"""


def test_two_processes_measure_what_one_does(tmp_path):
    several_processes.run(RANK, 2, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    expected = measure(updated(), pictures(11), torch.arange(11) % 3)
    for parallel in ("ddp", "fsdp2"):
        assert results[parallel] == pytest.approx(expected, rel=1e-4)
