"""Multinomial logistic regression by L-BFGS: few labels, and what SGD should have come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingsError

L2S = tuple(10.0**exponent for exponent in range(-6, 2))
_ROWS = 8192  # whose logits are in memory at once


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier.

    Attributes:
        weight: ``[C, D]``, for the features as they were given.
        bias: ``[C]``.
        l2: Strength of the penalty.
        loss: Mean cross-entropy of the training images, without the penalty.
        objective: What was minimised.
        gradient: Largest absolute entry of the objective's gradient at the end.
        evaluations: How often objective and gradient were computed.
        converged: Whether the gradient came below the tolerance.
    """

    weight: Tensor
    bias: Tensor
    l2: float
    loss: float
    objective: float
    gradient: float
    evaluations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Logits ``[n, C]`` of features ``[n, D]``."""
        return F.linear(features.to(self.weight), self.weight, self.bias)

    def correct(self, features: Tensor, labels: Tensor) -> int:
        """Number of right answers for class numbers ``[n]``."""
        return sum(
            int((self.logits(x).argmax(dim=1) == y.to(self.weight.device)).sum())
            for x, y in zip(torch.split(features, _ROWS), torch.split(labels, _ROWS))
        )


@dataclass(frozen=True)
class LogisticPath:
    """Classifiers for several penalties and the one that was chosen.

    Attributes:
        best: The classifier with most right answers on the held-out images; of equal ones that with
            the strongest penalty.
        correct: Right answers on the held-out images for each penalty, strongest first.
    """

    best: Logistic
    correct: dict[float, int]


def logistic_loss(
    weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Mean cross-entropy of a linear classifier and its gradients.

    It takes the images in pieces, so that memory does not grow with images times classes.

    Args:
        weight: ``[C, D]``.
        bias: ``[C]``.
        features: ``[n, D]``, of the same type and on the same device.
        labels: Class numbers ``[n]``, on the same device.

    Returns:
        The loss, and its gradients by `weight` and `bias`.
    """
    loss = torch.zeros((), dtype=torch.float64)
    by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for x, y in zip(torch.split(features, _ROWS), torch.split(labels, _ROWS)):
        log_p = F.linear(x, weight, bias).log_softmax(dim=1)
        loss -= log_p.gather(1, y[:, None]).cpu().double().sum()
        error = log_p.exp_()  # softmax minus one-hot labels
        error.scatter_add_(1, y[:, None], torch.full_like(y[:, None], -1, dtype=error.dtype))
        by_weight.addmm_(error.T, x)
        by_bias += error.sum(dim=0)
    n = len(features)
    return float(loss / n), by_weight.div_(n), by_bias.div_(n)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    l2: float,
    *,
    num_classes: int | None = None,
    standardise: bool = True,
    start: Logistic | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> Logistic:
    """Minimise mean cross-entropy + l2 / 2 * the sum of squared weights, without the biases.

    scikit-learn's `LogisticRegression` minimises the same with ``C = 1 / (n * l2)``. L-BFGS with a
    strong Wolfe line search; in float64 if the features are, otherwise in float32.

    Args:
        features: ``[n, D]``.
        labels: Class numbers ``[n]``.
        l2: Strength of the penalty, above 0: without it separable classes have no minimum.
        num_classes: Number of classes; None: one more than the largest label.
        standardise: Centre every feature and divide it by its standard deviation first. The penalty
            is then on the weights of the standardised features.
        start: Classifier to start from, of the same features and settings.
        max_iterations: Most steps.
        tolerance: Largest absolute entry of the gradient at which the minimum counts as found.

    Raises:
        ValueError: Features that are not finite, one class only, labels out of range, or a penalty
            that is not above 0.
    """
    if not 0 < l2 < math.inf:
        raise SettingsError(f"l2 is {l2}; use a number above 0, e.g. 1e-4")
    x, y, classes = _checked(features, labels, num_classes)
    mean, scale = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    if standardise:
        mean, spread = x.mean(dim=0), x.std(dim=0, correction=0)
        scale = torch.where(spread > 0, spread, 1.0)
        x = (x - mean) / scale
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    if start is not None:
        weight, bias = start.weight * scale, start.bias + start.weight @ mean
    counted = _minimise(weight, bias, x, y, l2, max_iterations, tolerance)
    loss, by_weight, by_bias = logistic_loss(weight, bias, x, y)
    by_weight += l2 * weight
    gradient = float(torch.cat([by_weight.flatten(), by_bias]).abs().max())
    outside = weight / scale
    return Logistic(
        weight=outside,
        bias=bias - outside @ mean,
        l2=l2,
        loss=loss,
        objective=loss + _penalty(weight, l2),
        gradient=gradient,
        evaluations=counted,
        converged=gradient <= tolerance,
    )


