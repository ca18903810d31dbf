"""Feeding depth heads: pairs to pixels in loader workers, pixels to patch features."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.dense import DenseDataset
from ..data.loading import load_in_order
from ..encode import Encoder
from ..errors import DataError, ImageError, SettingsError
from .tasks import View
from .views import fixed_pixels
from .words import option

_VIEW = View("square", "bicubic")

Indices = npt.NDArray[np.int64]
Loaded = tuple[Tensor, list[Tensor], list[str | None]]


@dataclass(frozen=True)
class DepthBatch:
    """Encoded pairs that could be read.

    Attributes:
        features: Maps `[b, D, h, w]` of `last` and `last4`; `2b` where mirrored images follow.
        depths: b maps `[H, W]`, 0 where unknown.
        pixels: uint8 `[b, 3, H, W]`.
        indices: `[b]`, places in the data set.
    """

    features: dict[str, Tensor]
    depths: list[Tensor]
    pixels: Tensor
    indices: Indices

    def stacked(self, size: tuple[int, int]) -> Tensor:
        """The depths `[b, *size]`, where all are of that size; b may be 0."""
        return torch.stack(self.depths) if self.depths else torch.empty(0, *size)


class _Pairs(Dataset[Loaded]):
    """Batches of a plan; images are resized as a whole, so no part of a depth map is left out."""

    def __init__(
        self,
        data: DenseDataset,
        plan: Sequence[tuple[Indices, npt.NDArray[np.bool_]]],
        size: tuple[int, int],
        full: bool,
    ) -> None:
        self.data, self.plan, self.size, self.full = data, plan, size, full

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, batch: int) -> Loaded:
        indices, flips = self.plan[batch]
        channels = self.data.decoder.in_chans
        pixels = torch.zeros(len(indices), channels, *self.size, dtype=torch.uint8)
        depths: list[Tensor] = []
        reasons: list[str | None] = []
        for slot, (index, flip) in enumerate(zip(indices.tolist(), flips.tolist())):
            try:
                image, depth = self._read(index)
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
            depths.append(depth.flip(-1) if flip else depth)
        return pixels, depths, reasons

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image, array, _ = self.data[index]
        depth = torch.from_numpy(array.copy())
        if not self.full:  # nearest, since unknown depths must not be mixed in
            depth = F.interpolate(depth[None, None], self.size, mode="nearest")[0, 0]
        return fixed_pixels(image, _VIEW, self.size), depth


@dataclass
class DepthFeed:
    """Encodes the pairs of a data set with a frozen model.

    Args:
        data: The pairs.
        model: A timm ViT.
        device, precision: See :func:`ijepa_zoo.extract_features`.
        workers: Loader processes.

    Attributes:
        broken: Why a pair could not be read, by its name.
    """

    data: DenseDataset
    model: nn.Module
    device: str = "auto"
    precision: str = "float32"
    workers: int = 0
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

    def of(self, data: DenseDataset) -> DepthFeed:
        """A feed of other data with the same model and settings."""
        return DepthFeed(data, self.model, self.device, self.precision, self.workers)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each representation."""
        width = self.encoder.row_shape[0]
        return {"last": width // 4, "last4": width}

    def for_training(
        self, plan: Sequence[tuple[Indices, npt.NDArray[np.bool_]]]
    ) -> Iterator[DepthBatch]:
        """Batches of indices and flips; depths have the size of the model's images."""
        if self._stored is None:
            yield from self._encode(plan, full=False, mirrored=False)
            return
        maps, depths, places = self._stored
        for indices, flips in plan:
            good = [(i, flip) for i, flip in zip(indices.tolist(), flips.tolist()) if i in places]
            rows = [places[i] for i, _ in good]
            sides = [int(flip) for _, flip in good]
            chosen = [depths[r].flip(-1) if s else depths[r] for r, s in zip(rows, sides)]
            features = self._split(maps[sides, rows])
            kept = np.array([i for i, _ in good], np.int64)
            yield DepthBatch(features, chosen, torch.empty(0), kept)

    def for_testing(self, indices: Indices, batch_size: int) -> Iterator[DepthBatch]:
        """Images, then the same mirrored; depths have their own sizes."""
        yield from self._encode(_in_order(indices, batch_size), full=True, mirrored=True)

    def store(self, indices: Indices, batch_size: int) -> Iterator[int]:
        """Keep features (of both sides) and depths in memory for `for_training`.

        Yields:
            How many pairs were encoded, batch by batch.
        """
        maps = torch.empty(2, len(indices), *self.encoder.row_shape)
        depths = torch.empty(len(indices), *self.encoder.size)
        places: dict[int, int] = {}
        for batch in self._encode(_in_order(indices, batch_size), full=False, mirrored=True):
            first, count = len(places), len(batch.indices)
            rows = slice(first, first + count)
            if count:
                maps[:, rows] = torch.stack(batch.features["last4"].cpu().chunk(2))
                depths[rows] = torch.stack(batch.depths)
            places |= zip(batch.indices.tolist(), range(first, first + count))
            yield count
        self._stored = maps, depths, places

    def _encode(
        self,
        plan: Sequence[tuple[Indices, npt.NDArray[np.bool_]]],
        *,
        full: bool,
        mirrored: bool,
    ) -> Iterator[DepthBatch]:
        pairs = _Pairs(self.data, plan, self.encoder.size, full)
        on_gpu = self.encoder.device.type == "cuda"
        loader = load_in_order(pairs, range(len(plan)), self.workers, pin_memory=on_gpu)
        waiting: deque[tuple[Tensor, list[Tensor], Indices]] = deque()

        def batches() -> Iterator[tuple[Tensor, list[str | None]]]:
            for (indices, _), (pixels, depths, reasons) in zip(plan, loader):
                kept = self._note(indices, reasons)
                waiting.append((pixels[kept], depths, indices[kept]))
                both = torch.cat([pixels, pixels.flip(-1)]) if mirrored else pixels
                yield both, reasons * (2 if mirrored else 1)

        for features, _ in self.encoder.encode(batches()):
            pixels, depths, indices = waiting.popleft()
            self._refuse_not_finite(features, indices)
            yield DepthBatch(self._split(features), depths, pixels, indices)

    def _note(self, indices: Indices, reasons: list[str | None]) -> list[int]:
        """Slots of the readable pairs; remembers why others are not."""
        for index, reason in zip(indices.tolist(), reasons):
            if reason is not None:
                self.broken[self.data.names[index]] = reason
        return [slot for slot, reason in enumerate(reasons) if reason is None]

    def _split(self, maps: Tensor) -> dict[str, Tensor]:
        # a copy where it comes from inference mode: autograd refuses those tensors
        maps = maps.to(self.encoder.device, copy=True)
        return {"last": maps[:, -self.widths["last"] :], "last4": maps}  # blocks ascend

    def _refuse_not_finite(self, features: Tensor, indices: Indices) -> None:
        if not features.isfinite().all():
            raise SettingsError(
                f"features of '{self.data.names[int(indices[0])]}' or its neighbours are not "
                "finite: the model's weights are damaged, or need another precision (float32)"
            )


def _in_order(indices: Indices, batch_size: int) -> list[tuple[Indices, npt.NDArray[np.bool_]]]:
    parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return [(part, np.zeros(len(part), np.bool_)) for part in parts]
