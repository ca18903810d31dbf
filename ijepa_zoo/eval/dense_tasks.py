"""Depth and segmentation: what heads on patch features predict, their losses and metrics.

Depth follows DINOv2 (arXiv 2304.07193, section 7.4; facebookresearch/dinov2 `SigLoss`): the
scale-invariant loss of Eigen et al. (arXiv 1406.2283) in the form of AdaBins. Segmentation is
cross-entropy of classes; mean IoU as in mmsegmentation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.dense import IGNORE_INDEX
from ..errors import ImageError
from ..models.classifier import DenseHead

DEPTH_METRICS = ("rmse", "rmse_log", "abs_rel", "sq_rel", "log10", "delta_1", "delta_2", "delta_3")
SEGMENTATION_METRICS = ("mean IoU", "pixel accuracy", "mean class accuracy")
MIN_DEPTH = 1e-3  # in meters; nearer pixels do not count, predictions are at least that
# Rows and columns of a 480 x 640 image that count (Eigen et al.).
_EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
_EPS = 1e-3  # under the logarithms of the loss
_SCALE_WEIGHT = 0.15  # of the squared mean: 1 - 0.85
_GAP = 8
_SIDE = 160  # pixels of a picture's shorter side, at least
_VIRIDIS = torch.tensor(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)],
    dtype=torch.float32,
)  # matplotlib's, at every quarter


class Depth:
    """Depth of each pixel as the weighted mean of bins.

    Args:
        max_depth: Depth of the last bin; farther pixels do not count.
        bins: Number of bins.
        upsample: See `DenseHead`.
        crop: 'eigen' for metrics in Eigen's crop, or None.
        unit: Unit of depths.
    """

    method, metrics, metric = "dense depth", DEPTH_METRICS, "RMSE"
    higher_is_better = False
    mirrored = True  # predictions in tests are means over an image and its mirror image
    blind = ("the mean depth", "the mean depth map")  # predictions that look at no image
    shown = (0, 2, 5)  # metrics that are recorded of these

    def __init__(
        self, max_depth: float, bins: int, upsample: int, crop: str | None = None, unit: str = "m"
    ) -> None:
        self.max_depth, self.bins, self.upsample = max_depth, bins, upsample
        self.crop, self.unit = crop, unit
        self.settings: dict[str, Any] = {"max_depth": max_depth, "crop": crop}

    def valid(self, targets: Tensor, *, test: bool = False) -> Tensor:
        """Pixels that count: of a known depth, in tests only in the crop."""
        valid = (targets > MIN_DEPTH) & (targets <= self.max_depth)
        if test and self.crop is not None:
            height, width = targets.shape[-2:]
            top, bottom = (round(edge * height) for edge in _EIGEN[:2])
            left, right = (round(edge * width) for edge in _EIGEN[2:])
            inside = torch.zeros_like(valid)
            inside[..., top:bottom, left:right] = True
            valid &= inside
        return valid

    def check(self, target: Tensor) -> None:
        """Raise an `ImageError` if a target `[H, W]` does not belong to the data."""

    def head(self, in_features: int, batch_norm: bool) -> DenseHead:
        """A head, whose output is `[B, C, h', w']`; C is 1 for depth."""
        depth_range = (MIN_DEPTH, self.max_depth)
        return DenseHead(in_features, self.bins, batch_norm, depth_range, self.upsample)

    def loss(self, maps: Tensor, targets: Tensor) -> Tensor:
        """`sqrt(var(g) + 0.15 mean(g)^2)`, g the differences of logarithms.

        Args:
            maps: Output of a head.
            targets: `[B, H, W]` on the CPU, with at least two pixels that count.
        """
        valid, targets = (t.to(maps.device) for t in (self.valid(targets), targets))
        full = F.interpolate(maps, targets.shape[1:], mode="bilinear")[:, 0]
        g = torch.where(valid, (full + _EPS).log() - (targets + _EPS).log(), 0)
        count = valid.sum()  # sums instead of a selection, whose size a GPU would have to tell
        mean = g.sum() / count
        variance = torch.where(valid, g - mean, 0).square().sum() / (count - 1)
        return (variance + _SCALE_WEIGHT * mean.square() + 1e-12).sqrt()

    def new_sums(self, size: tuple[int, int]) -> Tensor:
        """Zeros for `add`: sums of depths and their numbers for every place of the image."""
        return torch.zeros(2, *size, dtype=torch.float64)

    def add(self, sums: Tensor, targets: Tensor) -> None:
        """Add targets `[B, H, W]` to the sums, in place."""
        valid = self.valid(targets)
        sums += torch.stack([torch.where(valid, targets, 0).double().sum(0), valid.sum(0)])

    def zeros(self, heads: int) -> Tensor:
        """Statistics of no image, see `figures`."""
        return torch.zeros(heads + len(self.blind), len(self.metrics), dtype=torch.float64)

    def figures(self, maps: Sequence[Tensor], sums: Tensor, target: Tensor) -> Tensor:
        """Statistics `[H + 2, 8]` of one image, to be summed over images.

        Args:
            maps: Predictions `[1, h', w']` of H heads.
            sums: See `new_sums`.
            target: `[H, W]` on the CPU, with at least one pixel that counts.
        """
        depths, counts = sums
        mean = depths.sum() / counts.sum()
        mean_map = torch.where(counts > 0, depths / counts.clamp(min=1), mean)
        blind = torch.stack([torch.full_like(mean_map, float(mean)), mean_map]).float()
        predicted = [torch.cat([part.cpu() for part in maps])] if maps else []
        both = [*predicted, blind]
        return torch.cat([depth_metrics(p, target, self.valid(target, test=True), self.max_depth)
                          for p in both])  # fmt: skip

    def summary(self, figures: Tensor, images: int) -> Tensor:
        """Metrics `[H + 2, 8]`: means over images, as in DINOv2."""
        return figures / images

    def drawn(self, maps: Tensor, target: Tensor) -> Tensor:
        """A prediction `[H, W]` to look at, of the maps of one head."""
        return maps[0].cpu()

    def record(self) -> dict[str, Any]:
        """What a saved head predicts, as plain values."""
        return {"task": "depth", "unit": self.unit}

    def colors(self, target: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        """RGB `[H, W, 3]` of a target and predictions; colors span its logarithms, near is yellow.

        Unknown depths are gray.
        """
        known = target[self.valid(target)]
        near, far = known.min().log(), known.max().clamp(min=known.min() * 1.001).log()
        shown = []
        for depth in (torch.where(self.valid(target), target, 0), *others):
            share = ((far - depth.clamp(min=1e-6).log()) / (far - near)).clamp(0, 1)
            place = share * (len(_VIRIDIS) - 1)
            below = place.long().clamp(max=len(_VIRIDIS) - 2)
            colors = _VIRIDIS[below].lerp(_VIRIDIS[below + 1], (place - below)[..., None])
            shown.append(torch.where((depth > 0)[..., None], colors, 128).to(torch.uint8))
        return shown


def depth_metrics(predicted: Tensor, depth: Tensor, valid: Tensor, max_depth: float) -> Tensor:
    """RMSE, RMSE of logs, mean |p - d| / d and (p - d)^2 / d, mean difference of log10, and deltas.

    The deltas are the shares of pixels with max(p / d, d / p) below 1.25, 1.25^2 and 1.25^3.

    Args:
        predicted: `[H, h, w]`, resized bilinearly to the depth map.
        depth: `[h', w']`.
        valid: bool `[h', w']`, at least one pixel.
        max_depth: Predictions are clamped to it, and to 1 mm.

    Returns:
        `[H, 8]` float64, in the order of `DEPTH_METRICS`.
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


