"""examples/small_data: arms of the study, its table, and MAE beside them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ijepa_zoo.train import Trainer
from ijepa_zoo.train.networks import build_networks

EXAMPLE = Path(__file__).parent.parent / "examples" / "small_data"
SMALL = [
    "model.embed_dim=32", "model.depth=4", "model.num_heads=2", "model.predictor_embed_dim=16",
    "model.predictor_depth=1", "model.img_size=24", "model.patch_size=4", "optim.batch_size=8",
    "mask.group_size=8", "optim.warmup=1 steps", "data.held_out=24", "log.monitor_every=2",
    "log.log_every=1",
]  # fmt: skip


@pytest.fixture
def study(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import study

    return study


@pytest.fixture
def photos(tmp_path):
    """Images of two classes, noise and darker noise: 40 for training, 16 for validation."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 8)):
        for name, brightest in (("bright", 256), ("dark", 128)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, brightest, (26, 26, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def test_the_study_trains_probes_and_repeats_nothing(study, photos, monkeypatch, capsys):
    arguments = [
        "study.py", "--train", str(photos / "train"), "--val", str(photos / "val"),
        "--out", str(photos / "runs"), "--epochs", "2", "--arms", "random", "mae", "term",
        "--set", *SMALL,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    rows = json.loads((photos / "runs" / "study.json").read_text())
    assert [row["arm"] for row in rows] == ["random", "mae", "term"]
    assert all(0 <= row["kNN"] <= 100 for row in rows)
    assert rows[2]["images seen"] == 2 * 2 * 8  # 16 images are not held out
    assert rows[2]["hours"] > 0
    assert (photos / "runs" / "table.md").read_text() in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "train_step", None)
    monkeypatch.setattr("mae.make_mae", None)
    study.main()
    assert json.loads((photos / "runs" / "study.json").read_text()) == rows


def test_mae_is_a_timm_model_that_knows_where_patches_are(study, photos):
    from mae import make_mae, to_timm, train_mae

    config = study.settings("mae", 0, 2, SMALL)
    folder = train_mae(config, photos / "train", photos / "mae")
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert tuple(encoder.pretrained_cfg["input_size"]) == (3, 24, 24)
    mae = make_mae(build_networks(config))
    untrained, _ = to_timm(mae, dict(encoder.pretrained_cfg))
    images = torch.rand(1, 3, 24, 24)
    swapped = images.roll(4, dims=-1)  # the same patches at other places
    with torch.no_grad():
        first, second = (untrained.forward_features(pixels)[:, 0] for pixels in (images, swapped))
        assert encoder.forward_features(images).isfinite().all()
    assert not torch.allclose(first, second, atol=1e-3)
    assert len(torch.unique(mae.decoder.decoder_pos_embed[0, 1:], dim=0)) == 36
