"""Map-style datasets of images in files, tar shards and arrays."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import DataError, ImageError
from .decode import Decoder, Pixels, Raw
from .files import File, is_compressed, open_shard

Targets = npt.NDArray[np.int64]  # class numbers or indices
Labels = npt.NDArray[Any]  # Targets, or several labels per image: uint8 0/1, `[n, C]`

SAMPLED = 64  # images that a fingerprint reads
_OPEN_SHARDS = 64  # open files that random access to many shards may hold
_BYTES_PER_PIXEL, _METADATA = 8, 1 << 26  # no file of an image is larger


class ImageDataset(ABC):
    """Images by number: `dataset[i]` is (pixels, target, name).

    Args:
        decoder: See `Decoder`.
        name: Name of the dataset in messages.

    Attributes:
        decoder: Decodes what `raw` returns.
        targets: `[n]` class of each image, -1 for none, or a 0/1 matrix `[n, C]` where images
            have several; None without classes.
        classes: Names of the classes, if known.
        skipped: Number of the next image, path and reason of each file that is not an image by
            its name.
    """

    def __init__(self, decoder: Decoder, name: str = "") -> None:
        self.decoder, self._name = decoder, name
        self.targets: Labels | None = None
        self.classes: Mapping[int, str] = {}
        self.skipped: list[tuple[int, str, str]] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def raw(self, index: int) -> Raw:
        """The undecoded image: bytes of a file, an array or a Pillow image.

        Raises:
            ImageError: It cannot be read.
        """

    def name(self, index: int) -> str:
        """The image's path, or the name of the dataset and the number."""
        return f"{self._name}[{index}]"

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digits that are the same for the same images, wherever they are stored."""

    def read(self, index: int) -> Pixels:
        """Decode an image.

        Raises:
            ImageError: It cannot be read or decoded; the text is the reason, without the name.
        """
        return self.decoder(self.raw(index))

    def __getitem__(self, index: int) -> tuple[Pixels, int, str]:
        return self.read(index), self.target(index), self.name(index)

    def target(self, index: int) -> int:
        """Class of an image; -1 for none, or where images have several."""
        return -1 if self.targets is None or self.targets.ndim > 1 else int(self.targets[index])

    def label(self, index: int) -> str | None:
        """Names of an image's classes, joined by `;`; numbers without names; None for no class."""
        if self.targets is None:
            return None
        target = self.targets[index]
        numbers = np.flatnonzero(target).tolist() if target.ndim else [int(target)]
        return ";".join(self.classes.get(n, str(n)) for n in numbers if n >= 0) or None

    def files(self) -> list[str]:
        """The files on disk that are read."""
        return []


