"""The batches of a probe as functions of (seed, epoch, step), and those of a test in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.datasets import Targets
from ..data.decode import Pixels
from ..data.transforms import DRAWS
from ..errors import DataError, ImageError
from ..seeds import Stream, numpy_generator
from .sets import EvalSet
from .tasks import View
from .views import Size, fixed_pixels, random_pixels

_REPLACEMENTS = 20  # images that are tried instead of a broken one


@dataclass
class EvalBatch:
    """Images of one forward pass.

    Attributes:
        images: uint8 `[b, C, H, W]`.
        labels: Classes, int64 `[b]`, or uint8 0/1 `[b, C]`; of no meaning without an image.
        indices: int64 `[b]`, numbers of the images in their set; -1 in slots without an image.
        reasons: For each of the first images None, or why it could not be decoded; further slots
            are padding. Both kinds of slots hold zeros and must not count in any figure.
        broken: Name and reason of every image that could not be decoded.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    reasons: list[str | None]
    broken: list[tuple[str, str]] = field(default_factory=list)

    @property
    def valid(self) -> Tensor:
        """bool `[b]`: slots that hold an image."""
        return self.indices >= 0

    def pin_memory(self) -> EvalBatch:
        """Called by the loader: the same batch in memory that is copied to a GPU at once."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class TrainBatches(Dataset[EvalBatch]):
    """The training batches of one process, in pieces; nothing depends on what was read before.

    An epoch goes through one permutation in whole batches and leaves the rest out, other images in
    every epoch; fewer images than a batch make one batch. Item `(epoch * steps + step) * parts +
    part` is a piece of a batch: processes have equal shares, which are those of one process.

    Args:
        data: Training set.
        rows: Numbers of its images that heads are fitted to.
        view: The transforms.
        size: Height and width of the model's input.
        batch_size: Images of a step, of all processes together.
        seed: The run's seed.
        rank: Number of this process.
        world: Processes that share a batch.
        micro: Images of a piece, at most.

    Raises:
        DataError: The batch cannot be shared out, or there are fewer images than processes.
    """

    def __init__(
        self,
        data: EvalSet,
        rows: Targets,
        view: View,
        size: Size,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        micro: int = 256,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise DataError(
                f"a batch of {batch_size} images cannot be shared by {world} processes: use a "
                f"multiple of {world}"
            )
        batch_size = min(batch_size, len(rows) - len(rows) % world)
        if batch_size < 2 * world:  # BatchNorm needs two
            raise DataError(f"{len(rows)} images to fit heads to are too few for {world} processes")
        self.data, self.rows, self.view, self.size = data, rows, view, size
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.share = batch_size // world
        self.micro = min(micro, self.share)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.rows) // self.batch_size

    @property
    def parts(self) -> int:
        """Pieces of a step."""
        return -(-self.share // self.micro)

    def numbers(self, first_epoch: int, last_epoch: int) -> range:
        """Items of the epochs from `first_epoch` to before `last_epoch`."""
        each = self.steps * self.parts
        return range(first_epoch * each, last_epoch * each)

    def __getitem__(self, number: int) -> EvalBatch:
        """A piece of a batch.

        Raises:
            DataError: An image cannot be decoded, nor could any of those tried in its place.
        """
        step, part = divmod(number, self.parts)
        epoch, step = divmod(step, self.steps)
        first = self.rank * self.share + part * self.micro
        last = min(first + self.micro, (self.rank + 1) * self.share)
        order = _permutation(len(self.rows), self.seed, epoch)
        start = step * self.batch_size
        chosen = self.rows[order[start + first : start + last]].astype(np.int64)
        rng = numpy_generator(self.seed, Stream.EVAL_AUGMENT, epoch, step)
        draws = rng.random((self.batch_size, DRAWS))[first:last].tolist()
        broken: list[tuple[str, str]] = []
        pixels = []
        for place, index in enumerate(chosen.tolist()):
            chosen[place], image = self._read(index, (epoch, step, first + place), broken)
            pixels.append(random_pixels(image, self.view, self.size, draws[place]))
        labels = torch.from_numpy(self.data.labels[chosen])
        reasons: list[str | None] = [None] * len(chosen)
        return EvalBatch(torch.stack(pixels), labels, torch.from_numpy(chosen), reasons, broken)

    def _read(
        self, index: int, place: tuple[int, int, int], broken: list[tuple[str, str]]
    ) -> tuple[int, Pixels]:
        """The image of a place in a batch, or another one where it is broken."""
        for candidate in self._candidates(index, place):
            try:
                return candidate, self.data.read(candidate)
            except ImageError as error:
                broken.append((self.data.images.name(candidate), str(error)))
        name, reason = broken[-1]
        raise DataError(
            f"{self.data.images.name(index)} cannot be decoded, nor can {_REPLACEMENTS} others "
            f"drawn in its place; the last was {name}: {reason}"
        )

    def _candidates(self, index: int, place: tuple[int, int, int]) -> Iterator[int]:
        yield index
        rng = numpy_generator(self.seed, Stream.EVAL_ORDER, *place)
        yield from self.rows[rng.integers(len(self.rows), size=_REPLACEMENTS)].tolist()


class OrderedBatches(Dataset[EvalBatch]):
    """Every image once, in order, with the fixed transform of tests.

    Batch `b` of process `r` of `w` holds the images from `(b * w + r) * batch_size`. All batches
    have `batch_size` slots and all processes have as many batches: the last ones are padded.

    Args:
        data: The set.
        rows: Numbers of its images that are read.
        view: The transforms.
        size: Height and width of the model's input.
        batch_size: Slots of a batch of one process.
        rank: Number of this process.
        world: Processes that share the images.
    """

    def __init__(
        self,
        data: EvalSet,
        rows: Targets,
        view: View,
        size: Size,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.data, self.rows, self.view, self.size = data, rows, view, size
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.world))

    def __getitem__(self, number: int) -> EvalBatch:
        """A batch; images that cannot be decoded leave their slots empty."""
        first = (number * self.world + self.rank) * self.batch_size
        chosen = self.rows[first : first + self.batch_size].tolist()
        images = torch.zeros(self.batch_size, self.data.in_chans, *self.size, dtype=torch.uint8)
        indices = torch.full((self.batch_size,), -1, dtype=torch.int64)
        reasons: list[str | None] = [None] * len(chosen)
        broken = []
        for slot, index in enumerate(chosen):
            try:
                images[slot] = fixed_pixels(self.data.read(index), self.view, self.size)
            except ImageError as error:
                reasons[slot] = str(error)
                broken.append((self.data.images.name(index), str(error)))
                continue
            indices[slot] = index
        labels = torch.from_numpy(self.data.labels[indices.numpy()])
        return EvalBatch(images, labels, indices, reasons, broken)


@lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int) -> Targets:
    return numpy_generator(seed, Stream.EVAL_ORDER, epoch).permutation(n)
