"""Patch features of images with dense targets, computed in every epoch or kept in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..data.dense import DenseDataset
from ..data.loading import load_in_order
from ..encode import Encoder
from ..errors import DataError, ImageError, RunError, option
from .dense_tasks import DenseTask

Indices = npt.NDArray[np.int64]
Plan = Sequence[tuple[Indices, npt.NDArray[np.bool_]]]  # indices and flips of each batch


@dataclass(frozen=True)
class DenseBatch:
    """Encoded pairs that could be read.

    Attributes:
        maps: `last4` features `[b, 4D, h, w]`, of `2b` images where mirror images follow.
        targets: b targets float32 `[H, W]` on the CPU.
        pixels: uint8 `[b, C, H, W]`.
        indices: `[b]`, in the data set.
    """

    maps: Tensor
    targets: list[Tensor]
    pixels: Tensor
    indices: Indices


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
        reasons: list[str | None] = []
        for slot, (index, flip) in enumerate(zip(indices.tolist(), flips.tolist())):
            try:
                image, target = self._read(index)
            except ImageError as error:
                if not self.data.skip_broken:
                    raise DataError(
                        f"the pair of '{self.data.names[index]}' cannot be read ({error}): repair "
                        f"or remove it, or leave such pairs out with {option('skip_broken')}"
                    ) from error
                reasons.append(str(error))
                continue
            reasons.append(None)
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
class DenseFeed:
    """Encodes the pairs of a data set with a frozen model.

    Args:
        data: The pairs.
        model: A timm ViT.
        task: What the targets are.
        device, precision: See :func:`ijepa_zoo.extract_features`.
        workers: Loader processes; default: one per CPU.

    Attributes:
        broken: Why a pair could not be read, by its name.
    """

    data: DenseDataset
    model: nn.Module
    task: DenseTask
    device: str = "auto"
    precision: str = "float32"
    workers: int | None = None
    broken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.encoder = Encoder(
            self.model,
            layers="last4",
            pool=None,
            device=self.device,
            precision=self.precision,
            host=False,
        )
        self._stored: tuple[Tensor, Tensor, dict[int, int]] | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each representation."""
        width = self.encoder.row_shape[0]
        return {"last": width // 4, "last4": width}

    def split(self, maps: Tensor) -> dict[str, Tensor]:
        """The representations in maps `[b, 4D, h, w]`, without a copy."""
        return {"last": maps[:, -self.widths["last"] :], "last4": maps}  # blocks ascend

    def for_training(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps on the device and targets of the size of the model's images, batch by batch."""
        size = self.encoder.size
        if self._stored is None:
            for batch in self._encode(plan, full=False, mirrored=False):
                targets = torch.stack(batch.targets) if batch.targets else torch.empty(0, *size)
                yield batch.maps.clone(), targets  # autograd refuses tensors of inference mode
            return
        maps, targets, places = self._stored
        for indices, flips in plan:
            good = [(places[i], f) for i, f in zip(indices.tolist(), flips.tolist()) if i in places]
            rows, sides = [row for row, _ in good], [int(flip) for _, flip in good]
            flipped = [
                targets[row].flip(-1) if side else targets[row] for row, side in zip(rows, sides)
            ]
            stacked = torch.stack(flipped) if flipped else torch.empty(0, *size)
            yield maps[sides, rows].to(self.encoder.device), stacked

    def for_testing(self, indices: Indices, batch_size: int) -> Iterator[DenseBatch]:
        """Images, for some tasks then their mirror images; targets have their own sizes."""
        plan = _in_order(indices, batch_size)
        yield from self._encode(plan, full=True, mirrored=self.task.mirrored)

    def store(self, indices: Indices, batch_size: int) -> Iterator[int]:
        """Keep features of both sides, and targets, in memory for `for_training`.

        Yields:
            How many pairs were encoded, batch by batch.
        """
        maps = torch.empty(2, len(indices), *self.encoder.row_shape)
        targets = torch.empty(len(indices), *self.encoder.size)
        places: dict[int, int] = {}
        for batch in self._encode(_in_order(indices, batch_size), full=False, mirrored=True):
            first, count = len(places), len(batch.indices)
            rows = slice(first, first + count)
            if count:
                maps[:, rows] = torch.stack(batch.maps.cpu().chunk(2))
                targets[rows] = torch.stack(batch.targets)
            places |= zip(batch.indices.tolist(), range(first, first + count))
            yield count
        self._stored = maps, targets, places

    def _encode(self, plan: Plan, *, full: bool, mirrored: bool) -> Iterator[DenseBatch]:
        items = _Batches(self.data, plan, self.task, self.encoder.size, full, mirrored)
        on_gpu = self.encoder.device.type == "cuda"
        loader = load_in_order(items, range(len(plan)), self.workers, pin_memory=on_gpu)
        waiting: deque[tuple[Tensor, list[Tensor], Indices]] = deque()

        def batches() -> Iterator[tuple[Tensor, list[str | None]]]:
            for (indices, _), (pixels, targets, reasons) in zip(plan, loader):
                good = [slot for slot, reason in enumerate(reasons) if reason is None]
                for index, reason in zip(indices.tolist(), reasons):
                    if reason is not None:
                        self.broken[self.data.names[index]] = reason
                waiting.append((pixels[good], targets, indices[good]))
                yield pixels, reasons * (2 if mirrored else 1)

        for number, (maps, _) in enumerate(self.encoder.encode(batches())):
            pixels, targets, indices = waiting.popleft()
            if not number and not maps.isfinite().all():  # once: a GPU would wait for each answer
                raise RunError(
                    f"features of '{self.data.names[int(indices[0])]}' or its neighbors are not "
                    "finite: the model's weights are damaged, or need another precision (float32)"
                )
            yield DenseBatch(maps, targets, pixels, indices)


def _in_order(indices: Indices, batch_size: int) -> Plan:
    parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return [(part, np.zeros(len(part), np.bool_)) for part in parts]
