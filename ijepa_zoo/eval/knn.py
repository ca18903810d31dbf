"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingsError

KS = (10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.04, 0.07, 0.1, 0.2)


def knn_correct(
    train: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
    query_block: int = 1024,
    train_block: int = 16384,
) -> Tensor:
    """Numbers of right answers for every k and temperature, from one pass over the similarities.

    The k training images of largest cosine similarity vote for their classes with
    ``exp(similarity / temperature)``, as in VISSL (``tools/nearest_neighbor_test.py``: k 200,
    temperature 0.1) and DINO (arXiv 2104.14294: temperature 0.07), after Wu et al.
    (arXiv 1805.01978). No query may be among the training images: it would vote for itself.

    Similarities are computed in blocks, so memory grows with `query_block` times `train_block`, not
    with images times images.

    Args:
        train: ``[n, D]``.
        train_labels: Class numbers ``[n]``.
        queries: ``[m, D]``.
        query_labels: Class numbers ``[m]``; -1 (padding) is never right.
        ks: Numbers of neighbours.
        temperatures: Temperatures of the votes.
        query_block: Queries at a time.
        train_block: Training images at a time.

    Returns:
        int64 ``[len(ks), len(temperatures)]``.

    Raises:
        ValueError: Features that are not finite, shapes that do not fit, more neighbours than
            training images, or a k or temperature that is not above 0.
    """
    _check(train, train_labels, queries, query_labels)
    _check_grid(ks, temperatures, len(train))
    labels, answers = train_labels.to(train.device), query_labels.to(train.device)
    unit = _unit(train)
    right = torch.zeros(len(ks), len(temperatures), dtype=torch.int64, device=train.device)
    classes = int(labels.max()) + 1
    for block, truth in zip(torch.split(queries, query_block), torch.split(answers, query_block)):
        near, who = _neighbours(_unit(block.to(train.device)), unit, max(ks), train_block)
        for column, temperature in enumerate(temperatures):
            # relative to the nearest, which changes no order: not all votes can underflow then;
            # float64, so that the order in which a GPU adds them decides nothing
            votes = ((near - near[:, :1]) / temperature).double().exp()
            for row, answer in _answers(votes, labels[who], ks, classes):
                right[row, column] += (answer == truth).sum()
    return right


def _neighbours(queries: Tensor, train: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices of the k nearest, nearest first, ``[B, k]``."""
    near = queries.new_empty(len(queries), 0)
    who = torch.empty_like(near, dtype=torch.int64)
    for start in range(0, len(train), block):
        similarity = queries @ train[start : start + block].T
        found = similarity.topk(min(k, similarity.shape[1]), dim=1)
        near = torch.cat([near, found.values], dim=1)
        near, order = near.topk(min(k, near.shape[1]), dim=1)
        who = torch.cat([who, found.indices + start], dim=1).gather(1, order)
    return near, who


def _answers(
    votes: Tensor, classes_of: Tensor, ks: Sequence[int], classes: int
) -> list[tuple[int, Tensor]]:
    """The class with most votes of the k nearest, for each k with its place in `ks`."""
    tally = votes.new_zeros(len(votes), classes)
    answers, counted = [], 0
    for row in sorted(range(len(ks)), key=lambda row: ks[row]):
        more = slice(counted, counted := ks[row])
        tally.scatter_add_(1, classes_of[:, more], votes[:, more])
        answers.append((row, tally.argmax(dim=1)))
    return answers


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.detach().float(), dim=1)


def _check(train: Tensor, train_labels: Tensor, queries: Tensor, query_labels: Tensor) -> None:
    for what, x, y in (("training", train, train_labels), ("query", queries, query_labels)):
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
            raise SettingsError(
                f"{what} features have shape {tuple(x.shape)} and labels {tuple(y.shape)}; they "
                "must be [n, D] and [n], with n above 0"
            )
        spoiled = int((~x.isfinite().all(dim=1)).sum())
        if spoiled:
            raise SettingsError(
                f"{what} features of {spoiled} of {len(x)} images are NaN or infinite; check the "
                "model's weights, or compute in float32 or bfloat16"
            )
    if train.shape[1] != queries.shape[1]:
        raise SettingsError(f"{train.shape[1]} training and {queries.shape[1]} query features")
    if train_labels.min() < 0:
        raise SettingsError(f"training label {int(train_labels.min())}; labels must be 0 or more")


def _check_grid(ks: Sequence[int], temperatures: Sequence[float], images: int) -> None:
    if not ks or not temperatures:
        raise SettingsError(
            "give at least one k and one temperature, e.g. k 20 and temperature 0.07"
        )
    for temperature in temperatures:
        if not temperature > 0:
            raise SettingsError(f"temperature {temperature} must be above 0, e.g. 0.07")
    for k in ks:
        if not 1 <= k <= images:
            raise SettingsError(f"k is {k}; with {images} training images use 1 to {images}")
