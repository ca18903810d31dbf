"""Which images a step sees and how they are cropped, as functions of (seed, step)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from ..seeds import Stream, numpy_generator

_ATTEMPTS = 10  # draws before the fallback, as in torchvision's RandomResizedCrop


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> npt.NDArray[np.int64]:
    """Indices `[B]` of the images of a step: every epoch is one permutation of all `n` images.

    A batch that reaches past the end of an epoch goes on with the next permutation.

    Args:
        n: Images in the data set.
        batch_size: Images per step, B.
        seed: The run's seed.
        step: Updates done.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, n)
    return np.concatenate(
        [_permutation(n, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
    )


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return numpy_generator(seed, Stream.DATA_ORDER, epoch).permutation(n)


def crop_boxes(
    batch_size: int,
    image_size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    seed: int,
    step: int,
) -> npt.NDArray[np.int64]:
    """Boxes `[B, 4]` (top, left, height, width) with the law of torchvision's RandomResizedCrop.

    Args:
        batch_size: Images, B.
        image_size: Height and width of the images in pixels.
        scale: Area of the box as a fraction of the image, (min, max), uniform.
        ratio: Width / height of the box, (min, max), log-uniform.
        seed: The run's seed.
        step: Updates done.

    Raises:
        ValueError: `scale` or `ratio` is out of range.
    """
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(
            f"crop scale {scale} must be 0 < min <= max <= 1 and ratio {ratio} 0 < min <= max"
        )
    image_h, image_w = image_size
    rng = numpy_generator(seed, Stream.CROPS, step)
    draws = (batch_size, _ATTEMPTS)
    area = image_h * image_w * rng.uniform(scale[0], scale[1], size=draws)
    aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), size=draws))
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths > 0) & (widths <= image_w) & (heights > 0) & (heights <= image_h)
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)
    fallback_h, fallback_w = _largest_box(image_size, ratio)
    height = np.where(found, np.take_along_axis(heights, first, axis=1)[:, 0], fallback_h)
    width = np.where(found, np.take_along_axis(widths, first, axis=1)[:, 0], fallback_w)
    top = np.where(found, rng.integers(image_h - height + 1), (image_h - height) // 2)
    left = np.where(found, rng.integers(image_w - width + 1), (image_w - width) // 2)
    return np.stack([top, left, height, width], axis=1)


def _largest_box(image_size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int]:
    image_h, image_w = image_size
    if image_w / image_h < ratio[0]:
        return round(image_w / ratio[0]), image_w
    if image_w / image_h > ratio[1]:
        return image_h, round(image_h * ratio[1])
    return image_h, image_w


def crop_and_resize(
    images: torch.Tensor, boxes: npt.NDArray[np.int64], size: tuple[int, int]
) -> torch.Tensor:
    """Cut a box from every image and resize it (bilinear, antialiased), a whole batch at once.

    Resizing is separable and linear, so it is two batched matrix products; the result equals
    `torchvision.transforms.v2.functional.resized_crop` on float images.

    Args:
        images: `[B, H, W, C]`, uint8 or float.
        boxes: `[B, 4]`: top, left, height, width in pixels.
        size: Height and width of the result.

    Returns:
        Float32 `[B, C, height, width]`, in the units of the input.
    """
    batch, height, width, channels = images.shape
    box = torch.from_numpy(boxes).to(images.device, torch.float32)
    rows = _resize_matrix(box[:, 0], box[:, 2], height, size[0])
    columns = _resize_matrix(box[:, 1], box[:, 3], width, size[1])
    lines = torch.bmm(rows, images.float().reshape(batch, height, width * channels))
    lines = lines.reshape(batch, size[0], width, channels).movedim(3, 1)
    return torch.bmm(
        lines.reshape(batch, channels * size[0], width), columns.transpose(1, 2)
    ).reshape(batch, channels, *size)


def _resize_matrix(
    start: torch.Tensor, length: torch.Tensor, source: int, target: int
) -> torch.Tensor:
    """Weights `[B, target, source]` of the antialiased bilinear filter inside each interval."""
    scale = (length / target)[:, None, None]
    centres = (torch.arange(target, device=start.device) + 0.5)[:, None] * scale
    pixels = torch.arange(source, device=start.device) + 0.5 - start[:, None, None]
    weights = (1.0 - (pixels - centres).abs() / scale.clamp(min=1.0)).clamp(min=0.0)
    weights = weights * ((pixels > 0) & (pixels < length[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def normalise(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Scale images `[B, C, H, W]` with values 0 to 255 to the given mean and std (of 0 to 1)."""
    shift = torch.tensor(mean, device=images.device).view(-1, 1, 1) * 255
    return (images - shift) / (torch.tensor(std, device=images.device).view(-1, 1, 1) * 255)
