"""Metrics that show collapse and quality during pretraining, and warnings about them.

The loss shows neither. The metrics are of the target encoder on images that are not trained on;
compare them with their values at initialization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import Distributed
from ..metrics import knn_accuracy, linear_accuracy, mean_cosine, rankme, spread
from ..models.jepa import IJepa
from .config import Precision
from .data import normalize
from .optim import total_norm
from .precision import autocast, without_float8

_FEATURE_METRICS = {"rankme": rankme, "spread": spread, "cosine": mean_cosine}
_PROBES = {"knn": knn_accuracy, "linear": linear_accuracy}


class Monitor:
    """Metrics of the target encoder on images that are not trained on.

    Args:
        images: This process's part of the images, `[m, C, H, W]`, of one size in all processes.
        known: Which of them count, bool `[m]`; the others fill up the part.
        labels: Their classes `[m]`, if they have some; negative where there is none.
        mean: Of pixels from 0 to 1.
        std: Of pixels from 0 to 1.
        batch_size: Images of a forward pass.
        precision: Of the forward pass.
    """

    def __init__(
        self,
        images: Tensor,
        known: Tensor,
        labels: Tensor | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int = 64,
        precision: Precision = "fp32",
    ) -> None:
        self.images, self.known, self.labels = images, known, labels
        self.mean, self.std = mean, std
        self.batch_size, self.precision = batch_size, precision

    @torch.no_grad()
    def measure(self, model: IJepa, distributed: Distributed) -> dict[str, float]:
        """Measure the model; every process must call this, and gets the same metrics."""
        known = distributed.all_gather(self.known)
        own_features, moments = self._features(model, distributed)
        gathered = distributed.all_gather(own_features)
        features = gathered[known.to(gathered.device)]
        finite = bool(features.isfinite().all())
        metrics = {k: f(features) if finite else math.nan for k, f in _FEATURE_METRICS.items()}
        metrics |= explained_variance(*(distributed.all_reduce(m) for m in moments))
        if self.labels is not None:
            labels = distributed.all_gather(self.labels)
            labeled = known & (labels >= 0)
            labels, inputs = labels[labeled], gathered[labeled.to(gathered.device)]
            if len(torch.unique(labels)) > 1:
                metrics |= {
                    k: f(inputs, labels) if finite else math.nan for k, f in _PROBES.items()
                }
        metrics["ema_distance"] = _distance(model)
        return metrics

    def _features(self, model: IJepa, distributed: Distributed) -> tuple[Tensor, list[Tensor]]:
        """Features `[m, D]` of this process's images, and the moments of their tokens."""
        pooled: list[Tensor] = []
        moments: list[Tensor] = []
        for start in range(0, len(self.images), self.batch_size):
            batch = torch.arange(start, start + self.batch_size).clamp(max=len(self.images) - 1)
            pixels = self.images[batch].to(distributed.device)
            with without_float8(model.target_encoder), autocast(pixels.device, self.precision):
                tokens = model.target_encoder.encode(normalize(pixels, self.mean, self.std))
            pooled.append(tokens.float().mean(dim=1))
            known = self.known[start : start + self.batch_size].to(tokens.device)
            found = token_moments(tokens[: len(known)][known].float())
            moments = [a + b for a, b in zip(moments, found)] if moments else found
        return torch.cat(pooled)[: len(self.images)], moments


def _distance(model: IJepa) -> float:
    """L2 distance of the encoders over the norm of the target encoder."""
    pairs = zip(model.encoder.parameters(), model.target_encoder.parameters())
    # one difference at a time: all of them would need the memory of another encoder
    norms = [total_norm([p.detach() - q]) for p, q in pairs]
    distance = torch.linalg.vector_norm(torch.stack(norms))
    return float(distance / total_norm(model.target_encoder.parameters()))


