"""Where an image is cut, and what becomes of the part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resized_crop

from .pixels import Pixels

_TRIES = 10  # boxes drawn before the fallback, as in torchvision's RandomResizedCrop
DRAWS = 2 * _TRIES + 3  # uniform numbers of an image: areas, aspects, top, left, flip

Box = tuple[int, int, int, int]  # top, left, height, width


def crop_box(
    draws: Sequence[float],
    image_size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A box with the law of torchvision's RandomResizedCrop.

    Args:
        draws: Uniform numbers in [0, 1): areas of ten tries, their aspects, top and left.
        image_size: Height and width of the image in pixels.
        scale: Area of the box as a fraction of the image, (min, max), uniform.
        ratio: Width / height of the box, (min, max), log-uniform.

    Returns:
        Top, left, height and width in pixels.
    """
    image_h, image_w = image_size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, aspect_draw in zip(draws[:_TRIES], draws[_TRIES : 2 * _TRIES]):
        area = image_h * image_w * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect_draw * (high - low))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_w and 0 < height <= image_h:
            top_draw, left_draw = draws[2 * _TRIES : 2 * _TRIES + 2]
            top = math.floor(top_draw * (image_h - height + 1))
            return top, math.floor(left_draw * (image_w - width + 1)), height, width
    return centre_box(image_size, min(max(image_w / image_h, ratio[0]), ratio[1]))


def centre_box(image_size: tuple[int, int], aspect: float) -> Box:
    """The largest box in the middle of an image whose width / height is `aspect`."""
    image_h, image_w = image_size
    height, width = image_size
    if image_w / image_h < aspect:
        height = max(round(image_w / aspect), 1)
    else:
        width = max(round(image_h * aspect), 1)
    return (image_h - height) // 2, (image_w - width) // 2, height, width


def cut(image: Pixels, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """A box of an image, resized to uint8 `[C, *size]` with a bilinear filter, antialiased.

    torchvision's filter for uint8 tensors takes a third of the time of Pillow's, which the
    published code uses; results differ by at most one level of 255.
    """
    top, left, height, width = box
    if isinstance(image, Image.Image):
        part = np.array(image.crop((left, top, left + width, top + height)))
        image = torch.from_numpy(part.reshape(height, width, -1)).permute(2, 0, 1)
        top = left = 0
    resized: torch.Tensor = resized_crop(image, top, left, height, width, list(size))
    return resized


def size_of(image: Pixels) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(image, torch.Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width
