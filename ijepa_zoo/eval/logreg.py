"""Logistic regression on frozen features, with all labels or few, as DINOv2 evaluates encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets import Subset, Targets
from ..errors import DataError, SettingsError, option
from ..models.classifier import LinearHead
from ..seeds import Stream, numpy_generator
from .accuracy import Metrics, choose, compute_metrics
from .features import BlockFeatures, CachedLoader, Source
from .models import EvalModel
from .probe import EvalConfig, Probe, evaluate, make_result, open_probe
from .results import Result
from .runs import run_once
from .saved_head import save_probe_head
from .sets import listed_rows
from .tasks import Task

CS = tuple(10.0 ** float(e) for e in np.linspace(-6, 5, 45))  # DINOv2's `C_POWER_RANGE`
_ROWS = 8192  # whose logits are in memory at once


def evaluate_logreg(
    task: str | Task,
    model: str | nn.Module | EvalModel,
    data: Any,
    out: str | Path = "results",
    *,
    list: str | Path | None = None,
    per_class: int | None = None,
    cs: Sequence[float] = CS,
    **options: Any,
) -> Result:
    """Fit a logistic regression to frozen features, and test it on the whole test set.

    `last` or `last4` and the inverse strength C of the penalty are chosen on a seeded 10 % of the
    training images; then the classifier is fitted to all of them. DINOv2 (arXiv 2304.07193,
    `dinov2/eval/log_regression.py`) does the same on one layer, with the same 45 values of C.

    `list` is a text file with the names of the training images to use, one per line, such as
    ImageNet's 1 % (see `listed_rows`); `per_class` draws so many of each class by the seed; `cs`
    are the values of C. The other arguments are fields of :class:`~ijepa_zoo.eval.EvalConfig`;
    errors are those of :func:`evaluate_linear`.
    """
    if list is not None and per_class is not None:
        raise SettingsError(f"use {option('list')} or {option('per_class')}, not both")

    def open_data(*args: Any) -> Probe:
        probe = open_probe(*args)
        if list is not None:
            return choose_rows(probe, listed_rows(probe.train, list), {"list": Path(list).name})
        if per_class is not None:
            probe.train.refuse_several_labels(option("per_class"))
            rows = draw_per_class(probe.train.targets, per_class, probe.config.seed)
            return choose_rows(probe, rows, {"per_class": per_class})
        return probe

    def run(probe: Probe, source: Source) -> tuple[Result, Path]:
        transform = probe.protocol.transform.describe(source.size, train=False)
        protocol = {"cs": [*cs], "transform": transform, **probe.subset}

        def work(probe: Probe, folder: Path) -> Result:
            with probe.bar(0, "logistic regression") as bar:
                loader = CachedLoader(probe, source, bar, flips=False)
                return _sweep(probe, source, loader, cs, protocol, folder)

        return run_once(probe, source, "logreg", protocol, work)

    config = EvalConfig(task=task, model=model, data=data, out=out, **options)
    return evaluate(config, open_data, run)


def draw_per_class(labels: Targets, number: int, seed: int) -> Targets:
    """Sorted indices of `number` images of each class, or of all if there are fewer."""
    order = np.lexsort((numpy_generator(seed, Stream.EVAL_SPLIT, 2).random(len(labels)), labels))
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels))])
    rank = np.arange(len(labels)) - starts[labels[order]]  # within the class
    return np.sort(order[rank < number])


def choose_rows(probe: Probe, rows: Targets, subset: dict[str, Any]) -> Probe:
    """The probe with some of the training images."""
    train = probe.train
    classes = int((train.class_sizes(rows) > 0).sum())
    if classes < 2:
        raise DataError(f"the chosen images ({subset}) are of one class; use at least two")
    how = ", ".join(f"{key}={value}" for key, value in subset.items())
    note = f"{how}: {len(rows)} of {len(train)} training images, of {classes} classes"
    images, targets = Subset(train.images, rows), train.targets[rows]
    few = replace(train, images=images, targets=targets, notes=(*train.notes, note))
    return probe.with_rows(few, subset=subset)


def _sweep(
    probe: Probe,
    source: Source,
    loader: CachedLoader,
    cs: Sequence[float],
    protocol: dict[str, Any],
    folder: Path,
) -> Result:
    def own_rows(rows: Targets, name: str) -> tuple[Tensor, Tensor]:
        mine = loader.share(rows)
        labels = loader.train.labels[mine].to(loader.device)
        return source.split(loader.train.rows[mine].to(loader.device))[name], labels

    def measure(batches: Any, heads: Sequence[tuple[str, Logistic]]) -> Metrics:
        def logits(features: dict[str, Tensor]) -> Iterator[Tensor]:
            return (fitted.logits(features[name]) for name, fitted in heads)

        return compute_metrics(probe, source, batches, logits)

    @cache
    def fit_all(index: int) -> Logistic:
        name, c = settings[index]
        rows = np.concatenate([loader.train_rows, loader.val_rows])
        return fit_logistic(*own_rows(rows, name), c, **shared)

    shared: dict[str, Any] = {
        "num_classes": probe.num_classes,
        "all_reduce": probe.distributed.all_reduce,
    }
    settings, heads = [(name, c) for name in source.widths for c in sorted(cs)], []
    for name in source.widths:
        data, fitted = own_rows(loader.train_rows, name), None
        for c in sorted(cs):
            fitted = fit_logistic(*data, c, start=fitted, **shared)
            heads.append((name, fitted))
        del data  # free memory for those of all images
    choice = choose(
        loader,
        lambda batches: measure(batches, heads),
        lambda batches, index: measure(batches, [(settings[index][0], fit_all(index))]),
    )
    names = [f"{name} C={c:.3g}" for name, c in settings]
    name, best = settings[choice.index][0], fit_all(choice.index)
    if isinstance(source, BlockFeatures):
        save_probe_head(probe, source, best.head(), name, folder, chosen=names[choice.index])
    notes = ["after the choice fitted to all training images"]
    notes += [] if best.converged else ["the last fit did not converge"]
    args = (probe, source, "logreg", protocol, names, choice)
    return make_result(*args, notes=notes)


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier: weights `[C, D]` and biases `[C]`."""

    weight: Tensor
    bias: Tensor
    objective: float  # minimized, divided by C and the number of images
    converged: bool  # False if the iterations did not suffice

    def logits(self, features: Tensor) -> Tensor:
        """Logits `[n, C]` of features `[n, D]`."""
        return F.linear(features.to(self.weight), self.weight, self.bias)

    def head(self) -> LinearHead:
        """The same classifier as a module."""
        head = LinearHead(self.weight.shape[1], self.weight.shape[0])
        head.linear.load_state_dict({"weight": self.weight, "bias": self.bias})
        return head


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    c: float,
    num_classes: int,
    *,
    start: Logistic | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Logistic:
    """Minimize `C * sum of cross-entropies + sum of squared weights / 2`, as scikit-learn.

    That is the objective of `sklearn.linear_model.LogisticRegression`, biases without penalty. For
    a matrix of labels, every class has its own binary logistic regression, as in
    `sklearn.multiclass.OneVsRestClassifier`.

    L-BFGS with a strong Wolfe line search, on features that are shifted and scaled so that their
    curvatures are alike, which changes neither objective nor minimum. In float64 if the features
    are, else in float32.
    """
    x = features if features.dtype == torch.float64 else features.float()
    sums = torch.stack([x.sum(dim=0), x.square().sum(dim=0)])
    count = all_reduce(torch.tensor([float(len(x))], device=x.device))
    n = float(count)
    mean, square = all_reduce(sums).div_(n)
    l2 = 1 / (c * n)
    variance = (square - mean.square()).clamp_min(0)
    spread = num_classes if labels.ndim == 1 else 4  # 1 / the variance of a class, about
    scale = (variance + spread * l2).sqrt()  # square root of the curvature's diagonal
    x = (x - mean).div_(scale)
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    if start is not None:
        weight, bias = start.weight * scale, start.bias + start.weight @ mean

    def closure() -> float:
        loss, *gradients = _cross_entropy(weight, bias, x, labels)
        flat = all_reduce(torch.cat([loss.view(1), *(g.flatten() for g in gradients)])).div_(n)
        weight.grad = flat[1 : 1 + weight.numel()].view_as(weight) + l2 * weight / scale.square()
        bias.grad = flat[1 + weight.numel() :].clone()
        return float(flat[0] + l2 / 2 * (weight / scale).square().sum())

    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=tolerance**2 / 100,  # the objective is flat where gradients are small
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    done = optimizer.state[weight]
    converged = done["n_iter"] < max_iterations and done["func_evals"] < 2 * max_iterations
    unscaled = weight / scale
    return Logistic(unscaled, bias - unscaled @ mean, closure(), converged)


def _cross_entropy(
    weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of cross-entropies and its gradients; in pieces, so that memory is bounded."""
    loss = torch.zeros((), dtype=features.dtype, device=features.device)
    by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for x, y in zip(torch.split(features, _ROWS), torch.split(labels, _ROWS)):
        logits = F.linear(x, weight, bias)
        if y.ndim > 1:
            y = y.to(logits)
            loss += F.binary_cross_entropy_with_logits(logits, y, reduction="sum")
            error = logits.sigmoid_().sub_(y)
        else:
            log_p = logits.log_softmax(dim=1)
            loss -= log_p.gather(1, y[:, None]).sum()
            error = log_p.exp_()  # softmax minus one-hot labels
            error.scatter_add_(1, y[:, None], torch.full_like(y[:, None], -1, dtype=error.dtype))
        by_weight.addmm_(error.T, x)
        by_bias += error.sum(dim=0)
    return loss, by_weight, by_bias
