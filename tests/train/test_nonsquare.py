"""Images of another shape than a square: trained on, exported and opened."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_run import CONFIG, change, pictures, train
from timm.data import create_transform as timm_transform
from timm.data import resolve_model_data_config

import ijepa_zoo
from ijepa_zoo.data import open_images
from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.train import Trainer, export_run

SIZE, GRID = (48, 64), (6, 8)
WIDE = change(
    CONFIG,
    model={"img_size": SIZE},
    data={"crop_ratio": (1.0, 16 / 9)},
    optim={"duration": "2 steps", "warmup": "1 steps"},
)
IMAGES = pictures()[:, 8:56]  # 48 x 64 pixels


def test_batches_have_the_shape_and_masks_the_grid_of_the_images():
    trainer = Trainer(WIDE, open_images(IMAGES))
    assert trainer.masks.grid_size == trainer.model.predictor.grid_size == GRID
    (batch, *_), *_ = trainer.batches()
    assert batch.images.shape[-2:] == SIZE
    for patches in (batch.context, batch.targets):
        assert patches.max() < math.prod(GRID)
    for block in batch.targets.flatten(0, 1):  # rectangles: rows of neighbors in a grid 8 wide
        rows_, columns = block // GRID[1], block % GRID[1]
        assert len(block) == len(rows_.unique()) * len(columns.unique())
    assert trainer.monitor()[0].images.shape[-2:] == SIZE
    assert "48x64" in str(trainer)


def test_export_opens_with_the_grid_and_the_transform(tmp_path):
    run = tmp_path / "run"
    train(run, WIDE, IMAGES)
    model = ijepa_zoo.create_model(f"local-dir:{run}").eval()
    assert model.patch_embed.grid_size == GRID
    photo = np.random.default_rng(1).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    pixels = ijepa_zoo.create_transform(model)(Image.fromarray(photo))
    assert pixels.shape == (3, *SIZE)
    theirs = timm_transform(**resolve_model_data_config(model), is_training=False)
    assert torch.allclose(pixels, theirs(Image.fromarray(photo)), atol=1e-6)
    features = model(pixels[None])
    for to in ("timm", "native"):
        folder = export_run(run, tmp_path / to, to=to)
        opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert opened.patch_embed.grid_size == GRID
        assert torch.equal(opened(pixels[None]), features)
        assert tuple(resolve_model_data_config(opened)["input_size"]) == (3, *SIZE)
    with pytest.raises(CheckpointError, match="48x64"):
        export_run(run, tmp_path / "transformers", to="transformers")