def choose_logistic(
    features: Tensor,
    labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    l2s: Sequence[float] = L2S,
    *,
    num_classes: int | None = None,
    standardise: bool = True,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> LogisticPath:
    """Fit a classifier for every penalty and choose one on images it was not fitted to.

    From the strongest penalty to the weakest, each from the classifier before.

    Args:
        features: ``[n, D]``, to fit to.
        labels: Class numbers ``[n]``.
        held_out: ``[m, D]``, to choose on.
        held_out_labels: Class numbers ``[m]``.
        l2s: The penalties.
        num_classes: See `fit_logistic`, as for the others.
        standardise: See `fit_logistic`.
        max_iterations: Of each fit.
        tolerance: Of each fit.

    Raises:
        ValueError: See `fit_logistic`; no penalty, or nothing held out.
    """
    if not l2s or not len(held_out):
        raise SettingsError(f"{len(l2s)} penalties and {len(held_out)} held-out images; give some")
    if len(held_out) != len(held_out_labels) or not held_out.isfinite().all():
        raise SettingsError(
            f"{len(held_out)} held-out features need a label each ({len(held_out_labels)} given) "
            "and must be finite"
        )
    correct: dict[float, int] = {}
    best = found = None
    for l2 in sorted(set(l2s), reverse=True):
        found = fit_logistic(
            features,
            labels,
            l2,
            num_classes=num_classes,
            standardise=standardise,
            start=found,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )
        correct[l2] = found.correct(held_out, held_out_labels)
        if best is None or correct[l2] > correct[best.l2]:
            best = found
    assert best is not None
    return LogisticPath(best, correct)


def _minimise(
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    y: Tensor,
    l2: float,
    max_iterations: int,
    tolerance: float,
) -> int:
    """Change `weight` and `bias` in place; returns the number of evaluations."""
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        loss, by_weight, bias.grad = logistic_loss(weight, bias, x, y)
        weight.grad = by_weight.add_(weight, alpha=l2)
        return loss + _penalty(weight, l2)

    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=tolerance**2 / 100,  # the objective is flat where gradients are small
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return evaluations


def _penalty(weight: Tensor, l2: float) -> float:
    return l2 / 2 * float(weight.square().sum())


def _checked(
    features: Tensor, labels: Tensor, num_classes: int | None
) -> tuple[Tensor, Tensor, int]:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise SettingsError(
            f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; they "
            "must be [n, D] and [n]"
        )
    found = torch.unique(labels)
    if len(found) < 2:
        raise SettingsError(f"{len(found)} class among {len(labels)} labels; 2 or more are needed")
    classes = int(found[-1]) + 1 if num_classes is None else num_classes
    if found[0] < 0 or found[-1] >= classes:
        raise SettingsError(
            f"labels are from {int(found[0])} to {int(found[-1])}; they must be from 0 to "
            f"{classes - 1}"
        )
    spoiled = int((~features.isfinite().all(dim=1)).sum())
    if spoiled:
        raise SettingsError(f"features of {spoiled} of {len(features)} images are NaN or infinite")
    x = features.detach() if features.dtype == torch.float64 else features.detach().float()
    return x, labels.to(x.device), classes
