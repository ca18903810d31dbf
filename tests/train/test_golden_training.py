"""Losses, rates and final weights recorded from the published code, and our own loss curve."""

import json
from pathlib import Path

import pytest
import torch
from closed_formula import recorded_ijepa, recorded_images
from safetensors.torch import load_file
from small_run import CONFIG, PLAIN, change, rows, train

from ijepa_zoo.train.config import OptimConfig
from ijepa_zoo.train.optim import Schedule, make_optimizer, set_rates

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "step.json").read_text())
SIZES = GOLDEN["config"]


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


def test_trajectory():
    recorded = load_file(FOLDER / "step.safetensors")
    for name, masks in zip(("context_indices", "target_indices"), golden_masks(0)):
        assert torch.equal(masks, recorded[name])
    epochs, batch, warmup = SIZES["steps"] // SIZES["ipe"], SIZES["batch"], SIZES["warmup"]
    optim = OptimConfig(batch_size=batch, duration=f"{epochs} epochs", warmup=f"{warmup} epochs")
    schedule = Schedule.of(optim, batch * SIZES["ipe"] + batch - 1)
    model = recorded_ijepa(SIZES).train()
    optimizer = make_optimizer(model.encoder, model.predictor)
    for expected in GOLDEN["trajectory"]:
        step = expected["step"]
        loss = model(recorded_images(SIZES, step), *golden_masks(step))
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
        now = schedule.rates(step)
        for name, value in now.items():
            assert value == pytest.approx(expected[name], rel=1e-12, abs=1e-15)
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


def test_loss_curve(tmp_path):
    """A change that moves it changes what users get, and must say so."""
    config = change(
        CONFIG,
        mask={"per_image": 1},
        optim={**PLAIN, "duration": "40 steps", "warmup": "10 steps", "lr": 3e-3},
        log={"monitor_every": 100},
    )
    train(tmp_path, config)
    lines = (FOLDER / "loss_curve.txt").read_text().splitlines()
    recorded = [float(line.split()[1]) for line in lines if not line.startswith("#")]
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    # Rounding differs between processors and grows with the steps.
    assert losses[:10] == pytest.approx(recorded[:10], rel=1e-5)
    assert losses == pytest.approx(recorded, rel=1e-3)
    assert losses[-1] < 0.7 * losses[0]
