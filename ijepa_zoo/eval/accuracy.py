"""Metrics of heads over batches and processes: correct answers, or average precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError

if TYPE_CHECKING:
    from .dense_training import DenseLoader
    from .features import OnlineLoader, Source
    from .probe import Probe

TOP = 5  # for top-5 accuracy
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Metrics:
    """Test or validation metrics of heads on the same images."""

    name: str  # of the metric in `values`
    images: int  # their number
    values: list[float]  # one for each head
    intervals: Sequence[tuple[float, float] | None]  # 95 %, of values that are shares of images
    others: list[dict[str, Any]]  # further metrics of each head
    unit: str = "%"
    higher_is_better: bool = True
    constant: dict[str, float] = field(default_factory=dict)  # of predictions without an image

    @property
    def best(self) -> int:
        """Index of the best head, the first of equal ones."""
        signed = [value if self.higher_is_better else -value for value in self.values]
        ranked = [-math.inf if math.isnan(value) else value for value in signed]
        return ranked.index(max(ranked))


@dataclass(frozen=True)
class Choice:
    """The chosen head, and metrics of all heads on validation images.

    `test` has the metrics of the chosen head, or of all heads where there are no validation images.
    """

    index: int
    val: Metrics | None
    test: Metrics


def choose(
    loader: OnlineLoader | DenseLoader,
    measure: Callable[[Any], Metrics],
    test: Callable[[Any, int], Metrics],
) -> Choice:
    """Choose a head by what `measure` returns for batches, and `test` it alone."""
    if not len(loader.probe.val_rows):
        found = measure(loader.testing())
        return Choice(found.best, None, found)
    val = measure(loader.validation())
    return Choice(val.best, val, test(loader.testing(), val.best))


@torch.inference_mode()
def _gather(
    probe: Probe, source: Source, batches: Any, function: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor]:
    """Outputs `[n, H, ...]` of a function of features, and labels, of the images of all processes.

    Synchronizes only at the end.
    """
    found = [(function(source.split(rows)), labels) for rows, labels in batches]
    columns: list[list[Tensor]] = [list(column) for column in zip(*found)]
    shapes = probe.distributed.all_gather_object([c[0].cpu()[:0] for c in columns])
    own = columns or [[part] for part in next(filter(None, shapes))]  # a process may have no images
    outputs, labels = (probe.distributed.all_gather_rows(torch.cat(c).cpu()) for c in own)
    return outputs, labels


def compute_metrics(
    probe: Probe,
    source: Source,
    batches: Iterable[tuple[Tensor, Tensor]],
    logits: Callable[[Any], Iterable[Tensor]],
) -> Metrics:
    """Accuracies of heads, or average precision where images may have several classes."""
    if not probe.train.multi_label:

        def predict(features: Any) -> Tensor:
            return torch.stack([likeliest(found) for found in logits(features)], dim=1)

        return count_correct(probe, source, batches, predict)
    scores, labels = _gather(probe, source, batches, lambda f: torch.stack([*logits(f)], dim=1))
    if not labels.any():
        raise DataError("none of the images to choose by, or to test on, has a label")
    found = [average_precision(head.float(), labels) for head in scores.unbind(dim=1)]
    values, none = [100 * float(precisions.nanmean()) for precisions in found], [None] * len(found)
    return Metrics("mean average precision", len(labels), values, none, [{}] * len(found))


def count_correct(
    probe: Probe,
    source: Source,
    batches: Iterable[tuple[Tensor, Tensor]],
    predict: Callable[[Any], Tensor],
) -> Metrics:
    """Accuracies of the likeliest classes `[b, H, k]` that `predict` returns for features."""
    predicted, labels = _gather(probe, source, batches, predict)
    right = predicted == labels[:, None, None]
    first, images = right[..., 0].double(), labels.bincount(minlength=probe.num_classes)
    by_class = first.new_zeros(probe.num_classes, first.shape[1]).index_add_(0, labels, first)
    per_class = (by_class / images[:, None])[images > 0].mean(dim=0)
    others = [{"mean per-class accuracy": 100 * share} for share in per_class.tolist()]
    if probe.num_classes > TOP:
        for found, share in zip(others, right.any(dim=2).double().mean(dim=0).tolist()):
            found["top-5 accuracy"] = 100 * share
    intervals = [wilson_interval(int(n), len(labels)) for n in first.sum(dim=0).tolist()]
    values = [100 * share for share in first.mean(dim=0).tolist()]
    return Metrics("top-1 accuracy", len(labels), values, intervals, others)


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest classes of logits `[..., C]`; -1 where a head has diverged."""
    best = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    return best.indices.masked_fill(logits.isnan().any(dim=-1, keepdim=True), -1)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class, as scikit-learn's `average_precision_score`.

    The sum of precisions at the positive images divided by their number; images of equal score
    count together.
    """
    n = len(scores)
    ordered, order = scores.T.sort(dim=1, descending=True)
    positive = labels.T.gather(1, order).double()
    # the last image of equal score, for each image
    positions = torch.arange(n, device=scores.device).expand_as(order)
    is_last = F.pad(ordered[:, 1:] != ordered[:, :-1], (0, 1), value=True)
    last = positions.masked_fill(~is_last, n).flip(1).cummin(dim=1).values.flip(1)
    precision = positive.cumsum(dim=1).gather(1, last) / (last + 1)
    found = (precision * positive).sum(dim=1) / positive.sum(dim=1)
    return found.masked_fill(scores.isnan().any(dim=0) & ~found.isnan(), 0.0)


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of an accuracy in percent, of `right` answers among `total`.

    Wilson's score interval (JASA 22, 1927): unlike the normal approximation it holds for small
    numbers and near the ends.
    """
    share, spread = right / total, _Z * _Z / total
    middle = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = middle - half, middle + half
    return 100 * max(low / (1 + spread), 0.0), 100 * min(high / (1 + spread), 1.0)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; binary cross-entropy where images may have several classes.

    The latter is summed over classes and averaged over images, as VISSL's
    `bce_logits_multiple_output_single_target`, so that learning rates do not depend on C.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    summed = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")
    return summed / len(logits)
