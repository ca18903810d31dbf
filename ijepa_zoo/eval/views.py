"""Pixels of a probe: the random view that it trains on, and the fixed one that it is tested on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..data.decode import Pixels
from ..data.transforms import crop_box, limit_aspect, pixel_size
from .tasks import View

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop
_FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}

Size = tuple[int, int]


def random_pixels(image: Pixels, view: View, size: Size, draws: Sequence[float]) -> Tensor:
    """An image as a probe trains on it: uint8 `[C, *size]`.

    Args:
        image: The image.
        view: The transforms.
        size: Height and width of the result.
        draws: `DRAWS` uniform numbers in [0, 1); the last one decides the flip.
    """
    if view.shape == "square":
        pixels = _resized(image, view, size)
    else:
        box = crop_box(draws, pixel_size(image), scale=_SCALE, ratio=_RATIO)
        pixels = tv.resized_crop(image, *box, list(size), interpolation=_FILTERS[view.filter])
    flipped = tv.horizontal_flip(pixels) if draws[-1] < 0.5 else pixels
    return _tensor(flipped)


def fixed_pixels(image: Pixels, view: View, size: Size) -> Tensor:
    """An image as a probe is tested on it, and as features are cached: uint8 `[C, *size]`."""
    if view.shape == "crop":
        image = limit_aspect(image)
        image = tv.center_crop(_resized(image, view, _covering(image, view.resize_to(size))), size)
    else:
        image = _resized(image, view, size)
    return _tensor(image)


def _tensor(image: Pixels) -> Tensor:
    tensor: Tensor = image if isinstance(image, Tensor) else tv.pil_to_tensor(image)
    return tensor


def _resized(image: Pixels, view: View, size: Size) -> Pixels:
    resized: Pixels = tv.resize(image, list(size), interpolation=_FILTERS[view.filter])
    return resized


def _covering(image: Pixels, size: Size) -> Size:
    """Height and width at which the image just covers `size`, in torchvision's rounding."""
    height, width = pixel_size(image)
    if width * size[0] <= height * size[1]:
        return size[1] * height // width, size[1]
    return size[0], size[0] * width // height
