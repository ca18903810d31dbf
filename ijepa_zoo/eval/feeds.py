"""Two ways to feed heads: images through the frozen encoder in every epoch, or once for all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import Targets
from ..data.transforms import DRAWS
from ..distributed import Distributed
from ..errors import DataError
from ..seeds import Stream, numpy_generator
from .batches import TrainBatches
from .cache import CachedFeatures
from .probe import MICRO, Probe, encoded
from .representations import Representations
from .sets import EvalSet

_ROWS = 4096  # cached rows that heads are measured on at a time

Labelled = tuple[Tensor, Tensor]  # rows [b, W] of features and classes [b]


class Feed(Protocol):
    """Features of a probe's images, this process's share of them.

    Attributes:
        name: What results call this way of feeding.
        batch_size: Images of a step, of all processes together.
        steps: Steps of an epoch.
        broken: Name and reason of every image that could not be decoded.
        encoded: Images that went through the encoder.
        bar: Progress bar, in images.
    """

    name: str
    batch_size: int
    steps: int
    broken: dict[str, str]
    encoded: int
    bar: Any

    def training(self, first: int, last: int) -> Iterator[Labelled]:
        """The steps of the epochs from `first` to before `last`, one after the other."""

    def held_out(self) -> Iterator[Labelled]:
        """The images that choose the head."""

    def testing(self) -> Iterator[Labelled]:
        """The test images."""

    def fitted(self) -> int:
        """Images that heads were fitted to, those that could be decoded; all processes ask."""

    def recall(self, broken: Mapping[str, str]) -> None:
        """Take in `broken` as it was after an epoch of an earlier session."""

    def rate(self, spent: float) -> float | None:
        """Images per second of the encoder, if it worked; `spent` seconds went into all."""


def decoded(
    part: EvalSet, rows: Targets, broken: Mapping[str, str], distributed: Distributed
) -> int:
    """How many images no process failed to decode; every process must call this.

    Args:
        part: Their set.
        rows: Their numbers.
        broken: Names and reasons of those of this set that this process could not decode.
        distributed: Those that shared the work.
    """
    if not int(distributed.all_reduce(torch.tensor([len(broken)]))):
        return len(rows)  # of a million images no names are asked for
    failed = torch.tensor([part.images.name(row) in broken for row in rows.tolist()])
    return len(rows) - int((distributed.all_reduce(failed.long()) > 0).sum())


def refuse_undecoded(
    what: str, part: EvalSet, rows: Targets, count: int, broken: Mapping[str, str]
) -> None:
    """Refuse images of which none could be decoded.

    Args:
        what: What they are for.
        part: Their set.
        rows: Their numbers.
        count: How many of them could be decoded.
        broken: Name and reason of images that could not.

    Raises:
        DataError: The count is 0.
    """
    if count:
        return
    names = (part.images.name(row) for row in rows.tolist())
    first = next((f" (first: {name}: {broken[name]})" for name in names if name in broken), "")
    raise DataError(f"none of the {len(rows)} {what} images can be decoded{first}")


class OnlineFeed:
    """The protocol: every epoch sees every image in another random view.

    Args:
        probe: Data and protocol.
        source: The frozen encoder.
        bar: Progress bar, in images.
    """

    name = "online"

    def __init__(self, probe: Probe, source: Representations, bar: Any) -> None:
        self.probe, self.source, self.bar = probe, source, bar
        distributed, protocol = probe.distributed, probe.protocol
        self.batches = TrainBatches(
            *(probe.train, probe.fit, protocol.view, source.size, protocol.batch_size),
            seed=probe.seed,
            rank=distributed.rank,
            world=distributed.world_size,
            micro=MICRO,
        )
        self.batch_size, self.steps = self.batches.batch_size, self.batches.steps
        self.broken: dict[str, str] = {}
        self._broken_to_fit: dict[str, str] = {}
        self.encoded = 0

    def training(self, first: int, last: int) -> Iterator[Labelled]:
        """See :class:`Feed`."""
        numbers = self.batches.numbers(first, last)
        pieces: list[Labelled] = []
        for piece in self._encoded(self.batches, numbers, self._broken_to_fit):
            pieces.append(piece)
            if len(pieces) == self.batches.parts:
                rows, labels = zip(*pieces)
                yield torch.cat(rows), torch.cat(labels)
                pieces = []

    def held_out(self) -> Iterator[Labelled]:
        """See :class:`Feed`."""
        return self._in_order(self.probe.train, self.probe.choose)

    def testing(self) -> Iterator[Labelled]:
        """See :class:`Feed`."""
        return self._in_order(self.probe.test, np.arange(len(self.probe.test)))

    def fitted(self) -> int:
        """See :class:`Feed`."""
        probe = self.probe
        return decoded(probe.train, probe.fit, self._broken_to_fit, probe.distributed)

    def recall(self, broken: Mapping[str, str]) -> None:
        """See :class:`Feed`; until the last epoch only images to fit to are read."""
        self._broken_to_fit.update(broken)
        self.broken.update(broken)

    def rate(self, spent: float) -> float | None:
        """See :class:`Feed`; the heads train beside the encoder."""
        return self.encoded / spent if self.encoded else None

    def _in_order(self, part: EvalSet, rows: Targets) -> Iterator[Labelled]:
        batches = self.probe.in_order(part, rows, self.source.size)
        return self._encoded(batches, range(len(batches)), {})

    def _encoded(self, batches: Any, numbers: Any, broken: dict[str, str]) -> Iterator[Labelled]:
        for rows, labels in encoded(self.source, self.probe.loaded(batches, numbers), broken):
            self.broken.update(broken)
            images = len(labels) * self.probe.distributed.world_size
            self.encoded += images
            self.bar.update(images)
            yield rows, labels


class CachedFeed:
    """Features computed once, of every image and its mirror image.

    Where the protocol's only random view is the flip, the features are those of the protocol;
    otherwise the fixed view of tests stands for the random crops.

    Args:
        probe: Data and protocol.
        source: The frozen encoder.
        bar: Progress bar, in images.
        flips: False without mirror images, for what does not train.
    """

    name = "cached"

    def __init__(
        self, probe: Probe, source: Representations, bar: Any, *, flips: bool = True
    ) -> None:
        self.probe, self.bar, self.device = probe, bar, source.device
        started = time.perf_counter()
        self.train = probe.features(probe.train, source)
        self.mirrored = probe.features(probe.train, source, mirrored=True) if flips else None
        self.test = probe.features(probe.test, source)
        made = (self.train, self.mirrored, self.test)
        self.encoded = sum(found.computed for found in made if found)
        self.seconds = time.perf_counter() - started
        self.broken = {
            part.images.name(index): reason
            for part, found in ((probe.train, self.train), (probe.test, self.test))
            for index, reason in found.broken.items()
        }
        # places in the cache of the images that could be decoded
        self.fit = np.flatnonzero(np.isin(self.train.indices, probe.fit))
        self.choose = np.flatnonzero(np.isin(self.train.indices, probe.choose))
        self._refuse_undecoded()
        if flips:
            self._plan_training(source)

    def _plan_training(self, source: Representations) -> None:
        probe = self.probe
        distributed, protocol = probe.distributed, probe.protocol
        plan = TrainBatches(
            *(probe.train, self.fit, protocol.view, source.size, protocol.batch_size),
            seed=probe.seed,
            rank=distributed.rank,
            world=distributed.world_size,
        )
        self.batch_size, self.steps, self.share = plan.batch_size, plan.steps, plan.share

    def _refuse_undecoded(self) -> None:
        probe = self.probe
        uses = [
            ("training", probe.train, probe.fit, len(self.fit)),
            ("held-out training", probe.train, probe.choose, len(self.choose)),
            ("test", probe.test, np.arange(len(probe.test)), len(self.test.indices)),
        ]
        for what, part, rows, count in uses:
            if len(rows):
                refuse_undecoded(what, part, rows, count, self.broken)

    def labels(self, part: EvalSet, found: CachedFeatures, places: Targets) -> Tensor:
        """Classes of cached images by their places."""
        return torch.from_numpy(part.labels[found.indices[places]]).to(self.device)

    def training(self, first: int, last: int) -> Iterator[Labelled]:
        """See :class:`Feed`; the same images and flips as online, where all can be decoded."""
        seed, batch = self.probe.seed, self.batch_size
        mine = slice(self.probe.distributed.rank * self.share, None)
        for epoch in range(first, last):
            order = numpy_generator(seed, Stream.EVAL_ORDER, epoch).permutation(len(self.fit))
            for step in range(self.steps):
                chosen = self.fit[order[step * batch : (step + 1) * batch][mine][: self.share]]
                draws = numpy_generator(seed, Stream.EVAL_AUGMENT, epoch, step)
                flips = draws.random((batch, DRAWS))[mine][: self.share, -1] < 0.5
                rows = self.train.rows[chosen]
                if self.mirrored is not None:
                    rows[flips] = self.mirrored.rows[chosen[flips]]
                yield rows.to(self.device), self.labels(self.probe.train, self.train, chosen)
                self.bar.update(batch)

    def held_out(self) -> Iterator[Labelled]:
        """See :class:`Feed`."""
        return self._in_order(self.probe.train, self.train, self.choose)

    def testing(self) -> Iterator[Labelled]:
        """See :class:`Feed`."""
        return self._in_order(self.probe.test, self.test, np.arange(len(self.test.indices)))

    def fitted(self) -> int:
        """See :class:`Feed`."""
        return len(self.fit)

    def recall(self, broken: Mapping[str, str]) -> None:
        """See :class:`Feed`; the cache knows them."""

    def rate(self, spent: float) -> float | None:
        """See :class:`Feed`."""
        return self.encoded / self.seconds if self.encoded else None

    def _in_order(
        self, part: EvalSet, found: CachedFeatures, places: Targets
    ) -> Iterator[Labelled]:
        for chosen in _pieces(
            places[self.probe.distributed.rank :: self.probe.distributed.world_size]
        ):
            rows = found.rows[chosen].to(self.device)
            yield rows, self.labels(part, found, chosen)
            self.bar.update(len(chosen) * self.probe.distributed.world_size)


def _pieces(places: Targets) -> Iterable[Targets]:
    return (places[start : start + _ROWS] for start in range(0, len(places), _ROWS))
