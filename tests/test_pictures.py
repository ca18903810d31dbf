"""The picture of principal components, against NumPy's singular value decomposition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from ijepa_zoo.data import open_images
from ijepa_zoo.errors import DataError
from ijepa_zoo.pictures import pca_colours, pca_picture, save_pca_picture


def test_colours_are_principal_components() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 6, 3, 4, dtype=torch.float64) * torch.tensor([9, 5, 3, 1, 1, 1]).view(
        6, 1, 1
    )
    patches = maps.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    centred = patches - patches.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]
    axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    scores = centred @ axes.T
    low, high = np.percentile(scores, 1, axis=0), np.percentile(scores, 99, axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1)
    got = pca_colours(maps).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 2, 3, 3), (1, 5, 1, 2)])
def test_colours_of_very_few_patches_or_channels(shape: tuple[int, ...]) -> None:
    colours = pca_colours(torch.randn(shape))
    assert colours.shape == (shape[0], 3, *shape[2:])
    assert torch.isfinite(colours).all()


def test_grid_shows_each_image_beside_its_features() -> None:
    pixels = torch.zeros(5, 3, 64, 96, dtype=torch.uint8)
    pixels[:, 0] = torch.tensor([10, 20, 30, 40, 50], dtype=torch.uint8).view(5, 1, 1)
    sheet = np.asarray(pca_picture(pixels, torch.randn(5, 8, 4, 6)))
    shown = [level for level in range(256) if (sheet == (level, 0, 0)).all(2).sum() == 192 * 288]
    assert shown == [10, 20, 30, 40, 50]
    assert sheet.shape[0] % (192 + 8) == 8
    assert sheet.shape[1] % (2 * 288 + 8) == 8


def test_broken_images_are_passed_over(tmp_path: Path) -> None:
    for level in range(6):
        path = tmp_path / f"{level}.png"
        Image.new("L", (32, 32), level).save(path)
        if level in (0, 3):
            path.write_bytes(b"damaged")
    images = open_images([tmp_path / f"{i}.png" for i in range(6)])
    model = VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    save_pca_picture(images, model, tmp_path / "p.png", count=3, device="cpu")
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    levels = {tuple(pixel) for pixel in sheet.reshape(-1, 3)}
    assert {(1, 1, 1), (2, 2, 2), (4, 4, 4)} <= levels
    with pytest.raises(DataError, match="no image could be decoded"):
        save_pca_picture(open_images(tmp_path / "0.png"), model, tmp_path / "q.png", device="cpu")
