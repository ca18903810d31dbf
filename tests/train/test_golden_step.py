"""The published training, step by step: losses, rates and final weights recorded from its code."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ijepa_zoo import create_ijepa
from ijepa_zoo.train import PretrainConfig
from ijepa_zoo.train.optim import make_optimizer, set_rates

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "step.json").read_text())
SIZES = GOLDEN["config"]


def wave(name, shape, scale, offset=0.0):
    """The closed formula behind every recorded weight and image."""
    k = np.arange(np.prod(shape), dtype=np.float64)
    phase = zlib.crc32(name.encode()) % 1000
    values = offset + scale * np.sin(0.7 * k + 0.013 * k * (k % 7) + phase)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def filled_network(prefix, network):
    for name, parameter in network.named_parameters():
        is_norm = name.endswith("weight") and "norm" in name
        scale, offset = (0.1, 1.0) if is_norm else (0.05, 0.0)
        parameter.data = wave(f"{prefix}.{name}", tuple(parameter.shape), scale, offset)


def build():
    model = create_ijepa(
        "vit_nano8_64_ijepa",
        pretrained=False,
        img_size=SIZES["img"],
        patch_size=SIZES["patch"],
        embed_dim=SIZES["dim"],
        depth=SIZES["depth"],
        num_heads=SIZES["heads"],
        mlp_ratio=SIZES["mlp"],
        predictor_embed_dim=SIZES["pdim"],
        predictor_depth=SIZES["pdepth"],
    )
    filled_network("encoder", model.encoder)
    filled_network("predictor", model.predictor)
    model.target_encoder.load_state_dict(model.encoder.state_dict())
    return model.train()


def golden_masks(step):
    """The README's masks: context `[B, K]` and targets `[B, 4, L]`."""
    grid, batch = SIZES["img"] // SIZES["patch"], SIZES["batch"]
    height, width = (2, 3) if step % 2 == 0 else (3, 2)
    targets, contexts = [], []
    for b in range(batch):
        blocks = []
        for m in range(4):
            top, left = (b + 2 * m + step) % (grid - height), (2 * b + m + step) % (grid - width)
            blocks.append(
                [(top + i) * grid + left + j for i in range(height) for j in range(width)]
            )
        targets.append(blocks)
        hidden = {index for block in blocks for index in block}
        inner = [r * grid + c for r in range(grid - 1) for c in range(grid - 1)]
        contexts.append([index for index in inner if index not in hidden])
    shortest = min(map(len, contexts))
    return torch.tensor([c[:shortest] for c in contexts]), torch.tensor(targets)


def config():
    return PretrainConfig(
        "vit_nano8_64_ijepa", steps=SIZES["steps"], warmup_steps=SIZES["warmup"] * SIZES["ipe"]
    )


def test_masks_of_the_first_step():
    recorded = load_file(FOLDER / "step.safetensors")
    context, targets = golden_masks(0)
    assert torch.equal(context, recorded["context_indices"])
    assert torch.equal(targets, recorded["target_indices"])


def test_rates():
    for expected in GOLDEN["trajectory"]:
        for name, value in config().rates(expected["step"]).items():
            assert value == pytest.approx(expected[name], rel=1e-12, abs=1e-15)


def test_trajectory():
    model, rates = build(), config().rates
    optimizer = make_optimizer(model.encoder, model.predictor)
    size = (SIZES["batch"], 3, SIZES["img"], SIZES["img"])
    for expected in GOLDEN["trajectory"]:
        step = expected["step"]
        loss = model(wave(f"images{step}", size, 1.0), *golden_masks(step))
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
        now = rates(step)
        set_rates(optimizer, lr=now["lr"], weight_decay=now["weight_decay"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(now["momentum"])
    for network in ("encoder", "predictor", "target_encoder"):
        state = getattr(model, network).state_dict()
        recorded = GOLDEN[f"final_{network}"]
        assert state.keys() == recorded.keys()
        for name, expected in recorded.items():
            value = state[name].double()
            norm = expected["norm"]
            assert value.norm().item() == pytest.approx(norm, rel=1e-5), name
            # A sum can cancel to nothing: its scale is that of sqrt(n) entries.
            scale = max(abs(expected["sum"]), norm * value.numel() ** 0.5)
            assert abs(value.sum().item() - expected["sum"]) < 1e-5 * scale, name
