"""Predicted depth as a picture: image, known depth, prediction."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_GAP = 8
_SIDE = 160  # pixels of a picture's shorter side, at least
# Every quarter of matplotlib's viridis; near is yellow.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


def depth_picture(rows: list[tuple[Tensor, Tensor, Tensor]], max_depth: float) -> Image.Image:
    """A sheet with a row for each image: the image, its depth, the prediction.

    The colours of a row span the logarithms of its known depths; unknown ones are grey.

    Args:
        rows: uint8 `[3, H, W]`, depth `[h, w]` with 0 where unknown, prediction `[h', w']`.
        max_depth: Depths beyond count as unknown.

    Returns:
        An RGB image on white.
    """
    height, width = rows[0][0].shape[1:]
    scale = max(1, math.ceil(_SIDE / min(height, width)))
    size = (height * scale, width * scale)
    sheet = Image.new(
        "RGB", (3 * (size[1] + _GAP) + _GAP, len(rows) * (size[0] + _GAP) + _GAP), "white"
    )
    for place, (pixels, depth, predicted) in enumerate(rows):
        known = (depth > 0) & (depth <= max_depth)
        span = (float(depth[known].min()), float(depth[known].max()))
        image = F.interpolate(pixels[None].float(), size, mode="nearest")[0]
        truth = F.interpolate((depth * known)[None, None].float(), size, mode="nearest")[0, 0]
        guess = F.interpolate(predicted[None, None].float(), size, mode="bilinear")[0, 0]
        parts = [image.permute(1, 2, 0).to(torch.uint8).numpy(), *(_colour(d, span) for d in
                 (truth.numpy(), guess.numpy()))]  # fmt: skip
        for column, part in enumerate(parts):
            where = (_GAP + column * (size[1] + _GAP), _GAP + place * (size[0] + _GAP))
            sheet.paste(Image.fromarray(part), where)
    return sheet


def _colour(depth: npt.NDArray[np.float32], span: tuple[float, float]) -> npt.NDArray[np.uint8]:
    near, far = np.log(span[0]), np.log(max(span[1], span[0] * 1.001))
    share = (far - np.log(np.maximum(depth, span[0] * 1e-3))) / (far - near)
    anchors = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(share, anchors, c) for c in _COLOURS.T.astype(float)], axis=-1)
    colours[depth <= 0] = 128
    return np.rint(colours).astype(np.uint8)
