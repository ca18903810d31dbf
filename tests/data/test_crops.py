"""Crops of images: the numbers of the published code, from whatever an image is read as."""

import numpy as np
import torch
from ijepa_zoo.data.crops import cut
from PIL import Image
from torchvision.transforms import functional as published


def test_crop_is_the_published_one_within_a_level() -> None:
    """That of torchvision's first transforms on Pillow images, which has a filter of its own."""
    rng = np.random.default_rng(0)
    different = []
    for number in range(60):
        height, width = rng.integers(1, 200, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8) if number % 2 else pixels
        sides = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip((height, width), sides))
        size = [int(side) for side in rng.integers(1, 150, 2)]
        for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0])):
            expected = published.pil_to_tensor(
                published.resized_crop(image, top, left, *sides, size)
            ).int()
            found = cut(image, (top, left, *sides), (size[0], size[1]))
            assert found.dtype == torch.uint8
            different.append((found.int() - expected).abs())
    assert max(int(levels.max()) for levels in different) <= 1
    assert np.mean([(levels > 0).float().mean() for levels in different]) < 0.1


def test_crop_of_a_tensor_is_that_of_the_picture() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    box = (3, 7, 20, 31)
    for size in ((20, 31), (8, 8), (40, 48)):
        expected = cut(Image.fromarray(pixels), box, size)
        strided = torch.from_numpy(pixels).permute(2, 0, 1)  # as decoders give them
        for tensor in (strided, strided.contiguous()):
            assert torch.equal(cut(tensor, box, size), expected)


def test_crop_without_resizing_is_the_part_itself() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    found = cut(Image.fromarray(pixels), (4, 5, 16, 20), (16, 20))
    assert torch.equal(found, torch.from_numpy(pixels[4:20, 5:25]).permute(2, 0, 1))
