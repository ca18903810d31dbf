"""What a run trains on, as one list of images that are read by their numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .images import ImageError, ImageReader
from .items import Item
from .jpeg import decode_pixels
from .packed import PackedItems, load_index
from .pixels import ImageSet, Pixels, from_array, from_picture, labels_or_none
from .sources import SHARD_SUFFIXES, InputError, expand, list_items, no_images

__all__ = ["FileSet", "ImageSet", "open_images"]

_HUB_PREFIX = "hf-dataset:"
_ARRAY = ".npy"
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DAMAGED_ARRAY = (ValueError, EOFError, MemoryError, SyntaxError)  # what np.load raises


class FileSet:
    """Image files, members of tar shards and `.npy` images.

    Args:
        items: What there is.
        in_chans: Channels of the images that are read.
        tensors: See :func:`open_images`.
    """

    def __init__(self, items: PackedItems, in_chans: int, *, tensors: bool = False) -> None:
        self.items, self.in_chans = items, in_chans
        self.tensors = tensors and in_chans == 3
        self.labels = labels_or_none(items.labels)
        self._reader: tuple[int, ImageReader] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Pixels:
        """See :class:`ImageSet`."""
        item = self.items[index]
        is_array = item.path.lower().endswith(_ARRAY)
        if not is_array and not self.tensors:
            return from_picture(self._own_reader().read(item), self.in_chans)
        with self._own_reader().open(item) as file:
            if not is_array:
                return decode_pixels(file)
            try:
                array = np.load(file, allow_pickle=False)
            except _DAMAGED_ARRAY as error:
                raise ImageError(f"broken array: {error}") from error
        return from_array(array, self.in_chans)

    def name(self, index: int) -> str:
        """The image's path; `shard.tar/name.jpg` for a member of a shard."""
        return self.items[index].path

    def fingerprint(self) -> str:
        """See :class:`ImageSet`."""
        return self.items.fingerprint()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def _own_reader(self) -> ImageReader:
        # Forked processes would share the places of the open shards.
        if self._reader is None or self._reader[0] != os.getpid():
            self._reader = (os.getpid(), ImageReader())
        return self._reader[1]


def open_images(
    source: Any, *, in_chans: int = 3, index: Path | None = None, tensors: bool = False
) -> ImageSet:
    """Open what a user names; the whole list is known afterwards, and no image was decoded.

    Args:
        source: One of

            - paths, one or several: folders (with everything below them; `.npy` files in them are
              images `[H, W, C]`), image files, globs, `.txt` lists of paths, `.tar` shards;
            - a `.npy` file of all images, `[n, H, W, C]` or `[n, H, W]` (stays on the disk), or a
              `.npz` file with `images` and possibly `labels`;
            - a Hugging Face data set: `hf-dataset:NAME` or `hf-dataset:NAME:SPLIT`, a folder
              written by its `save_to_disk`, or a folder of parquet files;
            - `module:attribute`: a map-style Dataset, or a class or function that makes one without
              arguments; items are images, arrays `[H, W, C]`, tensors `[C, H, W]`, or tuples that
              begin with one;
            - such a Dataset, an array or an `ImageSet` itself.
        in_chans: Channels of the images, C: files are read as RGB for 3 and as greyscale for 1,
            other numbers need arrays of that many channels.
        index: A file that keeps the list of tar shards, whose every member is visited otherwise.
            It is made where it is missing, and again when a shard has changed.
        tensors: Read files as tensors of the same pixels where that is faster than Pillow.

    Raises:
        InputError: There is no such input, it holds no images or one image twice, or it cannot be
            read at random.
    """
    if isinstance(source, str | os.PathLike | Item):
        source = [source]
    elif not _are_inputs(source):
        return _open_object(source, in_chans)
    if len(source) == 1 and not isinstance(source[0], Item):
        single = _open_single(os.fspath(source[0]), in_chans, tensors)
        if single is not None:
            return single
    return _open_files(source, in_chans, index, tensors)


def _are_inputs(source: Any) -> bool:
    if not isinstance(source, list | tuple) or not source:
        return False
    return all(isinstance(given, str | os.PathLike | Item) for given in source)


