"""Training dense heads on frozen patch features: protocols, heads, epochs, resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.dense import DenseData, DenseDataset
from ..distributed import Distributed
from ..progress import progress_bar
from ..seeds import Stream, numpy_generator, torch_generator
from .dense_features import DenseFeed
from .dense_tasks import DenseTask
from .probe import EvalConfig, of_all_processes
from .runs import EpochState

_CHOOSE_SHARE = 0.1
_STD = 0.01  # of the initial weights, as in mmsegmentation's heads


@dataclass(frozen=True)
class DenseProtocol:
    """How heads are trained, and by default DINOv2's linear segmentation on ADE20K.

    Attributes:
        epochs: Passes over the training images; 40,000 steps of ADE20K's 20,210.
        batch_size: Images of a step, over all processes.
        lrs: Learning rates of the grid.
        batch_norm: Whether BatchNorm comes before the linear layer.
        weight_decay: Of AdamW.
    """

    epochs: int = 32
    batch_size: int = 16
    lrs: tuple[float, ...] = (1e-3, 1e-2)
    batch_norm: tuple[bool, ...] = (False, True)
    weight_decay: float = 1e-4

    def lr_scale(self, step: int, steps: int) -> float:
        """Share of the learning rate: linear warm-up over 3.75 % of the steps, then linear to 0."""
        warm_up = max(1, round(steps * 1_500 / 40_000))
        return (step + 1) / warm_up if step < warm_up else (steps - step) / steps


@dataclass(frozen=True)
class DepthProtocol(DenseProtocol):
    """DINOv2's depth: 38,400 steps of 16, which is 25 epochs of its 24,231 images of NYU.

    Attributes:
        bins: Depth bins.
        upsample: Factor of the bilinear upsampling of their scores.
    """

    epochs: int = 25
    lrs: tuple[float, ...] = (1e-4, 1e-3)
    weight_decay: float = 0.01
    bins: int = 256
    upsample: int = 4

    def lr_scale(self, step: int, steps: int) -> float:
        """Share of the learning rate: linear over the first third, then a cosine to 0."""
        warm_up = max(1, round(steps / 3))  # in DINOv2's configuration: 12,800 of 38,400
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@dataclass(frozen=True, kw_only=True)
class DenseConfig(EvalConfig):
    """The options of a dense probe.

    Args:
        epochs: Default: those of the protocol.
        batch_size: Images of a step; default: that of the protocol.
        cached: Encode each training image and its mirror image once and keep the features in
            memory, `2 n 4 D h w` numbers of 4 bytes. The training is the same to rounding.
        pictures: Rows of `predictions.png`; 0 for none.
    """

    epochs: int | None = None
    batch_size: int | None = None
    cached: bool = False
    pictures: int = 8


@dataclass(frozen=True)
class DenseProbe:
    """The data and how heads are trained on them, for any number of models."""

    config: DenseConfig
    pairs: DenseData
    task: DenseTask
    protocol: Any
    usual: Any
    distributed: Distributed

    def feed(self, data: DenseDataset, model: nn.Module) -> DenseFeed:
        """Features of a data set."""
        device, precision = self.distributed.device, self.config.precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        workers = 0 if str(self.config.data).startswith("scenes:") else self.config.workers
        return DenseFeed(data, model, self.task, str(device), precision, workers)

    def bar(self, total: int, what: str, unit: str = "image", done: int = 0) -> Any:
        """A progress bar, in rank 0."""
        shown = self.config.progress and self.distributed.is_main
        return progress_bar(shown, total, what, unit, done)


@dataclass(frozen=True)
class HeadSpec:
    """One head: what it reads, whether BatchNorm comes first, and its learning rate."""

    representation: str
    batch_norm: bool
    lr: float

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.representation}{' bn' if self.batch_norm else ''} lr={self.lr:g}"


def make_heads(
    specs: Sequence[HeadSpec], widths: dict[str, int], task: DenseTask, seed: int
) -> nn.ModuleList:
    """The heads of a grid; those that differ in the learning rate have the same initial weights."""
    heads = nn.ModuleList()
    for spec in specs:
        width = widths[spec.representation]
        head = task.head(width, spec.batch_norm)
        generator = torch_generator(seed, Stream.EVAL_INIT, width, int(spec.batch_norm))
        with torch.no_grad():
            shape = head.conv.weight.shape
            head.conv.weight.copy_(torch.randn(shape, generator=generator) * _STD)
            head.conv.bias.zero_()  # type: ignore[union-attr]
        heads.append(head)
    return heads


def make_optimizer(
    specs: Sequence[HeadSpec], heads: nn.ModuleList, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with the learning rate of each head, in the order of the heads."""
    groups = [
        {"params": list(head.parameters()), "lr": spec.lr, "name": spec.name}
        for spec, head in zip(specs, heads)
    ]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


