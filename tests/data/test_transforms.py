"""The model's evaluation transform and random crops, against timm's and torchvision's."""

import math

import numpy as np
import pytest
import timm
import torch
from inputs import encoded, noise
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as torchvision

from ijepa_zoo.data.transforms import (
    DRAWS,
    center_box,
    create_transform,
    crop_box,
    crop_resize,
    describe_transform,
    limit_aspect,
    pixel_size,
    transform_config,
)
from ijepa_zoo.errors import ImageError


def model(img_size=64, in_chans=3, **config):
    vit = VisionTransformer(img_size, 8, in_chans, embed_dim=8, depth=1, num_heads=1, num_classes=0)
    vit.pretrained_cfg = {"input_size": (3, 64, 64), "crop_pct": 0.875, **config}
    return vit


def photo(width, height):
    return Image.fromarray(noise(height, width))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_is_timms_own(mode):
    vit = timm.create_model("test_vit", img_size=96)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "crop_mode": mode, "input_size": (3, 96, 96)}
    config = timm.data.resolve_model_data_config(vit)
    expected = timm.data.create_transform(**config)(photo(300, 200))
    assert torch.equal(create_transform(vit)(photo(300, 200)), expected)
    for in_chans in (1, 12) if mode != "border" else ():
        other = model(96, in_chans, crop_mode=mode)
        assert create_transform(other)(noise(200, 300, in_chans)).shape == (in_chans, 96, 96)


@pytest.mark.parametrize("in_chans", [1, 2, 12])
def test_fits_the_channels_of_the_model(in_chans):
    moments = {"mean": (0.2, 0.3, 0.4), "std": (0.1, 0.2, 0.3)}
    vit = model(in_chans=in_chans, interpolation="bilinear", **moments)
    assert transform_config(vit)["input_size"] == (in_chans, 64, 64)
    values = noise(70, 90, 12)[..., :in_chans]
    found = create_transform(vit)(values)
    assert torch.equal(found, create_transform(vit)(torch.from_numpy(values).permute(2, 0, 1)))
    pixels = create_transform(vit, normalize=False)(values).float()
    torch.testing.assert_close(found, (pixels / 255 - 0.3) / 0.2)
    alone = create_transform(model(in_chans=1, interpolation="bilinear"), normalize=False)
    expected = alone(np.ascontiguousarray(values[..., -1]))[0].float()
    assert (pixels[-1] - expected).abs().max() <= 1  # between the filters of Pillow and torch
    if in_chans > 1:
        with pytest.raises(ImageError, match=f"{in_chans} channels"):
            create_transform(vit)(photo(8, 8))


@pytest.mark.parametrize("size", [64, 128, (64, 96)])
def test_follows_the_models_size_and_takes_files_arrays_and_tensors_alike(size):
    vit = model(size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    height, width = (size, size) if isinstance(size, int) else size
    pixels = create_transform(vit, normalize=False)(photo(150, 200))
    assert pixels.shape == (3, height, width)
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (pixels.float() / 255 - mean) / std
    tensor = torch.from_numpy(noise(200, 150)).permute(2, 0, 1)
    for raw in (photo(150, 200), encoded(photo(150, 200)), noise(200, 150), tensor):
        assert torch.equal(create_transform(vit)(raw), expected)
    assert f"0.875 to {height}x{width}" in describe_transform(vit)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 1), (3, 2_000), (4000, 10)])
def test_extreme_shapes_are_cut_about_their_center(size):
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), tuple(round(v * s) for v in (0.45, 0.55) for s in size))
    found = create_transform(model(crop_pct=1.0), normalize=False)(image)
    assert found.shape == (3, 64, 64)
    assert found[0, 32, 32] > 250 or size == (1, 1)
    tensor = torchvision.pil_to_tensor(image)
    assert torch.equal(limit_aspect(tensor), torchvision.pil_to_tensor(limit_aspect(image)))
    short = min(size)
    expected = tuple(min(side, 32 * short) for side in size[::-1])
    assert pixel_size(limit_aspect(tensor)) == pixel_size(limit_aspect(image)) == expected


def test_crop_box_has_the_law_of_torchvision(monkeypatch):
    """With the numbers that torchvision draws, one try at a time, the boxes are its own."""
    rng = np.random.default_rng(0)
    scale, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
    fallbacks = 0
    for _ in range(100):
        height, width = (int(side) for side in rng.integers(1, 300, 2))
        draws = rng.random(DRAWS)
        box = crop_box(draws.tolist(), (height, width), scale=scale, ratio=ratio)
        numbers = iter(np.stack([draws[:10], draws[10:20]], 1).reshape(-1))
        places = iter(draws[20:22])

        def uniform(tensor, low, high, n=numbers):
            return tensor.double().fill_(low + float(next(n)) * (high - low))

        def randint(low, high, size, p=places):
            return torch.tensor([math.floor(float(next(p)) * (high - low))])

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform)
            patch.setattr(torch, "randint", randint)
            image = torch.empty(3, height, width)
            expected = RandomResizedCrop.get_params(image, list(scale), list(ratio))
        fallbacks += next(places, None) is not None
        assert np.abs(np.subtract(box, expected)).max() <= 1  # torch takes logarithms in float32
        assert box[0] + box[2] <= height
        assert box[1] + box[3] <= width
    assert fallbacks > 1
    assert center_box((100, 50), 1.0) == (25, 0, 50, 50)
    assert center_box((50, 100), 2.0) == (0, 0, 50, 100)


def test_crop_is_torchvisions_on_pillow_images_within_a_level():
    rng = np.random.default_rng(0)
    different = []
    for number in range(20):
        height, width = (int(side) for side in rng.integers(1, 200, 2))
        pixels = noise(height, width, 3, number)
        sides = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip((height, width), sides))
        height, width = (int(side) for side in rng.integers(1, 150, 2))
        for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0])):
            cropped = torchvision.resized_crop(image, top, left, *sides, [height, width])
            found = crop_resize(image, (top, left, *sides), (height, width))
            different.append((found.int() - torchvision.pil_to_tensor(cropped).int()).abs())
            tensor = torchvision.pil_to_tensor(image)
            assert torch.equal(crop_resize(tensor, (top, left, *sides), (height, width)), found)
    assert max(int(levels.max()) for levels in different) <= 1
    assert np.mean([(levels > 0).float().mean() for levels in different]) < 0.1
