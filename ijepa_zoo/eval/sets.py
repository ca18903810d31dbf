"""The training and the test set of a probe: classes that agree, and images to choose a head by."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from ..data.clevr import open_clevr
from ..data.datasets import ArrayDataset, ImageDataset, Labels, Subset, Targets
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
_SCENES = "scenes:"


@dataclass(frozen=True)
class EvalSet:
    """Images and their classes."""

    images: ImageDataset
    labels: Labels
    classes: tuple[str, ...]
    split: str
    notes: tuple[str, ...] = ()
    name: str = ""
    skip_broken: bool = False

    @property
    def multi_label(self) -> bool:
        """Whether images may have several classes, or none."""
        return self.labels.ndim > 1

    def class_sizes(self, rows: Targets | None = None) -> Targets:
        """Number of images of each class, `[C]`; of some rows, or of all."""
        labels = self.labels if rows is None else self.labels[rows]
        if self.multi_label:
            return labels.sum(axis=0, dtype=np.int64)
        return np.bincount(labels, minlength=len(self.classes))

    def refuse_several_labels(self, probe: str) -> None:
        """Refuse images of several classes."""
        if self.multi_label:
            raise DataError(
                f"{probe} takes images of one class, and these have several: use the linear, "
                "attentive or logreg probe"
            )

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
        return len(self.labels)

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
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


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

    Data without a test part are split 80:20 with a fixed seed. `notes` of the sets say what was
    left out or split.
    """
    trained, tested = _open(task, data, test, workers, decoder, progress)
    if not (known := (trained.targets >= 0)).all():
        trained = _without(trained, known, "have no class")
    if tested is None:
        trained, tested = _split_off_test(trained)
    train, matched = (
        replace(part, name=data_name(data), skip_broken=skip_broken)
        for part in _matched(task, trained, tested)
    )
    return train, matched


