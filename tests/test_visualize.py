"""The picture of principal components, against scikit-learn's."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from timm.models.vision_transformer import VisionTransformer

from ijepa_zoo.data import open_images
from ijepa_zoo.errors import DataError
from ijepa_zoo.visualize import pca_colors, save_pca_picture


def test_colors_are_principal_components():
    scales = torch.tensor([9, 5, 3, 1, 1, 1]).view(6, 1, 1)
    maps = torch.randn(2, 6, 3, 4, dtype=torch.float64) * scales
    patches = maps.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    pca = PCA(3).fit(patches)
    signs = np.sign(pca.components_[np.arange(3), np.abs(pca.components_).argmax(1)])
    scores = pca.transform(patches) * signs
    low, high = np.percentile(scores, [1, 99], axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1)
    got = pca_colors(maps).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-9)
    for shape in ((1, 4, 1, 1), (2, 2, 3, 3)):  # few patches or channels
        colors = pca_colors(torch.randn(shape))
        assert colors.shape == (shape[0], 3, *shape[2:])
        assert torch.isfinite(colors).all()


def test_each_image_is_beside_its_features_and_the_next_one_instead_of_a_broken_one(tmp_path):
    files = [tmp_path / f"{level}.png" for level in range(6)]
    for level, file in enumerate(files):
        Image.new("RGB", (48, 32), (10 * level, 0, 0)).save(file)
    for level in (0, 3):
        files[level].write_bytes(b"damaged")
    model = VisionTransformer((32, 48), 8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    save_pca_picture(open_images(files), model, tmp_path / "p.png", count=3, device="cpu")
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    red = sheet[..., 0][(sheet[..., 1:] == 0).all(2)]
    assert [n for n in range(6) if (red == 10 * n).sum() >= 192 * 288] == [1, 2, 4]
    assert sheet.shape[0] % (192 + 8) == 8
    assert sheet.shape[1] % (2 * 288 + 8) == 8
    with pytest.raises(DataError):
        save_pca_picture(open_images(files[0]), model, tmp_path / "q.png", device="cpu")
