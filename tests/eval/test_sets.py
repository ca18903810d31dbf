"""Training and test sets: classes that agree, splits, and what is refused."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ijepa_zoo.data.datasets import ArrayDataset
from ijepa_zoo.data.decode import Decoder
from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.sets import EvalSet, listed_rows, open_task, split_classes, split_off_val
from ijepa_zoo.eval.tasks import find_task

CLASSES = find_task("classes")


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, classes: dict[str, int], first: int = 0) -> None:
    """So many images of each class, of consecutive levels."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(png(first))
            first += 1


def levels(data: EvalSet) -> list[int]:
    return [int(np.asarray(data.images.read(i))[0, 0, 0]) for i in range(len(data))]


def opened(data, task=CLASSES, **more):
    train, test = open_task(task, data, **more)
    for part in (train, test):
        assert len(part) == len(part.images)
        assert part.targets.dtype == np.int64
    assert train.class_names == test.class_names
    return train, test


def test_class_folders(tmp_path):
    put(tmp_path / "train", {"cat": 6, "dog": 5})
    put(tmp_path / "val", {"cat": 1, "dog": 2}, 100)
    train, test = opened(tmp_path)
    assert train.class_names == ["cat", "dog"]
    assert (levels(train), train.targets.tolist()) == ([*range(11)], [0] * 6 + [1] * 5)
    assert (levels(test), test.targets.tolist()) == ([100, 101, 102], [0, 1, 1])
    assert (train.name, test.name, train.notes, test.notes) == ("train", "val", (), ())


def test_one_folder_is_split_with_a_fixed_seed_that_is_recorded(tmp_path):
    put(tmp_path, {"a": 50, "b": 15})
    train, test = opened(tmp_path)
    assert (len(train), np.bincount(test.targets).tolist()) == (52, [10, 3])
    assert sorted(levels(train) + levels(test)) == list(range(65))
    assert "seed 0" in train.notes[0]
    assert levels(test) == [12, 15, 2, 24, 34, 39, 40, 44, 46, 7, 60, 61, 58]


def test_classes_of_the_test_set_keep_the_numbers_of_training(tmp_path):
    put(tmp_path / "train", {"b": 5, "c": 5, "x": 5})
    put(tmp_path / "val", {"a": 2, "b": 1, "c": 1, "d": 1}, 100)
    train, test = opened(tmp_path)
    assert train.class_names == ["b", "c", "x"]
    assert (test.targets.tolist(), levels(test)) == ([0, 1], [102, 103])
    (note,) = test.notes
    assert "3 of 5" in note
    assert "(a, d)" in note
    assert "val/a/0.png" in note
    put(tmp_path / "none", {"e": 1})
    with pytest.raises(DataError, match="'none'"):
        opened(tmp_path / "train", test=tmp_path / "none")


def test_images_without_a_class_are_left_out_and_counted(tmp_path):
    put(tmp_path / "train", {"a": 5, "b": 5})
    (tmp_path / "train" / "zz.png").write_bytes(png(0))
    put(tmp_path / "val", {"a": 1, "b": 1})
    train, _ = opened(tmp_path)
    assert len(train) == 10
    assert "1 of 11" in train.notes[0]


def test_labels_that_do_not_start_at_zero(tmp_path):
    images = np.zeros((30, 4, 4, 3), np.uint8)
    for name, labels in (("train", [1, 4, 9]), ("test", [9, 4, 1])):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.array(labels * 10))
    train, test = opened(str(tmp_path / "train.npz"), test=str(tmp_path / "test.npz"))
    assert (train.targets[:3].tolist(), test.targets[:3].tolist()) == ([0, 1, 2], [2, 1, 0])
    assert train.class_names == ["1", "4", "9"]


@pytest.mark.parametrize(
    ("data", "task", "options", "named"),
    [
        ("one", "classes", {}, "a"),
        ("two", "cifar100", {}, "100 classes"),
        ("scenes:60,8", "classes", {}, "--task count"),
        ("gone", "classes", {}, "gone"),
        ("scenes:20,20", "count", {"test": "x"}, "CLEVR"),
    ],
)
def test_data_that_do_not_fit_the_task_are_refused(
    tmp_path, monkeypatch, data, task, options, named
):
    put(tmp_path / "one" / "train", {"a": 5})
    put(tmp_path / "one" / "val", {"a": 1, "b": 1})
    put(tmp_path / "two", {"a": 5, "b": 5})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=named):
        opened(data, find_task(task), **options)


def clevr(root: Path, split: str, counts: list[int]) -> None:
    (root / "images" / split).mkdir(parents=True)
    (root / "scenes").mkdir(exist_ok=True)
    scenes = []
    for number, count in enumerate(counts):
        name = f"CLEVR_{split}_{number:06d}.png"
        (root / "images" / split / name).write_bytes(png(number))
        objects = [{"pixel_coords": [1, 1, 7.0 + count]}] * count
        scenes.append({"image_filename": name, "objects": objects})
    path = root / "scenes" / f"CLEVR_{split}_scenes.json"
    path.write_text(json.dumps({"scenes": scenes}))