def split_classes(labels: Labels, share: float, seed: int, use: int = 0) -> tuple[Targets, Targets]:
    """Indices of two parts, of which every class gives its share to within one image.

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


def split_off_val(train: EvalSet, seed: int) -> tuple[Targets, Targets]:
    """Indices of the training images that heads are fitted to, and of the 10 % that choose one."""
    return split_classes(train.labels, VAL_SHARE, seed)


def listed_rows(train: EvalSet, files: str | Path) -> Targets:
    """Sorted indices of the images that a text file names, as the 1 % list of ImageNet does.

    A line is a file name (`n01440764_10043.JPEG`), with folders (`n01440764/n01440764_10043.JPEG`)
    where names alone are not unique.
    """
    try:
        lines = Path(files).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list '{files}' cannot be read: {error}") from error
    wanted = dict.fromkeys(line.strip() for line in lines if line.strip())
    if not wanted:
        raise DataError(f"the list '{files}' is empty: it needs one file name a line")
    rows = _by_name(train, {name.count("/") for name in wanted})
    if missing := [name for name in wanted if name not in rows]:
        raise DataError(
            f"{len(missing)} of the {len(wanted)} images of '{files}' are not among the training "
            f"images: {some(missing)}; those are called, for example, '{train.images.name(0)}'"
        )
    if several := [name for name in wanted if len(rows[name]) > 1]:
        raise DataError(
            f"{len(several)} names of '{files}' mean several images ({some(several)}): write them "
            "with the folder, CLASS/NAME"
        )
    return np.array(sorted({rows[name][0] for name in wanted}), np.int64)


def _by_name(train: EvalSet, depths: Iterable[int]) -> dict[str, list[int]]:
    """Images by the ends of their names, with as many folders as `depths` has."""
    found: dict[str, list[int]] = defaultdict(list)
    for row in range(len(train)):
        parts = train.images.name(row).split("/")
        for depth in depths:
            found["/".join(parts[-depth - 1 :])].append(row)
    return found


def data_record(train: EvalSet, test: EvalSet) -> dict[str, Any]:
    """The data as results record them: names of the parts, numbers and fingerprints.

    `most_frequent` is the share of the most frequent class in percent; of images with several
    classes, `labels_per_image` is their mean number.
    """
    return {name: _record(part) for name, part in (("train", train), ("test", test))}


def _record(part: EvalSet) -> dict[str, Any]:
    sizes = part.class_sizes()
    if part.multi_label:
        frequency = {"labels_per_image": round(float(sizes.sum()) / len(part), 2)}
    else:
        frequency = {"most_frequent": round(100 * float(sizes.max()) / len(part), 2)}
    return {
        **({"name": part.name} if part.name else {}),
        "split": part.split,
        "images": len(part),
        "classes": len(part.classes),
        "fingerprint": part.fingerprint(),
        **frequency,
    }


def _open(
    task: Task, data: Any, test: Any, workers: int, decoder: Decoder | None, progress: bool
) -> tuple[Split, Split | None]:
    if task.kind == "classes":
        if isinstance(data, str) and data.startswith(_SCENES):
            raise DataError(f"'{data}' renders scenes without classes: use --task count or depth")
        return open_splits(data, test, decoder)
    if test is not None or not isinstance(data, str | os.PathLike):
        raise DataError(f"task {task.name!r} takes a folder of CLEVR or scenes:TRAIN,TEST alone")
    return open_clevr(data, task.kind, workers=workers, decoder=decoder, progress=progress)


def _split_off_test(whole: Split) -> tuple[Split, Split]:
    rows = split_classes(whole.targets, _TEST_SHARE, _TEST_SEED, use=1)
    note = (
        f"the data have no test part: {len(rows[0])} images train and {len(rows[1])} test, split "
        f"with seed {_TEST_SEED}, for every --seed"
    )
    return whole.subset(rows[0], f"{whole.name} (80 %)", [note]), whole.subset(
        rows[1], f"{whole.name} (20 %)"
    )


def _matched(task: Task, trained: Split, tested: Split) -> tuple[EvalSet, EvalSet]:
    """Both with the classes of training, in the order of their numbers."""
    several = trained.targets.ndim > 1
    numbers = np.flatnonzero(trained.targets.any(axis=0)) if several else np.unique(trained.targets)
    names = tuple(_name(trained, tested, number) for number in numbers.tolist())
    if len(names) < 2:
        raise DataError(
            f"the training images are all of one class, {', '.join(names)}: a probe needs two"
        )
    if task.kind == "classes" and task.num_classes not in (None, len(names)):
        raise DataError(
            f"{task.title} has {task.num_classes} classes, these data have {len(names)} "
            f"('{names[0]}', '{names[1]}', ...): use --task classes"
        )
    if several:
        others = int(np.delete(tested.targets, numbers, axis=1).any(axis=1).sum())
        labels = [part.targets[:, numbers] for part in (trained, tested)]
        if not labels[1].any():
            raise DataError(f"no image of the {tested.name} part has a class of training")
        if others:
            note = f"{others} of {len(labels[1])} test images have classes not in training"
            tested = replace(tested, notes=(*tested.notes, note))
    else:
        if not (seen := np.isin(tested.targets, numbers)).all():
            strange = np.unique(tested.targets[~seen]).tolist()
            named = some([_name(trained, tested, number) for number in strange])
            tested = _without(tested, seen, f"are of classes that training does not have ({named})")
        labels = [np.searchsorted(numbers, part.targets) for part in (trained, tested)]
    train, test = (
        EvalSet(part.images, found, names, part.name, part.notes)
        for part, found in zip((trained, tested), labels)
    )
    absent = [f"'{names[k]}'" for k in np.flatnonzero(test.class_sizes() == 0).tolist()]
    if absent:
        note = f"the {test.split} part has no image of {len(absent)} of {len(names)} classes"
        test = replace(test, notes=(*test.notes, f"{note} ({some(absent)})"))
    if task.kind != "classes" and task.num_classes != len(names):
        note = (
            f"{task.title} has {task.num_classes} classes, these training scenes have "
            f"{len(names)}: accuracies do not compare with the paper's"
        )
        train = replace(train, notes=(*train.notes, note))
    return train, test


def _name(trained: Split, tested: Split, number: int) -> str:
    if number < 0:
        return "no class"
    return trained.classes.get(number) or tested.classes.get(number) or str(number)


def _without(part: Split, kept: npt.NDArray[np.bool_], why: str) -> Split:
    """The images that are kept, and a note about the others."""
    if not kept.any():
        raise DataError(f"all images of the {part.name} part {why}")
    gone = np.flatnonzero(~kept)
    note = (
        f"{len(gone)} of {len(kept)} images of the {part.name} part {why} and are left out, "
        f"for example '{part.images.name(int(gone[0]))}'"
    )
    return part.subset(np.flatnonzero(kept), part.name, [note])


def _file_state(path: str) -> str:
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # such as a link to nowhere: a broken image
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"
