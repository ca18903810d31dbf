"""Images of a probe: transforms, training batches by (seed, epoch, step), test batches in order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from ..data.datasets import Targets
from ..data.decode import Pixels
from ..data.transforms import DRAWS, ModelTransform, crop_box, pixel_size
from ..errors import DataError
from ..seeds import Stream, fold, numpy_generator
from .sets import EvalSet
from .tasks import EvalTransform

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop

Size = tuple[int, int]
LabeledImages = tuple[Tensor, Tensor]  # uint8 [b, C, H, W] and classes [b]


def share(batch_size: int, rank: int, world: int, unit: int = 1) -> slice:
    """The images of a batch for one process; shares differ by one `unit` at most."""
    units = batch_size // unit
    if units < world:
        raise DataError(
            f"a batch of {batch_size} images is too small for {world} processes: use more "
            "training images, or fewer processes"
        )
    return slice(units * rank // world * unit, units * (rank + 1) // world * unit)


class TrainBatches(Dataset[LabeledImages]):
    """The training batches of one process, in pieces, each a function of its number.

    An epoch is a permutation of the images in whole batches, without the rest; fewer images than a
    batch are one batch. Item `(epoch * steps + step) * parts + part` is a piece, of at most `micro`
    images, of the share of this process. Shares are multiples of `unit`. `augment` changes pixels
    further, and may draw from `random` and NumPy.
    """

    def __init__(
        self,
        data: EvalSet,
        rows: Targets,
        transform: EvalTransform,
        size: Size,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        micro: int = 256,
        unit: int = 1,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        batch_size = min(batch_size, len(rows)) // unit * unit
        self.data, self.rows, self.transform, self.size = data, rows, transform, size
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.share = share(batch_size, rank, world, unit)
        self.micro = min(micro, -(-batch_size // (world * unit)) * unit)
        self.steps = len(rows) // batch_size
        self.parts = -(-(self.share.stop - self.share.start) // self.micro)

    def numbers(self, first_epoch: int, last_epoch: int) -> range:
        """Items of the epochs from `first_epoch` up to `last_epoch`, exclusive."""
        each = self.steps * self.parts
        return range(first_epoch * each, last_epoch * each)

    def plan(self, number: int) -> list[tuple[tuple[int, ...], int, list[float]]]:
        """Epoch, step and slot of each image of a piece, its row and its random numbers."""
        step, part = divmod(number, self.parts)
        epoch, step = divmod(step, self.steps)
        first = self.share.start + part * self.micro
        order = _permutation(len(self.rows), self.seed, epoch)[step * self.batch_size :]
        rng = numpy_generator(self.seed, Stream.EVAL_AUGMENT, epoch, step)
        draws = rng.random((self.batch_size, DRAWS)).tolist()
        slots = range(first, min(first + self.micro, self.share.stop))
        keys, rows = [(epoch, step, slot) for slot in slots], self.rows[order[slots]].tolist()
        return list(zip(keys, rows, draws[slots.start : slots.stop], strict=True))

    def __getitem__(self, number: int) -> LabeledImages:
        """A piece of a batch."""
        images, rows = [], []
        for keys, row, draws in self.plan(number):
            pixels = random_pixels(self.data.read(row), self.transform, self.size, draws)
            if self.augment is not None:
                with library_seeds(self.seed, Stream.EVAL_AUGMENT, *keys):
                    pixels = self.augment(pixels)
            images.append(pixels)
            rows.append(row)
        return torch.stack(images), torch.from_numpy(self.data.targets[rows])


class OrderedBatches(Dataset[LabeledImages]):
    """Every image once, in order, with the fixed transform of tests.

    The last batch has fewer classes than images: it is padded, so that all have the same shape.
    """

    def __init__(
        self, data: EvalSet, rows: Targets, transform: EvalTransform, size: Size, batch_size: int
    ) -> None:
        self.data, self.rows, self.batch_size = data, rows, batch_size
        self.transform = fixed_transform(transform, data.in_chans, size)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, number: int) -> LabeledImages:
        """A batch."""
        first = number * self.batch_size
        rows = self.rows[first : first + self.batch_size].tolist()
        images = torch.zeros(self.batch_size, *self.transform.input_size, dtype=torch.uint8)
        for slot, row in enumerate(rows):
            images[slot] = self.transform(self.data.read(row))
        return images, torch.from_numpy(self.data.targets[rows])


@lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int) -> Targets:
    return numpy_generator(seed, Stream.EVAL_ORDER, epoch).permutation(n)


def random_pixels(
    image: Pixels, transform: EvalTransform, size: Size, draws: Sequence[float]
) -> Tensor:
    """A training image, uint8 `[C, *size]`, from `DRAWS` uniform numbers."""
    if transform.crop_mode == "center":
        top, left, height, width = crop_box(draws, pixel_size(image), scale=_SCALE, ratio=_RATIO)
        image = tv.crop(image, top, left, height, width)
    mode = InterpolationMode(transform.interpolation)
    image = tv.resize(image, list(size), interpolation=mode)
    pixels: Tensor = image if isinstance(image, Tensor) else tv.pil_to_tensor(image)
    return pixels.flip(-1) if draws[-1] < 0.5 else pixels


def fixed_transform(transform: EvalTransform, in_chans: int, size: Size) -> ModelTransform:
    """The transform of test images and cached features, to uint8 `[C, *size]`."""
    normalization = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans}  # not applied
    config = {**asdict(transform), "input_size": (in_chans, *size), **normalization}
    return ModelTransform(config, normalize=False)


@contextmanager
def library_seeds(*keys: int) -> Iterator[None]:
    """Seed the generators of `random` and NumPy, which timm draws from, and restore them."""
    states = random.getstate(), np.random.get_state()
    random.seed(fold(*keys))
    np.random.seed(fold(*keys) % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def rand_augment(
    name: str, size: tuple[int, int], mean: tuple[float, ...]
) -> Callable[[Tensor], Tensor]:
    """timm's augmentation for uint8 tensors; draws from `random` and NumPy."""
    _, augment, _ = create_transform(
        size, is_training=True, auto_augment=name, interpolation="bicubic", mean=mean, separate=True
    )
    for operation in augment.transforms[0].ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return v2.Compose([v2.ToPILImage(), augment, v2.PILToTensor()])


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """timm's operation; it asks for 0 bits at the top, which newer versions of Pillow refuse."""
    mask = 0xFF & ~((1 << 8 - bits) - 1)
    return image.point(lambda value: value & mask)