def _open_object(source: Any, in_chans: int) -> ImageSet:
    from .array_sets import open_array
    from .object_sets import open_object

    if isinstance(source, ImageSet):
        return source
    array = open_array(source, in_chans)
    return open_object(source, in_chans) if array is None else array


def _open_single(path: str, in_chans: int, tensors: bool) -> ImageSet | None:
    """The set behind a path that is no list of image files."""
    if path.startswith(_HUB_PREFIX):
        from .hub_sets import open_hub

        return open_hub(path.removeprefix(_HUB_PREFIX), in_chans, tensors=tensors)
    if os.path.isdir(path):
        from .hub_sets import holds_data_set, open_hub

        return open_hub(path, in_chans, tensors=tensors) if holds_data_set(path) else None
    if path.lower().endswith((_ARRAY, ".npz")) and os.path.isfile(path):
        from .array_sets import open_array_file

        return open_array_file(path, in_chans)
    if _ATTRIBUTE.fullmatch(path) and not os.path.lexists(path):
        from .object_sets import open_attribute

        return open_attribute(path, in_chans)
    return None


def _open_files(
    inputs: Sequence[str | os.PathLike[str] | Item],
    in_chans: int,
    index: Path | None,
    tensors: bool,
) -> FileSet:
    given = [path for i in inputs if not isinstance(i, Item) for path in expand(os.fspath(i))]
    for path in given:
        _refuse_alone(path)
    shards = [path for path in given if path.lower().endswith(SHARD_SUFFIXES)]
    for shard in shards:
        _refuse_compressed(shard)
    if index is None or not shards or len(shards) != len(given) or len(given) < len(inputs):
        items = _packed(inputs)
    else:
        items = _indexed(shards, index)
    if in_chans not in (1, 3) and not items[0].path.lower().endswith(_ARRAY):
        raise InputError(
            f"'{items[0].path}' is read with 1 or 3 channels, model.in_chans is {in_chans}: give "
            "images of other channels as .npy files [H, W, C] or as one array [n, H, W, C]"
        )
    return FileSet(items, in_chans, tensors=tensors)


def _indexed(shards: list[str], index: Path) -> PackedItems:
    from filelock import FileLock

    index.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{index}.lock"):  # the processes of a run: one lists, the others wait
        items = load_index(index, shards) if all(map(os.path.isfile, shards)) else None
        if items is None:
            items = _packed(shards)
            items.save(index, shards)
        return items


def _packed(inputs: Sequence[str | os.PathLike[str] | Item]) -> PackedItems:
    skipped: list[Item] = []  # the first one alone
    count = 0

    def readable() -> Iterator[tuple[str, Item]]:
        nonlocal count
        for root, item in list_items(inputs, also=(_ARRAY,)):
            if item.problem is not None and item.shard is None:  # not one image, but many
                raise InputError(f"'{item.path}': {item.problem}; repair it or leave it out")
            if item.skipped is None:
                yield root, item
                continue
            count += 1
            skipped[:] = skipped or [item]

    items = PackedItems.of(readable())
    if not len(items):
        raise InputError(no_images(inputs, count, next(iter(skipped), None)))
    return items


def _refuse_alone(path: str) -> None:
    special = path.startswith(_HUB_PREFIX) or path.lower().endswith(".npz")
    if special or (_ATTRIBUTE.fullmatch(path) and not os.path.lexists(path)):
        raise InputError(f"'{path}' cannot be joined with other inputs: give it alone")
    if path.lower().endswith(_ARRAY) and _dimensions(path) == 4:
        raise InputError(
            f"'{path}' holds many images [n, H, W, C] and cannot be joined with other inputs: give "
            "it alone, or join the arrays with numpy.concatenate"
        )


def _dimensions(path: str) -> int | None:
    """Axes of an array file; None where it cannot be read, which is said when it is."""
    try:
        return np.lib.format.open_memmap(path, mode="r").ndim
    except (OSError, *_DAMAGED_ARRAY):
        return None


def _refuse_compressed(shard: str) -> None:
    if not os.path.isfile(shard):
        return  # said where it is listed
    try:
        with open(shard, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise InputError(f"'{shard}' cannot be read: {error.strerror}") from error
    if compressed:
        raise InputError(
            f"'{shard}' is compressed with gzip, and training reads images at random, which that "
            "does not allow: unpack it once (gunzip; images do not get larger) and name the .tar"
        )
