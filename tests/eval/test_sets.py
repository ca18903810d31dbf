"""Training and test sets: classes that agree, splits, and what is refused."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_probe import save

from ijepa_zoo.data.datasets import ArrayDataset, Subset
from ijepa_zoo.data.decode import Decoder
from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.sets import EvalSet, listed_rows, open_task, split_classes
from ijepa_zoo.eval.tasks import find_task


def put(folder, classes, level=0):
    """So many images of each class, of consecutive levels."""
    for name, count in classes.items():
        for number in range(count):
            save(np.full((2, 3, 3), level, np.uint8), folder / name / f"{number}.png")
            level += 1


def levels(data):
    return [int(np.asarray(data.images.read(i))[0, 0, 0]) for i in range(len(data))]


def opened(data, task="classes", **more):
    return open_task(find_task(task), data, **more)


def test_classes_of_folders_and_images_without_one_of_training(tmp_path):
    put(tmp_path / "train", {"b": 5, "c": 4, "x": 5})
    save(np.zeros((2, 3, 3), np.uint8), tmp_path / "train" / "zz.png")
    put(tmp_path / "val", {"a": 2, "b": 1, "c": 1, "d": 1}, 100)
    train, test = opened(tmp_path)
    assert train.class_names == test.class_names == ["b", "c", "x"]
    assert (levels(train), train.targets.tolist()) == ([*range(14)], [0] * 5 + [1] * 4 + [2] * 5)
    assert (levels(test), test.targets.tolist()) == ([102, 103], [0, 1])
    assert (train.name, test.name) == ("train", "val")
    assert "1 of 15" in train.notes[0]
    assert all(text in test.notes[0] for text in ("3 of 5", "(a, d)", "val/a/0.png"))


def test_one_folder_is_split_with_a_fixed_seed_that_is_recorded(tmp_path):
    put(tmp_path, {"a": 50, "b": 15})
    train, test = opened(tmp_path)
    assert (len(train), np.bincount(test.targets).tolist()) == (52, [10, 3])
    assert sorted(levels(train) + levels(test)) == list(range(65))
    assert "seed 0" in train.notes[0]
    assert levels(test) == [12, 15, 2, 24, 34, 39, 40, 44, 46, 7, 60, 61, 58]


@pytest.mark.parametrize(
    ("data", "task", "test", "named"),
    [
        ("one", "classes", None, "'a'"),
        ("two", "classes", "one/val", "'val'"),
        ("two", "cifar100", None, "100 classes"),
        ("scenes:60,8", "classes", None, "--task count"),
        ("gone", "classes", None, "gone"),
        ("scenes:20,20", "count", "x", "CLEVR"),
    ],
)
def test_data_that_do_not_fit_the_task_are_refused(tmp_path, monkeypatch, data, task, test, named):
    put(tmp_path / "one", {"train/a": 5, "val/c": 1})
    put(tmp_path / "two", {"a": 5, "b": 5})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=named):
        opened(data, task, test=test)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 100), st.booleans())
def test_splits_are_stratified_and_keep_every_class(labels, seed, several):
    """Images of several classes count for the rarest one."""
    labels = np.array(labels)
    sizes = np.bincount(labels)
    matrix = np.eye(len(sizes), dtype=np.uint8)[labels]
    matrix[:, sizes.argmax()] = 1  # also of the class that has the most images
    first, second = split_classes(matrix if several else labels, 0.1, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert {*labels[first]} == {*labels}
    held = np.bincount(labels[second], minlength=len(sizes))
    assert (np.abs(held - 0.1 * sizes) < 1).all()
    again, other = (split_classes(np.arange(999) % 7, 0.1, seed + n)[1].tolist() for n in (0, 1))
    assert again != other


def test_fingerprints_tell_sets_apart_and_not_places(tmp_path):
    for folder in ("one", "two"):
        put(tmp_path / folder, {"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2})
    (one, test), (two, _) = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert one.fingerprint() == two.fingerprint() != test.fingerprint()
    (tmp_path / "two" / "train" / "b").rename(tmp_path / "two" / "train" / "c")
    assert opened(tmp_path / "two")[0].fingerprint() != one.fingerprint()
    before = one.files_state
    os.utime(tmp_path / "one" / "train" / "a" / "3.png", (1, 1))
    changed = opened(tmp_path / "one")[0]
    assert before != changed.files_state
    assert one.fingerprint() == changed.fingerprint()


def test_lists_of_training_images(tmp_path):
    put(tmp_path, {"train/a": 5, "train/b": 5, "val/a": 1, "val/b": 1})
    (tmp_path / "train" / "b" / "4.png").rename(tmp_path / "train" / "b" / "own.png")
    train, file = opened(tmp_path)[0], tmp_path / "list.txt"
    file.write_text("b/3.png\n\nown.png \na/1.png\n")
    names = [train.images.name(row)[-7:] for row in listed_rows(train, file)]
    assert names == ["a/1.png", "b/3.png", "own.png"]
    for lines in ("a/1.png\na/99.png", "", "3.png"):
        file.write_text(lines)
        with pytest.raises(DataError, match=lines[-6:] or "list.txt"):
            listed_rows(train, file)
    with pytest.raises(DataError, match=r"nothing\.txt"):
        listed_rows(train, tmp_path / "nothing.txt")


def test_a_changed_pixel_of_an_array_is_noticed():
    pixels, states = np.zeros((40, 8, 8, 3), np.uint8), set()
    for level in (0, 9):
        pixels[1] = level
        whole = ArrayDataset([pixels.copy()], Decoder(), targets=np.arange(40) % 2)
        part = Subset(Subset(whole, np.arange(30)), np.arange(3))
        states.add(EvalSet(part, part.targets, {0: "a", 1: "b"}, "train").files_state)
    assert len(states) == 2
