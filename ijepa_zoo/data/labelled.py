"""Labelled images: a set, the class of each image, and what is known about them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .image_sets import FileSet
from .items import Item
from .packed import PackedItems
from .pixels import ImageSet, Pixels

Numbers = npt.NDArray[np.int64]


class Part:
    """Some images of a set, as a set of its own.

    Args:
        images: The whole set.
        rows: `[n]`, which of its images.
    """

    def __init__(self, images: ImageSet, rows: Numbers) -> None:
        self.images, self.rows = images, rows

    @property
    def labels(self) -> Numbers | None:
        """Those of the whole set."""
        return None if self.images.labels is None else self.images.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Pixels:
        """See :class:`~ijepa_zoo.data.pixels.ImageSet`."""
        return self.images.read(int(self.rows[index]))

    def name(self, index: int) -> str:
        """The name that the image has in the whole set."""
        return self.images.name(int(self.rows[index]))

    def fingerprint(self) -> str:
        """Hash of the whole set's and of the rows."""
        digest = hashlib.blake2b(self.images.fingerprint().encode(), digest_size=8)
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Labelled:
    """Images with the numbers of their classes, as the data set has them.

    Attributes:
        images: The images, n.
        numbers: `[n]` int64, class numbers; -1 for an image without one.
        names: Names of the numbers, where they are known.
        split: What the data set calls this part.
        notes: What a user should know about it, in sentences.
    """

    images: ImageSet
    numbers: Numbers
    names: Mapping[int, str] = field(default_factory=dict)
    split: str = "all"
    notes: tuple[str, ...] = ()

    def part(self, rows: Numbers, split: str, notes: Iterable[str] = ()) -> Labelled:
        """Some of the images, under another name; `notes` are added."""
        kept = (*self.notes, *notes)
        return Labelled(Part(self.images, rows), self.numbers[rows], self.names, split, kept)


def listed(root: Path, files: Sequence[str], numbers: Numbers, **more: Any) -> Labelled:
    """Images named by a list, with the list's class numbers.

    Args:
        root: Folder that the names are relative to.
        files: Names, `/` between folders.
        numbers: Their classes.
        more: Further fields of :class:`Labelled`.
    """
    start = os.path.join(root, "")
    items = PackedItems.of((start, Item(start + name)) for name in files)
    return Labelled(FileSet(items, in_chans=3), numbers, **more)