@dataclass
class DenseTraining:
    """Trains the heads of a grid, resumable after each epoch.

    Attributes:
        probe: Data and protocol.
        model: The frozen encoder.
        epoch: Epochs done.
        seconds: Time that they took, over all sessions.
        losses: Mean loss of each head in the last epoch.
        sums: See `Depth.new_sums`; the same in all processes.
        fit: Training pairs that heads are fitted to.
        choose: Those that choose a head; none where the test set does.
    """

    probe: DenseProbe
    model: nn.Module
    epoch: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        probe, protocol = self.probe, self.probe.protocol
        self.feed = probe.feed(probe.pairs.train, self.model)
        images = len(probe.pairs.train)
        order = numpy_generator(probe.config.seed, Stream.EVAL_SPLIT, 1).permutation(images)
        held_out = 0 if probe.config.select_on_test else max(1, round(_CHOOSE_SHARE * images))
        self.choose, self.fit = np.sort(order[:held_out]), np.sort(order[held_out:])
        grid = product(("last", "last4"), protocol.batch_norm, protocol.lrs)
        self.specs = [HeadSpec(*settings) for settings in grid]
        self.heads: Any = make_heads(self.specs, self.feed.widths, probe.task, probe.config.seed)
        self.heads.to(probe.distributed.device)
        self.optimizer = make_optimizer(self.specs, self.heads, protocol.weight_decay)
        self.sums = probe.task.new_sums(self.feed.encoder.size)
        self.steps = max(1, len(self.fit) // protocol.batch_size)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the metrics, as plain values."""
        encoder = {k: v for k, v in self.feed.encoder.settings.items() if k != "versions"}
        return {
            "protocol": asdict(self.probe.protocol),
            **self.probe.task.settings,
            "seed": self.probe.config.seed,
            **encoder,
            "train": self.probe.pairs.train.fingerprint,
            "test": self.probe.pairs.test.fingerprint,
            "select_on_test": self.probe.config.select_on_test,
        }

    def train(self, state: EpochState) -> None:
        """Train from the last finished epoch on.

        Raises:
            RunError: The state is damaged, or of other settings.
        """
        self._resume(state)
        probe, epochs = self.probe, self.probe.protocol.epochs
        started = time.monotonic() - self.seconds
        if probe.config.cached and self.epoch < epochs:
            # every process draws from all images, so each encodes all
            with probe.bar(len(self.fit), "encoding") as bar:
                for count in self.feed.store(self.fit, probe.protocol.batch_size):
                    bar.update(count)
        total, done = self.steps * epochs, self.steps * self.epoch
        with probe.bar(total, f"{probe.task.method} heads", "step", done) as bar:
            while self.epoch < epochs:
                self._train_epoch(bar)
                self.epoch += 1
                self.seconds = time.monotonic() - started
                self._save(state)
        for tensor in self.heads.state_dict().values():  # GPUs may round differently
            probe.distributed.broadcast(tensor)

    def _train_epoch(self, bar: Any) -> None:
        self.heads.train()
        losses = torch.zeros(len(self.specs), device=self.probe.distributed.device)
        for step, (maps, targets) in enumerate(self._batches()):
            scale = self.probe.protocol.lr_scale(
                self.epoch * self.steps + step, self.steps * self.probe.protocol.epochs
            )
            for group, spec in zip(self.optimizer.param_groups, self.specs):
                group["lr"] = spec.lr * scale
            self.probe.task.add(self.sums, targets)
            if int(self.probe.task.valid(targets).sum()) >= 2:  # on the CPU
                losses += self._update(maps, targets)
            bar.update()
        self.losses = (losses / self.steps).tolist()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features `last4` and targets of whole batches; an incomplete last one is left out."""
        seed, size = self.probe.config.seed, self.probe.protocol.batch_size
        distributed = self.probe.distributed
        generator = numpy_generator(seed, Stream.EVAL_ORDER, self.epoch)
        order = self.fit[generator.permutation(len(self.fit))]
        flips = numpy_generator(seed, Stream.EVAL_AUGMENT, self.epoch).random(len(order)) < 0.5
        rank, world = (
            (0, 1) if self.probe.config.cached else (distributed.rank, distributed.world_size)
        )
        parts = [slice(s * size + rank, (s + 1) * size, world) for s in range(self.steps)]
        for maps, targets in self.feed.for_training([(order[p], flips[p]) for p in parts]):
            if world == 1:
                yield maps, targets
            else:
                yield _exchange(distributed, size // world, maps, targets)

    def _update(self, maps: Tensor, targets: Tensor) -> Tensor:
        """One step of all heads; returns their losses."""
        self.optimizer.zero_grad()
        losses = []
        for spec, head in zip(self.specs, self.heads):  # one graph at a time: less memory
            features = self.feed.split(maps)[spec.representation]
            loss = self.probe.task.loss(head(features), targets)
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        self.optimizer.step()
        return torch.stack(losses)

    def _save(self, state: EpochState) -> None:
        broken = of_all_processes(self.feed.broken, self.probe.distributed)
        if self.probe.distributed.is_main:
            content = {"epoch": self.epoch, "seconds": self.seconds, "losses": self.losses}
            content |= {"sums": self.sums, "broken": broken, "heads": self.heads.state_dict()}
            state.save({**content, "optimizer": self.optimizer.state_dict()})

    def _resume(self, state: EpochState) -> None:
        found = state.load()
        if found is None:
            return
        self.losses = found["losses"]
        self.heads.load_state_dict(found["heads"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.sums.copy_(found["sums"])
        self.epoch, self.seconds = found["epoch"], found["seconds"]
        self.feed.broken.update(found["broken"])


def _exchange(
    distributed: Distributed, share: int, maps: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The batches of all processes together; each has up to `share` images."""
    missing = share - len(maps)
    there = distributed.all_gather(torch.arange(share) < len(maps))
    padded = (torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for t in (maps, targets))
    maps, targets = (distributed.all_gather(t) for t in padded)
    places = there.nonzero()[:, 0]
    return maps[places.to(maps.device)], targets[places]
