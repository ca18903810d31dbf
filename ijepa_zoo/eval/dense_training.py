"""Pairs and heads of the dense probes: features are encoded in every epoch or once."""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..data.datasets import Targets
from ..data.decode import Pixels
from ..data.dense import DenseData, DenseDataset
from ..encode import Batch
from ..errors import DataError, ImageError, RunError, option
from ..seeds import Stream, numpy_generator, torch_generator
from .dense_tasks import DenseTask
from .features import Source
from .heads import Grid, HeadSpec
from .probe import Evaluation, HeadsConfig
from .results import data_name
from .tasks import Protocol

Flips = npt.NDArray[np.bool_]
Plan = Sequence[tuple[Targets, Flips]]  # of each batch

_CLIP_GRAD = 35.0  # of mmsegmentation's depth recipes; segmentation never reaches it
_STD = 0.01  # of the initial weights, as in mmsegmentation's heads


@dataclass(frozen=True)
class DenseProbe(Evaluation):
    """Pairs of images and targets, and how heads are trained on them."""

    config: HeadsConfig
    pairs: DenseData
    task: DenseTask
    protocol: Protocol
    target_options: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the data."""
        return self.pairs.name

    def settings(self) -> dict[str, Any]:
        """See `Probe`."""
        config = self.config
        return {
            "protocol": asdict(self.protocol),
            **self.task.settings,
            "seed": config.seed,
            "train": self.pairs.train.fingerprint,
            "test": self.pairs.test.fingerprint,
            "select_on_test": config.select_on_test,
            "value_range": config.value_range,
            "bands": config.bands,
            **self.target_options,
        }

    def records(self) -> dict[str, Any]:
        """See `Probe`."""
        about = {"name": data_name(self.config.data), "split": self.pairs.split}
        return {
            name: {**about, "images": len(part), "fingerprint": part.fingerprint}
            for name, part in (("train", self.pairs.train), ("test", self.pairs.test))
        }

    def reader(self, part: str) -> Callable[[int], Any]:
        """See `Evaluation`."""
        return partial(read_pair, self._part(part), self.task)

    def image_name(self, part: str, row: int) -> str:
        """See `Evaluation`."""
        return self._part(part).names[row]

    def _part(self, name: str) -> DenseDataset:
        return self.pairs.train if name == "train" else self.pairs.test


def read_pair(data: DenseDataset, task: DenseTask, row: int) -> tuple[Pixels, Tensor]:
    """An image and its target, float32 `[H, W]`; raises `ImageError`."""
    image, array, _ = data[row]
    target = torch.from_numpy(array.astype(np.float32))
    task.check(target)
    return image, target


class DenseBatch(NamedTuple):
    """Encoded pairs."""

    maps: Tensor  # `last4` features [b, 4D, h, w], of 2b images where mirror images follow
    targets: list[Tensor]  # float32 [H, W] on the CPU


@dataclass(frozen=True)
class _Batches:
    """Decoded batches of a plan, for loader processes; `full` targets keep their size."""

    data: DenseDataset
    plan: Plan
    task: DenseTask
    size: tuple[int, int]
    full: bool
    mirrored: bool

    def __getitem__(self, batch: int) -> tuple[Tensor, list[Tensor]]:
        rows, flips = self.plan[batch]
        pixels = torch.zeros(len(rows), self.data.decoder.in_chans, *self.size, dtype=torch.uint8)
        targets: list[Tensor] = []
        for slot, (row, flip) in enumerate(zip(rows.tolist(), flips.tolist())):
            image, target = self._read(row)
            pixels[slot] = image.flip(-1) if flip else image
            targets.append(target.flip(-1) if flip else target)
        return torch.cat([pixels, pixels.flip(-1)]) if self.mirrored else pixels, targets

    def _read(self, row: int) -> tuple[Tensor, Tensor]:
        try:
            image, target = read_pair(self.data, self.task, row)
        except ImageError as error:
            raise DataError(
                f"the pair of '{self.data.names[row]}' cannot be read ({error}): repair or remove "
                f"it, or leave such pairs out with {option('skip_broken')}"
            ) from error
        if not self.full:  # nearest, since unknown depths and classes must not be mixed
            target = F.interpolate(target[None, None], self.size, mode="nearest")[0, 0]
        # resize the whole image, so that all of the target is used
        resized: Any = tv.resize(image, list(self.size), interpolation=InterpolationMode.BICUBIC)
        return (resized if isinstance(resized, Tensor) else tv.pil_to_tensor(resized)), target


class DenseLoader:
    """Encodes pairs."""

    gathered = True

    def __init__(self, probe: DenseProbe, source: Source, bar: Any) -> None:
        self.probe, self.source, self.bar = probe, source, bar
        self.batch_size = probe.protocol.batch_size
        self.steps = max(1, len(probe.train_rows) // self.batch_size)

    def training(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps and targets of the whole batches of epochs, the same ones in all processes.

        Each process reads its share of a batch: every n-th image, or those that it has stored. An
        incomplete last batch is left out.
        """
        probe, size, distributed = self.probe, self.batch_size, self.probe.distributed
        store = self._encode_once() if probe.config.cached and first < last else None
        for epoch in range(first, last):
            rng = numpy_generator(probe.config.seed, Stream.EVAL_ORDER, epoch)
            order = rng.permutation(len(probe.train_rows))
            rng = numpy_generator(probe.config.seed, Stream.EVAL_AUGMENT, epoch)
            flips = rng.random(len(order)) < 0.5
            owner = (np.arange(len(order)) if store is None else order) % distributed.world_size
            plan = []
            for start in range(0, self.steps * size, size):
                mine = start + np.flatnonzero(owner[start : start + size] == distributed.rank)
                plan.append((order[mine], flips[mine]))
            for maps, targets in self._encoded(plan) if store is None else map(store.read, plan):
                yield distributed.all_gather_rows(maps), distributed.all_gather_rows(targets)
                self.bar.update(size)

    def validation(self) -> Iterator[DenseBatch]:
        """The pairs that choose the head, the share of this process; targets keep their size."""
        probe = self.probe
        return self._in_order(probe.pairs.train, probe.val_rows, True, probe.task.mirrored)

    def testing(self) -> Iterator[DenseBatch]:
        """The test pairs, the share of this process; targets keep their size."""
        probe = self.probe
        return self._in_order(probe.pairs.test, probe.test_rows, True, probe.task.mirrored)

    def _in_order(
        self, data: DenseDataset, rows: Targets, full: bool, mirrored: bool
    ) -> Iterator[DenseBatch]:
        mine = rows[self.probe.distributed.rank :: self.probe.distributed.world_size]
        starts = range(0, len(mine), self.batch_size)
        parts = [mine[start : start + self.batch_size] for start in starts]
        plan = [(part, np.zeros(len(part), np.bool_)) for part in parts]
        return self._encode(data, plan, full, mirrored)

    def _encode(
        self, data: DenseDataset, plan: Plan, full: bool, mirrored: bool
    ) -> Iterator[DenseBatch]:
        items = _Batches(data, plan, self.probe.task, self.source.size, full, mirrored)
        waiting: deque[list[Tensor]] = deque()

        def batches() -> Iterator[Batch]:
            for pixels, targets in self.probe.loaded(items, range(len(plan))):
                waiting.append(targets)
                yield pixels, [None] * len(pixels)

        for maps, _ in self.source.encode(batches()):
            yield DenseBatch(maps, waiting.popleft())

    def _encoded(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        train = self.probe.train_rows
        chosen = [(train[positions], flips) for positions, flips in plan]
        for batch in self._encode(self.probe.pairs.train, chosen, full=False, mirrored=False):
            empty = torch.empty(0, *self.source.size)
            targets = torch.stack(batch.targets) if batch.targets else empty
            yield batch.maps.clone(), targets  # autograd refuses tensors of inference mode

    def _encode_once(self) -> _Store:
        """Features of both sides of this process's share of the images."""
        probe, source = self.probe, self.source
        world = probe.distributed.world_size
        count = len(probe.train_rows[probe.distributed.rank :: world])
        cache = Path(probe.config.out) / "cache"
        maps = tensor_on_disk(cache, (2, count, *source.row_shape))
        targets = tensor_on_disk(cache, (count, *source.size))
        done = 0
        with probe.bar(count, "encoding") as bar:
            for batch in self._in_order(probe.pairs.train, probe.train_rows, False, True):
                rows = slice(done, done + len(batch.targets))
                maps[:, rows] = batch.maps.cpu().view(2, -1, *source.row_shape)
                targets[rows] = torch.stack(batch.targets)
                done = rows.stop
                bar.update(len(batch.targets))
        return _Store(maps, targets, world, source.device)


def tensor_on_disk(folder: Path, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor in a file without a name, which is gone when the process ends."""
    size = 4 * math.prod(shape)
    if not size:
        return torch.empty(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            try:  # a disk that is full later would end the process without a message
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise RunError(
                    f"cached features need {size / 2**30:.1f} GiB in '{folder}': {error.strerror}"
                ) from error
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


class _Store(NamedTuple):
    """Features and targets of the images that a process has encoded, every n-th of all."""

    maps: Tensor  # [2, n, 4D, h, w]: images, mirror images
    targets: Tensor  # [n, H, W]
    world: int
    device: torch.device

    def read(self, batch: tuple[Targets, Flips]) -> tuple[Tensor, Tensor]:
        """Maps on the device and targets."""
        positions, flips = batch
        rows, flipped = positions // self.world, torch.from_numpy(flips)[:, None, None]
        targets = torch.where(flipped, self.targets[rows].flip(-1), self.targets[rows])
        return self.maps[flips.astype(int), rows].to(self.device), targets


class DenseGrid(Grid):
    """Dense heads, and the sums of targets, for constant predictions."""

    sums: Tensor

    def __init__(
        self,
        task: DenseTask,
        heads: dict[HeadSpec, nn.Module],
        optimizer: torch.optim.Optimizer,
        size: tuple[int, int],
    ) -> None:
        super().__init__(heads, optimizer, loss=task.loss, clip_grad=_CLIP_GRAD)
        self.task = task
        self.register_buffer("sums", task.count(torch.empty(0, *size)))

    def step(
        self, features: dict[str, Tensor], targets: Tensor, lr_scale: float, *shared: Any
    ) -> Tensor:
        """One step, if two pixels count; targets `[b, H, W]` are on the CPU."""
        self.sums += self.task.count(targets)
        device = features["last"].device
        if int(self.task.valid(targets).sum()) < 2:
            return torch.zeros(len(self.specs), device=device)
        return super().step(features, targets.to(device, non_blocking=True), lr_scale, *shared)


def make_dense_grid(
    task: DenseTask,
    protocol: Protocol,
    widths: dict[str, int],
    size: tuple[int, int],
    seed: int,
    device: torch.device | str = "cpu",
) -> DenseGrid:
    """Heads of `last` and `last4`, with and without BatchNorm, for each rate and decay."""
    heads: dict[HeadSpec, nn.Module] = {}
    groups = []
    rates = protocol.lrs, protocol.weight_decays
    for name, kind, lr, weight_decay in product(widths, ("linear", "bn"), *rates):
        head = task.head(widths[name], kind == "bn")
        generator = torch_generator(seed, Stream.EVAL_INIT, widths[name], int(kind == "bn"))
        weight, bias = head.conv.parameters()
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * _STD)
            bias.zero_()
        spec = HeadSpec(name, kind, lr, weight_decay)
        heads[spec] = head.to(device)
        groups += spec.groups(head.parameters())
    return DenseGrid(task, heads, torch.optim.AdamW(groups), size)