def test_counts_that_training_does_not_have_are_left_out(tmp_path):
    clevr(tmp_path, "train", [3, 4, 5, 6, 7, 8, 9, 10] * 2)
    clevr(tmp_path, "val", [10, 2, 3, 11])
    train, test = opened(tmp_path, find_task("count"))
    assert train.targets.tolist() == list(range(8)) * 2
    assert train.class_names[0] == "3 objects"
    assert (test.targets.tolist(), levels(test), train.notes) == ([7, 0], [0, 2], ())
    assert "11 objects, 2 objects" in test.notes[0]
    train, _ = opened(tmp_path, find_task("depth"))
    assert "Clevr/Dist has 6 classes" in train.notes[0]


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200),
    st.sampled_from([0.1, 0.2]),
    st.integers(0, 100),
)
def test_splits_are_stratified_and_keep_every_class(labels, share, seed):
    labels = np.array(labels)
    first, second = split_classes(labels, share, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert (np.diff(first) > 0).all()
    assert (np.diff(second) > 0).all()
    assert {*labels[first]} == {*labels}
    sizes = np.bincount(labels)
    held = np.bincount(labels[second], minlength=len(sizes))
    assert (np.abs(held - share * sizes) < 1).all()
    np.testing.assert_array_equal(split_classes(labels, share, seed)[1], second)


def test_the_split_depends_on_seed_and_use_and_is_fair_to_every_image():
    labels, chosen = np.array([0] * 13 + [1, 1] + [2] * 25), np.zeros(40)
    for seed in range(1000):
        chosen[split_classes(labels, 0.1, seed)[1]] += 1
    # 100 expected, standard deviation sqrt(1000 * 0.1 * 0.9) = 9.5: five of them
    assert np.abs(chosen - 100).max() < 48
    many = np.arange(1000) % 7
    base = split_classes(many, 0.1, 3)[1]
    assert len(base) in (100, 101)
    for other in (split_classes(many, 0.1, 4), split_classes(many, 0.1, 3, use=1)):
        assert not np.array_equal(other[1], base)


def test_images_of_several_classes_count_for_the_rarest():
    rng = np.random.default_rng(0)
    matrix = (rng.random((400, 6)) < [0.8, 0.5, 0.2, 0.1, 0.05, 0]).astype(np.uint8)
    matrix[7] = 1  # the only image of the last class
    for seed in range(20):
        fit, choose = split_classes(matrix, 0.1, seed)
        assert 7 in fit
        assert len(choose) in (39, 40)
        assert matrix[choose][:, 4].sum() == pytest.approx(matrix[:, 4].sum() / 10, abs=2)


def test_fingerprints_tell_sets_apart_and_not_places(tmp_path):
    for folder in ("one", "two"):
        put(tmp_path / folder / "train", {"a": 6, "b": 6})
        put(tmp_path / folder / "val", {"a": 2, "b": 2})
    (one, test), (two, _) = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert one.fingerprint() == two.fingerprint() != test.fingerprint()
    assert len(split_off_val(one, 5)[1]) in (1, 2)
    put(tmp_path / "two" / "train", {"a": 7})
    more = opened(tmp_path / "two")[0]
    (tmp_path / "two" / "train" / "b").rename(tmp_path / "two" / "train" / "c")
    renamed = opened(tmp_path / "two")[0]
    assert len({part.fingerprint() for part in (one, more, renamed)}) == 3
    before, file = one.files_state, tmp_path / "one" / "train" / "a" / "3.png"
    file.write_bytes(png(200))
    os.utime(file, (1, 1))
    changed = opened(tmp_path / "one")[0]
    assert before != changed.files_state
    assert one.fingerprint() == changed.fingerprint()


def test_one_changed_image_of_an_array_is_other_data():
    images, targets = np.zeros((200, 4, 4, 3), np.uint8), np.zeros(200, np.int64)
    before, after = (
        EvalSet(ArrayDataset([images], Decoder()), targets, {}, "train") for _ in range(2)
    )
    assert before.files_state
    images[77, 1, 1, 1] = 1
    assert after.files_state != before.files_state


def test_tensors_of_a_fast_decoder_become_the_pixels_of_pillow():
    class Fast(ArrayDataset):
        def read(self, index):
            return torch.from_numpy(np.array(super().read(index))).permute(2, 0, 1)

    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 5, 3), np.uint8)
    images = Fast([pixels], Decoder(as_tensor=True))
    found = EvalSet(images, np.arange(2), {}, "train").read(1)
    assert isinstance(found, Image.Image)
    assert (np.asarray(found) == pixels[1]).all()


def test_lists_of_training_images(tmp_path):
    put(tmp_path / "train", {"a": 5, "b": 5})
    put(tmp_path / "val", {"a": 1, "b": 1})
    (tmp_path / "train" / "b" / "4.png").rename(tmp_path / "train" / "b" / "own.png")
    train, file = opened(tmp_path)[0], tmp_path / "list.txt"
    file.write_text("b/3.png\n\nown.png \na/1.png\n")
    assert [train.images.name(row)[-7:] for row in listed_rows(train, file)] == [
        "a/1.png",
        "b/3.png",
        "own.png",
    ]
    for lines, named in (("a/1.png\na/99.png", "a/99.png"), ("", "list.txt"), ("3.png", "3.png")):
        file.write_text(lines)
        with pytest.raises(DataError, match=named):
            listed_rows(train, file)
    with pytest.raises(DataError, match=r"nothing\.txt"):
        listed_rows(train, tmp_path / "nothing.txt")
