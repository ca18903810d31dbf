"""Map-style datasets of users and of torchvision."""

from __future__ import annotations

import hashlib
import logging
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import DataError, ImageError, some
from .datasets import SAMPLED, ImageDataset, Labels, evenly_spaced
from .decode import Decoder, Raw

# attributes of torchvision's datasets: class numbers, (image, class) or (class, image), names
_NUMBERS = ("targets", "labels", "_labels", "y", "attr")
_PAIRS = {"_samples": 1, "samples": 1, "index": 0}
_NAMES = ("classes", "categories", "all_categories", "attr_names")
_log = logging.getLogger(__name__)


class ObjectDataset(ImageDataset):
    """A map-style dataset of the user or of torchvision.

    Its items are Pillow images, arrays `[H, W, C]`, tensors `[C, H, W]`, or tuples that begin with
    one. Its `targets` or `labels` (or torchvision's names for them) are the classes if they are
    integers `[n]` or 0/1 `[n, C]`, and its `classes` their names.
    """

    # Errors from damaged files; others are errors in the dataset's code.
    _DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

    def __init__(self, data: Any, decoder: Decoder, name: str) -> None:
        super().__init__(decoder, name)
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise DataError(
                f"{name} is a {type(data).__name__}, and images are read by number: it needs "
                "__len__ and __getitem__ (a map-style Dataset)"
            )
        if isinstance(data, str | bytes | Mapping) or not len(data):
            raise DataError(f"{name} is a {type(data).__name__} without images")
        self.data = data
        self.targets = _labels_of(data, name)
        found = [getattr(data, attribute, None) for attribute in _NAMES]
        names = next((names for names in found if isinstance(names, list | tuple)), ())
        if self.targets is not None:
            joined = [", ".join(n) if isinstance(n, tuple) else str(n) for n in names]
            self.classes = dict(enumerate(joined))
            if len({*joined}) < len(joined):
                raise DataError(f"{name} has two classes of the same name: {some(joined)}")

    def __len__(self) -> int:
        return len(self.data)

    def raw(self, index: int) -> Raw:
        """The image of an item."""
        try:
            item = self.data[index]
            image = item[0] if isinstance(item, tuple | list) and item else item
            if isinstance(image, Image.Image):
                image.load()
        except self._DAMAGED as error:
            raise ImageError(f"{type(error).__name__}: {error}") from error
        if isinstance(image, Image.Image | np.ndarray | torch.Tensor):
            return image
        raise DataError(
            f"{self.name(index)} is a {type(image).__name__}; an item is a Pillow image, an array "
            "[H, W, C], a tensor [C, H, W], or a tuple that begins with one"
        )

    def fingerprint(self) -> str:
        """Hash of number, classes and some images, if they are the same when read twice."""
        targets = b"" if self.targets is None else self.targets.astype("<i8").tobytes()
        digest = hashlib.blake2b(f"{len(self)} ".encode() + targets, digest_size=8)
        for index in evenly_spaced(len(self), SAMPLED):
            with suppress(ImageError):
                first, second = (np.asarray(self.raw(index)).tobytes() for _ in range(2))
                digest.update(first if first == second else b"")
        return digest.hexdigest()


def _labels_of(data: Any, name: str) -> Labels | None:
    """The labels of a map-style dataset, from the first attribute that has them."""
    for attribute in _NUMBERS:
        values = getattr(data, attribute, None)
        if values is None or callable(values):
            continue
        if (found := _class_numbers(values, len(data))) is not None:
            return found
        if attribute in ("targets", "labels"):
            _log.warning(
                "%s.%s is ignored: it has neither one integer per image nor 0 or 1 per class",
                name,
                attribute,
            )
    for attribute, position in _PAIRS.items():
        pairs = getattr(data, attribute, None)
        if isinstance(pairs, list) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            return _class_numbers([pair[position] for pair in pairs], len(data))
    return None


def _class_numbers(values: Any, length: int) -> Labels | None:
    """One integer per image, or a matrix of 0 and 1; None for anything else."""
    if isinstance(values, list | tuple):  # torchvision has None in hidden test splits
        values = [-1 if value is None else value for value in values]
    try:
        numbers = np.asarray(values)
    except (ValueError, TypeError):  # rows of different lengths
        return None
    if numbers.shape == (length,) and np.issubdtype(numbers.dtype, np.integer):
        return numbers.astype(np.int64)
    if numbers.ndim == 2 and len(numbers) == length and np.isin(numbers, (0, 1)).all():
        return numbers.astype(np.uint8)
    return None
