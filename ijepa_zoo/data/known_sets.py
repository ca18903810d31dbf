"""Data sets as their makers distribute them: CIFAR, iNaturalist 2018 and Places205."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .array_sets import ArraySet
from .labelled import Labelled, listed
from .sources import InputError

_CIFAR = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
_PLACES_IMAGES = (".", "images256", "data/vision/torralba/deeplearning/images256")
_PLACES_LISTS = (".", "trainvalsplit_places205")


def open_known(root: Path) -> tuple[Labelled, Labelled] | None:
    """The training and the test part of a known data set; None where `root` holds none.

    CIFAR is read by torchvision, which compares the files' checksums first. iNaturalist and
    Places205 are tested on their validation images, as in the I-JEPA paper.

    Raises:
        InputError: The data set is there, but damaged or without its images.
    """
    folders = [root / name for name in _CIFAR if (root / name).is_dir()]
    if len(folders) > 1:
        raise InputError(f"'{root}' holds CIFAR-10 and CIFAR-100: name '{folders[0]}' or the other")
    for folder in folders or [root]:
        if folder.name in _CIFAR:
            return _cifar(folder, "train"), _cifar(folder, "test")
    if (root / "train2018.json").is_file():
        return _inaturalist(root, "train"), _inaturalist(root, "val")
    for lists in _PLACES_LISTS:
        if (root / lists / "train_places205.csv").is_file():
            return _places(root, root / lists, "train"), _places(root, root / lists, "val")
    return None


def _cifar(folder: Path, split: str) -> Labelled:
    from torchvision import datasets

    name = _CIFAR[folder.name]
    try:
        data = getattr(datasets, name)(folder.parent, train=split == "train")
    except RuntimeError as error:
        raise InputError(
            f"'{folder}' is damaged or incomplete ({error}): unpack {name} again"
        ) from error
    numbers = np.array(data.targets, np.int64)
    images = ArraySet(data.data, 3, f"{name}-{split}", numbers)
    return Labelled(images, numbers, dict(enumerate(data.classes)), split)


def _inaturalist(root: Path, split: str) -> Labelled:
    path = root / f"{split}2018.json"
    found = _json(path)
    try:
        files = {image["id"]: image["file_name"] for image in found["images"]}
        pairs = [(files[a["image_id"]], a["category_id"]) for a in found["annotations"]]
        names = {c["id"]: c["name"] for c in found.get("categories", ())}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' is no list of iNaturalist 2018: it needs 'images' with 'id' and 'file_name',"
            f" and 'annotations' with 'image_id' and 'category_id' ({error!r})"
        ) from error
    return _of_pairs(path, root, pairs, split, names)


def _places(root: Path, lists: Path, split: str) -> Labelled:
    path = lists / f"{split}_places205.csv"
    pairs = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")
        if line.strip() and not (name and label.isdecimal()):
            raise InputError(f"'{path}', line {number}: {line!r} is no file name and class number")
        if line.strip():
            pairs.append((name, int(label)))
    first = pairs[0][0] if pairs else ""
    images = next((root / p for p in _PLACES_IMAGES if (root / p / first).is_file()), root)
    return _of_pairs(path, images, pairs, split, {})


def _of_pairs(
    path: Path, root: Path, pairs: list[tuple[str, int]], split: str, names: dict[int, str]
) -> Labelled:
    if not pairs:
        raise InputError(f"'{path}' lists no images")
    if not (root / pairs[0][0]).is_file():
        raise InputError(
            f"'{path}' lists '{pairs[0][0]}', which is not in '{root}': unpack the images there"
        )
    numbers = np.array([number for _, number in pairs], np.int64)
    return listed(root, [name for name, _ in pairs], numbers, names=names, split=split)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"'{path}' is no JSON: {error}") from error
