"""The training and the test set of a probe: classes that agree, and images to choose a head by."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from ..data.clevr import open_clevr
from ..data.datasets import ArrayDataset, Labels, Subset, Targets
from ..data.decode import Decoder, Pixels
from ..data.splits import Split, open_splits
from ..encode import hash_texts
from ..errors import DataError, ImageError, option, some
from ..seeds import Stream, numpy_generator
from .results import data_name
from .tasks import Task

VAL_SHARE = 0.1  # of the training images, to choose the head by
_TEST_SHARE = 0.2  # of a data set that is in one piece
_TEST_SEED = 0  # fixed, so that runs with other seeds are tested on the same images


@dataclass(frozen=True)
class EvalSet(Split):
    """A split whose classes are numbered from 0."""

    data: str = ""  # name of the data
    skip_broken: bool = False  # leave out images that cannot be decoded, instead of an error

    @property
    def multi_label(self) -> bool:
        """Whether images may have several classes, or none."""
        return self.targets.ndim > 1

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return list(self.classes.values())

    def class_sizes(self, rows: Targets | None = None) -> Targets:
        """Number of images of each class, `[C]`; of some rows, or of all."""
        targets = self.targets if rows is None else self.targets[rows]
        if self.multi_label:
            return targets.sum(axis=0, dtype=np.int64)
        return np.bincount(targets, minlength=len(self.classes))

    def refuse_several_labels(self, probe: str) -> None:
        """Raise a `DataError` if images may have several classes."""
        if self.multi_label:
            raise DataError(f"{probe} takes images of one class, and these have several")

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.images.decoder.in_chans

    def read(self, index: int) -> Pixels:
        """Decode an image."""
        try:
            image = self.images.read(index)
        except ImageError as error:
            if self.skip_broken:
                raise
            raise DataError(
                f"'{self.images.name(index)}' cannot be decoded ({error}): repair or remove it, or "
                f"leave such images out with {option('skip_broken')}"
            ) from error
        if isinstance(image, Tensor) and self.images.decoder.as_tensor and len(image) == 3:
            # the protocols resize with Pillow
            return Image.fromarray(image.permute(1, 2, 0).numpy())
        return image

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def files_state(self) -> str:
        """A hash of sizes and times of files and of every byte of arrays."""
        images = self.images
        whole = images.dataset if isinstance(images, Subset) else images
        if isinstance(whole, ArrayDataset):
            digest = hashlib.blake2b(digest_size=8)
            for index in range(len(images)):
                digest.update(np.asarray(images.raw(index)).tobytes())
            return digest.hexdigest()
        return hash_texts(map(_file_state, images.files()))

    def fingerprint(self) -> str:
        """Some hexadecimal digits that are the same for the same images, labels and classes."""
        digest = hashlib.blake2b(self.images.fingerprint().encode(), digest_size=8)
        digest.update(self.targets.astype("<i8").tobytes())
        digest.update("\n".join(self.class_names).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """The data as results record them; `most_frequent` is the largest class in percent."""
        sizes = self.class_sizes()
        if self.multi_label:
            frequency = {"labels_per_image": round(float(sizes.sum()) / len(self), 2)}
        else:
            frequency = {"most_frequent": round(100 * float(sizes.max()) / len(self), 2)}
        return {
            **({"name": self.data} if self.data else {}),
            "split": self.name,
            "images": len(self),
            "classes": len(self.classes),
            "fingerprint": self.fingerprint(),
            **frequency,
        }


def open_task(
    task: Task,
    data: Any,
    *,
    test: Any = None,
    workers: int = 0,
    decoder: Decoder | None = None,
    skip_broken: bool = False,
    progress: bool = False,
) -> tuple[EvalSet, EvalSet]:
    """Training and test set of a task; no image is decoded.

    Data without a test part are split 80:20 with a fixed seed. `notes` of the sets have what was
    left out or split.
    """
    if task.kind == "classes":
        if isinstance(data, str) and data.startswith("scenes:"):
            raise DataError(f"'{data}' renders scenes without classes: use --task count or depth")
        train, tested = open_splits(data, test, decoder)
    elif test is not None or not isinstance(data, str | os.PathLike):
        raise DataError(f"task {task.name!r} takes a folder of CLEVR or scenes:TRAIN,TEST alone")
    else:
        options: dict[str, Any] = {"workers": workers, "decoder": decoder, "progress": progress}
        train, tested = open_clevr(data, task.kind, **options)
    train = select(train, train.targets >= 0, "have no class")
    train, tested = split_off_test(train) if tested is None else (train, tested)
    multi_label = train.targets.ndim > 1
    numbers = np.flatnonzero(train.targets.any(axis=0)) if multi_label else np.unique(train.targets)
    names = {-1: "no class", **tested.classes, **train.classes}
    classes = {k: names.get(n, str(n)) for k, n in enumerate(numbers.tolist())}
    _check_classes(task, [*classes.values()])
    if multi_label:
        others = int(np.delete(tested.targets, numbers, axis=1).any(axis=1).sum())
        note = f"{others} of {len(tested.targets)} test images have classes not in training"
        tested = replace(tested, notes=(*tested.notes, *([note] if others else [])))
        targets = [part.targets[:, numbers] for part in (train, tested)]
        if not targets[1].any():
            raise DataError(f"no image of the {tested.name} part has a class of training")
    else:
        seen = np.isin(tested.targets, numbers)
        unseen = some(names.get(n, str(n)) for n in np.unique(tested.targets[~seen]).tolist())
        why = f"are of classes that training does not have ({unseen})"
        tested = select(tested, seen, why)
        targets = [np.searchsorted(numbers, part.targets) for part in (train, tested)]
    given: dict[str, Any] = {"data": data_name(data), "skip_broken": skip_broken}
    found = [
        EvalSet(part.images, own, classes, part.name, part.notes, **given)
        for part, own in zip((train, tested), targets)
    ]
    return found[0], found[1]


def _check_classes(task: Task, names: list[str]) -> None:
    """Raise a `DataError` if a task does not have these classes."""
    if len(names) < 2:
        raise DataError(f"all training images are of one class ({some(names)}): use at least two")
    if task.kind == "classes" and task.num_classes not in (None, len(names)):
        raise DataError(
            f"{task.name} has {task.num_classes} classes, these data have {len(names)} "
            f"({some(names, 2)}): use --task classes"
        )


def split_classes(labels: Labels, share: float, seed: int, use: int = 0) -> tuple[Targets, Targets]:
    """Indices of two parts; the second has the share of every class, to within one image.

    An image of several classes counts for the rarest of them. The only image of a class is in the
    first part.
    """
    if labels.ndim > 1:
        labels = _rarest(labels)
    rng = numpy_generator(seed, Stream.EVAL_SPLIT, use)
    order = np.lexsort((rng.random(len(labels)), labels))
    marks = np.floor(np.arange(len(labels) + 1) * share + rng.random())
    second = np.zeros(len(labels), np.bool_)
    second[order] = np.diff(marks) > 0
    second &= np.bincount(labels)[labels] > 1
    return np.flatnonzero(~second), np.flatnonzero(second)


def _rarest(labels: Labels) -> Targets:
    """The class of each row of a 0/1 matrix `[n, C]` that has the fewest rows; C for none."""
    sizes = labels.sum(axis=0, dtype=np.int64)
    rarest = np.where(labels > 0, sizes, len(labels) + 1).argmin(axis=1)
    return np.where(labels.any(axis=1), rarest, labels.shape[1])


def listed_rows(train: EvalSet, files: str | Path) -> Targets:
    """Sorted indices of the images that a text file names, as the 1 % list of ImageNet does.

    A line is a file name (`n01440764_10043.JPEG`), with folders (`n01440764/n01440764_10043.JPEG`)
    where names alone are not unique.
    """
    try:
        wanted = set(map(str.strip, Path(files).read_text(encoding="utf-8").split("\n"))) - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list '{files}' cannot be read: {error}") from error
    depths = {name.count("/") for name in wanted}
    rows: dict[str, list[int]] = defaultdict(list)  # by the ends of their names
    for row in range(len(train)):
        parts = train.images.name(row).split("/")
        for depth in depths:
            rows["/".join(parts[-depth - 1 :])].append(row)
    unclear = [name for name in wanted if len(rows[name]) != 1]
    if unclear or not wanted:
        raise DataError(
            f"{len(unclear)} of the {len(wanted)} lines of '{files}' do not name one training "
            f"image each ({some(unclear)}): use names such as '{train.images.name(0)}'"
        )
    return np.array(sorted({rows[name][0] for name in wanted}), np.int64)


def split_off_test(whole: Split) -> tuple[Split, Split]:
    """Training and test part, 80:20, of data in one piece; the same for every seed."""
    rows = split_classes(whole.targets, _TEST_SHARE, _TEST_SEED, use=1)
    note = (
        f"the data have no test part: {len(rows[0])} images train and {len(rows[1])} test, split "
        f"with seed {_TEST_SEED}, for every --seed"
    )
    train = whole.subset(rows[0], f"{whole.name} (80 %)", [note])
    return train, whole.subset(rows[1], f"{whole.name} (20 %)")


def select(part: Split, kept: npt.NDArray[np.bool_], why: str) -> Split:
    """The images that are kept, and a note about the others."""
    if kept.all():
        return part
    if not kept.any():
        raise DataError(f"all images of the {part.name} part {why}")
    left_out = np.flatnonzero(~kept)
    note = (
        f"{len(left_out)} of {len(kept)} images of the {part.name} part {why} and are left out, "
        f"for example '{part.images.name(int(left_out[0]))}'"
    )
    return part.subset(np.flatnonzero(kept), part.name, [note])


def _file_state(path: str) -> str:
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # such as a dangling link
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"
