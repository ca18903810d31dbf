"""The model's own transform, at every size, and for images of extreme shapes."""

import numpy as np
import pytest
import timm
import torch
from ijepa_zoo.data.batches import ImageBatches
from ijepa_zoo.data.items import Item
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from ijepa_zoo.data.transforms import create_transform, describe_transform


def model(img_size: int | tuple[int, int] = 64, **cfg: object) -> VisionTransformer:
    vit = VisionTransformer(img_size, 8, embed_dim=8, depth=1, num_heads=1, num_classes=0)
    vit.pretrained_cfg = {"input_size": (3, 64, 64), "crop_pct": 0.875, **cfg}
    return vit


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def test_is_timms_own() -> None:
    vit = timm.create_model("vit_tiny_patch16_224")
    config = timm.data.resolve_model_data_config(vit)
    expected = timm.data.create_transform(**config)(photo(300, 200))
    assert torch.equal(create_transform(vit)(photo(300, 200)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_takes_images_of_any_mode(mode: str) -> None:
    grey = np.full((64, 64), 51, np.uint8)
    image = Image.fromarray(
        {"I;16": grey.astype(np.uint16) * 257, "F": grey / np.float32(255)}.get(mode, grey)
    )
    image = image if image.mode == mode else image.convert(mode)
    pixels = create_transform(model(crop_pct=1.0), normalize=False)(image)
    assert torch.as_tensor(pixels).shape == (3, 64, 64)
    if mode != "1":
        assert abs(int(torch.as_tensor(pixels)[0, 32, 32]) - 51) <= 1


@pytest.mark.parametrize("size", [64, 128, (64, 96)])
def test_follows_the_models_size(size: int | tuple[int, int]) -> None:
    vit = model(size)
    height, width = (size, size) if isinstance(size, int) else size
    assert create_transform(vit)(photo(150, 200)).shape == (3, height, width)
    if isinstance(size, int):  # 64 / 0.875 = 73 and 128 / 0.875 = 146 pixels before the crop
        short = int(size / 0.875)
        resized = photo(150, 200).resize((short, int(short * 200 / 150)), 3)
        left, top = (round((side - size) / 2) for side in resized.size)
        expected = np.asarray(resized.crop((left, top, left + size, top + size)))
        got = create_transform(vit, normalize=False)(photo(150, 200)).permute(1, 2, 0).numpy()
        assert np.abs(got.astype(int) - expected).max() <= 1


def test_pixels_and_normalised_are_the_same_image() -> None:
    vit = model(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = create_transform(vit, normalize=False)(photo(70, 90))
    assert pixels.dtype == torch.uint8
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (pixels.float() / 255 - mean) / std
    assert torch.equal(create_transform(vit)(photo(70, 90)), expected)


@pytest.mark.parametrize(("width", "height"), [(1, 60_000), (60_000, 1), (1, 1), (3, 2_000)])
def test_extreme_shapes(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (10, 20, 30))
    got = create_transform(model(), normalize=False)(image)
    assert got.shape == (3, 64, 64)
    assert got[:, 5, 7].tolist() == [10, 20, 30]


def test_cut_of_a_long_image_keeps_its_centre() -> None:
    image = Image.new("RGB", (4000, 10))
    image.paste((255, 0, 0), (1990, 0, 2010, 10))  # the middle 20 pixels
    got = create_transform(model(crop_pct=1.0), normalize=False)(image)
    assert (got[0, :, 4:60] > 250).all()


def test_other_channels_are_refused() -> None:
    vit = VisionTransformer(64, 8, in_chans=1, embed_dim=8, depth=1, num_heads=1)
    with pytest.raises(ValueError, match="takes images of 1 channels"):
        create_transform(vit)


def test_description() -> None:
    assert describe_transform(model()).startswith("bicubic resize, center crop 0.875 to 64x64")


def test_batches_keep_their_slots(tmp_path: object) -> None:
    items = [Item(f"{tmp_path}/{i}.png") for i in range(5)]
    for i in (0, 2, 3, 4):
        Image.new("RGB", (64, 64), (i + 1, 0, 0)).save(items[i].path)
    batches = ImageBatches(items, create_transform(model(), normalize=False), 3, (64, 64))
    assert len(batches) == 2
    first, reasons = batches[0]
    assert first[:, 0, 0, 0].tolist() == [1, 0, 3]
    assert [r is None for r in reasons] == [True, False, True]
    last, reasons = batches[1]
    assert last[:, 0, 0, 0].tolist() == [4, 5, 0]
    assert reasons == [None, None]
