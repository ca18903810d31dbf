"""All heads of a linear probe, trained at once on the same frozen features.

The features get no gradient, so the gradients of a head follow from a few products of matrices;
those of all heads that read the same features are one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from .head_group import HeadGroup, HeadSpec, Rule

__all__ = ["HeadGrid", "HeadSpec"]

BN_EPS = 1e-5
BN_MOMENTUM = 0.1  # share of the new batch in the running statistics


class HeadGrid:
    """Linear and BatchNorm + linear heads, each trained as if it were alone.

    As VISSL's ``mlp`` and ``eval_mlp`` heads with which I-JEPA was evaluated: the linear layer
    starts as `torch.nn.Linear` does, uniform in +-1 / sqrt(width) (its ``PARAMS_MULTIPLIER`` is 1);
    BatchNorm has eps 1e-5 and momentum 0.1. Heads of equal width start from the same weights, and
    no head depends on which others are trained. Computation is in float32.

    Several processes: give `total`; the gradients and the statistics of BatchNorm are those of the
    whole batch (as with SyncBN), so the weights do not depend on the number of processes or on how
    the batch is shared out. Every process must call `update`, also one without an image.

    Args:
        specs: The heads.
        widths: Number of features of each representation.
        num_classes: Number of classes.
        optimizer: 'sgd' as `torch.optim.SGD`, or 'lars' as VISSL's with ``exclude_bias_and_norm``.
        momentum: Momentum of the optimizer.
        nesterov: Nesterov's momentum, of 'sgd' alone.
        seed: Decides the first weights.
        device: Where the heads live.
        total: Sum of a tensor over the processes, such as `Distributed.sum`; None for one process.

    Attributes:
        specs: The heads; every result with one entry per head is in their order.
        num_classes: Number of classes.

    Raises:
        ValueError: No head, a head twice, numbers out of range or representations without a width.
    """

    def __init__(
        self,
        specs: Sequence[HeadSpec],
        widths: Mapping[str, int],
        num_classes: int,
        *,
        optimizer: Literal["sgd", "lars"] = "sgd",
        momentum: float = 0.9,
        nesterov: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._rule = Rule(optimizer, momentum, nesterov)
        _check(specs, widths, num_classes, self._rule)
        self.specs = tuple(specs)
        self.num_classes = num_classes
        self._widths = {r: widths[r] for r in dict.fromkeys(s.representation for s in specs)}
        self._device = torch.device(device)
        self._total = total
        members: dict[tuple[str, bool], list[int]] = {}
        for i, spec in enumerate(specs):
            members.setdefault((spec.representation, spec.batch_norm), []).append(i)
        self._groups = {
            (r, bn): HeadGroup([self.specs[i] for i in indices], widths[r], num_classes, seed)
            for (r, bn), indices in members.items()
        }
        self._running = {
            r: {"mean": torch.zeros(widths[r]), "var": torch.ones(widths[r])}
            for r, bn in members
            if bn
        }
        for tensors in (*(g.tensors for g in self._groups.values()), *self._running.values()):
            tensors.update({name: tensor.to(self._device) for name, tensor in tensors.items()})
        listed = torch.tensor([i for indices in members.values() for i in indices])
        self._order = listed.argsort().to(self._device)

    @torch.no_grad()
    def update(self, features: Mapping[str, Tensor], labels: Tensor, lr_scale: float) -> Tensor:
        """One step of every head on a batch.

        Args:
            features: ``[B, D]`` for each representation.
            labels: Class numbers ``[B]``, int64.
            lr_scale: Factor of all learning rates.

        Returns:
            Mean cross-entropy of every head before the step, ``[H]``.

        Raises:
            ValueError: Features that are not finite or of another shape, labels that are no class
                numbers, or fewer than two images for a BatchNorm. No head was changed.
        """
        labels = labels.to(self._device)
        rows = self._rows(features, labels)
        count, means = self._survey(rows, labels)
        normed = self._normalise(rows, means, count)
        gradients = [
            group.gradients((normed if bn else rows)[r], labels, count)
            for (r, bn), group in self._groups.items()
        ]
        flat = iter(self._sum([tensor for found in gradients for tensor in found.values()]))
        losses = []
        for group, found in zip(self._groups.values(), gradients):
            summed = {name: next(flat) for name in found}
            losses.append(summed.pop("loss"))
            group.step(summed, self._rule, lr_scale)
        return torch.cat(losses)[self._order]

    @torch.no_grad()
    def logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits of every head in evaluation mode, ``[H, B, C]``."""
        rows = self._rows(features)
        normed = {
            r: (rows[r] - running["mean"]) * (running["var"] + BN_EPS).rsqrt()
            for r, running in self._running.items()
        }
        logits = [g.logits((normed if bn else rows)[r]) for (r, bn), g in self._groups.items()]
        return torch.cat(logits, dim=1).index_select(1, self._order).transpose(0, 1)

    def correct(self, features: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Numbers of right answers in evaluation mode, int64 ``[H]``.

        A label of -1 (padding) is never right, nor are a head's logits that are not a number.

        Raises:
            ValueError: Features that are not finite, or not as many as labels.
        """
        labels = labels.to(self._device)
        rows = self._rows(features, labels)
        self._refuse(_spoiled(rows, labels >= 0).tolist(), len(labels))
        best = self.logits(rows).max(dim=2)
        right = (best.indices == labels) & ~best.values.isnan()
        return right.sum(dim=1)

    def head(self, index: int) -> nn.Module:
        """Head number `index` on its own, in evaluation mode, with copies of its weights."""
        spec = self.specs[index]
        group = self._groups[spec.representation, spec.batch_norm]
        mine = {name: tensor[group.specs.index(spec)] for name, tensor in group.tensors.items()}
        width = self._widths[spec.representation]
        linear = nn.Linear(width, self.num_classes)
        linear.load_state_dict({"weight": mine["weight"], "bias": mine["bias"]})
        if not spec.batch_norm:
            return linear.to(self._device).eval()
        norm = nn.BatchNorm1d(width, eps=BN_EPS, momentum=BN_MOMENTUM)
        running = self._running[spec.representation]
        state = {"weight": mine["gamma"], "bias": mine["beta"]}
        state |= {f"running_{name}": tensor for name, tensor in running.items()}
        norm.load_state_dict(norm.state_dict() | state)  # the number of batches stays 0
        return nn.Sequential(norm, linear).to(self._device).eval()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, momenta and running statistics by name: the grid's own tensors, no copies."""
        found: dict[str, Tensor] = {}
        for (representation, bn), group in self._groups.items():
            prefix = f"{representation}.{'bn' if bn else 'linear'}"
            found |= {f"{prefix}.{name}": tensor for name, tensor in group.tensors.items()}
        for representation, running in self._running.items():
            found |= {f"{representation}.running_{name}": t for name, t in running.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a grid of the same heads was.

        Raises:
            ValueError: The state is that of other heads. Nothing was changed.
        """
        mine = self.state_dict()

        def differ(name: str) -> bool:
            fixed = name.endswith((".lr", ".weight_decay"))
            old, new = mine[name].cpu(), state[name].cpu()
            return old.shape != new.shape or (fixed and not old.equal(new))

        names = sorted(mine.keys() | state.keys())
        wrong = [n for n in names if n not in mine or n not in state or differ(n)]
        if wrong:
            raise SettingsError(
                f"the saved state is of other heads: {', '.join(wrong)} differ; start anew, or "
                "with the heads, classes and model that it was saved with"
            )
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def _rows(
        self, features: Mapping[str, Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The features on the device in float32; refuses those of another shape."""
        for representation, width in self._widths.items():
            shape = tuple(features[representation].shape) if representation in features else None
            if shape is None or len(shape) != 2 or shape[1] != width:
                raise SettingsError(
                    f"features {representation!r} have shape {shape}; the heads need [B, {width}]"
                )
            if labels is not None and labels.shape != shape[:1]:
                raise SettingsError(
                    f"labels have shape {tuple(labels.shape)} and features {representation!r} "
                    f"{shape}; there must be one label for each row"
                )
        return {r: features[r].to(self._device, torch.float32) for r in self._widths}

    def _survey(self, rows: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Number of images of all processes and mean features; refuses what would spoil a head.

        The numbers of bad rows are exchanged first, so that all processes refuse a batch together.
        """
        no_class = (labels < 0) | (labels >= self.num_classes)
        size = torch.tensor([len(labels)], device=self._device)
        spoiled = _spoiled(rows, torch.ones_like(no_class))
        figures = torch.cat([size, no_class.sum().view(1), spoiled]).float()
        figures, *sums = self._sum([figures, *(rows[r].sum(dim=0) for r in self._running)])
        count, strangers, *spoiled_rows = (int(n) for n in figures.tolist())
        self._refuse(spoiled_rows, count)
        if strangers:
            raise SettingsError(
                f"{strangers} of {count} labels are not from 0 to {self.num_classes - 1}"
            )
        if count < (2 if self._running else 1):
            raise SettingsError(
                f"a batch of {count} images; BatchNorm needs 2: use a larger batch, or leave out a "
                "last batch that is smaller than the others"
            )
        return figures[0], {r: total / count for r, total in zip(self._running, sums)}

    def _refuse(self, spoiled: list[int], count: int) -> None:
        for representation, number in zip(self._widths, spoiled):
            if number:
                raise SettingsError(
                    f"features {representation!r} of {number} of {count} images are NaN or "
                    "infinite; check the model's weights, or compute in float32 or bfloat16"
                )

    def _normalise(
        self, rows: dict[str, Tensor], means: dict[str, Tensor], count: Tensor
    ) -> dict[str, Tensor]:
        centred = {r: rows[r] - mean for r, mean in means.items()}
        squares = self._sum([x.square().sum(dim=0) for x in centred.values()])
        for total, (r, x) in zip(squares, centred.items()):
            self._running[r]["mean"].lerp_(means[r], BN_MOMENTUM)
            self._running[r]["var"].lerp_(total / (count - 1), BN_MOMENTUM)
            x.mul_((total / count + BN_EPS).rsqrt())
        return centred

    def _sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums over the processes, in one exchange."""
        if self._total is None or not tensors:
            return tensors
        flat = self._total(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


def _spoiled(rows: dict[str, Tensor], counts: Tensor) -> Tensor:
    """Number of rows of each representation that are not finite, of those that count."""
    return torch.stack([(~x.isfinite().all(dim=1) & counts).sum() for x in rows.values()])


def _check(
    specs: Sequence[HeadSpec], widths: Mapping[str, int], num_classes: int, rule: Rule
) -> None:
    if not specs:
        raise SettingsError("no head to train; give at least one HeadSpec")
    if num_classes < 2:
        raise SettingsError(f"{num_classes} classes; a probe needs 2 or more")
    if rule.optimizer not in ("sgd", "lars"):
        raise SettingsError(f"optimizer is {rule.optimizer!r}; use 'sgd' or 'lars'")
    if not 0 <= rule.momentum < 1:
        raise SettingsError(
            f"momentum is {rule.momentum}; use a number from 0 to below 1, e.g. 0.9"
        )
    if rule.nesterov and (rule.optimizer == "lars" or not rule.momentum):
        raise SettingsError("Nesterov's momentum is of optimizer 'sgd' with a momentum above 0")
    for spec in specs:
        if specs.count(spec) > 1:
            raise SettingsError(f"head '{spec.name}' is in the grid twice; leave one out")
        if spec.representation not in widths:
            raise SettingsError(
                f"head '{spec.name}' reads {spec.representation!r}, of which no width is given; "
                f"there are {', '.join(widths) or 'none'}"
            )
        if not (0 < spec.lr < math.inf and 0 <= spec.weight_decay < math.inf):
            raise SettingsError(f"head '{spec.name}': lr must be above 0 and wd 0 or more")
