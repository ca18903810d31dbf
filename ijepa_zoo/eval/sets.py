"""The training and the test set of a probe: classes that agree, and images to choose a head by."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from ..data.clevr import open_clevr
from ..data.datasets import ImageDataset, Targets
from ..data.decode import Decoder, Pixels
from ..data.splits import Split, open_splits
from ..errors import DataError, ImageError, option, some
from ..seeds import Stream, numpy_generator
from .results import data_name
from .tasks import TASKS, Task

CHOOSE_SHARE = 0.1  # of the training images, to choose the head by
_TEST_SHARE = 0.2  # of a data set that is in one piece
_TEST_SEED = 0  # fixed, so that runs with other seeds are tested on the same images
_SCENES = "scenes:"


@dataclass(frozen=True)
class EvalSet:
    """Images and their classes.

    Attributes:
        images: The images, n.
        labels: `[n]` int64, classes 0 to C - 1; both sets of a task have the same classes.
        classes: Names of the C classes.
        split: What the data set calls this part.
        notes: What a user should know about it, in sentences.
        name: What a person calls the data, such as the name of their folder; empty: not known.
        skip_broken: Leave out images that cannot be decoded.
    """

    images: ImageDataset
    labels: Targets
    classes: tuple[str, ...]
    split: str
    notes: tuple[str, ...] = ()
    name: str = ""
    skip_broken: bool = False

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.images.decoder.in_chans

    def read(self, index: int) -> Pixels:
        """Decode an image.

        Raises:
            ImageError: It cannot be decoded, and such images are left out.
            DataError: It cannot be decoded.
        """
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
    """Open the data of a task; no image is decoded.

    Args:
        task: See :func:`~ijepa_zoo.eval.tasks.find_task`.
        data: For classes what :func:`~ijepa_zoo.data.splits.open_splits` takes, for
            CLEVR's tasks what :func:`~ijepa_zoo.data.clevr.open_clevr` takes.
        test: The test part, if `data` does not hold it (classes alone).
        workers: Processes that render scenes, if any are rendered.
        decoder: See `open_images`.
        skip_broken: Leave out images that cannot be decoded.
        progress: Show a progress bar while rendering.

    Returns:
        Training and test set; data without a test part are split 80:20 with a fixed seed. Their
        `notes` say what was left out or split.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
    """
    trained, tested = _open(task, data, test, workers, decoder, progress)
    known = trained.targets >= 0
    if not known.all():
        trained = _without(trained, known, "have no class")
    if tested is None:
        trained, tested = _split_off_test(trained)
    name = data_name(data)
    train, matched = (
        replace(part, name=name, skip_broken=skip_broken)
        for part in _matched(task, trained, tested)
    )
    return train, matched


def split_classes(
    labels: Targets, share: float, seed: int, use: int = 0
) -> tuple[Targets, Targets]:
    """Share images out at random, so that every class gives its share to within one image.

    Args:
        labels: `[n]` class numbers.
        share: Share of the second part, at most 0.5.
        seed: The run's seed.
        use: Number of the split, so that two splits of a seed differ.

    Returns:
        Sorted indices int64 of the first part and of the second, which has `n * share` images,
        rounded up or down; fewer only where classes have a single image, which stays in the first
        part, so that no class is missing there.
    """
    rng = numpy_generator(seed, Stream.EVAL_SPLIT, use)
    order = np.lexsort((rng.random(len(labels)), labels))
    marks = np.floor(np.arange(len(labels) + 1) * share + rng.random())
    second = np.zeros(len(labels), np.bool_)
    second[order] = np.diff(marks) > 0
    second &= np.bincount(labels)[labels] > 1
    return np.flatnonzero(~second), np.flatnonzero(second)


def split_to_choose(train: EvalSet, seed: int) -> tuple[Targets, Targets]:
    """Indices of the training images that heads are fitted to, and of the 10 % that choose one."""
    return split_classes(train.labels, CHOOSE_SHARE, seed)


def listed_rows(train: EvalSet, files: str | Path) -> Targets:
    """Indices of the images that a list names.

    Args:
        train: The training set.
        files: A text file in the format of the 1 % list of ImageNet: one file name a line
            (`n01440764_10043.JPEG`), or with folders (`n01440764/n01440764_10043.JPEG`) where
            names alone are not unique.

    Returns:
        Sorted int64.

    Raises:
        DataError: The list cannot be read or is empty, names an image that does not exist, or one
            of several of that name.
    """
    try:
        lines = Path(files).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list '{files}' cannot be read: {error}") from error
    wanted = dict.fromkeys(line.strip() for line in lines if line.strip())
    if not wanted:
        raise DataError(f"the list '{files}' is empty: it needs one file name a line")
    places = _by_name(train, {name.count("/") for name in wanted})
    missing = [name for name in wanted if name not in places]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(wanted)} images of '{files}' are not among the training "
            f"images: {some(missing)}; those are called, for example, '{train.images.name(0)}'"
        )
    several = [name for name in wanted if len(places[name]) > 1]
    if several:
        example = " and ".join(f"'{train.images.name(row)}'" for row in places[several[0]][:2])
        raise DataError(
            f"{len(several)} names of '{files}' mean several images ({some(several)}: {example}): "
            "write them with the folder, CLASS/NAME"
        )
    return np.array(sorted({places[name][0] for name in wanted}), np.int64)


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

    `most_frequent` is the share of the most frequent class in percent.
    """
    return {
        name: {
            **({"name": part.name} if part.name else {}),
            "split": part.split,
            "images": len(part),
            "classes": len(part.classes),
            "fingerprint": part.fingerprint(),
            "most_frequent": round(100 * np.bincount(part.labels).max() / len(part), 2),
        }
        for name, part in (("train", train), ("test", test))
    }


