"""The training and the test part of a labelled data set, from what a user names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .hub_sets import holds_data_set
from .image_sets import FileSet, open_images
from .known_sets import open_known
from .labelled import Labelled
from .packed import PackedItems
from .sources import SHARD_SUFFIXES, InputError, expand

_TRAIN = ("train", "training")
_TEST = ("test", "val", "valid", "validation")  # in the order of preference
_HUB = "hf-dataset:"


def open_labelled(data: Any, test: Any = None) -> tuple[Labelled, Labelled | None]:
    """Open a labelled data set; no image is decoded.

    Args:
        data: The whole data set, or its training part if `test` is given. Anything that
            :func:`~ijepa_zoo.data.image_sets.open_images` takes and that has labels. Folders may
            hold: one folder of images per class; `train` and `test` or `val` with such folders
            (`test` is taken where both have classes); tar shards named after their part;
            CIFAR-10 or CIFAR-100 (`cifar-10-batches-py`); iNaturalist 2018 (`train2018.json`);
            Places205 (`train_places205.csv`). Of `hf-dataset:NAME` both parts are taken.
        test: The test part, if `data` does not hold it.

    Returns:
        The training part and the test part, None where there is none.

    Raises:
        InputError: There are no such images, or they have no labels.
    """
    if test is not None:
        return _open_pair(data, test)
    if isinstance(data, str | os.PathLike):
        path = os.fspath(data)
        if path.startswith(_HUB):
            return _open_hub(path.removeprefix(_HUB))
        if os.path.isdir(path):
            return _open_folder(path)
    return _open(data, "all"), None


def _open(source: Any, split: str) -> Labelled:
    images = open_images(source)
    shown = f"'{os.fspath(source)}'" if isinstance(source, str | os.PathLike) else "this data set"
    if not isinstance(images, FileSet):
        if images.labels is None:
            raise InputError(
                f"{shown} has no labels, or one class only; a probe needs images of at least two "
                "classes"
            )
        return Labelled(images, images.labels, split=split)
    numbers = images.items.labels
    if (numbers < 0).all():
        raise _no_classes(shown)
    names = _class_names(images.items)
    return Labelled(images, numbers, names, split, tuple(_gathered(images.items, names)))


def _no_classes(shown: str) -> InputError:
    return InputError(
        f"{shown} has no class folders: put the images of each class into a folder named after it, "
        "as in train/cat/1.jpg and val/cat/2.jpg"
    )


def _class_names(items: PackedItems) -> dict[int, str]:
    """Names of the classes that are folders; shards do not say what gave a class its number."""
    first = dict(zip(*(a.tolist() for a in np.unique(items.labels, return_index=True))))
    found = {number: items[row] for number, row in first.items() if number >= 0}
    return {
        number: os.path.basename(os.path.dirname(item.path))
        for number, item in found.items()
        if item.shard is None
    }


def _gathered(items: PackedItems, names: Mapping[int, str]) -> Iterable[str]:
    """A note where folders of one name, which count as one class, may not be meant as one."""
    pairs = np.unique(items.labels * len(items.table) + items.holders)
    folders: dict[tuple[int, str], str] = {}
    for number, holder in zip(*(a.tolist() for a in np.divmod(pairs, len(items.table)))):
        place = items.table[holder]
        root = place.path.removesuffix(place.shown)
        before = folders.setdefault((number, root), place.path)
        if number in names and before != place.path:
            yield (
                f"'{before}' and '{place.path}' have one name and count as one class, "
                f"'{names[number]}', as do all folders of one name: rename them if they are two"
            )
            return


def _open_pair(train: Any, test: Any) -> tuple[Labelled, Labelled]:
    train_roots, test_roots = _roots(train), _roots(test)
    if train_roots is None or test_roots is None:
        return _open(train, "train"), _open(test, "test")
    for one in train_roots:
        for other in test_roots:
            if one.startswith(other) or other.startswith(one):
                raise InputError(
                    f"'{one}' and '{other}' overlap, so that test images would be trained on: name "
                    "a folder of its own for each"
                )
    # One list of both: classes are numbered in the order of all their names.
    whole = _open([root.rstrip("/") for root in (*train_roots, *test_roots)], "all")
    assert isinstance(whole.images, FileSet)
    items = whole.images.items
    held = [place.path.startswith(tuple(test_roots)) for place in items.table]
    tested = np.array(held, np.bool_)[items.holders]
    parts = []
    for rows, roots in ((~tested, train_roots), (tested, test_roots)):
        if not rows.any():
            raise InputError(f"no images found in '{roots[0].rstrip('/')}'")
        if (whole.numbers[rows] < 0).all():
            raise _no_classes(f"'{roots[0].rstrip('/')}'")
        name = os.path.basename(roots[0].rstrip("/"))
        parts.append(whole.part(np.flatnonzero(rows), name))
    return parts[0], parts[1]


def _roots(source: Any) -> list[str] | None:
    """What the paths of all images of folders and shards begin with; None for other inputs."""
    given = [source] if isinstance(source, str | os.PathLike) else source
    if not isinstance(given, list | tuple):
        return None
    if not all(isinstance(path, str | os.PathLike) for path in given):
        return None
    roots = []
    for path in (path for pattern in given for path in expand(os.fspath(pattern))):
        folder = os.path.isdir(path) and not holds_data_set(path)
        if not folder and not path.lower().endswith(SHARD_SUFFIXES):
            return None
        roots.append(os.path.join(path, ""))
    return roots


def _open_folder(path: str) -> tuple[Labelled, Labelled | None]:
    known = open_known(Path(path))
    if known is not None:
        return known
    if holds_data_set(path):
        return _open_hub(path)
    train = next((p for name in _TRAIN if _has_folders(p := os.path.join(path, name))), None)
    if train is not None:
        tests = [os.path.join(path, name) for name in _TEST]
        # ImageNet's own test folder has no classes.
        test = next((t for t in tests if _has_folders(t)), None)
        flat = next((t for t in tests if os.path.isdir(t)), None)
        if test is None and flat is not None:
            raise _no_classes(f"'{flat}'")
        return (_open(train, "train"), None) if test is None else _open_pair(train, test)
    shards = {name: _shards(path, name) for name in (*_TRAIN, *_TEST)}
    train_shards = next((shards[name] for name in _TRAIN if shards[name]), None)
    test_shards = next((shards[name] for name in _TEST if shards[name]), None)
    if train_shards and test_shards:
        return _open_pair(train_shards, test_shards)
    return _open(path, "all"), None


def _has_folders(path: str) -> bool:
    return os.path.isdir(path) and any(entry.is_dir() for entry in os.scandir(path))


def _shards(folder: str, part: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    return [os.path.join(folder, name) for name in names if part in name.lower()]


def _open_hub(name: str) -> tuple[Labelled, Labelled | None]:
    splits = _hub_splits(name)
    train = next((split for split in _TRAIN if split in splits), None)
    tests = [split for split in _TEST if split in splits]
    if train is None or not tests:
        return _open(f"{_HUB}{name}", "all"), None
    return _open(f"{_HUB}{name}:{train}", train), _labelled_test(name, tests)


def _hub_splits(name: str) -> list[str]:
    """Splits of a Hugging Face data set; none where one is named, or there is but one."""
    if not os.path.isdir(name) and ":" in name:
        return []
    saved = os.path.join(name, "dataset_dict.json")
    if os.path.isfile(saved):
        return list(json.loads(Path(saved).read_text(encoding="utf-8"))["splits"])
    if os.path.isfile(os.path.join(name, "dataset_info.json")) or find_spec("datasets") is None:
        return []  # opening it says that the package is missing
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name))
    except (OSError, ValueError) as error:
        raise InputError(f"data set '{name}' cannot be loaded: {error}") from error


def _labelled_test(name: str, splits: list[str]) -> Labelled:
    for split in splits:
        images = open_images(f"{_HUB}{name}:{split}")
        if images.labels is not None:
            return Labelled(images, images.labels, split=split)
    raise InputError(f"'{_HUB}{name}' has no labels in {' or '.join(splits)}: give a test set")
