"""Pixels of a probe: the random view that it trains on, and the fixed one that it is tested on."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..data.crops import crop_box
from ..data.transforms import LimitAspect
from .tasks import View

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop
_FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}

Size = tuple[int, int]


def random_pixels(image: Image.Image, view: View, size: Size, draws: Sequence[float]) -> Tensor:
    """An image as a probe trains on it: uint8 `[3, *size]`.

    Args:
        image: RGB.
        view: The transforms.
        size: Height and width of the result.
        draws: `DRAWS` uniform numbers in [0, 1); the last one decides the flip.
    """
    if view.shape == "square":
        pixels = _resized(image, view, size)
    else:
        box = crop_box(draws, (image.height, image.width), scale=_SCALE, ratio=_RATIO)
        pixels = tv.resized_crop(image, *box, list(size), interpolation=_FILTERS[view.filter])
    flipped = tv.horizontal_flip(pixels) if draws[-1] < 0.5 else pixels
    tensor: Tensor = tv.pil_to_tensor(flipped)
    return tensor


def fixed_pixels(image: Image.Image, view: View, size: Size) -> Tensor:
    """An image as a probe is tested on it, and as features are cached: uint8 `[3, *size]`."""
    if view.shape == "crop":
        image = LimitAspect()(image)
        image = tv.center_crop(_resized(image, view, _covering(image, view.resize_to(size))), size)
    else:
        image = _resized(image, view, size)
    tensor: Tensor = tv.pil_to_tensor(image)
    return tensor


def _resized(image: Image.Image, view: View, size: Size) -> Image.Image:
    resized: Image.Image = tv.resize(image, list(size), interpolation=_FILTERS[view.filter])
    return resized


def _covering(image: Image.Image, size: Size) -> Size:
    """Height and width at which the image just covers `size`, in torchvision's rounding."""
    if image.width * size[0] <= image.height * size[1]:
        return size[1] * image.height // image.width, size[1]
    return size[0], size[0] * image.width // image.height
