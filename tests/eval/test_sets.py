"""Training and test sets: layouts of all kinds, classes that agree, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ijepa_zoo.data.datasets import ArrayDataset, Subset
from ijepa_zoo.data.decode import Decoder
from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.sets import EvalSet, open_task, split_classes, split_off_val
from ijepa_zoo.eval.tasks import Task, find_task

CLASSES = find_task("classes")


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, classes: dict[str, int], first: int = 0) -> None:
    """So many images of each class, of levels that go on."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(png(first))
            first += 1


def levels(data: EvalSet) -> list[int]:
    return [int(np.asarray(data.images.read(i))[0, 0, 0]) for i in range(len(data))]


def opened(data: Any, task: Task = CLASSES, **more: Any) -> tuple[EvalSet, EvalSet]:
    train, test = open_task(task, data, **more)
    for part in (train, test):
        assert len(part) == len(part.images) == len(part.labels)
        assert part.labels.dtype == np.int64
    assert train.classes == test.classes
    return train, test


@pytest.mark.parametrize("test", ["val", "test", "validation"])
def test_class_folders(tmp_path: Path, test: str) -> None:
    put(tmp_path / "train", {"cat": 6, "dog": 5})
    put(tmp_path / test, {"cat": 1, "dog": 2}, 100)
    train, tested = opened(tmp_path)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 6 + [1] * 5
    assert levels(train) == list(range(11))
    assert (levels(tested), tested.labels.tolist()) == ([100, 101, 102], [0, 1, 1])
    assert (train.split, tested.split) == ("train", test)
    assert train.notes == tested.notes == ()


def test_one_folder_is_split_with_a_fixed_seed_that_is_recorded(tmp_path: Path) -> None:
    put(tmp_path, {"a": 50, "b": 15})
    train, test = opened(tmp_path)
    assert (len(train), len(test)) == (52, 13)
    assert np.bincount(test.labels).tolist() == [10, 3]
    assert sorted(levels(train) + levels(test)) == list(range(65))
    assert "52 images train and 13 test, split with seed 0" in train.notes[0]
    assert levels(opened(tmp_path)[1]) == levels(test)
    assert levels(test) == [12, 15, 2, 24, 34, 39, 40, 44, 46, 7, 60, 61, 58]


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    put(tmp_path, {"car": 10, "train": 10})
    assert opened(tmp_path)[0].classes == ("car", "train")


def test_classes_of_the_test_set_keep_the_numbers_of_training(tmp_path: Path) -> None:
    put(tmp_path / "a", {"x": 5, "y": 5, "z": 5})
    put(tmp_path / "b", {"y": 2, "z": 1}, 100)
    train, test = opened(tmp_path / "a", test=tmp_path / "b")
    assert train.classes == ("x", "y", "z")
    assert test.labels.tolist() == [1, 1, 2]


def test_a_class_unseen_in_training_is_dropped_and_said(tmp_path: Path) -> None:
    put(tmp_path / "train", {"b": 5, "c": 5})
    put(tmp_path / "val", {"a": 2, "b": 1, "c": 1, "d": 1}, 100)
    train, test = opened(tmp_path)
    assert (train.classes, test.labels.tolist(), levels(test)) == (("b", "c"), [0, 1], [102, 103])
    assert test.notes == (
        "3 of 5 images of the val part are of classes that training does not have (a, d) and are "
        f"left out, for example '{tmp_path}/val/a/0.png'",
    )
    put(tmp_path / "none", {"e": 1})
    with pytest.raises(DataError, match=r"'train' and 'none' have no name in common, .* 'e'"):
        opened(tmp_path / "train", test=tmp_path / "none")


def test_images_beside_the_class_folders_are_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path / "train", {"a": 5, "b": 5})
    (tmp_path / "train" / "zz.png").write_bytes(png(0))
    put(tmp_path / "val", {"a": 1, "b": 1})
    train, _ = opened(tmp_path)
    assert len(train) == 10
    assert "1 of 11 images of the train part have no class and are left out" in train.notes[0]


def test_labels_that_do_not_start_at_zero(tmp_path: Path) -> None:
    images = np.zeros((30, 4, 4, 3), np.uint8)
    for name, labels in (("train", [1, 4, 9]), ("test", [9, 4, 1])):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.array(labels * 10))
    train, test = opened(str(tmp_path / "train.npz"), test=str(tmp_path / "test.npz"))
    assert (train.labels[:3].tolist(), test.labels[:3].tolist()) == ([0, 1, 2], [2, 1, 0])
    assert train.classes == ("1", "4", "9")


