"""`ijepa-zoo bench data`: the time from JPEG files to a batch of crops, on one core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from torchvision.datasets.folder import default_loader
from torchvision.transforms import RandomResizedCrop

from ..data.crops import DRAWS, crop_box, cut
from ..data.image_sets import ImageSet, open_images
from ..masks import MultiBlockMasks
from ..seeds import Stream, numpy_generator
from ..train import PretrainConfig
from ..train.batches import TrainBatches, batch_indices
from ..train.settings import override
from .photos import photographs
from .published import PUBLISHED, chosen_code
from .result import BenchResult, agreed
from .timing import OURS, Work, take_turns, use_threads

_LEVELS = 1.0  # of 255, between the two antialiased filters
_BOXES = 4000  # drawn by both codes
_LAW = 0.03  # of means and deviations of areas and log ratios: 4 standard errors
_GRID = 14  # patches of a side, for the masks
_COMPARED = 12  # photographs whose crops are compared


def data(
    *,
    data: str | Path | None = None,
    images: int = 64,
    batch_size: int = 16,
    img_size: int = 224,
    vs: Sequence[str] = (),
    published_path: str | Path | None = None,
    threads: int = 1,
    seconds: float = 60.0,
    rounds: int = 30,
    progress: bool = False,
) -> BenchResult:
    """Time reading, decoding, cropping and collating training batches in one process.

    Ours are uint8 crops with their masks, as the trainer's loader processes make them; the
    published ones are normalised float32 crops without masks.

    Args:
        data: A folder of photographs, of which as many are used as the rounds need; those that
            cannot be decoded are left out. None for made up ones.
        images: Number of made up ones.
        batch_size: Images of a batch.
        img_size: Side of the crops in pixels.
        vs: `published` to take turns with the published transform and torch's collate.
        published_path: A clone of the published code.
        threads: CPU threads.
        seconds: Time for the rounds.
        rounds: Most rounds, each of one batch.
        progress: Show a progress bar.

    Returns:
        Seconds per batch and images/s of each contender, and the ratio.

    Raises:
        ValueError: A setting does not fit, no file can be decoded, or there is no such clone.
        DisagreementError: Crops have other pixels or another law.
    """
    vs = list(dict.fromkeys(vs))
    settings = {name: value for name, value in locals().items() if name != "progress"}
    code = chosen_code("data", vs, published_path)
    most = (rounds + 1) * batch_size + _COMPARED
    with use_threads(threads), photographs(data, images, most, progress=progress) as good:
        found = open_images(good.folder, tensors=True)
        batches = _batches(found, min(batch_size, len(found)), img_size)
        steps = count()
        works: dict[str, Work] = {OURS: lambda: batches.micro_batch(next(steps), 0)}
        agreement = {}
        if code is not None:
            config = batches.config.data
            agreement = {
                "published law": compare_boxes(config.crop_scale, config.crop_ratio),
                PUBLISHED: compare_pixels(found, img_size),
            }
            transform = code.transforms.make_transforms(img_size, config.crop_scale)
            works[PUBLISHED] = _PublishedBatches(found, transform, batches)
        timings = take_turns(works, seconds=seconds, rounds=rounds, progress=progress, what="data")
        results = {}
        for name in works:
            taken = timings.summary(name)
            rate = batches.micro / taken.median
            results[name] = {"seconds": taken.as_json(), "images_per_second": rate}
        sizes = [Path(found.name(i)).stat().st_size for i in range(len(found))]
    extra = {"mean_file_bytes": float(np.mean(sizes)), "images": len(sizes), **good.about}
    return BenchResult("data", settings, results, timings.ratios(), agreement, extra)


class _PublishedBatches:
    """The same images in the same order as ours, as the published loader makes batches of them."""

    def __init__(self, images: ImageSet, transform: Any, batches: TrainBatches) -> None:
        self.images, self.transform, self.batches = images, transform, batches
        self.steps = count()

    def __call__(self) -> None:
        batches, step = self.batches, next(self.steps)
        chosen = batch_numbers(batches, step)
        crops = [self.transform(default_loader(self.images.name(i))) for i in chosen]
        default_collate([(crop, 0) for crop in crops])


def batch_numbers(batches: TrainBatches, step: int) -> list[int]:
    """Numbers of the images of a step."""
    size = batches.config.optim.batch_size
    places = batch_indices(len(batches.indices), size, seed=batches.config.seed, step=step)
    chosen: list[int] = batches.indices[places].tolist()
    return chosen


def compare_boxes(scale: tuple[float, float], ratio: tuple[float, float]) -> dict[str, Any]:
    """Compare the law of our crop boxes with that of torchvision's RandomResizedCrop.

    Raises:
        DisagreementError: Means or deviations of areas or ratios differ.
    """
    size = (375, 500)
    draws = numpy_generator(0, Stream.CROPS, 0).random((_BOXES, DRAWS)).tolist()
    ours = [crop_box(row, size, scale=scale, ratio=ratio) for row in draws]
    image = torch.empty(3, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [
            RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(_BOXES)
        ]
    difference = np.abs(_moments(ours, size) - _moments(theirs, size)).max()
    what = f"means and deviations of area, log ratio and place of {_BOXES} boxes"
    return agreed(what, float(difference), _LAW)


def compare_pixels(images: ImageSet, side: int) -> dict[str, Any]:
    """Compare our crops of some photographs with torchvision's of the PIL image, box by box.

    Raises:
        DisagreementError: A value differs by more than one level.
    """
    from torchvision.transforms.functional import resized_crop

    largest = 0
    for number in range(min(_COMPARED, len(images))):
        image = default_loader(images.name(number))
        draws = numpy_generator(1, Stream.CROPS, number).random(DRAWS).tolist()
        box = crop_box(draws, (image.height, image.width), scale=(0.3, 1.0), ratio=(0.75, 4 / 3))
        theirs = np.asarray(resized_crop(image, *box, [side, side]), dtype=np.int16)
        ours = cut(images.read(number), box, (side, side)).permute(1, 2, 0).numpy()
        largest = max(largest, int(np.abs(theirs - ours).max()))
    return agreed(f"levels of crops of {min(_COMPARED, len(images))} photographs", largest, _LEVELS)


def _moments(boxes: Sequence[Sequence[int]], size: tuple[int, int]) -> np.ndarray:
    tops, lefts, heights, widths = np.array(boxes, dtype=float).T
    area = heights * widths / (size[0] * size[1])
    columns = [area, np.log(widths / heights) / math.log(4 / 3), tops / size[0], lefts / size[1]]
    return np.array([(column.mean(), column.std()) for column in columns])


def _batches(images: ImageSet, batch_size: int, side: int) -> TrainBatches:
    config = override(PretrainConfig(), **{"optim.batch_size": batch_size, "mask.cut": "global"})
    numbers, masks = np.arange(len(images)), MultiBlockMasks((_GRID, _GRID))
    return TrainBatches(
        *(images, numbers, config, (side, side), masks), rank=0, world=1, micro=batch_size
    )