class Segmentation:
    """Class of each pixel; the methods are those of `Depth`.

    Args:
        num_classes: Number of classes; pixels of `IGNORE_INDEX` do not count.
    """

    method, metrics, metric, unit = "segmentation", SEGMENTATION_METRICS, "mean IoU", "%"
    higher_is_better, mirrored = True, False
    blind, shown = ("the most frequent class",), (0, 1)

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.settings: dict[str, Any] = {"num_classes": num_classes}

    def valid(self, targets: Tensor, *, test: bool = False) -> Tensor:
        """Pixels with a class."""
        return targets != IGNORE_INDEX

    def check(self, target: Tensor) -> None:
        """Refuse a mask of other classes."""
        largest = float(torch.where(self.valid(target), target, 0).max())
        if largest >= self.num_classes:
            raise ImageError(
                f"its mask has class {largest:g}, the data have classes 0 to {self.num_classes - 1}"
            )

    def head(self, in_features: int, batch_norm: bool) -> DenseHead:
        """A head, whose output is logits."""
        return DenseHead(in_features, self.num_classes, batch_norm)

    def loss(self, maps: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the logits upsampled to the targets, mean over pixels."""
        targets = targets.to(maps.device).long()
        full = F.interpolate(maps, targets.shape[1:], mode="bilinear")
        return F.cross_entropy(full, targets, ignore_index=IGNORE_INDEX)

    def new_sums(self, size: tuple[int, int]) -> Tensor:
        """Pixels of each class."""
        return torch.zeros(self.num_classes, dtype=torch.float64)

    def add(self, sums: Tensor, targets: Tensor) -> None:
        """Count pixels."""
        classes = targets[self.valid(targets)].long()
        sums += torch.bincount(classes, minlength=self.num_classes)

    def zeros(self, heads: int) -> Tensor:
        """Empty confusion matrices."""
        return torch.zeros(heads + 1, self.num_classes, self.num_classes, dtype=torch.float64)

    def figures(self, maps: Sequence[Tensor], sums: Tensor, target: Tensor) -> Tensor:
        """Confusion matrices `[H + 1, C, C]`: rows are true classes."""
        valid = self.valid(target)
        truth = target[valid].long()
        guesses = [self.drawn(part, target)[valid].long() for part in maps]
        guesses.append(torch.full_like(truth, int(sums.argmax())))
        size = self.num_classes
        counts = [torch.bincount(truth * size + guess, minlength=size**2) for guess in guesses]
        return torch.stack(counts).view(-1, size, size).double()

    def summary(self, figures: Tensor, images: int) -> Tensor:
        """Percent of all pixels together; classes neither present nor predicted are left out."""
        right = figures.diagonal(dim1=1, dim2=2)
        truth, predicted = figures.sum(2), figures.sum(1)
        iou = right / (truth + predicted - right)  # NaN where there is no such pixel
        columns = [iou.nanmean(1), right.sum(1) / truth.sum(1), (right / truth).nanmean(1)]
        return 100 * torch.stack(columns, dim=1)

    def drawn(self, maps: Tensor, target: Tensor) -> Tensor:
        """Class with the largest logit, resized to the target."""
        full = F.interpolate(maps[None], target.shape, mode="bilinear", align_corners=False)[0]
        return full.argmax(0).cpu()

    def record(self) -> dict[str, Any]:
        """What a saved head predicts."""
        return {"task": "segmentation"}

    def colors(self, target: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        """VOC's palette; pixels that do not count are white, class 0 is black."""
        classes = torch.arange(256)
        bits = [(classes >> place & 1) << (7 - place // 3) for place in range(8)]
        channels = [sum(bits[place] for place in range(c, 8, 3)) for c in range(3)]
        palette = torch.stack([torch.as_tensor(c) for c in channels], dim=1)
        palette[IGNORE_INDEX] = 255
        return [palette[image.long() % 256].to(torch.uint8) for image in (target, *others)]


DenseTask = Depth | Segmentation


def picture(task: DenseTask, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Image.Image:
    """A sheet with a row for each image: the image, its target, the prediction.

    Args:
        task: What is predicted.
        rows: uint8 `[3, H, W]`, target `[h, w]`, prediction `[h', w']`.

    Returns:
        An RGB image on white.
    """
    height, width = rows[0][0].shape[1:]
    scale = max(1, math.ceil(_SIDE / min(height, width)))
    size = (height * scale, width * scale)
    across, down = size[1] + _GAP, size[0] + _GAP
    sheet = Image.new("RGB", (3 * across + _GAP, len(rows) * down + _GAP), "white")
    for row, (pixels, target, predicted) in enumerate(rows):
        parts = [pixels.permute(1, 2, 0), *task.colors(target, [predicted])]
        for column, part in enumerate(parts):
            cell = Image.fromarray(part.numpy()).resize(size[::-1], Image.Resampling.NEAREST)
            sheet.paste(cell, (_GAP + column * across, _GAP + row * down))
    return sheet
