"""Training of dense heads on frozen patch features, which are encoded in every epoch or once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..data.dense import DenseDataset
from ..data.loading import load_in_order
from ..distributed import Distributed
from ..encode import Encoder
from ..errors import DataError, ImageError, RunError, option
from ..features import Layers
from ..progress import progress_bar
from ..seeds import Stream, numpy_generator, torch_generator
from .dense_tasks import DenseProtocol, DenseTask
from .probe import EvalConfig, of_all_processes
from .runs import EpochState

Indices = npt.NDArray[np.int64]
Flips = npt.NDArray[np.bool_]
Plan = Sequence[tuple[Indices, Flips]]  # of each batch

_VAL_SHARE = 0.1
_CLIP_GRAD = 35.0  # of mmsegmentation's depth recipes; segmentation never reaches it
_STD = 0.01  # of the initial weights, as in mmsegmentation's heads


@dataclass(frozen=True, kw_only=True)
class DenseConfig(EvalConfig):
    """The options of a dense probe."""

    epochs: int | None = None
    batch_size: int | None = None
    cached: bool = False


class DenseBatch(NamedTuple):
    """Encoded pairs that could be read."""

    maps: Tensor  # `last4` features [b, 4D, h, w], of 2b images where mirror images follow
    targets: list[Tensor]  # float32 [H, W] on the CPU
    indices: Indices  # [b], in the data set


@dataclass(frozen=True)
class _Batches:
    """Decoded batches of a plan, for loader processes.

    Images are resized as a whole, so no part of a target is left out.
    """

    data: DenseDataset
    plan: Plan
    task: DenseTask
    size: tuple[int, int]
    full: bool
    mirrored: bool

    def __getitem__(self, batch: int) -> tuple[Tensor, list[Tensor], list[str | None]]:
        indices, flips = self.plan[batch]
        channels = self.data.decoder.in_chans
        pixels = torch.zeros(len(indices), channels, *self.size, dtype=torch.uint8)
        targets: list[Tensor] = []
        reasons: list[str | None] = [None] * len(indices)
        for slot, (index, flip) in enumerate(zip(indices.tolist(), flips.tolist())):
            try:
                image, target = self._read(index)
            except ImageError as error:
                if not self.data.skip_broken:
                    raise DataError(
                        f"the pair of '{self.data.names[index]}' cannot be read ({error}): repair "
                        f"or remove it, or leave such pairs out with {option('skip_broken')}"
                    ) from error
                reasons[slot] = str(error)
                continue
            pixels[slot] = image.flip(-1) if flip else image
            targets.append(target.flip(-1) if flip else target)
        if self.mirrored:
            pixels = torch.cat([pixels, pixels.flip(-1)])
        return pixels, targets, reasons

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image, array, _ = self.data[index]
        target = torch.from_numpy(array.astype(np.float32))
        self.task.check(target)
        if not self.full:  # nearest, since unknown depths and classes must not be mixed
            target = F.interpolate(target[None, None], self.size, mode="nearest")[0, 0]
        resized: Any = tv.resize(image, list(self.size), interpolation=InterpolationMode.BICUBIC)
        return (resized if isinstance(resized, Tensor) else tv.pil_to_tensor(resized)), target


@dataclass
class DenseLoader:
    """Encodes the pairs of a data set, and notes why some could not be read, by their names."""

    data: DenseDataset
    encoder: Encoder
    task: DenseTask
    workers: int | None = None
    broken: dict[str, str] = field(default_factory=dict)

    def in_order(
        self, indices: Indices, batch_size: int, *, full: bool, mirrored: bool
    ) -> Iterator[DenseBatch]:
        """Encode images one after the other; see `encode`."""
        parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        plan = [(part, np.zeros(len(part), np.bool_)) for part in parts]
        return self.encode(plan, full=full, mirrored=mirrored)

    def encode(self, plan: Plan, *, full: bool, mirrored: bool) -> Iterator[DenseBatch]:
        """Encode batches."""
        items = _Batches(self.data, plan, self.task, self.encoder.size, full, mirrored)
        on_gpu = self.encoder.device.type == "cuda"
        loader = load_in_order(items, range(len(plan)), self.workers, pin_memory=on_gpu)
        waiting: deque[tuple[list[Tensor], Indices]] = deque()

        def batches() -> Iterator[tuple[Tensor, list[str | None]]]:
            for (indices, _), (pixels, targets, reasons) in zip(plan, loader):
                for index, reason in zip(indices.tolist(), reasons):
                    if reason is not None:
                        self.broken[self.data.names[index]] = reason
                good = [slot for slot, reason in enumerate(reasons) if reason is None]
                waiting.append((targets, indices[good]))
                yield pixels, reasons * (2 if mirrored else 1)

        for number, (maps, _) in enumerate(self.encoder.encode(batches())):
            targets, indices = waiting.popleft()
            if not number and not maps.isfinite().all():  # once: a GPU would wait for each answer
                raise RunError(
                    f"features of '{self.data.names[int(indices[0])]}' or its neighbors are not "
                    "finite: the model's weights are damaged, or need another precision (float32)"
                )
            yield DenseBatch(maps, targets, indices)


class GridHead(nn.Module):
    """One head of a grid; heads that differ in the learning rate begin with equal weights."""

    def __init__(
        self, task: DenseTask, width: int, seed: int, layers: Layers, batch_norm: bool, lr: float
    ) -> None:
        super().__init__()
        self.layers, self.lr = layers, lr
        self.name = f"{layers}{' bn' if batch_norm else ''} lr={lr:g}"
        self.width = width if layers == "last4" else width // 4
        self.head = task.head(self.width, batch_norm)
        generator = torch_generator(seed, Stream.EVAL_INIT, self.width, int(batch_norm))
        weight, bias = self.head.conv.parameters()
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * _STD)
            bias.zero_()

    def forward(self, maps: Tensor) -> Tensor:
        """Output for `last4` maps `[b, 4D, h, w]`, whose last channels are those of `last`."""
        output: Tensor = self.head(maps[:, -self.width :])
        return output


@dataclass
class DenseTraining:
    """Trains the heads of a grid, resumable after each epoch."""

    config: DenseConfig
    protocol: DenseProtocol
    loader: DenseLoader
    distributed: Distributed
    epoch: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        seed, images, width = (
            self.config.seed,
            len(self.loader.data),
            self.loader.encoder.row_shape[0],
        )
        order = numpy_generator(seed, Stream.EVAL_SPLIT, 1).permutation(images)
        held_out = 0 if self.config.select_on_test else max(1, round(_VAL_SHARE * images))
        self.val_rows, self.train_rows = np.sort(order[:held_out]), np.sort(order[held_out:])
        self.task = self.loader.task
        layers: tuple[Layers, ...] = ("last", "last4")
        grid = product(layers, self.protocol.batch_norm, self.protocol.lrs)
        heads = [GridHead(self.task, width, seed, *settings) for settings in grid]
        self.heads: Any = nn.ModuleList(heads).to(self.distributed.device)
        groups = [{"params": [*head.parameters()], "lr": head.lr} for head in heads]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.protocol.weight_decay)
        self.sums = torch.zeros((), dtype=torch.float64)
        self.steps = max(1, len(self.train_rows) // self.protocol.batch_size)

    def bar(self, total: int, what: str, unit: str = "image", done: int = 0) -> Any:
        """A progress bar, in rank 0."""
        shown = self.config.progress and self.distributed.is_main
        return progress_bar(shown, total, what, unit, done)

    def train(self, state: EpochState) -> None:
        """Train from the last finished epoch on."""
        self._resume(state)
        epochs = self.protocol.epochs
        started = time.monotonic() - self.seconds
        store = self._encode_once() if self.config.cached and self.epoch < epochs else None
        total, done = self.steps * epochs, self.steps * self.epoch
        with self.bar(total, f"{self.task.method} heads", "step", done) as bar:
            while self.epoch < epochs:
                self._train_epoch(store, bar)
                self.epoch += 1
                self.seconds = time.monotonic() - started
                self._save(state)
        for tensor in self.heads.state_dict().values():  # GPUs may round differently
            self.distributed.broadcast(tensor)

    def _train_epoch(self, store: _Store | None, bar: Any) -> None:
        self.heads.train()
        losses = torch.zeros(len(self.heads), device=self.distributed.device)
        for step, (maps, targets) in enumerate(self._batches(store)):
            done = self.epoch * self.steps + step
            scale = self.protocol.lr_scale(done, self.steps * self.protocol.epochs)
            for group, head in zip(self.optimizer.param_groups, self.heads):
                group["lr"] = head.lr * scale
            self.sums = self.sums + self.task.count(targets)
            if int(self.task.valid(targets).sum()) >= 2:  # on the CPU
                losses += self._update(maps, targets.to(maps.device, non_blocking=True))
            bar.update()
        self.losses = (losses / self.steps).tolist()

    def _batches(self, store: _Store | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps and targets of whole batches, the same ones in all processes.

        Each process reads its share of a batch: every n-th image, or those that it has stored. An
        incomplete last batch is left out.
        """
        seed, size, world = self.config.seed, self.protocol.batch_size, self.distributed.world_size
        gather = self.distributed.all_gather_rows
        order = numpy_generator(seed, Stream.EVAL_ORDER, self.epoch).permutation(
            len(self.train_rows)
        )
        flips = numpy_generator(seed, Stream.EVAL_AUGMENT, self.epoch).random(len(order)) < 0.5
        owner = (np.arange(len(order)) if store is None else order) % world
        plan = []
        for start in range(0, self.steps * size, size):
            mine = start + np.flatnonzero(owner[start : start + size] == self.distributed.rank)
            plan.append((self.train_rows[order[mine]], flips[mine]))
        for maps, targets in self._encoded(plan) if store is None else map(store.read, plan):
            yield gather(maps), gather(targets)

    def _encoded(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader.encode(plan, full=False, mirrored=False):
            size = self.loader.encoder.size
            targets = torch.stack(batch.targets) if batch.targets else torch.empty(0, *size)
            yield batch.maps.clone(), targets  # autograd refuses tensors of inference mode

    def _encode_once(self) -> _Store:
        """Features of both sides of this process's share of the images."""
        mine = self.train_rows[self.distributed.rank :: self.distributed.world_size]
        encoder, size = self.loader.encoder, self.protocol.batch_size
        maps = torch.empty(2, len(mine), *encoder.row_shape)
        targets = torch.empty(len(mine), *encoder.size)
        rows: dict[int, int] = {}
        with self.bar(len(mine), "encoding") as bar:
            for batch in self.loader.in_order(mine, size, full=False, mirrored=True):
                first, count = len(rows), len(batch.indices)
                if count:
                    maps[:, first : first + count] = torch.stack(batch.maps.cpu().chunk(2))
                    targets[first : first + count] = torch.stack(batch.targets)
                rows |= zip(batch.indices.tolist(), range(first, first + count))
                bar.update(count)
        return _Store(maps, targets, rows, encoder.device)

    def _update(self, maps: Tensor, targets: Tensor) -> Tensor:
        """One step of all heads; returns their losses."""
        self.optimizer.zero_grad()
        losses = []
        for head in self.heads:  # one graph at a time: less memory
            loss = self.task.loss(head(maps), targets)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(head.parameters(), _CLIP_GRAD)
            losses.append(loss.detach())
        self.optimizer.step()
        return torch.stack(losses)

    def _save(self, state: EpochState) -> None:
        broken = of_all_processes(self.loader.broken, self.distributed)
        if self.distributed.is_main:
            content = {"epoch": self.epoch, "seconds": self.seconds, "losses": self.losses}
            content |= {"sums": self.sums, "broken": broken, "heads": self.heads.state_dict()}
            state.save({**content, "optimizer": self.optimizer.state_dict()})

    def _resume(self, state: EpochState) -> None:
        found = state.load()
        if found is not None:
            self.heads.load_state_dict(found["heads"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.losses, self.sums = found["losses"], found["sums"]
            self.epoch, self.seconds = found["epoch"], found["seconds"]
            self.loader.broken.update(found["broken"])


class _Store(NamedTuple):
    """Features and targets of the images that a process has encoded."""

    maps: Tensor  # [2, n, 4D, h, w]: images, mirror images
    targets: Tensor  # [n, H, W]
    rows: dict[int, int]  # by index in the data set
    device: torch.device

    def read(self, batch: tuple[Indices, Flips]) -> tuple[Tensor, Tensor]:
        """Maps on the device and targets of those that could be read."""
        good = [(self.rows[i], int(flip)) for i, flip in zip(*batch) if i in self.rows]
        rows, sides = [row for row, _ in good], [side for _, side in good]
        flipped = torch.tensor(sides, dtype=torch.bool)[:, None, None]
        targets = torch.where(flipped, self.targets[rows].flip(-1), self.targets[rows])
        return self.maps[sides, rows].to(self.device), targets
