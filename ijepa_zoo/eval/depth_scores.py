"""Depth heads on a set of images: their figures, beside those of predictions that see no image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..progress import progress_bar
from .depth_feed import DepthBatch, DepthFeed, Indices
from .depth_metrics import METRICS, depth_figures, valid_pixels
from .depth_training import DepthTraining

Row = tuple[Tensor, Tensor, Tensor]  # image, depth, prediction


def measure(
    training: DepthTraining,
    feed: DepthFeed,
    indices: Indices,
    only: int | None,
    pictures: int,
    progress: bool,
) -> tuple[Tensor, int, list[Row]]:
    """Mean figures over images of the heads (or one), of the mean depth and of the mean map.

    Returns:
        `[H + 2, 8]`, the number of images that they are of, and the image, depth and predictions
        `[H, h, w]` of evenly spaced images, on the process that has them.
    """
    distributed = training.distributed
    blind = training.mean_maps()
    heads = len(training.heads.specs) if only is None else 1
    total = torch.zeros(heads + 2, len(METRICS), dtype=torch.float64)
    count = torch.zeros(1, dtype=torch.int64)
    rows: list[Row] = []
    mine = indices[distributed.rank :: distributed.world_size]
    evenly = np.linspace(0, len(mine), min(pictures, len(mine)), endpoint=False).astype(int)
    shown = set(mine[evenly].tolist())
    with progress_bar(progress and distributed.rank == 0, len(mine), "measuring") as bar:
        for batch in feed.for_testing(mine, training.protocol.batch_size):
            predictions = _both_sides(training, batch, only)
            bar.update(len(batch.indices))
            for i, depth in enumerate(batch.depths):
                valid = valid_pixels(depth, training.max_depth, training.pairs.crop)
                if not valid.any():
                    continue
                predicted = predictions[:, i]
                total[:heads] += depth_figures(predicted, depth, valid, training.max_depth)
                total[heads:] += depth_figures(blind, depth, valid, training.max_depth)
                count += 1
                if int(batch.indices[i]) in shown:
                    rows.append((batch.pixels[i], depth, predicted))
    count = distributed.all_reduce(count)
    if not count:
        raise DataError("no pair of the set could be read, or none has a pixel that counts: "
                         + next(iter(feed.broken.values()), "see max_depth"))  # fmt: skip
    return distributed.all_reduce(total) / count, int(count), rows


@torch.inference_mode()
def _both_sides(training: DepthTraining, batch: DepthBatch, only: int | None) -> Tensor:
    """Predictions `[H, b, h, w]` on the CPU: the mean over the image and its mirror image.

    So do DINOv2 and DINOv3 (test-time augmentation).
    """
    training.heads.eval()
    if not batch.depths:
        return torch.empty(0)
    plain, mirrored = training.heads(batch.features, only).chunk(2, dim=1)
    return ((plain + mirrored.flip(-1)) / 2).cpu()
