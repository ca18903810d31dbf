"""From pretraining to a probe on images of 12 channels, by the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

import ijepa_zoo
from ijepa_zoo.cli import main

SMALL = [
    "model.name=vit_nano8_64_ijepa", "model.in_chans=12", "model.img_size=64",
    "model.embed_dim=24", "model.depth=4", "model.num_heads=2", "model.predictor_embed_dim=12",
    "model.predictor_depth=1", "data.mean=0.5", "data.std=0.25", "data.held_out=0",
    "mask.group_size=4", "mask.min_keep=4", "optim.batch_size=8", "optim.duration=3 steps",
    "optim.warmup=1 steps", "runtime.workers=0", "runtime.device=cpu",
]  # fmt: skip


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Files `[H, W, 12]` of two classes, which differ in the last channel alone."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, value in (("dry", 20), ("wet", 220)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40, 36, 12), dtype=np.uint8)
                pixels[..., -1] = value + random.integers(0, 30)
                np.save(folder / f"{number}.npy", pixels)


def test_twelve_channels_from_pretraining_to_a_probe(images):
    words = ["--data", "data/train", "--out", "run", "--quiet"]
    assert main(["pretrain", "custom_small", *SMALL, *words]) == 0
    assert main(["export", "run", "exported", "--network", "target_encoder"]) == 0
    model = ijepa_zoo.create_model("local-dir:exported")
    assert model.patch_embed.proj.weight.shape == (24, 12, 8, 8)
    assert ijepa_zoo.create_transform(model).input_size == (12, 64, 64)

    options = ["--model", "local-dir:exported", "--device", "cpu", "--workers", "0"]
    assert main(["features", "data/train", *options, "--out", "features.npy"]) == 0
    assert np.load("features.npy").shape == (24, 24)

    assert main(["eval", "knn", *options, "--data", "data", "--quiet"]) == 0
    (result,) = Path("results").glob("*/result.json")
    assert json.loads(result.read_text())["value"] > 80  # chance: 50
