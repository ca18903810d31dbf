"""Heads of a linear probe that read the same features: logits, gradients and steps of all at once.

``h`` is the number of heads, ``B`` of images, ``C`` of classes and ``D`` of features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..seeds import Stream, torch_generator

_TRUST = 0.001  # VISSL's eta


@dataclass(frozen=True)
class HeadSpec:
    """One head of the grid.

    Attributes:
        representation: The features it reads, e.g. 'last' or 'last4'.
        batch_norm: Whether a BatchNorm with affine parameters comes before the linear layer.
        lr: Learning rate; `HeadGrid.update` multiplies it with the schedule's factor.
        weight_decay: L2 penalty of weights and biases of the linear layer, not of the BatchNorm.
    """

    representation: str
    batch_norm: bool
    lr: float
    weight_decay: float

    @property
    def name(self) -> str:
        """Such as 'last4 bn lr=0.01 wd=0.0005'."""
        kind = "bn" if self.batch_norm else "linear"
        return f"{self.representation} {kind} lr={self.lr:g} wd={self.weight_decay:g}"


@dataclass(frozen=True)
class Rule:
    """How gradients become steps.

    Attributes:
        optimizer: 'sgd' as `torch.optim.SGD`; 'lars' as VISSL's ``vissl/optimizers/lars.py``.
        momentum: Part of the last step that goes into the next.
        nesterov: Whether SGD looks ahead by its momentum.
    """

    optimizer: Literal["sgd", "lars"]
    momentum: float
    nesterov: bool


class HeadGroup:
    """Heads with the same input, which is normalised already where they have a BatchNorm.

    Args:
        specs: The heads.
        width: Number of features.
        num_classes: Number of classes.
        seed: Decides the first weights.

    Attributes:
        specs: The heads.
        tensors: ``weight`` ``[h, C, D]``, ``bias`` ``[h, C]``, for BatchNorm ``gamma`` and ``beta``
            ``[h, D]``, the momentum of each, and ``lr`` and ``weight_decay`` ``[h]``.
    """

    def __init__(self, specs: Sequence[HeadSpec], width: int, num_classes: int, seed: int) -> None:
        self.specs = tuple(specs)
        heads, bound = len(self.specs), 1 / math.sqrt(width)
        generator = torch_generator(seed, Stream.EVAL_INIT)
        weight = torch.empty(num_classes, width).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(num_classes).uniform_(-bound, bound, generator=generator)
        parameters = {"weight": weight.repeat(heads, 1, 1), "bias": bias.repeat(heads, 1)}
        if self.specs[0].batch_norm:
            parameters |= {"gamma": torch.ones(heads, width), "beta": torch.zeros(heads, width)}
        self._parameters = tuple(parameters)
        self._decays = any(spec.weight_decay for spec in self.specs)
        momenta = {f"momentum.{name}": torch.zeros_like(p) for name, p in parameters.items()}
        numbers = {
            "lr": torch.tensor([spec.lr for spec in self.specs]),
            "weight_decay": torch.tensor([spec.weight_decay for spec in self.specs]),
        }
        self.tensors: dict[str, Tensor] = parameters | momenta | numbers

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``[B, h, C]`` of the input ``[B, D]``."""
        weight, bias = self.tensors["weight"], self.tensors["bias"]
        if "gamma" in self.tensors:  # W (gamma x + beta) + b = (W gamma) x + (W beta + b)
            bias = bias + torch.einsum("hcd,hd->hc", weight, self.tensors["beta"])
            weight = weight * self.tensors["gamma"][:, None]
        flat = torch.addmm(bias.flatten(), x, weight.flatten(0, 1).T)
        return flat.view(len(x), *bias.shape)

    def gradients(self, x: Tensor, labels: Tensor, count: Tensor) -> dict[str, Tensor]:
        """Gradients of every head's cross-entropy, summed over the images and divided by `count`.

        Returns:
            A gradient for each parameter by its name, and ``loss`` ``[h]``.
        """
        logits = self.logits(x)
        index = labels[:, None, None].expand(-1, len(self.specs), 1)
        log_sum = logits.logsumexp(dim=2, keepdim=True)
        loss = (log_sum - logits.gather(2, index)).sum(dim=(0, 2)) / count
        error = logits.sub_(log_sum).exp_()  # softmax minus one-hot labels
        error.scatter_add_(2, index, torch.full_like(log_sum, -1)).div_(count)
        weight, offset = self.tensors["weight"], error.sum(dim=0)
        product = (error.flatten(1).T @ x).view_as(weight)  # gradient of W gamma
        found = {"bias": offset, "loss": loss}
        if "gamma" in self.tensors:
            found["gamma"] = (product * weight).sum(dim=1)
            found["beta"] = torch.einsum("hcd,hc->hd", weight, offset)
            product.mul_(self.tensors["gamma"][:, None])
            product.add_(offset[:, :, None] * self.tensors["beta"][:, None])
        return found | {"weight": product}

    def step(self, gradients: dict[str, Tensor], rule: Rule, lr_scale: float) -> None:
        """Change the parameters; the gradients are used up."""
        rates = self.tensors["lr"] * lr_scale
        for name in self._parameters:
            parameter, change = self.tensors[name], gradients[name]
            shape = (-1, *[1] * (parameter.ndim - 1))
            if self._decays and name in ("weight", "bias"):
                change.addcmul_(parameter, self.tensors["weight_decay"].view(shape))
            if rule.optimizer == "lars" and name == "weight":
                change.mul_(trust_ratios(parameter, change))
            momentum = self.tensors[f"momentum.{name}"].mul_(rule.momentum).add_(change)
            change = change.add_(momentum, alpha=rule.momentum) if rule.nesterov else momentum
            parameter.addcmul_(change, rates.view(shape), value=-1)


def trust_ratios(weights: Tensor, steps: Tensor) -> Tensor:
    """LARS' factor of each head's step: 0.001 times the length of its weights over the step's.

    LARS (arXiv 1708.03888) as VISSL has it: the step is the gradient *with* weight decay, and the
    factor is 1 where a length is 0. NVIDIA's and timm's versions divide by the sum of the lengths
    of gradient and weight decay instead; without weight decay they are the same. I-JEPA's probes
    left biases and BatchNorm out (``exclude_bias_and_norm``).

    Args:
        weights: ``[h, C, D]``.
        steps: Gradients plus weight decay times weights, ``[h, C, D]``.

    Returns:
        Factors ``[h, 1, 1]``.
    """
    length, change = (
        torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, 1, 1) for x in (weights, steps)
    )
    return torch.where((length > 0) & (change > 0), _TRUST * length / change, 1.0)
