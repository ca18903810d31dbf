"""Lists of millions of images, packed into a few arrays.

A Python object for each of 14 million images takes gigabytes, and loader workers copy what they
touch, because objects count their users. Arrays are shared.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .items import Item
from .sources import InputError

_INDEX_VERSION = 1
_ARRAYS = {
    **{"holders": np.int32, "ends": np.int64, "names": np.uint8},
    **{"offsets": np.int64, "sizes": np.int64, "labels": np.int64},
}
# What an index that is damaged, or is something else, leads to.
_DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zlib.error),
    *(NotImplementedError, RecursionError, MemoryError, zipfile.BadZipFile, struct.error),
)


@dataclass(frozen=True)
class Holder:
    """A folder or tar shard, as the part of a path up to and with its slash.

    Attributes:
        path: What comes before the name of an image.
        shown: The same without the part that only says where the input lies.
    """

    path: str
    shown: str


@dataclass(frozen=True)
class PackedItems:
    """`n` items in their order.

    Attributes:
        table: Folders and shards.
        holders: `[n]` int32, places in `table`.
        names: uint8, the names of all images one after the other, as bytes of the file system.
        ends: `[n]` int64, where each name ends in `names`.
        offsets: `[n]` int64, first byte of an image in its shard.
        sizes: `[n]` int64, bytes of an image in its shard; -1 for a file of its own.
        labels: `[n]` int64, class number or -1; classes are numbered in the order of their names.
        problems: Why an image cannot be read, by its number.
    """

    table: list[Holder]
    holders: npt.NDArray[np.int32]
    names: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    problems: dict[int, str]

    @classmethod
    def of(cls, found: Iterable[tuple[str, Item]]) -> PackedItems:
        """Pack items as :func:`~ijepa_zoo.data.sources.list_items` gives them.

        Raises:
            InputError: An image is there twice: it could be trained on and held out.
        """
        places: dict[tuple[str, str], int] = {}
        classes: dict[str | None, int] = {None: -1}
        problems: dict[int, str] = {}
        names = bytearray()
        holders, ends, offsets, sizes, labels = (array("i"), *(array("q") for _ in range(4)))
        folders, keys = _RealFolders(), array("q")
        for number, (root, item) in enumerate(found):
            start = item.path.rfind("/") + 1 if item.shard is None else len(item.shard) + 1
            key = (item.path[:start], root)
            holders.append(places.setdefault(key, len(places)))
            name = os.fsencode(item.path[start:])
            names += name
            keys.append(hash((folders[key[0]], name, item.offset)))
            ends.append(len(names))
            offsets.append(item.offset)
            sizes.append(-1 if item.shard is None else item.size)
            labels.append(classes.setdefault(item.label, len(classes) - 1))
            if item.problem is not None:
                problems[number] = item.problem
        packed = cls(
            [Holder(path, path.removeprefix(root)) for path, root in places],
            np.array(holders, np.int32),
            np.frombuffer(bytes(names), np.uint8),
            np.array(ends, np.int64),
            np.array(offsets, np.int64),
            np.array(sizes, np.int64),
            _in_order_of_names(np.array(labels, np.int64), classes),
            problems,
        )
        packed._refuse_repetitions(np.array(keys, np.int64), folders)
        return packed

    def _refuse_repetitions(self, keys: npt.NDArray[np.int64], folders: _RealFolders) -> None:
        ordered = np.sort(keys)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        seen: dict[tuple[str, str, int], Item] = {}  # of different images with one key, too
        for index in np.flatnonzero(np.isin(keys, repeated)).tolist():
            item = self[index]
            folder = self.table[self.holders[index]].path
            image = folders[folder], item.path.removeprefix(folder), item.offset
            first = seen.setdefault(image, item)
            if first is not item:
                also = "" if first.path == item.path else f", also as '{first.path}'"
                raise InputError(
                    f"'{item.path}' is named twice{also}: it could be trained on and held out at "
                    "once; leave one of them out"
                )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Item:
        """The item at `index`, from 0; its label is left out."""
        path = self.table[self.holders[index]].path
        start = self.ends[index - 1] if index else 0
        name = os.fsdecode(self.names[start : self.ends[index]].tobytes())
        size, problem = int(self.sizes[index]), self.problems.get(index)
        if size < 0:
            return Item(path + name, problem=problem)
        return Item(
            path + name, None, path.removesuffix("/"), int(self.offsets[index]), size, problem
        )

    def fingerprint(self) -> str:
        """Hash of number, order, names and sizes in shards, wherever the input lies."""
        digest = hashlib.blake2b(digest_size=8)
        shown = json.dumps([holder.shown for holder in self.table])
        digest.update(f"{len(self)} {shown}".encode())
        for values in (self.holders, self.ends, self.names, self.sizes):
            digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
        return digest.hexdigest()

    def save(self, index: Path, files: list[str]) -> None:
        """Write the list of `files`, tar shards, for :func:`load_index`; renamed when complete."""
        about = {
            "version": _INDEX_VERSION,
            "files": _state(files),
            "table": [asdict(holder) for holder in self.table],
            "problems": list(self.problems.items()),
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        index.parent.mkdir(parents=True, exist_ok=True)
        partial = index.with_name(f"{index.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
            partial.replace(index)
        finally:
            partial.unlink(missing_ok=True)


def load_index(index: Path, files: list[str]) -> PackedItems | None:
    """The list that was saved for `files`.

    Returns:
        None where there is none, it is damaged, or a file changed its size or time since.
    """
    try:
        with np.load(index, allow_pickle=False) as saved:
            about: dict[str, Any] = json.loads(saved["about"].tobytes())
            if about["version"] != _INDEX_VERSION or about["files"] != _state(files):
                return None
            arrays = {name: saved[name] for name in _ARRAYS}
        table = [Holder(**holder) for holder in about["table"]]
        problems = {int(number): reason for number, reason in about["problems"]}
        items = PackedItems(table, **arrays, problems=problems)
        return items if _fits(items) else None
    except _DAMAGED:
        return None  # it is a copy of what the shards say, and is made again


def _fits(items: PackedItems) -> bool:
    """Whether the parts of a list belong together."""
    arrays = [getattr(items, name) for name in _ARRAYS]
    if [(a.dtype, a.ndim) for a in arrays] != [(np.dtype(kind), 1) for kind in _ARRAYS.values()]:
        return False
    if {len(a) for a in arrays if a is not items.names} != {len(items)} or not len(items):
        return False
    ends = np.concatenate([[0], items.ends])
    return bool(
        (np.diff(ends) >= 0).all()
        and ends[-1] == len(items.names)
        and items.holders.min() >= 0
        and items.holders.max() < len(items.table)
    )


class _RealFolders(dict[str, str]):
    """Folders and shards as they are without links and detours, each looked up once."""

    def __missing__(self, path: str) -> str:
        self[path] = real = path if "\0" in path else os.path.realpath(path)
        return real


def _state(files: list[str]) -> list[list[str | int]]:
    states = ((file, os.stat(file)) for file in files)
    return [[file, state.st_size, state.st_mtime_ns] for file, state in states]


def _in_order_of_names(
    labels: npt.NDArray[np.int64], classes: dict[str | None, int]
) -> npt.NDArray[np.int64]:
    ordered = sorted(name for name in classes if name is not None)
    rank = {name: number for number, name in enumerate(ordered)}
    # The last place serves -1, which stands for no class.
    renumbered = np.array([*(rank[name] for name in classes if name is not None), -1], np.int64)
    return renumbered[labels]
