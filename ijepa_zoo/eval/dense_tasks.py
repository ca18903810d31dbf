"""Depth and segmentation: protocols, heads on patch features, losses and metrics.

Depth follows DINOv2 (arXiv 2304.07193, section 7.4; facebookresearch/dinov2 `SigLoss`): the
scale-invariant loss of Eigen et al. (arXiv 1406.2283) in the form of AdaBins. Segmentation is
cross-entropy of classes; mean IoU as in mmsegmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dense import IGNORE_INDEX
from ..errors import ImageError, option
from ..models.classifier import DenseHead
from .tasks import EvalTransform, Protocol

WHOLE = EvalTransform("squash", "bicubic", crop_pct=1.0)
DEPTH_METRICS = ("rmse", "rmse_log", "abs_rel", "sq_rel", "log10", "delta_1", "delta_2", "delta_3")
SEGMENTATION_METRICS = ("mean IoU", "pixel accuracy", "mean class accuracy")
MIN_DEPTH = 1e-3  # in meters; nearer pixels do not count, predictions are at least that
# Valid rows and columns of a 480 x 640 image (Eigen et al.).
_EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
_EPS = 1e-3  # inside the logarithms of the loss
_SCALE_WEIGHT = 0.15  # of the squared mean: 1 - 0.85


# DINOv2's linear segmentation of ADE20K: 40,000 steps of 16, warm-up of 1,500.
SEGMENTATION = Protocol(
    32,
    WHOLE,
    optimizer="adamw",
    lrs=(1e-3, 1e-2),
    weight_decays=(1e-4,),
    batch_size=16,
    base_batch=None,
    schedule="linear",
    per_step=True,
    warmup=1_500 / 40_000,
)
# DINOv2's depth: 38,400 steps of 16, which is 25 epochs of its 24,231 images of NYU, by mmcv's
# `CosineAnnealing`, whose warm-up is a factor of the cosine.
DEPTH = replace(
    SEGMENTATION,
    epochs=25,
    lrs=(1e-4, 1e-3),
    weight_decays=(0.01,),
    schedule="cosine",
    floor=0.0,
    warmup=12_800 / 38_400,
)


class Depth:
    """Depth of each pixel, up to `max_depth`, as the weighted mean of bins; see `DenseHead`."""

    method, metrics, metric = "depth", DEPTH_METRICS, "RMSE"
    higher_is_better = False
    mirrored = True  # predictions in tests are means over an image and its mirror image
    blind = ("the mean depth", "the mean depth map")  # constant predictions
    shown = (0, 2, 5)  # metrics that are recorded of these
    shape = (len(DEPTH_METRICS),)  # of the statistics of one head

    def __init__(
        self, max_depth: float, bins: int, upsample: int, crop: str | None = None, unit: str = "m"
    ) -> None:
        self.max_depth, self.bins, self.upsample = max_depth, bins, upsample
        self.crop, self.unit = crop, unit
        self.settings: dict[str, Any] = {"max_depth": max_depth, "crop": crop}
        self.settings |= {"bins": bins, "upsample": upsample}
        self.head_record = {"task": "depth", "unit": unit}
        self.counts = (
            f"depths from {MIN_DEPTH:g} to {max_depth:g} (give units with {option('depth_scale')}, "
            f"the range with {option('max_depth')})"
        )

    def valid(self, targets: Tensor, *, test: bool = False) -> Tensor:
        """Valid pixels: of a known depth, in tests only in the crop."""
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
        """`sqrt(var(g) + 0.15 mean(g)^2)`, g the differences of logarithms."""
        valid = self.valid(targets)
        full = F.interpolate(maps, targets.shape[1:], mode="bilinear")[:, 0]
        g = torch.where(valid, (full + _EPS).log() - (targets + _EPS).log(), 0)
        count = valid.sum()  # sums instead of a selection, which would synchronize
        mean = g.sum() / count
        variance = torch.where(valid, g - mean, 0).square().sum() / (count - 1)
        return (variance + _SCALE_WEIGHT * mean.square() + 1e-12).sqrt()

    def count(self, targets: Tensor) -> Tensor:
        """Sums over a batch, for every pixel, of depths and of valid pixels."""
        valid = self.valid(targets)
        return torch.stack([torch.where(valid, targets, 0).double().sum(0), valid.sum(0)])

    def statistics(self, maps: Sequence[Tensor], sums: Tensor, target: Tensor) -> Tensor:
        """Statistics `[H + 2, 8]` of one image, to be summed over images."""
        depths, counts = sums
        mean = depths.sum() / counts.sum()
        mean_map = torch.where(counts > 0, depths / counts.clamp(min=1), mean)
        blind = torch.stack([torch.full_like(mean_map, float(mean)), mean_map]).float()
        valid = self.valid(target, test=True)
        predicted = [torch.cat([part.cpu() for part in maps]), blind]
        return torch.cat([depth_metrics(p, target, valid, self.max_depth) for p in predicted])

    def summary(self, statistics: Tensor, images: int) -> Tensor:
        """Metrics `[H + 2, 8]`: means over images, as in DINOv2."""
        return statistics / images

    def more(self, statistics: Tensor) -> dict[str, Any]:
        """Further metrics of one head."""
        return {}


def depth_metrics(predicted: Tensor, depth: Tensor, valid: Tensor, max_depth: float) -> Tensor:
    """RMSE, RMSE of logs, mean |p - d| / d and (p - d)^2 / d, mean difference of log10, and deltas.

    The deltas are the shares of pixels with max(p / d, d / p) below 1.25, 1.25^2 and 1.25^3.
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
    """Class of each pixel, if it is not `IGNORE_INDEX`; the methods are those of `Depth`."""

    method, metrics, metric, unit = "segmentation", SEGMENTATION_METRICS, "mean IoU", "%"
    higher_is_better, mirrored = True, False
    blind, shown = ("the most frequent class",), (0, 1)

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        self.num_classes, self.shape = num_classes, (num_classes, num_classes)
        self.class_names = class_names or [str(number) for number in range(num_classes)]
        self.settings: dict[str, Any] = {"num_classes": num_classes}
        self.head_record = {"task": "segmentation"}
        self.counts = f"classes from 0 to {num_classes - 1}"

    def valid(self, targets: Tensor, *, test: bool = False) -> Tensor:
        """Pixels with a class."""
        return targets != IGNORE_INDEX

    def check(self, target: Tensor) -> None:
        """Refuse a mask of other classes."""
        classes = torch.where(self.valid(target), target, 0)
        for found in (classes.min().item(), classes.max().item()):
            if not 0 <= found < self.num_classes:
                raise ImageError(f"its mask has class {found:g}, but {self.counts} count")

    def head(self, in_features: int, batch_norm: bool) -> DenseHead:
        """A head, whose output is logits."""
        return DenseHead(in_features, self.num_classes, batch_norm)

    def loss(self, maps: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the logits upsampled to the targets, mean over pixels."""
        targets = targets.long()
        full = F.interpolate(maps, targets.shape[1:], mode="bilinear")
        return F.cross_entropy(full, targets, ignore_index=IGNORE_INDEX)

    def count(self, targets: Tensor) -> Tensor:
        """Pixels of each class."""
        classes = targets[self.valid(targets)].long()
        return torch.bincount(classes, minlength=self.num_classes).double()

    def statistics(self, maps: Sequence[Tensor], sums: Tensor, target: Tensor) -> Tensor:
        """Confusion matrices `[H + 1, C, C]`: rows are true classes."""
        valid = self.valid(target)
        truth = target[valid].long()
        full = [F.interpolate(part[None], target.shape, mode="bilinear")[0] for part in maps]
        guesses = [logits.argmax(0).cpu()[valid] for logits in full]
        guesses.append(torch.full_like(truth, int(sums.argmax())))
        size = self.num_classes
        counts = [torch.bincount(truth * size + guess, minlength=size**2) for guess in guesses]
        return torch.stack(counts).view(-1, size, size).double()

    def summary(self, statistics: Tensor, images: int) -> Tensor:
        """Percent of all pixels together; classes neither present nor predicted are left out."""
        right, truth = statistics.diagonal(dim1=1, dim2=2), statistics.sum(2)
        accuracy, per_class = right.sum(1) / truth.sum(1), (right / truth).nanmean(1)
        return 100 * torch.stack([_iou(statistics).nanmean(1), accuracy, per_class], dim=1)

    def more(self, statistics: Tensor) -> dict[str, Any]:
        """IoU of each class in percent, None for one neither present nor predicted."""
        values = (100 * _iou(statistics[None])[0]).tolist()
        return {"IoU": {n: None if v != v else v for n, v in zip(self.class_names, values)}}


def _iou(confusion: Tensor) -> Tensor:
    """Intersection over union `[H, C]`; NaN where there is no pixel."""
    right = confusion.diagonal(dim1=1, dim2=2)
    return right / (confusion.sum(2) + confusion.sum(1) - right)


DenseTask = Depth | Segmentation
