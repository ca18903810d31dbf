"""Metrics of heads over batches and processes: correct answers, or average precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from .features import Source
from .results import wilson_interval

if TYPE_CHECKING:
    from .probe import Probe

TOP = 5  # for top-5 accuracy


@dataclass(frozen=True)
class Counts:
    """Correct answers of K heads."""

    correct: Tensor
    top: Tensor
    images: Tensor
    name = "top-1 accuracy"

    @property
    def total(self) -> int:
        """Number of images."""
        return int(self.images.sum())

    def values(self) -> list[float]:
        """Top-1 accuracy of each head in percent."""
        return [100 * int(n) / self.total for n in self.correct.sum(dim=1)]

    def only(self, head: int) -> Counts:
        """The counts of one head."""
        one = slice(head, head + 1)
        return Counts(self.correct[one], self.top[one], self.images)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the first head's accuracy in percent."""
        return wilson_interval(int(self.correct[0].sum()), self.total)

    def others(self) -> dict[str, float]:
        """Further metrics of the first head, in percent."""
        seen = self.images > 0
        per_class = self.correct[0, seen].double() / self.images[seen]
        found = {"mean per-class accuracy": 100 * float(per_class.mean())}
        if len(self.images) > TOP:
            found["top-5 accuracy"] = 100 * int(self.top[0]) / self.total
        return found


@dataclass(frozen=True)
class AveragePrecisions:
    """Average precision of K heads for images that may have several classes."""

    precisions: Tensor
    total: int
    name = "mean average precision"

    def values(self) -> list[float]:
        """Mean over the classes with an image, of each head, in percent."""
        return [100 * float(mean) for mean in self.precisions.nanmean(dim=1)]

    def only(self, head: int) -> AveragePrecisions:
        """Those of one head."""
        return AveragePrecisions(self.precisions[head : head + 1], self.total)

    def interval(self) -> None:
        """None: an average precision is not a share of images."""

    def others(self) -> dict[str, float]:
        """No further metrics."""
        return {}


Metrics = Counts | AveragePrecisions


def join_heads(parts: Sequence[Any]) -> Any:
    """Metrics of the heads of several parts, all of the same images."""
    first = parts[0]
    if isinstance(first, AveragePrecisions):
        return replace(first, precisions=torch.cat([part.precisions for part in parts]))
    correct, top = (torch.cat([getattr(p, name) for p in parts]) for name in ("correct", "top"))
    return Counts(correct, top, first.images)


def best_head(metrics: Metrics) -> int:
    """Index of the best head, the first of equal ones."""
    values = metrics.values()
    return values.index(max(values))


def compute_metrics(
    probe: Probe,
    source: Source,
    batches: Iterable[tuple[Tensor, Tensor]],
    logits: Callable[[Any], Sequence[Tensor]],
    heads: int,
) -> Metrics:
    """Metrics of all processes' images: average precision where images may have several classes."""
    if not probe.train.multi_label:

        def predict(features: Any) -> Tensor:
            return torch.stack([likeliest(found) for found in logits(features)])

        return count_correct(probe, source, batches, predict, heads)
    with torch.inference_mode():
        none = torch.empty(0, probe.num_classes)  # a process may have no images
        scores, answers = [none.expand(heads, -1, -1)], [none.to(torch.uint8)]
        for rows, labels in batches:
            scores.append(torch.stack([*logits(source.split(rows))]).float().cpu())
            answers.append(labels.cpu())
        whole = probe.distributed.all_gather_rows(torch.cat(scores, dim=1).transpose(0, 1))
        labels = probe.distributed.all_gather_rows(torch.cat(answers))
        if not labels.any():
            raise DataError("none of the images to choose by, or to test on, has a label")
        found = [average_precision(whole[:, head], labels) for head in range(heads)]
    return AveragePrecisions(torch.stack(found), len(labels))


@torch.inference_mode()
def count_correct(
    probe: Probe,
    source: Source,
    batches: Iterable[tuple[Tensor, Tensor]],
    predict: Callable[[Any], Tensor],
    heads: int,
) -> Counts:
    """Count the correct answers of all processes; waits for the device only at the end."""
    classes, device = probe.num_classes, source.device
    correct = torch.zeros(heads, classes, dtype=torch.int64, device=device)
    top = torch.zeros(heads, dtype=torch.int64, device=device)
    images = torch.zeros(classes, dtype=torch.int64, device=device)
    for rows, labels in batches:
        right = predict(source.split(rows)) == labels[:, None]
        correct.index_add_(1, labels, right[..., 0].long())
        top += right.any(dim=2).sum(dim=1)
        images.index_add_(0, labels, torch.ones_like(labels))
    flat = torch.cat([correct.flatten(), top, images]).cpu()
    parts = torch.split(probe.distributed.all_reduce(flat), [heads * classes, heads, classes])
    return Counts(parts[0].view(heads, classes), parts[1], parts[2])


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
    places = torch.arange(n, device=scores.device).expand_as(order)
    is_last = F.pad(ordered[:, 1:] != ordered[:, :-1], (0, 1), value=True)
    last = places.masked_fill(~is_last, n).flip(1).cummin(dim=1).values.flip(1)
    precision = positive.cumsum(dim=1).gather(1, last) / (last + 1)
    found = (precision * positive).sum(dim=1) / positive.sum(dim=1)
    return found.masked_fill(scores.isnan().any(dim=0) & ~found.isnan(), 0.0)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; binary cross-entropy where images may have several classes.

    The latter is summed over classes and averaged over images, as VISSL's
    `bce_logits_multiple_output_single_target`, so that learning rates do not depend on C.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    summed = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")
    return summed / len(logits)
