"""Numbers that show collapse and quality during pretraining; the loss does not.

They are taken from the target encoder on images that are never trained on, and only mean something
beside the same numbers at initialisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import Distributed
from ..errors import SettingsError
from ..models.jepa import IJepa
from .config import Precision
from .data import normalize
from .precision import autocast, without_float8

_NEIGHBOURS = 20
_TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO's kNN classifier
_RIDGES = tuple(10.0**e for e in range(-5, 2))  # times the mean eigenvalue


def rankme(features: Tensor) -> float:
    """Effective rank of features: exp of the entropy of their singular values.

    RankMe (arXiv 2210.02885, eq. 1-2), with `p_k = s_k / sum(s) + 1e-7`. It is at most min(n, D),
    so compare only values of the same n and D; the paper advises many more samples than features.

    Args:
        features: One row per image, `[n, D]`.

    Returns:
        The effective rank, from 1 (collapsed) to min(n, D).
    """
    singular = torch.linalg.svdvals(_checked(features))
    p = singular / singular.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def spread(features: Tensor) -> float:
    """Standard deviation of L2-normalised features, times sqrt(D): 0 collapsed, 1 isotropic.

    Args:
        features: One row per image, `[n, D]`.
    """
    unit = F.normalize(_checked(features), dim=1)
    return float(unit.std(dim=0).mean() * features.shape[1] ** 0.5)


def mean_cosine(features: Tensor) -> float:
    """Mean cosine similarity between different images: 1 collapsed, 0 unrelated.

    Args:
        features: One row per image, `[n, D]`.
    """
    unit = F.normalize(_checked(features), dim=1)
    n = len(unit)
    return float((unit.sum(dim=0).square().sum() - n) / (n * (n - 1)))


def knn_accuracy(features: Tensor, labels: Tensor) -> float:
    """Accuracy of a leave-one-out kNN classifier in percent.

    The 20 images of largest cosine similarity vote with `exp(similarity / 0.07)`, as in DINO
    (arXiv 2104.14294, appendix); an image never votes for itself.

    Args:
        features: One row per image, `[n, D]`.
        labels: Class numbers `[n]`, int64.
    """
    unit = F.normalize(_checked(features), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    near, who = similarity.topk(min(_NEIGHBOURS, len(unit) - 1), dim=1)
    classes = torch.unique(labels, return_inverse=True)[1].to(features.device)
    votes = unit.new_zeros(len(unit), int(classes.max()) + 1)
    votes.scatter_add_(1, classes[who], torch.exp((near - 1) / _TEMPERATURE))
    return _percent(votes.argmax(dim=1) == classes)


def linear_accuracy(features: Tensor, labels: Tensor) -> float:
    """Accuracy of a linear classifier in percent, cross-validated over two halves.

    Ridge regression to one-hot labels in closed form, trained on one half of the images and
    tested on the other, both ways. The halves have equal shares of every class. The strength of
    the ridge is chosen within the training half alone, by its leave-one-out error.

    Args:
        features: One row per image, `[n, D]`.
        labels: Class numbers `[n]`, int64.
    """
    x = _checked(features)
    classes = torch.unique(labels, return_inverse=True)[1].to(features.device)
    y = F.one_hot(classes).to(x)
    order = classes.argsort(stable=True)
    halves = order[0::2], order[1::2]
    right = [
        _ridge(x[train], y[train], x[test]).argmax(dim=1) == classes[test]
        for train, test in (halves, halves[::-1])
    ]
    return _percent(torch.cat(right))


def _ridge(x: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """Predictions for `test` of ridge regression with centred data; leave-one-out as in PRESS."""
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
    predictions: Tensor = (test - mean) @ weights + offset
    return predictions


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise SettingsError(
            f"features have shape {tuple(features.shape)}; they must be [n, D] with n >= 2"
        )
    return features.detach().double()


class Monitor:
    """Figures of the target encoder on images that are not trained on.

    Args:
        images: uint8 `[m, C, H, W]`, at least two.
        labels: Class numbers `[m]`, int64, -1 for an image without one; None: no labels.
        mean: Mean of the channels, of values from 0 to 1.
        std: Standard deviation of the channels, of values from 0 to 1.
        batch_size: Images of every forward pass of a process; the last one is padded.
        precision: That of the forward pass: the run's own, bf16 for fp8.

    Raises:
        ValueError: There are fewer than two images, or labels of another number.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int = 64,
        precision: Precision = "fp32",
    ) -> None:
        if len(images) < 2:
            raise SettingsError(
                f"{len(images)} images to monitor the run with, at least 2 are needed: "
                "use data.held_out=512"
            )
        if labels is not None and len(labels) != len(images):
            raise SettingsError(f"{len(labels)} labels for {len(images)} images of the monitor")
        self.images, self.labels = images, labels
        self.mean, self.std = mean, std
        self.batch_size = batch_size
        self.precision = precision

    @torch.no_grad()
    def measure(self, model: IJepa, distributed: Distributed) -> dict[str, float]:
        """Measure the model; every process must call this, and gets the same figures.

        Args:
            model: The networks, sharded or not.
            distributed: The processes that share the work.

        Returns:
            `rankme`, `spread` and `cosine` of the features, averaged over patches; `ema_distance`,
            the length of encoder minus target encoder over that of the target encoder; with
            labels of two or more classes also `knn` and `linear`, accuracies in percent. Figures
            of features that are not finite are NaN.
        """
        features = self._features(model, distributed)
        figures = _figures(features, self.labels)
        distance = total_norm(
            p.detach() - q
            for p, q in zip(model.encoder.parameters(), model.target_encoder.parameters())
        )
        return {**figures, "ema_distance": distance / total_norm(model.target_encoder.parameters())}

    def _features(self, model: IJepa, distributed: Distributed) -> Tensor:
        """Features `[m, D]` of all images; processes do equal numbers of forward passes."""
        share = -(-len(self.images) // distributed.world_size)
        first, size = distributed.rank * share, self.batch_size
        pooled: list[Tensor] = []
        for start in range(first, first + share, size):
            batch = torch.arange(start, start + size).clamp(max=len(self.images) - 1)
            pixels = self.images[batch].to(distributed.device)
            with without_float8(model.target_encoder), autocast(pixels.device, self.precision):
                tokens = model.target_encoder.encode(normalize(pixels, self.mean, self.std))
            pooled.append(tokens.float().mean(dim=1))
        gathered: Tensor = distributed.all_gather(torch.cat(pooled)[:share])
        return gathered[: len(self.images)]


def _figures(features: Tensor, labels: Tensor | None) -> dict[str, float]:
    named = {"rankme": rankme, "spread": spread, "cosine": mean_cosine}
    finite = bool(features.isfinite().all())
    figures = {name: f(features) if finite else float("nan") for name, f in named.items()}
    if labels is None:
        return figures
    known = labels >= 0
    if len(torch.unique(labels[known])) < 2:
        return figures
    probes = {"knn": knn_accuracy, "linear": linear_accuracy}
    return figures | {
        name: f(features[known.to(features.device)], labels[known]) if finite else float("nan")
        for name, f in probes.items()
    }


def gradient_norms(model: IJepa) -> dict[str, float]:
    """L2 norms of the last gradients, `grad_encoder` and `grad_predictor`.

    With sharded networks every process must call this.
    """
    return {
        f"grad_{name}": total_norm([p.grad for p in network.parameters() if p.grad is not None])
        for name, network in _trained(model)
    }


def update_norms(model: IJepa, optimizer: torch.optim.AdamW) -> dict[str, float]:
    """Size of the last update, `update_encoder` and `update_predictor`.

    L2 norm of what the update changed over that of the parameters; around 1e-3 is common. The
    change is worked out from the optimizer's state, so no copy of the weights is kept. With
    sharded networks every process must call this, after an update and before the next.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    return {
        f"update_{name}": total_norm(_changes(network.parameters(), groups, optimizer))
        / total_norm(network.parameters())
        for name, network in _trained(model)
    }


def _changes(
    parameters: Iterable[nn.Parameter],
    groups: dict[nn.Parameter, dict[str, Any]],
    optimizer: torch.optim.AdamW,
) -> Iterable[Tensor]:
    """What AdamW's last update subtracted from each parameter (arXiv 1711.05101, algorithm 2)."""
    step = 0.0  # one for all parameters, so it is read from the device once
    for parameter in parameters:
        group, state = groups[parameter], optimizer.state[parameter]
        step = step or float(state["step"])
        first, second = (1 - beta**step for beta in group["betas"])
        change = state["exp_avg_sq"].div(second).sqrt_().add_(group["eps"])
        change = (state["exp_avg"] / change).mul_(group["lr"] / first)
        decay = group["lr"] * group["weight_decay"]
        # p_after = (1 - decay) * p_before - change
        yield change.add_((parameter.detach() + change).mul_(decay / (1 - decay)))


def _trained(model: IJepa) -> Sequence[tuple[str, nn.Module]]:
    return ("encoder", model.encoder), ("predictor", model.predictor)


def total_norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm of all tensors together; those of sharded tensors are summed over processes."""
    norms = [torch.linalg.vector_norm(tensor.detach()) for tensor in tensors]
    if not norms:
        return 0.0
    total: Any = torch.linalg.vector_norm(torch.stack(norms))
    return float(total.full_tensor() if hasattr(total, "full_tensor") else total)
