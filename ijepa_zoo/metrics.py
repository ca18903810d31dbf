"""Metrics of features: effective rank, spread, and accuracies of simple classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SettingsError

_NEIGHBORS = 20
_TEMPERATURE = 0.07
_RIDGES = tuple(10.0**e for e in range(-5, 2))  # times the mean eigenvalue


def rankme(features: Tensor) -> float:
    """Effective rank of features: exp of the entropy of their singular values.

    RankMe (arXiv 2210.02885, eq. 1-2), with `p_k = s_k / sum(s) + 1e-7`. It is at most min(n, D),
    so compare only values of the same n and D; the paper advises many more samples than features.

    Args:
        features: One row per image, `[n, D]`.

    Returns:
        The effective rank, from 1 (collapsed) to min(n, D).

    Raises:
        SettingsError: `features` is not two-dimensional, or has fewer than two rows.
    """
    singular = torch.linalg.svdvals(_checked(features))
    total = singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)  # constant features
    p = singular / total + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def spread(features: Tensor) -> float:
    """Standard deviation of L2-normalized features `[n, D]` times sqrt(D), 0 if collapsed, to 1."""
    unit = F.normalize(_checked(features), dim=1)
    return float(unit.std(dim=0).mean() * features.shape[1] ** 0.5)


def mean_cosine(features: Tensor) -> float:
    """Mean cosine similarity between the features `[n, D]` of different images, 1 if collapsed."""
    unit = F.normalize(_checked(features), dim=1)
    n = len(unit)
    return float((unit.sum(dim=0).square().sum() - n) / (n * (n - 1)))


def knn_accuracy(features: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of a leave-one-out kNN classifier of features `[n, D]`, labels `[n]`.

    The 20 images of largest cosine similarity vote with `exp(similarity / 0.07)`, as in DINO
    (arXiv 2104.14294, appendix).
    """
    unit = F.normalize(_checked(features), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest, indices = similarity.topk(min(_NEIGHBORS, len(unit) - 1), dim=1)
    classes = torch.unique(labels, return_inverse=True)[1].to(features.device)
    votes = unit.new_zeros(len(unit), int(classes.max()) + 1)
    votes.scatter_add_(1, classes[indices], torch.exp((nearest - 1) / _TEMPERATURE))
    return _percent(votes.argmax(dim=1) == classes)


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
    top: int = 1,
    query_block: int = 1024,
    bank_block: int = 16384,
) -> Tensor:
    """Classes by a weighted vote of the nearest images, for every k and temperature.

    The k images of largest cosine similarity vote for their classes with
    `exp(similarity / temperature)`, as in VISSL (k 200, temperature 0.1) and DINO
    (arXiv 2104.14294: temperature 0.07), after Wu et al. (arXiv 1805.01978). The similarities are
    computed once for all settings, in blocks. `bank` `[n, D]` has rows of unit length and no query.

    Returns:
        The `top` classes by votes, most first, int64 `[len(ks) * len(temperatures), m, top]`;
        temperatures vary fastest.
    """
    blocks = []
    for block in torch.split(queries, query_block):
        near, indices = _neighbors(F.normalize(block.float(), dim=1), bank, max(ks), bank_block)
        if near.device.type == "mps":  # has no float64
            near, indices, bank_labels = near.cpu(), indices.cpu(), bank_labels.cpu()
        classes = bank_labels[indices]
        # Relative to the nearest, or all votes could underflow; in float64, so that the order in
        # which a GPU adds them does not matter.
        similarity = (near - near[:, :1]).double()
        found: dict[tuple[int, float], Tensor] = {}
        for temperature in temperatures:
            votes, counted = (similarity / temperature).exp(), 0
            tally = votes.new_zeros(len(votes), num_classes)
            for k in sorted(ks):
                tally.scatter_add_(1, classes[:, counted:k], votes[:, counted:k])
                found[k, temperature], counted = tally.topk(top, dim=1).indices, k
        blocks.append(torch.stack([found[k, t] for k in ks for t in temperatures]))
    return torch.cat(blocks, dim=1)


def _neighbors(queries: Tensor, bank: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices of the k nearest rows of the bank, nearest first, `[B, k]`."""
    near = queries.new_empty(len(queries), 0)
    indices = torch.empty_like(near, dtype=torch.int64)
    for start in range(0, len(bank), block):
        similarity = queries @ bank[start : start + block].T
        found = similarity.topk(min(k, similarity.shape[1]), dim=1)
        near = torch.cat([near, found.values], dim=1)
        near, order = near.topk(min(k, near.shape[1]), dim=1)
        indices = torch.cat([indices, found.indices + start], dim=1).gather(1, order)
    return near, indices


def linear_accuracy(features: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of a linear classifier of features `[n, D]`, labels `[n]`.

    Ridge regression to one-hot labels in closed form, trained on one half of the images and
    tested on the other, both ways. The halves have equal shares of every class. The strength of
    the ridge is chosen within the training half, by its leave-one-out error.
    """
    x = _checked(features)
    classes = torch.unique(labels, return_inverse=True)[1].to(features.device)
    y = F.one_hot(classes).to(x)
    order = classes.argsort(stable=True)
    halves = order[0::2], order[1::2]
    correct = [
        _ridge(x[train], y[train], x[test]).argmax(dim=1) == classes[test]
        for train, test in (halves, halves[::-1])
    ]
    return _percent(torch.cat(correct))


def _ridge(x: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """Predictions for `test` of ridge regression with centered data; leave-one-out as in PRESS."""
    mean, offset = x.mean(dim=0), y.mean(dim=0)
    u, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    projected = u.T @ (y - offset)
    best = (torch.inf, s)
    for ridge in _RIDGES:
        shrink = s.square() / (s.square() + ridge * s.square().mean() + torch.finfo(s.dtype).tiny)
        leverage = (u.square() * shrink).sum(dim=1, keepdim=True) + 1 / len(x)
        left_out = (y - offset - u @ (shrink[:, None] * projected)) / (1 - leverage).clamp(1e-9)
        best = min(best, (float(left_out.square().mean()), shrink), key=lambda pair: pair[0])
    weights = v.T @ (torch.where(s > 0, best[1] / s, 0.0)[:, None] * projected)
    return (test - mean) @ weights + offset


def _percent(correct: Tensor) -> float:
    return 100 * float(correct.double().mean())


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise SettingsError(
            f"features have shape {tuple(features.shape)}; they must be [n, D] with n >= 2"
        )
    if features.device.type == "mps":  # has no float64
        features = features.cpu()
    return features.detach().double()