class Subset(ImageDataset):
    """The images of a dataset at `indices` `[n]`."""

    dataset: ImageDataset
    indices: Targets

    def __init__(self, dataset: ImageDataset, indices: Targets) -> None:
        super().__init__(dataset.decoder)
        if isinstance(dataset, Subset):
            indices, dataset = dataset.indices[indices], dataset.dataset
        self.dataset, self.indices, self.classes = dataset, indices, dataset.classes
        self.targets = None if dataset.targets is None else dataset.targets[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def raw(self, index: int) -> Raw:
        """See `ImageDataset`."""
        return self.dataset.raw(int(self.indices[index]))

    def name(self, index: int) -> str:
        """See `ImageDataset`."""
        return self.dataset.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        """See `ImageDataset`."""
        digest = hashlib.blake2b(self.dataset.fingerprint().encode(), digest_size=8)
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()

    def files(self) -> list[str]:
        """See `ImageDataset`."""
        if not isinstance(self.dataset, FileDataset):
            return self.dataset.files()
        return list(dict.fromkeys(self.dataset.file(int(index)) for index in self.indices))


class FileDataset(ImageDataset):
    """Image files and members of tar shards.

    The list is packed into arrays: 14 million Python objects take gigabytes, and each loader worker
    would copy them, because reference counts are written on access.
    """

    def __init__(self, files: Iterable[File], decoder: Decoder) -> None:
        super().__init__(decoder)
        folders: dict[tuple[str, str | None, str], int] = {}
        labels: dict[str | None, int] = {None: -1}
        self.problems: dict[int, str] = {}  # why an image cannot be read, by its number
        names = bytearray()
        folder_of, ends, offsets, sizes, targets = array("i"), *(array("q") for _ in range(4))
        for file in files:
            if file.skipped is not None:
                self.skipped.append((len(ends), file.path, file.skipped))
                continue
            if file.problem is not None:
                self.problems[len(ends)] = file.problem
            path, shard = file.path, file.shard
            start = len(shard) + 1 if shard else len(path) - len(os.path.basename(path))
            folder = (path[:start], shard, file.root)
            folder_of.append(folders.setdefault(folder, len(folders)))
            names += os.fsencode(path[start:])
            ends.append(len(names))
            offsets.append(file.offset)
            sizes.append(file.size)
            targets.append(labels.setdefault(file.label, len(labels) - 1))
        self._listed = time.monotonic_ns()
        self.folders = list(folders)
        self.folder_of = np.array(folder_of, np.int32)
        self.names = np.frombuffer(bytes(names), np.uint8)
        self.ends, self.offsets, self.sizes = (
            np.array(values, np.int64) for values in (ends, offsets, sizes)
        )
        if found := [label for label in labels if label is not None]:
            # numbered in the order of the names; the last entry is for -1, no class
            rank = {label: number for number, label in enumerate(sorted(found))}
            renumbered = np.array([*(rank[label] for label in found), -1], np.int64)
            self.targets = renumbered[np.array(targets, np.int64)]
            self.classes = dict(enumerate(rank))

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        """The image's path; `shard.tar/name.jpg` for a member of a shard."""
        start = self.ends[index - 1] if index else 0
        name = os.fsdecode(self.names[start : self.ends[index]].tobytes())
        return self.folders[self.folder_of[index]][0] + name

    def file(self, index: int) -> str:
        """The file on disk that holds an image."""
        return self.folders[self.folder_of[index]][1] or self.name(index)

    def files(self) -> list[str]:
        """See `ImageDataset`."""
        return list(dict.fromkeys(self.file(index) for index in range(len(self))))

    def raw(self, index: int) -> Raw:
        """The bytes of the file."""
        if index in self.problems:
            raise ImageError(self.problems[index])
        shard = self.folders[self.folder_of[index]][1]
        path = self.name(index)
        try:
            if shard is not None:
                return self._member(shard, int(self.offsets[index]), int(self.sizes[index]))
            if "\0" in path:
                raise ImageError("a path cannot hold a NUL character")
            with open(path, "rb") as file:
                self._check_size(os.fstat(file.fileno()).st_size)
                return file.read()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error

    def _member(self, shard: str, offset: int, size: int) -> bytes:
        self._check_size(size)  # also against gzip bombs
        file = _opened(shard, os.getpid(), self._listed)
        try:
            file.seek(offset)
            return file.read(size)
        except (EOFError, zlib.error) as error:
            raise ImageError(f"a damaged tar shard: {error}") from error

    def _check_size(self, size: int) -> None:
        limit = _BYTES_PER_PIXEL * self.decoder.max_pixels + _METADATA
        if size > limit:
            raise ImageError(f"too large: {size:,} bytes, the limit is {limit:,} (max_pixels)")

    def fingerprint(self) -> str:
        """Hash of number, order, names and sizes in shards, wherever the input is stored."""
        shown = [path.removeprefix(root) for path, _, root in self.folders]
        digest = hashlib.blake2b(f"{len(self)} {json.dumps(shown)}".encode(), digest_size=8)
        for values in (self.folder_of, self.ends, self.names, self.sizes):
            digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
        return digest.hexdigest()

    def compressed_shards(self) -> list[str]:
        """Shards that cannot be read in random order, because they are compressed."""
        shards = dict.fromkeys(shard for _, shard, _ in self.folders if shard is not None)
        return [shard for shard in shards if is_compressed(shard)]

    def real_paths(self) -> npt.NDArray[np.int64]:
        """A hash for each image of its path with links resolved."""
        real = [os.path.realpath(folder) for folder, _, _ in self.folders]
        keys = array("q")
        for index, folder in enumerate(self.folder_of):
            name = self.name(index)
            if os.path.islink(name):
                keys.append(hash(os.path.split(os.path.realpath(name))))
            else:
                keys.append(hash((real[folder], name.removeprefix(self.folders[folder][0]))))
        return np.array(keys, np.int64)


@lru_cache(_OPEN_SHARDS)
def _opened(shard: str, process: int, listed: int) -> BinaryIO:
    """A shard, opened by each process: forked ones would share the position in the file.

    A shard that was replaced and listed again is opened again.
    """
    return open_shard(shard)


class ArrayDataset(ImageDataset):
    """Images in arrays `[n, H, W, C]` or `[n, H, W]`, each with a `name` for messages.

    `paths` are the `.npy` files that the arrays are, which other processes open again instead of
    copying them. A memory map of the user may be a part of its file.
    """

    def __init__(
        self,
        arrays: Sequence[npt.NDArray[Any]],
        decoder: Decoder,
        name: str | Sequence[str] = "array",
        targets: npt.NDArray[Any] | None = None,
        paths: Sequence[str] = (),
    ) -> None:
        names = [name] * len(arrays) if isinstance(name, str) else list(name)
        super().__init__(decoder, names[0])
        for images, name in zip(arrays, names, strict=True):
            if images.dtype.kind not in "uif" or images.ndim not in (3, 4) or 0 in images.shape:
                raise DataError(
                    f"{name} is {images.dtype} {list(images.shape)}; images are numbers "
                    "[n, H, W, C] or [n, H, W] (tensors [n, C, H, W])"
                )
            try:
                decoder(np.asarray(images[0]))
            except ImageError as error:
                raise DataError(f"{name} holds images that cannot be used: {error}") from error
        self.arrays, self._names = arrays, names
        self._paths = [os.path.abspath(path) for path in paths]
        self.starts = np.cumsum([0, *(len(images) for images in arrays)])
        if targets is not None:
            if targets.shape != (len(self),) or targets.dtype.kind not in "iub":
                raise DataError(
                    f"the labels of {names[0]} are {targets.dtype} {list(targets.shape)}; class "
                    f"numbers are {len(self)} integers"
                )
            self.targets = targets.astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        """Number of the array and index in it."""
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return which, int(index - self.starts[which])

    def raw(self, index: int) -> Raw:
        """The array `[H, W, C]` or `[H, W]` of an image."""
        which, row = self._locate(index)
        return np.asarray(self.arrays[which][row])

    def name(self, index: int) -> str:
        """Name of the array and number in it."""
        which, row = self._locate(index)
        return f"{self._names[which]}[{row}]"

    def files(self) -> list[str]:
        """See `ImageDataset`."""
        return [str(a.filename) for a in self.arrays if isinstance(a, np.memmap)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "arrays": [] if self._paths else self.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = self.arrays or [np.load(path, mmap_mode="r") for path in self._paths]

    def fingerprint(self) -> str:
        """Hash of the shapes and of some images."""
        shapes = [images.shape for images in self.arrays]
        digest = hashlib.blake2b(str(shapes).encode(), digest_size=8)
        for index in evenly_spaced(len(self), SAMPLED):
            digest.update(np.asarray(self.raw(index)).tobytes())
        return digest.hexdigest()


def evenly_spaced(length: int, count: int) -> list[int]:
    """At most `count` indices from the first to the last of `length`."""
    return sorted(set(np.linspace(0, length - 1, count).astype(int).tolist()))


def indicator_matrix(labels: Sequence[Iterable[int]], num_classes: int = 0) -> Labels:
    """0/1 matrix `[n, C]` of the class numbers of each image; C is at least `num_classes`."""
    pairs = [(row, number) for row, found in enumerate(labels) for number in found]
    rows, numbers = np.array(pairs, np.int64).reshape(-1, 2).T
    matrix = np.zeros((len(labels), max(num_classes, numbers.max(initial=-1) + 1)), np.uint8)
    matrix[rows, numbers] = 1
    return matrix
