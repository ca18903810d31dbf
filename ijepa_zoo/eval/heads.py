"""Heads on frozen features: trained together, each as if it were alone, and resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import Distributed
from ..models.classifier import LinearHead
from ..progress import skip
from ..seeds import Stream, torch_generator
from .accuracy import Metrics, best_head, classification_loss, compute_metrics
from .features import BlockFeatures, Source, not_finite, refuse_undecoded
from .loaders import CachedLoader, FeatureLoader, OnlineLoader
from .probe import (
    EvalConfig,
    Probe,
    describe_protocol,
    evaluate,
    make_result,
    of_all_processes,
    paper_figure,
    pooling,
    run_once,
    save_probe_head,
    with_protocol,
)
from .results import Result
from .runs import EpochState
from .tasks import Protocol

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
        """Such as 'last4 bn lr=0.01 wd=0.0005'."""
        return f"{self.representation} {self.kind} lr={self.lr:g} wd={self.weight_decay:g}"


class Grid:
    """Heads that are trained together, each as if it were alone."""

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
        """One step of every head; returns their losses before it, `[H]`."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        weight = 1.0
        if distributed is not None and batch_size is not None:
            weight = len(labels) * distributed.world_size / batch_size
        self.optimizer.zero_grad()
        losses = []
        for index in range(len(self.specs)):  # one graph at a time: less memory
            loss = weight * classification_loss(self.logits_of(index, features), labels)
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        if distributed is not None and distributed.world_size > 1:
            for head in self.modules:
                _average_gradients(head, distributed)
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


def evaluate_heads(
    config: EvalConfig,
    method: str,
    usual: Protocol | None,
    make: Callable[[Probe, Source], Grid],
    epochs: int | None,
    batch_size: int | None,
    lrs: Sequence[float] | None,
    wds: Sequence[float] | None,
    *,
    cached: bool,
    patches: bool = False,
) -> Result:
    """Train a grid of heads on features, choose one, test it and save it.

    `usual` is the protocol with the task's transform; None for the task's own.
    """
    loader_class = CachedLoader if cached else OnlineLoader

    def prepare(probe: Probe) -> Probe:
        own = probe.task.protocol
        protocol = own if usual is None else replace(usual, view=own.view)
        return with_protocol(probe, protocol, epochs, batch_size, lrs, wds)

    def run(probe: Probe, source: Source) -> tuple[Result, Path]:
        protocol = describe_protocol(probe, loader_class.name, source.size)

        def work(folder: Path, settings: dict[str, Any]) -> tuple[Result, float | None]:
            started = time.perf_counter()
            images = (
                probe.protocol.epochs * len(probe.train_rows)
                + len(probe.val_rows)
                + len(probe.test)
            )
            with probe.bar(images, f"{probe.task.name}, {source.about['name']}") as bar:
                loader = loader_class(probe, source, bar, gather=not patches)
                grid = make(probe, source)
                state = EpochState(folder / "state.pt", probe.distributed)
                losses, earlier = train(probe, source, loader, grid, state)
                chosen, val, test = choose_and_test(probe, source, loader, grid)
            spec, head = grid.specs[chosen], grid.modules[chosen]
            if isinstance(source, BlockFeatures):
                layers = "last" if patches else spec.representation
                save_probe_head(probe, source, head, layers, folder, chosen=spec.name)
            used = {**pooling(source), **protocol, "batch_size": loader.batch_size}
            paper, notes = paper_figure(probe, source, usual or probe.task.protocol, cached)
            result = make_result(
                *(probe, source.about, method, used, grid.names, chosen, val, test, loader.broken),
                losses=losses,
                paper=paper,
                notes=[*loader.notes, *notes],
            )
            rate = loader.rate(time.perf_counter() - started)
            return replace(result, seconds=earlier), rate

        return run_once(probe, source, f"{method}-{loader_class.name}", protocol, work)

    return evaluate(config, run, patches=patches, prepare=prepare)


def train(
    probe: Probe, source: Source, loader: FeatureLoader, grid: Grid, state: EpochState
) -> tuple[list[float], float]:
    """Train all heads; returns the last losses, and the seconds of earlier sessions."""
    protocol, distributed = probe.protocol, probe.distributed
    losses, earlier, done = [0.0] * len(grid.specs), 0.0, 0
    started = time.perf_counter()
    if (found := state.load()) is not None:
        grid.modules.load_state_dict(found["heads"])
        grid.optimizer.load_state_dict(found["optimizer"])
        done, earlier, losses = found["epoch"], found["seconds"], found["losses"]
        loader.broken.update(found["broken"])
    skip(loader.bar, done * loader.steps * loader.batch_size)
    steps = loader.training(done, protocol.epochs)
    mine = None if loader.gathered else distributed
    grid.modules.train()
    for epoch in range(done, protocol.epochs):
        # the last number counts batches that are not finite; nothing waits for the device
        total = torch.zeros(len(grid.specs) + 1, device=source.device)
        for step, (rows, labels) in enumerate(islice(steps, loader.steps)):
            at = epoch + step / loader.steps if protocol.per_step else epoch
            scale = protocol.lr_scale(at, loader.batch_size)
            total[:-1] += grid.step(source.split(rows), labels, scale, mine, loader.batch_size)
            total[-1] += ~rows.isfinite().all()
        if mine is not None:
            total = distributed.all_reduce(total) / distributed.world_size
        *losses, bad = (total / loader.steps).tolist()
        if bad:
            raise not_finite(source)
        loader.bar.set_postfix(
            epoch=f"{epoch + 1}/{protocol.epochs}", loss=f"{min(losses):.3g}", refresh=False
        )
        broken = of_all_processes(loader.broken, distributed)
        if distributed.is_main:
            seconds = earlier + time.perf_counter() - started
            kept = {"epoch": epoch + 1, "losses": losses, "seconds": seconds, "broken": broken}
            heads, optimizer = grid.modules.state_dict(), grid.optimizer.state_dict()
            state.save({**kept, "heads": heads, "optimizer": optimizer})
    grid.modules.eval()
    return losses, earlier


def choose_and_test(
    probe: Probe, source: Source, loader: FeatureLoader, grid: Grid
) -> tuple[int, Metrics | None, Metrics]:
    """Choose a head on validation images and test it alone; all are tested if there are none."""
    heads = len(grid.specs)
    tests = ("test", probe.test, np.arange(len(probe.test)))
    if not len(probe.val_rows):
        test = compute_metrics(probe, source, loader.testing(), grid.logits, heads)
        refuse_undecoded(*tests, test.total, loader.broken)
        return best_head(test), None, test
    val = compute_metrics(probe, source, loader.validation(), grid.logits, heads)
    refuse_undecoded("validation", probe.train, probe.val_rows, val.total, loader.broken)
    chosen = best_head(val)

    def logits(features: dict[str, Tensor]) -> list[Tensor]:
        return [grid.logits_of(chosen, features)]

    test = compute_metrics(probe, source, loader.testing(), logits, 1)
    refuse_undecoded(*tests, test.total, loader.broken)
    return chosen, val, test
