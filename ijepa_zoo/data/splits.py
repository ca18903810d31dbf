"""The training and the test split of images with classes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .datasets import FileDataset, ImageDataset, Labels, Subset, Targets, indicator_matrix
from .decode import Decoder
from .files import SHARD_SUFFIXES, TEST, TRAIN, File
from .huggingface import hf_splits, is_hf, with_split
from .labels import LabeledFiles
from .sources import open_images, torch_splits

_CIFAR = {"cifar-10-batches-py": "torch/cifar10", "cifar-100-python": "torch/cifar100"}
# of the official archives of iNaturalist 2018 and Places205
_LISTS = ("{}2018.json", "{}_places205.csv", "trainvalsplit_places205/{}_places205.csv")
_IMAGE_FOLDERS = (".", "images256", "data/vision/torralba/deeplearning/images256")


@dataclass(frozen=True)
class Split:
    """Images with classes."""

    images: ImageDataset
    targets: Labels  # as those of `ImageDataset`, but never None
    classes: Mapping[int, str]  # names of the numbers, if known
    name: str  # the dataset's name of this split
    notes: tuple[str, ...] = ()  # for the user, such as images that were left out

    def subset(self, indices: Targets, name: str, notes: Sequence[str] = ()) -> Split:
        """Some of the images, under another name; `notes` are added."""
        images = Subset(self.images, indices)
        return Split(images, self.targets[indices], self.classes, name, (*self.notes, *notes))

    def with_classes(self, names: Sequence[str], several: bool) -> Split:
        """The same images, with classes numbered as in `names`; a matrix of targets if `several`.

        Images of other classes have none.
        """
        number_of = {name: number for number, name in enumerate(names)}
        is_matrix = self.targets.ndim > 1
        count = self.targets.shape[1] if is_matrix else int(self.targets.max()) + 1
        own = [self.classes.get(number, str(number)) for number in range(count)]
        # the last one is for -1, no class
        numbers = np.array([*(number_of.get(name, -1) for name in own), -1], np.int64)
        if several:
            found = map(np.flatnonzero, self.targets) if is_matrix else self.targets[:, None]
            rows = [[n for n in numbers[row].tolist() if n >= 0] for row in found]
            targets = indicator_matrix(rows, len(names))
        else:
            targets = numbers[self.targets]
        return replace(self, targets=targets, classes=dict(enumerate(names)))


def open_splits(
    data: Any, test: Any = None, decoder: Decoder | None = None
) -> tuple[Split, Split | None]:
    """Open the training and the test split (None without one), with the same class numbers.

    `data` is all images, or the training split if `test` is given: anything that `open_images`
    takes and that has classes. Folders may hold a folder for each class; `train` and `test` or
    `val` with such folders (`test` is taken where both have classes); tar shards named after their
    split; CIFAR-10 or CIFAR-100 (`cifar-10-batches-py`); iNaturalist 2018 (`train2018.json`);
    Places205 (`train_places205.csv`). Of `hfds/NAME`, `torch/NAME` and a CSV with a column `split`
    both splits are taken. An image in both splits raises DataError.
    """
    decoder = decoder or Decoder()
    if test is not None:
        return _open_pair(data, test, decoder)
    if isinstance(data, str | os.PathLike):
        path = os.fspath(data)
        if is_hf(path):
            names = hf_splits(path)
            trains, tests = ([n for n in usual if n in names] for usual in (TRAIN, TEST))
            return _open_named(path, trains, tests, decoder)
        if path.startswith("torch/"):
            return _open_torch(path, decoder)
        if os.path.isdir(path):
            return _open_folder(path, decoder)
    whole = _open(data, "all", decoder)
    if isinstance(whole.images, LabeledFiles) and whole.images.splits:
        train, tested = (_of_csv(whole, names) for names in (TRAIN, TEST))
        if train is None:
            raise DataError(f"'{data}' has no image whose split is train")
        return train, tested
    return whole, None


def _open(source: Any, name: str, decoder: Decoder) -> Split:
    images = open_images(source, decoder=decoder)
    if images.targets is None or (images.targets < 0).all():
        shown = f"'{os.fspath(source)}'" if isinstance(source, str | os.PathLike) else "the dataset"
        raise DataError(
            f"{shown} has no classes: put the images of each class into a folder named after it, "
            "as in train/cat/1.jpg and val/cat/2.jpg, or list them in a CSV with path,label"
        )
    return Split(images, images.targets, images.classes, name)


def _of_csv(whole: Split, names: Sequence[str]) -> Split | None:
    """The first of the named splits that the CSV has."""
    splits = whole.images.splits if isinstance(whole.images, LabeledFiles) else {}
    found = [name for name in names if name in splits]
    notes = [f"{len(splits[name])} images of the split '{name}' are left out" for name in found[1:]]
    return whole.subset(splits[found[0]], found[0], notes) if found else None


def _open_pair(train: Any, test: Any, decoder: Decoder) -> tuple[Split, Split]:
    splits = []
    for data, name, names in ((train, "train", TRAIN), (test, "test", TEST)):
        if isinstance(data, str | os.PathLike):
            name = os.path.basename(os.path.normpath(data))
        split = _open(data, name, decoder)
        splits.append(_of_csv(split, names) or split)
    first, second = splits
    shared = np.flatnonzero(np.isin(_real_paths(second.images), _real_paths(first.images)))
    if len(shared):
        raise DataError(
            f"{len(shared)} test images are training images too, by links or because one input is "
            f"inside the other, for example '{second.images.name(int(shared[0]))}'"
        )
    return _same_classes(first, second)


def _real_paths(images: ImageDataset) -> Targets:
    whole = images.dataset if isinstance(images, Subset) else images
    if not isinstance(whole, FileDataset):
        return np.empty(0, np.int64)
    paths = whole.real_paths()
    return paths[images.indices] if isinstance(images, Subset) else paths


def _same_classes(train: Split, test: Split) -> tuple[Split, Split]:
    """Number the classes of both by the names of all; numbers without names stay."""
    several = train.targets.ndim > 1 or test.targets.ndim > 1
    if several and not (train.classes and test.classes):
        if train.targets.shape[1:] != test.targets.shape[1:]:
            raise DataError(
                f"the labels of '{train.name}' and '{test.name}' are {train.targets.shape} and "
                f"{test.targets.shape}: both need [n, C] with as many classes, or names of classes"
            )
        return train, test
    if not several and (not train.classes or not test.classes or train.classes == test.classes):
        return train, test
    if not {*train.classes.values()} & {*test.classes.values()}:
        raise DataError(
            f"the classes of '{train.name}' and '{test.name}' have no name in common, such as "
            f"'{next(iter(train.classes.values()))}' and '{next(iter(test.classes.values()))}'"
        )
    names = sorted({*train.classes.values(), *test.classes.values()})
    return train.with_classes(names, several), test.with_classes(names, several)


def _open_folder(path: str, decoder: Decoder) -> tuple[Split, Split | None]:
    root = Path(path)
    for folder in (root, *(root / name for name in _CIFAR)):
        if folder.name in _CIFAR and folder.is_dir():
            return _open_torch(f"{_CIFAR[folder.name]}:root={folder.parent}", decoder)
    for name in _LISTS:
        if (root / name.format("train")).is_file():
            lists = ((split, root / name.format(split)) for split in ("train", "val"))
            first, second = (_listed(root, path, split, decoder) for split, path in lists)
            return first, second
    train, test = _class_folders(root, TRAIN), _class_folders(root, TEST)
    if train and test:
        return _open_pair(train, test, decoder)
    if train and any((root / name).is_dir() for name in TEST):
        raise DataError(f"'{path}' has a test split without folders of classes")
    if train:
        return _open(train, "train", decoder), None
    if shards := _named_shards(root):
        return _open_pair(*shards, decoder)
    return _open(path, "all", decoder), None


def _class_folders(root: Path, names: Sequence[str]) -> Path | None:
    """The first of the named folders that has class folders."""
    folders = (root / name for name in names if (root / name).is_dir())
    return next((f for f in folders if any(entry.is_dir() for entry in f.iterdir())), None)


def _named_shards(root: Path) -> tuple[list[str], list[str]] | None:
    """Training and test shards, by a word of their names, else by the end of a word."""
    shards = [path for path in sorted(root.iterdir()) if path.name.endswith(SHARD_SUFFIXES)]

    def having(names: Sequence[str], pattern: str) -> list[str]:
        for name in names:
            split = re.compile(pattern.format(name), re.IGNORECASE)
            if found := [str(path) for path in shards if split.search(path.name)]:
                return found
        return []

    for pattern in ("(?<![a-z]){}(?![a-z])", "{}(?![a-z])"):
        train, test = having(TRAIN, pattern), having(TEST, pattern)
        if train or test:
            return (train, test) if train and test else None
    return None


def _open_torch(path: str, decoder: Decoder) -> tuple[Split, Split | None]:
    names = torch_splits(path)
    return _open_named(path, names[:1], names[1:], decoder)


def _open_named(
    path: str, trains: Sequence[str], tests: Sequence[str], decoder: Decoder
) -> tuple[Split, Split | None]:
    """The first training and the first usable test split of Hugging Face or torchvision."""
    if not trains or not tests:
        return _open(path, "all", decoder), None
    first = _open(with_split(path, trains[0]), trains[0], decoder)
    for name in tests:  # some have a test split whose classes are hidden
        images = open_images(with_split(path, name), decoder=decoder)
        if images.targets is not None and (images.targets >= 0).any():
            return _same_classes(first, Split(images, images.targets, images.classes, name))
    raise DataError(f"'{path}' has no classes in {' or '.join(tests)}: give a test set")


def _listed(root: Path, path: Path, split: str, decoder: Decoder) -> Split:
    """The images of an official list, iNaturalist 2018's JSON or Places205's CSV."""
    classes: dict[int, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            files = {image["id"]: image["file_name"] for image in found["images"]}
            targets = {files[a["image_id"]]: a["category_id"] for a in found["annotations"]}
            classes = {c["id"]: c["name"] for c in found.get("categories", ())}
        else:
            pairs = (
                line.strip().rpartition(" ")[::2] for line in text.splitlines() if line.strip()
            )
            targets = {name: int(label) for name, label in pairs}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' is not a list of images and classes: {error!r}") from error
    first = next(iter(targets), "no image")
    images = next((root / f for f in _IMAGE_FOLDERS if (root / f / first).is_file()), None)
    if images is None:
        raise DataError(f"'{path}' lists '{first}', which is not in '{root}': unpack the images")
    return list_split(images, targets, classes, split, decoder)


def list_split(
    root: Path,
    targets: Mapping[str, int],
    classes: Mapping[int, str],
    name: str,
    decoder: Decoder,
) -> Split:
    """Images of a list of files, relative to a folder, and their classes."""
    start = os.path.join(root, "")
    images = FileDataset((File(start + file, start) for file in targets), decoder)
    images.targets, images.classes = np.array([*targets.values()], np.int64), classes
    return Split(images, images.targets, classes, name)
