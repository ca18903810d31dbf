"""The batches of a run: images, crops and masks of a step as functions of (seed, step)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..data.datasets import FileDataset, ImageDataset
from ..data.decode import Decoder, Pixels
from ..data.loading import load_in_order
from ..data.sources import open_images
from ..data.transforms import DRAWS, center_box, crop_box, crop_resize, pixel_size
from ..errors import DataError, ImageError, SettingsError
from ..masks import MultiBlockMasks
from ..seeds import Stream, numpy_generator
from .config import MaskConfig, PretrainConfig

_log = logging.getLogger(__name__)
_REPLACEMENTS = 20  # images tried in the place of a broken one

_Indices = npt.NDArray[np.int64]


def open_training_images(
    config: PretrainConfig, data: Any, index: Path | None = None
) -> ImageDataset:
    """The images of a run.

    Args:
        config: Settings.
        data: See `open_images`.
        index: See `open_images`.

    Raises:
        DataError: There are none, or they cannot be read in any order.
    """
    chosen = config.data
    decoder = Decoder(config.model.in_chans or 3, chosen.value_range, chosen.bands, as_tensor=True)
    images = open_images(data, decoder=decoder, index=index)
    if not isinstance(images, FileDataset):
        return images
    if len(images.problems) == len(images):
        raise DataError(f"no image can be read: {images.name(0)}: {images.problems[0]}")
    if compressed := images.compressed_shards():
        raise DataError(
            f"'{compressed[0]}' is compressed, and training reads images in any order: unpack it "
            "once (gunzip; images do not get larger) and name the .tar"
        )
    repeated = len(images) - len(np.unique(images.real_paths()))
    if repeated:
        _log.warning(
            "%d images are named twice, directly or by links, so that held-out images may be "
            "trained on", repeated,
        )  # fmt: skip
    return images


def split(n: int, held_out: int, seed: int) -> tuple[_Indices, _Indices]:
    """Share `n` images out at random between training and monitors.

    Returns:
        Sorted indices of the training images and of the `held_out` others.

    Raises:
        ValueError: None would be left to train on.
    """
    if held_out >= n:
        raise SettingsError(
            f"data.held_out={held_out} leaves none of {n} images to train on: use {n // 20}"
        )
    chosen = numpy_generator(seed, Stream.HELD_OUT).choice(n, held_out, replace=False)
    trained = np.ones(n, np.bool_)
    trained[chosen] = False
    return np.flatnonzero(trained), np.sort(chosen).astype(np.int64)


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> _Indices:
    """Indices `[B]` of the images of a step.

    Every epoch of `n // B` steps goes through one permutation and leaves its last `n % B` images
    out, as the official repository does; they are others in every epoch.

    Args:
        n: Images of the training set.
        batch_size: Images per step, B; at most n.
        seed: The run's seed.
        step: Updates done.
    """
    epoch, place = divmod(step, n // batch_size)
    chosen = _permutation(n, seed, epoch)[place * batch_size : (place + 1) * batch_size]
    return chosen.astype(np.int64)


@lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    # Every loader worker keeps one: half the size of the usual integers.
    return numpy_generator(seed, Stream.DATA_ORDER, epoch).permutation(np.arange(n, dtype="u4"))


@dataclass
class Batch:
    """One forward pass of one process.

    Attributes:
        images: uint8 `[b, C, H, W]`, cropped and resized.
        context: int64 `[b * R, K]`, patch indices; those of an image follow each other.
        targets: int64 `[b * R, M, L]`, patch indices.
        indices: int64 `[b]`, numbers of the images in their set.
        broken: Name and reason of every image that could not be decoded and was replaced.
    """

    images: torch.Tensor
    context: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    broken: list[tuple[str, str]]

    def pin_memory(self) -> Batch:
        """Called by the loader: the same batch in memory that is copied to a GPU at once."""
        images, context = self.images.pin_memory(), self.context.pin_memory()
        return replace(self, images=images, context=context, targets=self.targets.pin_memory())


def mask_sampler(mask: MaskConfig, grid_size: tuple[int, int]) -> MultiBlockMasks:
    """The sampler that the settings describe, for a grid of `(height, width)` patches.

    Raises:
        ValueError: The settings do not fit the grid.
    """
    names = {field.name for field in fields(MultiBlockMasks)} - {"grid_size"}
    return MultiBlockMasks(grid_size, **{name: getattr(mask, name) for name in names})


class TrainBatches(Dataset[list[Batch]]):
    """The micro-batches of one process, by step; nothing depends on what was read before.

    Args:
        images: Images to read.
        indices: Numbers of those that are trained on.
        config: Settings.
        image_size: Height and width that the model takes, in pixels.
        masks: Sampler of context and targets.
        rank: Number of this process.
        world: Processes that share a batch.
        micro: Images of a micro-batch; divides the process's share and `mask.group_size`.
    """

    def __init__(
        self,
        images: ImageDataset,
        indices: _Indices,
        config: PretrainConfig,
        image_size: tuple[int, int],
        masks: MultiBlockMasks,
        rank: int,
        world: int,
        micro: int,
    ) -> None:
        self.images, self.indices, self.config = images, indices, config
        self.image_size, self.masks = image_size, masks
        self.rank, self.world, self.micro = rank, world, micro

    @property
    def parts(self) -> int:
        """Micro-batches of a step."""
        return self.config.optim.batch_size // self.world // self.micro

    def __getitem__(self, step: int) -> list[Batch]:
        """All micro-batches of a step, in their order."""
        return [self.micro_batch(step, part) for part in range(self.parts)]

    def micro_batch(self, step: int, part: int) -> Batch:
        """One of them.

        Raises:
            DataError: An image cannot be decoded, nor could any of those tried in its place.
        """
        seed, whole = self.config.seed, self.config.optim.batch_size
        first = (self.rank * self.parts + part) * self.micro
        places = slice(first, first + self.micro)
        chosen = self.indices[batch_indices(len(self.indices), whole, seed=seed, step=step)[places]]
        draws = numpy_generator(seed, Stream.CROPS, step).random((whole, DRAWS))[places].tolist()
        context, targets = self._masks_of(step, places)
        pixels: list[torch.Tensor] = []
        broken: list[tuple[str, str]] = []
        for number, index in enumerate(chosen.tolist()):
            chosen[number], image = self._read(index, (step, first + number), broken)
            pixels.append(self._crop(image, draws[number]))
        return Batch(torch.stack(pixels), context, targets, torch.from_numpy(chosen), broken)

    def _masks_of(self, step: int, places: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of some images of a step: `per_image` for each, one after the other."""
        mask, whole = self.config.mask, self.config.optim.batch_size
        count = mask.per_image
        return self.masks.sample(
            whole * count,
            seed=self.config.seed,
            step=step,
            part=slice(places.start * count, places.stop * count),
            group_size=self.config.group_size * count,
        )

    def _read(
        self, index: int, place: tuple[int, int], broken: list[tuple[str, str]]
    ) -> tuple[int, Pixels]:
        """The image of a place in a batch, or another one where it is broken."""
        for candidate in self._candidates(index, place):
            try:
                return candidate, self.images.read(candidate)
            except ImageError as error:
                broken.append((self.images.name(candidate), str(error)))
        name, reason = broken[-1]
        raise DataError(
            f"step {place[0]}: {self.images.name(index)} cannot be decoded, nor can "
            f"{_REPLACEMENTS} others drawn in its place; the last was {name}: {reason}"
        )

    def _candidates(self, index: int, place: tuple[int, int]) -> Iterator[int]:
        yield index
        rng = numpy_generator(self.config.seed, Stream.REPLACE, *place)
        yield from self.indices[rng.integers(len(self.indices), size=_REPLACEMENTS)].tolist()

    def _crop(self, image: Pixels, draws: Sequence[float]) -> torch.Tensor:
        data = self.config.data
        box = crop_box(draws, pixel_size(image), scale=data.crop_scale, ratio=data.crop_ratio)
        pixels = crop_resize(image, box, self.image_size)
        return pixels.flip(-1) if data.horizontal_flip and draws[-1] < 0.5 else pixels