class Photos:
    """A map-style data set of a user's own."""

    def __init__(self, targets: list[int]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((2, 2, 3), index, np.uint8), self.targets[index]


def test_data_sets_in_memory() -> None:
    train, test = opened(Photos([0, 1] * 6), test=Photos([1, 0]))
    assert (levels(test), test.labels.tolist()) == ([0, 1], [1, 0])
    assert train.notes == ()
    train, test = opened(Photos([0, 1] * 10))
    assert (len(train), len(test)) == (16, 4)


def test_too_little_to_train_on(tmp_path: Path) -> None:
    put(tmp_path / "train", {"a": 20})
    put(tmp_path / "val", {"a": 1, "b": 1})
    with pytest.raises(DataError, match="one class, a"):
        opened(tmp_path)


def test_a_class_of_one_training_image_stays_among_those_fitted(tmp_path: Path) -> None:
    put(tmp_path / "train", {"a": 30, "b": 1, "c": 1})
    put(tmp_path / "val", {"a": 1, "c": 1}, 100)
    train, test = opened(tmp_path)
    assert test.notes == ("the val part has no image of 1 of 3 classes ('b')",)
    for seed in range(30):
        fit, choose = split_off_val(train, seed)
        assert set(train.labels[fit]) == {0, 1, 2}
        assert set(train.labels[choose]) == {0}
        assert len(fit) + len(choose) == 32


def test_rendered_scenes_have_no_classes() -> None:
    with pytest.raises(DataError, match="--task count"):
        opened("scenes:60,8")


def test_what_is_no_labelled_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images found"):
        opened(tmp_path)
    (tmp_path / "1.png").write_bytes(png(0))
    with pytest.raises(DataError, match=tmp_path.name):
        opened(tmp_path)
    with pytest.raises(DataError, match="gone"):
        opened(tmp_path / "gone")
    with pytest.raises(DataError, match="no classes"):
        opened(np.zeros((20, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="CLEVR"):
        opened("scenes:20,20", find_task("count"), test="x")


def test_the_number_of_classes_must_be_the_tasks(tmp_path: Path) -> None:
    put(tmp_path, {f"c{k}": 5 for k in range(10)})
    assert len(opened(tmp_path, find_task("cifar10"))[0].classes) == 10
    with pytest.raises(DataError, match=r"100 classes, .* 10 "):
        opened(tmp_path, find_task("cifar100"))


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


def test_a_test_count_that_never_occurs_in_training_is_dropped(tmp_path: Path) -> None:
    clevr(tmp_path, "train", [3, 4, 5, 6, 7, 8, 9, 10] * 2)
    clevr(tmp_path, "val", [10, 2, 3, 11])
    train, test = opened(tmp_path, find_task("count"))
    assert train.labels.tolist() == list(range(8)) * 2
    assert train.classes[0] == "3 objects"
    assert (test.labels.tolist(), levels(test)) == ([7, 0], [0, 2])
    note = test.notes[0]
    assert "2 of 4 images of the val part" in note
    assert "2 objects" in note
    assert "11 objects" in note
    assert train.notes == ()


def test_fewer_classes_of_scenes_are_said(tmp_path: Path) -> None:
    clevr(tmp_path, "train", [3, 4] * 6)
    clevr(tmp_path, "val", [3, 4])
    train, _ = opened(tmp_path, find_task("depth"))
    assert train.classes == ("9.5 to 10", "10 to 100")
    assert "Clevr/Dist has 6 classes, these training scenes have 2" in train.notes[0]


def test_rendered_scenes() -> None:
    train, test = opened("scenes:60,8", find_task("count"))
    assert train.classes == tuple(f"{n} objects" for n in range(3, 11))
    assert (len(train), len(test)) == (60, 8)


def test_the_split_is_stratified_seeded_and_covers_everything() -> None:
    labels = np.random.default_rng(0).choice(7, 1003, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.04, 0.01])
    fit, choose = split_classes(labels, 0.1, 3)
    assert sorted([*fit, *choose]) == list(range(1003))
    assert len(choose) in (100, 101)
    sizes, held = np.bincount(labels), np.bincount(labels[choose], minlength=7)
    assert (np.abs(held - 0.1 * sizes) < 1).all()
    assert (np.diff(fit) > 0).all()
    assert (np.diff(choose) > 0).all()
    again = split_classes(labels, 0.1, 3)
    np.testing.assert_array_equal(again[1], choose)
    for other in (split_classes(labels, 0.1, 4), split_classes(labels, 0.1, 3, use=1)):
        assert not np.array_equal(other[1], choose)


def test_the_split_is_fair_to_every_image_and_keeps_every_class() -> None:
    labels = np.array([0] * 13 + [1, 1] + [2] * 25)
    chosen = np.zeros(40)
    for seed in range(2000):
        fit, choose = split_classes(labels, 0.1, seed)
        assert set(labels[fit]) == {0, 1, 2}
        assert len(choose) == 4
        chosen[choose] += 1
    # 200 expected, standard deviation sqrt(2000 * 0.1 * 0.9) = 13.4: five of them
    assert np.abs(chosen - 200).max() < 67


def test_heads_are_chosen_by_a_tenth(tmp_path: Path) -> None:
    put(tmp_path / "train", {"a": 20, "b": 30})
    put(tmp_path / "val", {"a": 1, "b": 1})
    train, _ = opened(tmp_path)
    fit, choose = split_off_val(train, 5)
    assert (len(fit), np.bincount(train.labels[choose]).tolist()) == (45, [2, 3])


def test_fingerprints_tell_sets_apart_and_not_places(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        put(tmp_path / folder / "train", {"a": 6, "b": 6})
        put(tmp_path / folder / "val", {"a": 2, "b": 2})
    (one, test), (two, _) = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert one.fingerprint() == two.fingerprint() != test.fingerprint()
    put(tmp_path / "two" / "train", {"a": 7})
    assert opened(tmp_path / "two")[0].fingerprint() != one.fingerprint()
    (tmp_path / "two" / "train" / "b").rename(tmp_path / "two" / "train" / "c")
    assert opened(tmp_path / "two", test=None)[0].fingerprint() != one.fingerprint()


def test_fingerprints_hold_rows_and_classes(tmp_path: Path) -> None:
    images = np.zeros((20, 4, 4, 3), np.uint8)
    for name, labels in (("one", [1, 2]), ("two", [1, 3])):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.array(labels * 10))
    one, two = (str(tmp_path / f"{name}.npz") for name in ("one", "two"))
    named = [opened(path, test=one)[0].fingerprint() for path in (one, two)]
    assert named[0] != named[1]
    images, labels = opened(one, test=one)[0].images, np.array([0, 1])
    parts = (Subset(images, np.array(rows)) for rows in ([0, 1], [2, 1]))
    first, second = (EvalSet(part, labels, ("a", "b"), "test").fingerprint() for part in parts)
    assert first != second


def test_other_files_of_the_same_names_are_other_data(tmp_path):
    import os

    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    before = open_task(find_task("classes"), str(tmp_path))[0]
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "cat" / "3.png")
    os.utime(tmp_path / "cat" / "3.png", (1, 1))
    after = open_task(find_task("classes"), str(tmp_path))[0]
    parts = [open_task(find_task("classes"), str(tmp_path))[1], after, before]
    assert before.fingerprint() == after.fingerprint()
    assert len({part.files_state for part in parts}) == 2


def test_one_changed_image_of_an_array_is_other_data():
    import numpy as np

    images = np.zeros((200, 4, 4, 3), np.uint8)
    before, after = (
        EvalSet(ArrayDataset([images], Decoder()), np.zeros(200, np.int64), ("a", "b"), "test")
        for _ in range(2)
    )
    assert len(before.files_state) == 16
    images[77, 1, 1, 1] = 1
    assert after.files_state != before.files_state


def test_tensors_of_a_fast_decoder_become_the_pixels_of_pillow():
    import torch

    class Fast(ArrayDataset):
        def read(self, index: int) -> Any:
            return torch.from_numpy(np.array(super().read(index))).permute(2, 0, 1)

    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 5, 3), np.uint8)
    images = Fast([pixels], Decoder(as_tensor=True))
    found = EvalSet(images, np.arange(2), ("a", "b"), "train").read(1)
    assert isinstance(found, Image.Image)
    assert (np.asarray(found) == pixels[1]).all()