def _open(
    task: Task, data: Any, test: Any, workers: int, decoder: Decoder | None, progress: bool
) -> tuple[Split, Split | None]:
    if task.kind == "classes":
        if isinstance(data, str) and data.startswith(_SCENES):
            raise DataError(
                f"'{data}' renders scenes, which have numbers of objects and distances, but no "
                "classes: use `eval count` or `eval depth`, or the task 'count' or 'depth' "
                "(--task count) of linear and knn"
            )
        return open_splits(data, test, decoder)
    if test is not None or not isinstance(data, str | os.PathLike):
        raise DataError(
            f"task {task.name!r} takes one folder of CLEVR or scenes:TRAIN,TEST, which hold the "
            "test scenes too"
        )
    return open_clevr(data, task.kind, workers=workers, decoder=decoder, progress=progress)


def _split_off_test(whole: Split) -> tuple[Split, Split]:
    rows = split_classes(whole.targets, _TEST_SHARE, _TEST_SEED, use=1)
    note = (
        f"the data have no test part: {len(rows[0])} images train and {len(rows[1])} test, split "
        f"with seed {_TEST_SEED} whatever --seed is"
    )
    return whole.subset(rows[0], f"{whole.name} (80 %)", [note]), whole.subset(
        rows[1], f"{whole.name} (20 %)"
    )


def _matched(task: Task, trained: Split, tested: Split) -> tuple[EvalSet, EvalSet]:
    numbers, labels = np.unique(trained.targets, return_inverse=True)
    names = tuple(_name(trained, tested, number) for number in numbers.tolist())
    train = EvalSet(trained.images, labels.astype(np.int64), names, trained.name, trained.notes)
    _refuse_classes(task, train)
    seen = np.isin(tested.targets, numbers)
    if not seen.all():
        strange = np.unique(tested.targets[~seen]).tolist()
        named = some([_name(trained, tested, number) for number in strange])
        tested = _without(tested, seen, f"are of classes that training does not have ({named})")
    placed = np.searchsorted(numbers, tested.targets).astype(np.int64)
    test = EvalSet(tested.images, placed, names, tested.name, tested.notes)
    notes = tuple(_remarks(task, trained, train))
    absent = tuple(_absent(test))
    return replace(train, notes=train.notes + notes), replace(test, notes=test.notes + absent)


def _name(trained: Split, tested: Split, number: int) -> str:
    if number < 0:
        return "no class"
    return trained.classes.get(number) or tested.classes.get(number) or str(number)


def _without(labelled: Split, kept: npt.NDArray[np.bool_], why: str) -> Split:
    """The images that are kept, and a note about the others."""
    gone = np.flatnonzero(~kept)
    note = (
        f"{len(gone)} of {len(kept)} images of the {labelled.name} part {why} and are left out, "
        f"for example '{labelled.images.name(int(gone[0]))}'"
    )
    if not kept.any():
        raise DataError(f"all images of the {labelled.name} part {why}")
    return labelled.subset(np.flatnonzero(kept), labelled.name, [note])


def _refuse_classes(task: Task, train: EvalSet) -> None:
    if len(train.classes) < 2:
        raise DataError(
            f"the training images are all of one class, '{train.classes[0]}'; a probe needs at "
            "least two"
        )
    if task.kind == "classes" and task.num_classes not in (None, len(train.classes)):
        fitting = [t.name for t in TASKS.values() if t.num_classes == len(train.classes)]
        hint = " or ".join(f"--task {name}" for name in [*fitting, "classes"])
        raise DataError(
            f"{task.title} has {task.num_classes} classes, these data have {len(train.classes)} "
            f"('{train.classes[0]}', '{train.classes[1]}', ...): use {hint}"
        )


def _remarks(task: Task, trained: Split, train: EvalSet) -> Iterator[str]:
    classes = len(train.classes)
    if task.kind != "classes" and classes != task.num_classes:
        yield (
            f"{task.title} has {task.num_classes} classes, these training scenes have {classes}: "
            "accuracies do not compare with the paper's"
        )
    numbers = np.unique(trained.targets)
    if not trained.classes and (numbers != np.arange(classes)).any():
        yield (
            f"the labels are {classes} numbers from {numbers[0]} to {numbers[-1]}; they count as 0 "
            f"to {classes - 1} in their order"
        )
    single = np.flatnonzero(np.bincount(train.labels) == 1).tolist()
    if single:
        named = some([f"'{train.classes[k]}'" for k in single])
        yield f"{len(single)} of {classes} classes have a single training image ({named})"


def _absent(test: EvalSet) -> Iterator[str]:
    sizes = np.bincount(test.labels, minlength=len(test.classes))
    absent = [f"'{test.classes[k]}'" for k in np.flatnonzero(sizes == 0).tolist()]
    if absent:
        yield (
            f"the {test.split} part has no image of {len(absent)} of {len(sizes)} classes "
            f"({some(absent)})"
        )