def token_moments(tokens: Tensor) -> list[Tensor]:
    """Sums over images for `explained_variance`, of tokens `[b, N, D]` normalized like targets."""
    targets = F.layer_norm(tokens, tokens.shape[-1:])
    count = targets.new_tensor(len(targets))
    squares, image_squares = (t.square().sum() for t in (targets, targets.mean(dim=1)))
    return [count, targets.sum(dim=0), squares, image_squares]


def explained_variance(
    count: Tensor, by_position: Tensor, squares: Tensor, image_squares: Tensor
) -> dict[str, float]:
    """Shares of the variance of tokens that position and image explain, from `token_moments`."""
    positions = by_position / count
    mean_square = positions.mean(dim=0).square().sum()
    total = squares / (count * len(positions)) - mean_square
    return {
        "position_variance": float((positions.square().sum(1).mean() - mean_square) / total),
        "image_variance": float((image_squares / count - mean_square) / total),
    }


# distance from collapse, and the share of its best value below which a metric counts as low
_HEALTH: dict[str, tuple[Callable[[float], float], float]] = {
    "rankme": (lambda rank: rank - 1, 0.5),
    "spread": (lambda spread: spread, 0.5),
    "cosine": (lambda cosine: 1 - cosine, 0.25),  # the square of the spread
}
_PATIENCE = 3  # successive measurements that are low and not better than the one before
_WARMUP_PATIENCE = 8  # at the start healthy runs fall far below initialization, and then recover
_SAME = 1.02  # values that differ by less are equal


class CollapseWatch:
    """Warns once each time that the rows of a run's log begin to show collapse.

    Rank, spread or 1 - cosine is below half (a quarter for 1 - cosine) of the best value so far,
    initialization included, in three measurements in a row that do not recover; eight while the
    learning rate still rises. The state is a function of the rows and the `initial` metrics, so
    `replay` of a log restores it.
    """

    def __init__(self, initial: dict[str, float] | None = None) -> None:
        self.initial = dict(initial or {})
        self._best = {name: self.initial[name] for name in _HEALTH if name in self.initial}
        self._last: dict[str, float] = {}
        self._low = dict.fromkeys(_HEALTH, 0)
        self._lr, self._rising, self._reported = 0.0, False, False

    def replay(self, rows: Iterable[dict[str, float]]) -> None:
        """Read the rows of a log (`read_log`) without warnings."""
        for row in rows:
            self.update(int(row["step"]) + 1, row)

    def update(self, step: int, metrics: dict[str, float]) -> str | None:
        """Read a row of the log, of which any column may be missing; return a new warning."""
        if "lr" in metrics:
            self._rising, self._lr = metrics["lr"] > self._lr, metrics["lr"]
        measured = {k: metrics[k] for k in _HEALTH if math.isfinite(metrics.get(k, math.nan))}
        for name, value in measured.items():
            health, share = _HEALTH[name]
            now, before = health(value), health(self._last.get(name, value))
            best = max(self._best.get(name, value), value, key=health)
            low = now < share * health(best)
            self._low[name] = self._low[name] + 1 if low and now <= _SAME * before else int(low)
            self._best[name], self._last[name] = best, value
        lowest = max(self._low.values())
        if lowest == 0:
            self._reported = False
        patience = _WARMUP_PATIENCE if self._rising else _PATIENCE
        if not measured or self._reported or lowest < patience:
            return None
        self._reported = True
        return (
            f"step {step}: the features are collapsing: "
            f"{', '.join(map(self._compared, measured))}. This rarely recovers: start again with a "
            f"lower optim.lr (now {self._lr:.2g}), another optim.momentum (0.995, 0.996 or 0.998), "
            "a regularizer (optim.regularizer_weight=0.1), a longer optim.warmup, or larger "
            "targets (mask.target_scale)"
        )

    def _compared(self, name: str) -> str:
        text = f"{name} {self._last[name]:.3g} (best {self._best[name]:.3g}"
        initial = self.initial.get(name)
        return text + (")" if initial is None else f", at initialization {initial:.3g})")
