"""The loss curve of a small run: a change that moves it changes what users get, and must say so."""

from pathlib import Path

import pytest
from small_run import CONFIG, change, rows, train

RECORDED = Path(__file__).parents[1] / "golden" / "loss_curve.txt"


def test_loss_curve(tmp_path):
    config = change(
        CONFIG,
        optim={"duration": "40 steps", "warmup": "10 steps", "regularizer_weight": 0.0, "lr": 3e-3},
        log={"monitor_every": 100},
    )
    train(tmp_path, config)
    lines = RECORDED.read_text().splitlines()
    recorded = [float(line.split()[1]) for line in lines if not line.startswith("#")]
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    # Rounding differs between processors and grows with the steps.
    assert losses[:10] == pytest.approx(recorded[:10], rel=1e-5)
    assert losses == pytest.approx(recorded, rel=1e-3)
    assert losses[-1] < 0.7 * losses[0]
