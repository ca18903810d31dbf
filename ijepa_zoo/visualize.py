"""Principal components of patch features as colors beside each image."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .data.datasets import ImageDataset
from .data.transforms import create_transform
from .encode import Encoder
from .errors import DataError, ImageError

_GAP = 8  # pixels between the pairs
_SIDE = 192  # pixels of a picture's shorter side, at least


def pca_colors(maps: Tensor) -> Tensor:
    """Three principal components of features `[n, D, h, w]`, over all patches: `[n, 3, h, w]`.

    In float64, scaled from their 1st to their 99th percentile to 0..1; the sign is such that the
    loading of largest size is positive.
    """
    count, width, height, columns = maps.shape
    patches = maps.double().permute(0, 2, 3, 1).reshape(-1, width)
    patches = patches - patches.mean(0)
    _, vectors = torch.linalg.eigh(patches.T @ patches)
    axes = vectors.flip(1)[:, :3]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    scores = patches @ (axes * largest.sign())
    low, high = (scores.quantile(q, dim=0) for q in (0.01, 0.99))
    colors = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colors = F.pad(colors, (0, 3 - colors.shape[1]))
    return colors.reshape(count, height, columns, 3).permute(0, 3, 1, 2)


def pca_picture(pixels: Tensor, maps: Tensor) -> Image.Image:
    """A grid of images beside the colors of their maps `[n, D, h, w]`.

    Images are uint8 `[n, 3, H, W]`, or gray `[n, 1, H, W]`.
    """
    scale = max(1, math.ceil(_SIDE / min(pixels.shape[-2:])))
    height, width = (side * scale for side in pixels.shape[-2:])
    colors = F.interpolate(pca_colors(maps), (height, width), mode="bicubic").clamp(0, 1)
    pixels = pixels.expand(-1, 3, -1, -1)
    images = F.interpolate(pixels.double() / 255, (height, width), mode="nearest")
    pairs = torch.cat([images, colors], dim=3).mul(255).round().to(torch.uint8)
    columns = max(1, round(math.sqrt(len(pairs) * height / (2 * width))))
    rows = math.ceil(len(pairs) / columns)
    size = columns * (2 * width + _GAP) + _GAP, rows * (height + _GAP) + _GAP
    sheet = Image.new("RGB", size, (255, 255, 255))
    for number, pair in enumerate(pairs):
        row, column = divmod(number, columns)
        corner = _GAP + column * (2 * width + _GAP), _GAP + row * (height + _GAP)
        sheet.paste(Image.fromarray(pair.permute(1, 2, 0).numpy()), corner)
    return sheet


def save_pca_picture(
    images: ImageDataset,
    model: nn.Module,
    path: str | Path,
    *,
    count: int = 12,
    device: str = "auto",
) -> None:
    """Draw the patch features (last block) of some images, evenly spaced over the input.

    Instead of an image that cannot be decoded, the next one is drawn.
    """
    transform = create_transform(model, normalize=False)
    chosen: list[Tensor] = []
    following, reason = 0, "there are none"
    for start in np.linspace(0, len(images), min(count, len(images)), endpoint=False).astype(int):
        for index in range(max(int(start), following), len(images)):
            following = index + 1
            try:
                chosen.append(transform(images.read(index)))
                break
            except ImageError as error:
                reason = str(error)
    if not chosen:
        raise DataError(f"no picture: no image could be decoded ({reason})")
    pixels = torch.stack(chosen)
    encoder = Encoder(model, pool=None, device=device)
    ((maps, _),) = encoder.encode([(pixels, [None] * len(pixels))])
    pca_picture(pixels, maps.cpu()).save(path)
