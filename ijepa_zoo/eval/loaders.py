"""Rows and classes for the heads of a probe: encoded in every epoch, or from the cache."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import Targets
from ..data.transforms import DRAWS
from ..encode import Batch
from ..errors import DataError
from ..seeds import Stream, numpy_generator
from .batches import TrainBatches, share
from .features import CachedFeatures, Source, cached_features, refuse_undecoded
from .probe import CACHED_AS_IS, Probe
from .sets import EvalSet

_VALUES = 2**24  # of cached rows that are read at a time
_PIECE = 128  # images of a forward pass in training

_CACHED_WITHOUT_CROPS = (
    "cached: each image and its mirror image are encoded once, with the test transform instead of "
    "the protocol's random crops"
)

LabeledRows = tuple[Tensor, Tensor]  # rows [b, ...] of features and classes [b]


class OnlineLoader:
    """Every epoch encodes every image in another random view, as the protocols say."""

    name, notes = "online", ()

    def __init__(self, probe: Probe, source: Source, bar: Any, *, gather: bool = True) -> None:
        self.probe, self.source, self.bar, self.gathered = probe, source, bar, gather
        protocol = probe.protocol
        self.batches = TrainBatches(
            *(probe.train, probe.train_rows, protocol.view, source.size, protocol.batch_size),
            seed=probe.seed,
            rank=probe.distributed.rank,
            world=probe.distributed.world_size,
            micro=_PIECE,
        )
        self.batch_size, self.steps = self.batches.batch_size, self.batches.steps
        self.broken: dict[str, str] = {}
        self.encoded = 0

    def training(self, first: int, last: int) -> Iterator[LabeledRows]:
        """The steps of the epochs from `first` to before `last`."""
        numbers = self.batches.numbers(first, last)
        gather = self.probe.distributed.all_gather_rows
        pieces: list[LabeledRows] = []
        for piece in self._encode(self.batches, numbers):
            pieces.append(piece)
            if len(pieces) == self.batches.parts:
                rows, labels = (torch.cat(column) for column in zip(*pieces))
                if self.gathered:
                    rows, labels = gather(rows), gather(labels)
                yield rows, labels
                pieces = []

    def validation(self) -> Iterator[LabeledRows]:
        """The images that choose the head, the share of this process."""
        return self._in_order(self.probe.train, self.probe.val_rows)

    def testing(self) -> Iterator[LabeledRows]:
        """The test images, the share of this process."""
        return self._in_order(self.probe.test, np.arange(len(self.probe.test)))

    def rate(self, seconds: float) -> float | None:
        """Images per second of the encoder; heads are trained at the same time."""
        return self.encoded / seconds if self.encoded else None

    def _in_order(self, part: EvalSet, rows: Targets) -> Iterator[LabeledRows]:
        batches = self.probe.in_order(part, rows, self.source.size)
        return self._encode(batches, range(len(batches)))

    def _encode(self, batches: Any, numbers: Any) -> Iterator[LabeledRows]:
        for rows, labels in encoded(self.probe, self.source, batches, numbers, self.broken):
            images = len(labels) * self.probe.distributed.world_size
            self.encoded += images
            self.bar.update(images)
            yield rows.float(), labels


def encoded(
    probe: Probe, source: Source, batches: Any, numbers: Sequence[int], broken: dict[str, str]
) -> Iterator[LabeledRows]:
    """Rows and classes of the images of batches, by their numbers, that could be decoded.

    Name and reason of the others are put into `broken`.
    """
    waiting: deque[Tensor] = deque()

    def pixels() -> Iterator[Batch]:
        for batch in probe.loaded(batches, numbers):
            broken.update(batch.broken)
            waiting.append(batch.labels[batch.valid])
            yield batch.images, batch.reasons

    for rows, _ in source.encode(pixels()):
        labels = waiting.popleft()
        if len(labels):  # the last process may have no image of a set
            yield rows, labels.to(rows.device, non_blocking=True)


class CachedLoader:
    """Features computed once, of every image and its mirror image.

    Where the protocol's only random view is the flip, the features are those of the protocol;
    otherwise the test view stands in for the random crops. Without `flips` there are no mirror
    images, for classifiers that are not trained in epochs.
    """

    name = "cached"

    def __init__(
        self, probe: Probe, source: Source, bar: Any, *, flips: bool = True, gather: bool = True
    ) -> None:
        self.probe, self.bar, self.device, self.gathered = probe, bar, source.device, gather
        started = time.perf_counter()
        self.train = cached_features(probe, probe.train, source)
        self.mirrored = (
            cached_features(probe, probe.train, source, mirrored=True) if flips else None
        )
        self.test = cached_features(probe, probe.test, source)
        made = (self.train, self.mirrored, self.test)
        self.encoded = sum(found.computed for found in made if found)
        self.seconds = time.perf_counter() - started
        self.broken = {
            part.images.name(index): reason
            for part, found in ((probe.train, self.train), (probe.test, self.test))
            for index, reason in found.broken.items()
        }
        self.train_rows = np.flatnonzero(np.isin(self.train.indices, probe.train_rows))
        self.val_rows = np.flatnonzero(np.isin(self.train.indices, probe.val_rows))
        if len(self.train_rows) == 1:
            raise DataError("only one training image can be decoded, and two are needed")
        self.batch_size = min(probe.protocol.batch_size, len(self.train_rows))
        self.steps = len(self.train_rows) // max(self.batch_size, 1)
        for what, part, rows, count in (
            ("training", probe.train, probe.train_rows, len(self.train_rows)),
            ("validation", probe.train, probe.val_rows, len(self.val_rows)),
            ("test", probe.test, np.arange(len(probe.test)), len(self.test.indices)),
        ):
            if len(rows):
                refuse_undecoded(what, part, rows, count, self.broken)
        is_protocol = probe.protocol.view.shape == "square"
        self.notes = (CACHED_AS_IS if is_protocol else _CACHED_WITHOUT_CROPS,)

    def labels(self, part: EvalSet, found: CachedFeatures, indices: Targets) -> Tensor:
        """Classes of cached rows."""
        return torch.from_numpy(part.labels[found.indices[indices]]).to(self.device)

    def share(self, indices: Targets) -> Targets:
        """Those of the indices that belong to this process."""
        return indices[self.probe.distributed.rank :: self.probe.distributed.world_size]

    def training(self, first: int, last: int) -> Iterator[LabeledRows]:
        """The steps of the epochs; images and flips are those of `OnlineLoader`."""
        seed, batch, distributed = self.probe.seed, self.batch_size, self.probe.distributed
        shared = (0, 1) if self.gathered else (distributed.rank, distributed.world_size)
        own = share(batch, *shared)
        for epoch in range(first, last):
            order = numpy_generator(seed, Stream.EVAL_ORDER, epoch).permutation(
                len(self.train_rows)
            )
            for step in range(self.steps):
                chosen = self.train_rows[order[step * batch : (step + 1) * batch]][own]
                draws = numpy_generator(seed, Stream.EVAL_AUGMENT, epoch, step)
                flips = draws.random((batch, DRAWS))[own, -1] < 0.5
                rows = self.train.rows[chosen]
                if self.mirrored is not None:
                    rows[flips] = self.mirrored.rows[chosen[flips]]
                labels = self.labels(self.probe.train, self.train, chosen)
                yield rows.to(self.device).float(), labels
                self.bar.update(batch)

    def validation(self) -> Iterator[LabeledRows]:
        """See :class:`OnlineLoader`."""
        return self._in_order(self.probe.train, self.train, self.val_rows)

    def testing(self) -> Iterator[LabeledRows]:
        """See :class:`OnlineLoader`."""
        return self._in_order(self.probe.test, self.test, np.arange(len(self.test.indices)))

    def rate(self, seconds: float) -> float | None:
        """See :class:`OnlineLoader`."""
        return self.encoded / self.seconds if self.encoded else None

    def _in_order(
        self, part: EvalSet, found: CachedFeatures, indices: Targets
    ) -> Iterator[LabeledRows]:
        mine = self.share(indices)
        count = max(1, _VALUES // math.prod(found.rows.shape[1:]))
        for start in range(0, len(mine), count):
            chosen = mine[start : start + count]
            labels = self.labels(part, found, chosen)
            yield found.rows[chosen].to(self.device).float(), labels
            self.bar.update(len(chosen) * self.probe.distributed.world_size)


FeatureLoader = OnlineLoader | CachedLoader