class _MicroBatches:
    """Micro-batch after micro-batch: whole steps of many images would fill the memory."""

    def __init__(self, batches: TrainBatches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Batch:
        return self.batches.micro_batch(*divmod(number, self.batches.parts))


def loader(
    batches: TrainBatches,
    first_step: int,
    last_step: int,
    workers: int | None,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """The micro-batches of each step from `first_step` to before `last_step`.

    Args:
        batches: Where they come from.
        first_step: Updates done.
        last_step: Updates at the end.
        workers: See `load_in_order`.
        pin_memory: See `load_in_order`.

    Raises:
        DataError: Too many broken images in a row.
        RunError: A loader process was killed.
    """
    numbers = range(first_step * batches.parts, last_step * batches.parts)
    step: list[Batch] = []
    for batch in load_in_order(_MicroBatches(batches), numbers, workers, pin_memory):
        step.append(batch)
        if len(step) == batches.parts:
            yield step
            step = []


def evaluation_images(
    images: ImageDataset, indices: _Indices, image_size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[str, str]]]:
    """Images for monitors: the short side resized, the middle cut out.

    Args:
        images: Where they come from.
        indices: Their numbers.
        image_size: Height and width of the result in pixels.

    Returns:
        uint8 `[m, C, H, W]`; class numbers int64 `[m]`, None where the set has none; name and
        reason of every image that was left out because it is broken.

    Raises:
        DataError: None of them can be decoded.
    """
    aspect = image_size[1] / image_size[0]
    pixels, kept, broken = [], [], []
    for index in indices.tolist():
        try:
            image = images.read(index)
        except ImageError as error:
            broken.append((images.name(index), str(error)))
            continue
        pixels.append(crop_resize(image, center_box(pixel_size(image), aspect), image_size))
        kept.append(index)
    if not pixels:
        name, reason = broken[0]
        raise DataError(f"none of {len(indices)} images can be decoded; {name}: {reason}")
    labels = None if images.targets is None else torch.from_numpy(images.targets[kept])
    return torch.stack(pixels), labels, broken


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Images `[B, C, H, W]` of 0 to 255, scaled to `mean` and `std` of 0 to 1 (1 or C values)."""
    return (images - _levels(mean, images.device)) / _levels(std, images.device)


@lru_cache(maxsize=16)
def _levels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Kept on the device: copying them for each batch would wait for it.
    return torch.tensor(values, device=device).view(-1, 1, 1) * 255
