"""Heads on frozen features: trained together, each as if it were alone, and resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Distributed
from ..errors import RunError
from ..models.classifier import LinearHead
from ..seeds import Stream, torch_generator
from .accuracy import Choice, Metrics, choose, classification_loss
from .features import Source
from .runs import train_epochs
from .tasks import Protocol

_MOMENTUM = 0.9
_TRUST = 0.001  # VISSL's eta


@dataclass(frozen=True)
class HeadSpec:
    """One head of a grid."""

    representation: str
    kind: str
    lr: float
    weight_decay: float

    @property
    def name(self) -> str:
        """Name such as 'last4 bn lr=0.01 wd=0.0005'."""
        return f"{self.representation} {self.kind} lr={self.lr:g} wd={self.weight_decay:g}"

    def groups(self, decayed: Iterable[Any], free: Iterable[Any] = ()) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer: with weight decay, and without."""
        rates = {"lr": self.lr, "base_lr": self.lr}
        return [
            {"params": list(decayed), **rates, "weight_decay": self.weight_decay},
            {"params": list(free), **rates, "weight_decay": 0.0},
        ]


class Grid(nn.Module):
    """Heads that are trained together; the optimizer's groups have their rate as `base_lr`."""

    def __init__(
        self,
        heads: Mapping[HeadSpec, nn.Module],
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = classification_loss,
        clip_grad: float | None = None,
    ) -> None:
        super().__init__()
        self.specs, self.heads = list(heads), nn.ModuleList(heads.values())
        self.optimizer, self.autocast = optimizer, autocast
        self.loss, self.clip_grad = loss, clip_grad

    @property
    def names(self) -> list[str]:
        """Names of the heads."""
        return [spec.name for spec in self.specs]

    def outputs(self, features: dict[str, Tensor], heads: Sequence[int]) -> list[Tensor]:
        """Outputs of some heads, in float32: logits `[B, C]`, or maps of dense heads."""
        return [self.output(head, features) for head in heads]

    def output(self, head: int, features: dict[str, Tensor]) -> Tensor:
        """Output of one head, in float32."""
        rows = features[self.specs[head].representation]
        with torch.autocast(rows.device.type, self.autocast, enabled=self.autocast is not None):
            output: Tensor = self.heads[head](rows)
        return output.float()

    def step(
        self,
        features: dict[str, Tensor],
        targets: Tensor,
        lr_scale: float,
        distributed: Distributed | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """One step of every head; returns their losses before it, `[H]`.

        With `distributed`, features are the share of this process of a batch of `batch_size`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        weight = 1.0
        if distributed is not None and batch_size is not None:
            weight = len(targets) * distributed.world_size / batch_size
        self.optimizer.zero_grad()
        losses = []
        for index, head in enumerate(self.heads):  # one graph at a time: less memory
            loss = weight * self.loss(self.output(index, features), targets)
            torch.autograd.backward(loss)
            losses.append(loss.detach())
            if distributed is not None and distributed.world_size > 1:
                _average_gradients(head, distributed)
            if self.clip_grad is not None:
                nn.utils.clip_grad_norm_(head.parameters(), self.clip_grad)
        self.optimizer.step()
        return torch.stack(losses)


def _average_gradients(head: nn.Module, distributed: Distributed) -> None:
    gradients = [p.grad for p in head.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mean = distributed.all_reduce(flat) / distributed.world_size
    for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def make_grid(
    specs: Sequence[HeadSpec],
    widths: dict[str, int],
    num_classes: int,
    protocol: Protocol,
    seed: int,
    device: torch.device | str = "cpu",
) -> Grid:
    """Linear and BatchNorm + linear heads, as VISSL's `mlp` and `eval_mlp`.

    Heads of equal width start from the same weights. BatchNorm has eps 1e-5 and momentum 0.1, and
    no weight decay.
    """
    heads: dict[HeadSpec, nn.Module] = {}
    groups: list[dict[str, Any]] = []
    for spec in specs:
        width = widths[spec.representation]
        head = LinearHead(width, num_classes, batch_norm=spec.kind == "bn")
        bound, generator = 1 / math.sqrt(width), torch_generator(seed, Stream.EVAL_INIT)
        for parameter in head.linear.parameters():  # as torch.nn.Linear
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        heads[spec] = head.to(device)
        groups += spec.groups(head.linear.parameters(), head.norm.parameters())
    if protocol.optimizer == "lars":
        groups = [{"decay": group.pop("weight_decay"), **group} for group in groups]
        return Grid(heads, LARS(groups, lr=0.1, momentum=_MOMENTUM))
    return Grid(heads, torch.optim.SGD(groups, lr=0.1, momentum=_MOMENTUM, nesterov=True))


class LARS(torch.optim.SGD):
    """SGD with momentum whose updates of a matrix have 0.001 times the norm of the matrix.

    LARS (arXiv 1708.03888) by VISSL's rule (`vissl/optimizers/lars.py`): the norm is that of the
    gradient *with* weight decay, and the factor is 1 where a norm is 0. NVIDIA's and timm's
    versions divide by the sum of the norms of gradient and weight decay. Biases and BatchNorm
    take plain steps (`exclude_bias_and_norm`). Groups have their weight decay as `decay`.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad.add_(parameter, alpha=group["decay"])
                if parameter.ndim > 1:
                    length, change = parameter.norm(), update.norm()
                    usable = (length > 0) & (change > 0)
                    update.mul_(torch.where(usable, _TRUST * length / change, 1.0))
        super().step()


def train_and_choose(
    probe: Any,
    source: Source,
    loader: Any,
    grid: Grid,
    folder: Path,
    measure: Callable[[Any, Sequence[int]], Metrics],
) -> tuple[Choice, dict[str, Any]]:
    """Train all heads and choose one; `measure` has the metrics of some heads on batches.

    `probe` is a `Probe` or a `DenseProbe`, `loader` an `OnlineLoader` or a `DenseLoader`. Also
    returns the last losses, and the seconds of earlier sessions.
    """
    protocol, distributed = probe.protocol, probe.distributed
    mine = None if loader.gathered else distributed

    def train_epoch(batches: Iterator[tuple[Tensor, Tensor]], epoch: int) -> list[float]:
        # the last entry counts batches that are not finite, without a synchronization
        total = torch.zeros(len(grid.specs) + 1, device=source.device)
        for step, (rows, targets) in enumerate(islice(batches, loader.steps), epoch * loader.steps):
            scale = protocol.lr_scale(step, loader.steps, loader.batch_size)
            total[:-1] += grid.step(source.split(rows), targets, scale, mine, loader.batch_size)
            total[-1] += ~rows.isfinite().all()
        if mine is not None:
            total = distributed.all_reduce(total) / distributed.world_size
        *losses, bad = (total / loader.steps).tolist()
        if bad:
            exact = source.settings.get("precision") == "float32"
            advice = "check the model's weights" if exact else "use --precision float32"
            raise RunError(f"features of {source.about['name']} are NaN or infinite: {advice}")
        return losses

    args = (grid, grid.optimizer, train_epoch, protocol.epochs, folder)
    losses, seconds = train_epochs(probe, loader, *args)
    for tensor in grid.heads.state_dict().values():  # GPUs may round differently
        distributed.broadcast(tensor)
    every = range(len(grid.specs))
    choice = choose(loader, lambda b: measure(b, every), lambda b, head: measure(b, [head]))
    return choice, {"losses": losses, "seconds": seconds}
