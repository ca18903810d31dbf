"""Correct answers of heads, counted over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .features import Source

if TYPE_CHECKING:
    from .probe import Probe

TOP = 5  # classes of an answer that count for top-5 accuracy


@dataclass(frozen=True)
class Counts:
    """Correct answers of K heads.

    Attributes:
        correct: By class, `[K, C]`.
        top: With the class among the five most likely, `[K]`.
        images: By class, `[C]`.
    """

    correct: Tensor
    top: Tensor
    images: Tensor

    @property
    def total(self) -> int:
        """Number of images."""
        return int(self.images.sum())

    def accuracies(self) -> list[float]:
        """Top-1 accuracy of each head in percent."""
        return [100 * int(n) / self.total for n in self.correct.sum(dim=1)]

    def others(self) -> dict[str, float]:
        """Further metrics of the first head, in percent."""
        seen = self.images > 0
        per_class = self.correct[0, seen].double() / self.images[seen]
        found = {"mean per-class accuracy": 100 * float(per_class.mean())}
        if len(self.images) > TOP:
            found["top-5 accuracy"] = 100 * int(self.top[0]) / self.total
        return found


@torch.inference_mode()
def count_correct(
    probe: Probe,
    source: Source,
    batches: Iterable[tuple[Tensor, Tensor]],
    predict: Callable[[dict[str, Tensor]], Tensor],
    heads: int,
) -> Counts:
    """Count the correct answers of all processes; waits for the device only at the end.

    Args:
        probe: The task.
        source: Made the rows.
        batches: Rows and classes, the share of this process.
        predict: The likeliest classes `[K, B, top]` by features.
        heads: K.
    """
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


def best_head(counts: Counts) -> int:
    """Index of the head with the most correct answers, the first of equal ones."""
    return int(counts.correct.sum(dim=1).argmax())
