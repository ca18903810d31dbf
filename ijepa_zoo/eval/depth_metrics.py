"""Loss and figures of dense depth, over the pixels whose depth is known.

The loss is the scale-invariant one of Eigen et al. (arXiv 1406.2283) in the form of AdaBins
(arXiv 2011.14141) that DINOv2's depth probe uses (facebookresearch/dinov2, `SigLoss`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Total = Callable[[Tensor], Tensor]

METRICS = ("rmse", "rmse_log", "abs_rel", "sq_rel", "log10", "delta_1", "delta_2", "delta_3")
MIN_DEPTH = 1e-3  # in metres; nearer pixels do not count, predictions are at least that
# Rows and columns of a 480 x 640 picture that count (Eigen et al., arXiv 1406.2283).
_EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
_EPS = 1e-3  # under the logarithms of the loss
_SCALE_WEIGHT = 0.15  # of the squared mean: 1 - 0.85


def valid_pixels(depth: Tensor, max_depth: float, crop: str | None = None) -> Tensor:
    """Pixels that count: depth known, from 1 mm to `max_depth`, in the crop.

    Args:
        depth: `[..., H, W]`, 0 where unknown.
        max_depth: In the units of `depth`.
        crop: `eigen`, for the part of the picture in which NYU's figures are taken, or None.

    Returns:
        bool, of the same shape.
    """
    valid = (depth > MIN_DEPTH) & (depth <= max_depth)
    if crop is not None:
        height, width = depth.shape[-2:]
        top, bottom = (round(edge * height) for edge in _EIGEN[:2])
        left, right = (round(edge * width) for edge in _EIGEN[2:])
        inside = torch.zeros_like(valid)
        inside[..., top:bottom, left:right] = True
        valid &= inside
    return valid


def scale_invariant_loss(
    predicted: Tensor, depth: Tensor, valid: Tensor, total: Total | None = None
) -> Tensor:
    """`sqrt(var(g) + 0.15 mean(g)^2)`, g the differences of logarithms, for each head.

    With several processes the loss is that of all pixels together, and each process has its part
    of the gradient: their sum is the gradient.

    Args:
        predicted: `[H, B, h, w]`, above 0.
        depth: `[B, h, w]`.
        valid: bool `[B, h, w]`, in all processes at least two pixels.
        total: Sum of a tensor over the processes; None for one process. All must call this.

    Returns:
        `[H]`.
    """
    g = (predicted[:, valid] + _EPS).log() - (depth[valid] + _EPS).log()
    wide = g.detach().double()
    ones = wide.new_full((len(g),), g.shape[1])
    sums = torch.stack([ones, wide.sum(1), wide.square().sum(1)])
    count, first, second = sums if total is None else total(sums)
    mean = first / count
    variance = (second - first * mean).clamp(min=0) / (count - 1)
    loss = (variance + _SCALE_WEIGHT * mean.square() + 1e-12).sqrt()
    # the derivative by each g, since sums over processes do not pass gradients on
    slope = (wide - mean[:, None]) / (count - 1)[:, None] + (_SCALE_WEIGHT * mean / count)[:, None]
    part = ((slope / loss[:, None]).to(g) * g).sum(1)
    return loss.to(g) + part - part.detach()


def depth_figures(predicted: Tensor, depth: Tensor, valid: Tensor, max_depth: float) -> Tensor:
    """The figures of one picture; those of a data set are their means over pictures, as in DINOv2.

    RMSE, RMSE of natural logarithms, mean |p - d| / d, mean (p - d)^2 / d, mean difference of
    decimal logarithms, and the shares of pixels with max(p / d, d / p) below 1.25, 1.25^2, 1.25^3.

    Args:
        predicted: `[H, h, w]` of H heads, resized bilinearly to the depth map.
        depth: `[h', w']`.
        valid: bool `[h', w']`, at least one pixel.
        max_depth: Predictions are clamped to it, and to 1 mm.

    Returns:
        `[H, 8]`, float64, in the order of `METRICS`.
    """
    full = F.interpolate(predicted[None], depth.shape, mode="bilinear", align_corners=False)[0]
    p = full.clamp(MIN_DEPTH, max_depth)[:, valid].double()
    d = depth[valid].double()
    error, log_error = p - d, p.log() - d.log()
    ratio = torch.maximum(p / d, d / p)
    columns = [
        error.square().mean(1).sqrt(),
        log_error.square().mean(1).sqrt(),
        (error.abs() / d).mean(1),
        (error.square() / d).mean(1),
        (p.log10() - d.log10()).abs().mean(1),
        *((ratio < 1.25**power).double().mean(1) for power in (1, 2, 3)),
    ]
    return torch.stack(columns, dim=1)
