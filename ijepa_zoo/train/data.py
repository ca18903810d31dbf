"""The batches of a run: images, crops and masks of a step as functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..data.datasets import FileDataset, ImageDataset
from ..data.decode import Decoder, Pixels
from ..data.loading import load_in_order
from ..data.sources import open_images
from ..data.transforms import DRAWS, center_box, crop_box, crop_resize, pixel_size
from ..errors import DataError, ImageError, SettingsError
from ..masks import MultiBlockMasks
from ..seeds import Stream, numpy_generator
from .config import MaskConfig, PretrainConfig

_REPLACEMENTS = 20  # images to try instead of a broken one

_Indices = npt.NDArray[np.int64]


def open_training_images(config: PretrainConfig, data: Any) -> ImageDataset:
    """The images of a run; refuse those that cannot be read in random order."""
    chosen = config.data
    decoder = Decoder(config.model.in_chans or 3, chosen.value_range, chosen.bands, as_tensor=True)
    images = open_images(data, decoder=decoder)
    if not isinstance(images, FileDataset):
        return images
    if compressed := images.compressed_shards():
        raise DataError(
            f"'{compressed[0]}' is compressed, but training reads in random order: unpack it "
            "once (gunzip; images do not get larger) and name the .tar"
        )
    return images


def split(n: int, held_out: int, seed: int) -> tuple[_Indices, _Indices]:
    """Sorted indices of the training images, and of `held_out` random others for the monitors."""
    if held_out >= n:
        raise SettingsError(
            f"data.held_out={held_out} leaves none of {n} images to train on: use "
            f"data.held_out={n // 20}"
        )
    chosen = numpy_generator(seed, Stream.HELD_OUT).choice(n, held_out, replace=False)
    trained = np.ones(n, np.bool_)
    trained[chosen] = False
    return np.flatnonzero(trained), np.sort(chosen).astype(np.int64)


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> _Indices:
    """Indices `[B]` of the images of a step.

    An epoch is a permutation without its last `n % B` images, as in the official repository.
    """
    epoch, position = divmod(step, n // batch_size)
    chosen = _permutation(n, seed, epoch)[position * batch_size : (position + 1) * batch_size]
    return chosen.astype(np.int64)


@lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    # Every loader worker keeps one: half the size of the usual integers.
    return numpy_generator(seed, Stream.DATA_ORDER, epoch).permutation(np.arange(n, dtype="u4"))


@dataclass
class Batch:
    """A micro-batch: the images of one forward pass of a process."""

    images: torch.Tensor  # uint8 [b, C, H, W], cropped and resized
    context: torch.Tensor  # int64 [b * R, K], patch indices, R consecutive rows for each image
    targets: torch.Tensor  # int64 [b * R, M, L], patch indices
    indices: torch.Tensor  # int64 [b], numbers of the images in the dataset
    broken: list[tuple[str, str]]  # name and reason of every image that was replaced

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; called by the DataLoader."""
        images, context = self.images.pin_memory(), self.context.pin_memory()
        return replace(self, images=images, context=context, targets=self.targets.pin_memory())


def mask_sampler(mask: MaskConfig, grid_size: tuple[int, int]) -> MultiBlockMasks:
    """The sampler that the settings describe, for a grid of `(height, width)` patches."""
    names = {field.name for field in fields(MultiBlockMasks)} - {"grid_size"}
    try:
        return MultiBlockMasks(grid_size, **{name: getattr(mask, name) for name in names})
    except SettingsError as error:
        raise SettingsError(f"mask: {error}") from error


