"""Heads on frozen features: trained together, each as if it were alone, and resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import Distributed
from ..models.classifier import LinearHead
from ..progress import skip
from ..seeds import Stream, torch_generator
from .accuracy import Metrics, best_head, classification_loss, compute_metrics
from .features import Source, not_finite, refuse_undecoded
from .feeds import Feed
from .probe import Probe, of_all_processes
from .runs import EpochState
from .tasks import Protocol

_TRUST = 0.001  # VISSL's eta


@dataclass(frozen=True)
class HeadSpec:
    """One head of a grid.

    Attributes:
        representation: The features it reads, e.g. 'last' or 'last4'.
        kind: 'linear', 'bn' with a BatchNorm before the linear layer, or another module.
        lr: Learning rate per 256 images.
        weight_decay: Weight decay; not of BatchNorm.
    """

    representation: str
    kind: str
    lr: float
    weight_decay: float

    @property
    def name(self) -> str:
        """Such as 'last4 bn lr=0.01 wd=0.0005'."""
        return f"{self.representation} {self.kind} lr={self.lr:g} wd={self.weight_decay:g}"


class Grid:
    """Heads that are trained together, each as if it were alone.

    Args:
        heads: The heads by their specs.
        optimizer: Of all their parameters; groups have `base_lr`.
        autocast: Dtype of the computation; None for float32.

    Attributes:
        specs: The specs, in the order of all results.
        modules: The heads.
    """

    def __init__(
        self,
        heads: Mapping[HeadSpec, nn.Module],
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.specs = list(heads)
        self.modules = nn.ModuleList(heads.values())
        self.optimizer, self.autocast = optimizer, autocast

    @property
    def names(self) -> list[str]:
        """Names of the heads."""
        return [spec.name for spec in self.specs]

    def logits(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Logits `[B, C]` of each head, in float32."""
        return [self.logits_of(index, features) for index in range(len(self.specs))]

    def logits_of(self, index: int, features: dict[str, Tensor]) -> Tensor:
        """Logits `[B, C]` of one head, in float32."""
        rows = features[self.specs[index].representation]
        with torch.autocast(rows.device.type, self.autocast, enabled=self.autocast is not None):
            logits: Tensor = self.modules[index](rows)
        return logits.float()

    def step(
        self,
        features: dict[str, Tensor],
        labels: Tensor,
        lr_scale: float,
        distributed: Distributed | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """One step of every head; returns their losses before it, `[H]`.

        Args:
            features: `[B, ...]` by representation.
            labels: See `classification_loss`.
            lr_scale: Factor of the learning rates.
            distributed: The processes whose gradients are averaged, if each has its own images.
            batch_size: Images of all of them together, if their numbers of images may differ.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        losses = torch.stack([classification_loss(x, labels) for x in self.logits(features)])
        if distributed is not None and batch_size is not None:
            losses = losses * (len(labels) * distributed.world_size / batch_size)
        self.optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        if distributed is not None and distributed.world_size > 1:
            for head in self.modules:
                _average_gradients(head, distributed)
        self.optimizer.step()
        return losses.detach()


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
    heads, groups = {}, []
    for spec in specs:
        width = widths[spec.representation]
        head = LinearHead(width, num_classes, batch_norm=spec.kind == "bn")
        bound, generator = 1 / math.sqrt(width), torch_generator(seed, Stream.EVAL_INIT)
        for parameter in head.linear.parameters():  # as torch.nn.Linear
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        heads[spec] = head.to(device)
        rates = {"lr": spec.lr, "base_lr": spec.lr}
        decay = {"weight_decay": spec.weight_decay}
        groups.append({"params": [*head.linear.parameters()], **rates, **decay})
        if spec.kind == "bn":
            groups.append({"params": [*head.norm.parameters()], **rates, "weight_decay": 0.0})
    optimizer: torch.optim.Optimizer
    if protocol.optimizer == "lars":
        optimizer = LARS(groups, momentum=protocol.momentum)
    else:
        momentum, nesterov = protocol.momentum, protocol.nesterov
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=nesterov)
    return Grid(heads, optimizer)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps of matrices are as long as the matrices, times 0.001.

    LARS (arXiv 1708.03888) by VISSL's rule (`vissl/optimizers/lars.py`): the length is that of the
    gradient *with* weight decay, and the factor is 1 where a length is 0. NVIDIA's and timm's
    versions divide by the sum of the lengths of gradient and weight decay. Biases and BatchNorm
    take plain steps (`exclude_bias_and_norm`).
    """

    def __init__(
        self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if parameter.ndim > 1:
                    length, change = parameter.norm(), update.norm()
                    usable = (length > 0) & (change > 0)
                    update.mul_(torch.where(usable, _TRUST * length / change, 1.0))
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.sub_(momentum, alpha=group["lr"])


@dataclass(frozen=True)
class Trained:
    """What training left beside the heads.

    Attributes:
        losses: Mean training loss of each head in the last epoch.
        earlier: Seconds that earlier sessions took.
    """

    losses: list[float]
    earlier: float


def train(probe: Probe, source: Source, feed: Feed, grid: Grid, state: EpochState) -> Trained:
    """Train all heads; the state is written after every epoch.

    Raises:
        RunError: Features are not finite, or the state is damaged.
    """
    protocol, distributed = probe.protocol, probe.distributed
    losses, earlier, done = [0.0] * len(grid.specs), 0.0, 0
    started = time.perf_counter()
    if (found := state.load()) is not None:
        grid.modules.load_state_dict(found["heads"])
        grid.optimizer.load_state_dict(found["optimizer"])
        done, earlier, losses = found["epoch"], found["seconds"], found["losses"]
        feed.restore(found["broken"])
    skip(feed.bar, done * feed.steps * feed.batch_size)
    steps = feed.training(done, protocol.epochs)
    mine = None if feed.gathered else distributed
    grid.modules.train()
    for epoch in range(done, protocol.epochs):
        # the last number counts batches that are not finite; nothing waits for the device
        total = torch.zeros(len(grid.specs) + 1, device=source.device)
        for step, (rows, labels) in enumerate(islice(steps, feed.steps)):
            at = epoch + step / feed.steps if protocol.per_step else epoch
            scale = protocol.lr_scale(at, feed.batch_size)
            total[:-1] += grid.step(source.split(rows), labels, scale, mine, feed.batch_size)
            total[-1] += ~rows.isfinite().all()
        if mine is not None:
            total = distributed.all_reduce(total) / distributed.world_size
        *losses, bad = (total / feed.steps).tolist()
        if bad:
            raise not_finite(source)
        feed.bar.set_postfix(
            epoch=f"{epoch + 1}/{protocol.epochs}", loss=f"{min(losses):.3g}", refresh=False
        )
        broken = of_all_processes(feed.broken, distributed)
        if distributed.is_main:
            seconds = earlier + time.perf_counter() - started
            kept = {"epoch": epoch + 1, "losses": losses, "seconds": seconds, "broken": broken}
            heads, optimizer = grid.modules.state_dict(), grid.optimizer.state_dict()
            state.save({**kept, "heads": heads, "optimizer": optimizer})
    grid.modules.eval()
    return Trained(losses, earlier)


def choose_and_test(
    probe: Probe, source: Source, feed: Feed, grid: Grid
) -> tuple[int, Metrics | None, Metrics, int]:
    """Choose a head on validation images and test it alone; all are tested if there are none.

    Returns:
        Its index, metrics of the validation images (None without) and of the test images, and the
        number of images that heads were fitted to.
    """
    fitted, heads = feed.fitted(), len(grid.specs)
    tests = ("test", probe.test, np.arange(len(probe.test)))
    if not len(probe.choose):
        test = compute_metrics(probe, source, feed.testing(), grid.logits, heads)
        refuse_undecoded(*tests, test.total, feed.broken)
        return best_head(test), None, test, fitted
    val = compute_metrics(probe, source, feed.validation(), grid.logits, heads)
    refuse_undecoded("validation", probe.train, probe.choose, val.total, feed.broken)
    chosen = best_head(val)

    def logits(features: dict[str, Tensor]) -> list[Tensor]:
        return [grid.logits_of(chosen, features)]

    test = compute_metrics(probe, source, feed.testing(), logits, 1)
    refuse_undecoded(*tests, test.total, feed.broken)
    return chosen, val, test, fitted
