"""The picture of principal components, against NumPy's singular value decomposition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from ijepa_zoo.data import open_images
from ijepa_zoo.errors import DataError
from ijepa_zoo.visualize import pca_colors, pca_picture, save_pca_picture


def test_colors_are_principal_components() -> None:
    scales = torch.tensor([9, 5, 3, 1, 1, 1]).view(6, 1, 1)
    maps = torch.randn(2, 6, 3, 4, dtype=torch.float64) * scales
    patches = maps.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    centered = patches - patches.mean(0)
    axes = np.linalg.svd(centered, full_matrices=False)[2][:3]
    axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    scores = centered @ axes.T
    low, high = np.percentile(scores, [1, 99], axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1)
    got = pca_colors(maps).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 2, 3, 3)])
def test_very_few_patches_or_channels(shape: tuple[int, ...]) -> None:
    colors = pca_colors(torch.randn(shape))
    assert colors.shape == (shape[0], 3, *shape[2:])
    assert torch.isfinite(colors).all()


def test_grid_shows_each_image_beside_its_features() -> None:
    pixels = torch.zeros(5, 3, 64, 96, dtype=torch.uint8)
    pixels[:, 0] = torch.tensor([10, 20, 30, 40, 50], dtype=torch.uint8).view(5, 1, 1)
    sheet = np.asarray(pca_picture(pixels, torch.randn(5, 8, 4, 6)))
    red = sheet[..., 0][(sheet[..., 1:] == 0).all(2)]
    for level in (10, 20, 30, 40, 50):
        assert (red == level).sum() == 192 * 288
    assert sheet.shape[0] % (192 + 8) == 8
    assert sheet.shape[1] % (2 * 288 + 8) == 8


def test_the_next_image_is_drawn_instead_of_a_broken_one(tmp_path: Path) -> None:
    for level in range(6):
        Image.new("L", (32, 32), level).save(tmp_path / f"{level}.png")
    for level in (0, 3):
        (tmp_path / f"{level}.png").write_bytes(b"damaged")
    images = open_images([tmp_path / f"{i}.png" for i in range(6)])
    model = VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    save_pca_picture(images, model, tmp_path / "p.png", count=3, device="cpu")
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    levels = {tuple(pixel) for pixel in sheet.reshape(-1, 3)}
    assert {(1, 1, 1), (2, 2, 2), (4, 4, 4)} <= levels
    with pytest.raises(DataError):
        save_pca_picture(open_images(tmp_path / "0.png"), model, tmp_path / "q.png", device="cpu")