def sample_masks(
    masks: MultiBlockMasks, config: PretrainConfig, step: int, own: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of some images of a step: `mask.per_image` for each, one after the other."""
    per_image = config.mask.per_image
    return masks.sample(
        config.optim.batch_size * per_image,
        seed=config.seed,
        step=step,
        part=slice(own.start * per_image, own.stop * per_image),
        group_size=config.group_size * per_image,
    )


class TrainBatches:
    """The micro-batches of one process, by number; each is a function of its number alone."""

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
        self.rank, self.micro = rank, micro
        self.per_step = config.optim.batch_size // world // micro

    def __getitem__(self, number: int) -> Batch:
        """Micro-batch `number % per_step` of step `number // per_step`."""
        step, part = divmod(number, self.per_step)
        seed, batch_size = self.config.seed, self.config.optim.batch_size
        first = (self.rank * self.per_step + part) * self.micro
        own = slice(first, first + self.micro)
        order = batch_indices(len(self.indices), batch_size, seed=seed, step=step)
        chosen = self.indices[order[own]]
        draws = numpy_generator(seed, Stream.CROPS, step).random((batch_size, DRAWS))[own].tolist()
        context, targets = sample_masks(self.masks, self.config, step, own)
        pixels: list[torch.Tensor] = []
        broken: list[tuple[str, str]] = []
        for i, index in enumerate(chosen.tolist()):
            chosen[i], image = self._read(index, step, first + i, broken)
            pixels.append(self._crop(image, draws[i]))
        return Batch(torch.stack(pixels), context, targets, torch.from_numpy(chosen), broken)

    def steps(
        self, first: int, last: int, workers: int | None, pin_memory: bool
    ) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `first` up to `last`, exclusive."""
        numbers = range(first * self.per_step, last * self.per_step)
        batches = load_in_order(self.__getitem__, numbers, workers, pin_memory)
        while step := list(islice(batches, self.per_step)):
            yield step

    def _read(
        self, index: int, step: int, position: int, broken: list[tuple[str, str]]
    ) -> tuple[int, Pixels]:
        """The image at a position of a batch, or another one if it is broken."""
        for candidate in self._candidates(index, step, position):
            try:
                return candidate, self.images.read(candidate)
            except ImageError as error:
                broken.append((self.images.name(candidate), str(error)))
        name, reason = broken[-1]
        raise DataError(
            f"step {step}: {self.images.name(index)} cannot be decoded, nor can {_REPLACEMENTS} "
            f"others that were drawn instead; the last was {name}: {reason}"
        )

    def _candidates(self, index: int, step: int, position: int) -> Iterator[int]:
        yield index
        rng = numpy_generator(self.config.seed, Stream.REPLACE, step, position)
        yield from self.indices[rng.integers(len(self.indices), size=_REPLACEMENTS)].tolist()

    def _crop(self, image: Pixels, draws: Sequence[float]) -> torch.Tensor:
        data = self.config.data
        box = crop_box(draws, pixel_size(image), scale=data.crop_scale, ratio=data.crop_ratio)
        pixels = crop_resize(image, box, self.image_size)
        return pixels.flip(-1) if data.horizontal_flip and draws[-1] < 0.5 else pixels


def evaluation_images(
    images: ImageDataset, indices: _Indices, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, str]]]:
    """Images of the monitors uint8 `[m, C, H, W]`, resized and center-cropped.

    Also which of them there are, bool `[m]`: broken images, and those with a negative index, stay
    black. And name and reason of the broken ones.
    """
    height, width = shape[1:]
    pixels = torch.zeros(len(indices), *shape, dtype=torch.uint8)
    known = torch.zeros(len(indices), dtype=torch.bool)
    broken: list[tuple[str, str]] = []
    for number, index in enumerate(indices.tolist()):
        if index < 0:
            continue
        try:
            image = images.read(index)
        except ImageError as error:
            broken.append((images.name(index), str(error)))
            continue
        box = center_box(pixel_size(image), width / height)
        pixels[number] = crop_resize(image, box, (height, width))
        known[number] = True
    return pixels, known, broken


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Images `[B, C, H, W]` of 0 to 255, scaled to `mean` and `std` of 0 to 1 (1 or C values)."""
    return (images - _levels(mean, images.device)) / _levels(std, images.device)


@lru_cache(maxsize=16)
def _levels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Cached on the device: a copy for each batch would synchronize.
    return torch.tensor(values, device=device).view(-1, 1, 1) * 255
