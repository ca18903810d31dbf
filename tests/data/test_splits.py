"""The training and the test split, from what a user names."""

import json
import pickle

import numpy as np
import pytest
from inputs import Photos, levels, noise, png, put, shard
from torchvision.datasets import CIFAR10

from ijepa_zoo.data.datasets import ArrayDataset, Subset
from ijepa_zoo.data.decode import Decoder
from ijepa_zoo.data.splits import open_splits
from ijepa_zoo.errors import DataError


def classes(split):
    return [split.classes[int(number)] for number in split.targets]


@pytest.mark.parametrize(
    "names", [("train", "testing"), ("training", "validation"), ("train", "valid")]
)
def test_folders_of_splits(tmp_path, names):
    put(tmp_path / names[0], {"cat/day/1.png": png(1), "dog/night/2.png": png(2)})
    put(tmp_path / names[1], {"ape/3.png": png(3), "dog/images/4.png": png(4)})
    for train, test in (open_splits(tmp_path), open_splits(*(tmp_path / name for name in names))):
        assert (train.name, test.name) == names
        assert train.classes == test.classes == {0: "ape", 1: "cat", 2: "dog"}
        assert (classes(train), classes(test)) == (["cat", "dog"], ["ape", "dog"])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train/cat/1.png", "val/cat/1.png", "test/cat/1.png"], ("train", "test")),
        (["train/cat/1.png", "val/cat/1.png", "test/1.png"], ("train", "val")),  # a hidden one
        (["train/cat/1.png"], ("train", None)),
        (["cat/1.png"], ("all", None)),
        (["1.png"], "no classes"),
        (["train/cat/1.png", "val/1.png"], "test split"),
        (["train/n01/images/1.png", "val/images/2.png"], "images"),  # Tiny-ImageNet as unpacked
    ],
)
def test_the_test_split_comes_before_the_validation_split(tmp_path, files, expected):
    put(tmp_path, dict.fromkeys(files, png()))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            open_splits(tmp_path)
    else:
        train, test = open_splits(tmp_path)
        assert (train.name, test and test.name) == expected


def test_shards_named_after_their_split_beside_parquet(tmp_path):
    put(tmp_path, {"train-0.parquet": b"PAR1"})
    shard(tmp_path / "set-train-0.tar", {"1.png": png(1), "1.cls": b"3"})
    shard(tmp_path / "set-train-1.tar", {"2.png": png(2), "2.cls": b"4"})
    shard(tmp_path / "set-val-0.tar", {"3.png": png(3), "3.cls": b"4"})
    train, test = open_splits(tmp_path)
    assert (levels(train.images), levels(test.images)) == ([1, 2], [3])
    assert (classes(train), classes(test)) == (["3", "4"], ["4"])
    (tmp_path / "set-val-0.tar").unlink()
    shard(tmp_path / "latest-train-2.tar", {"4.png": png(4), "4.cls": b"3"})
    assert open_splits(tmp_path)[1] is None  # no word of it is test


def test_shards_whose_names_end_in_their_split(tmp_path):
    shard(tmp_path / "settrain000.tar", {"1.png": png(1), "1.cls": b"3"})
    shard(tmp_path / "setVal000.tar", {"3.png": png(3), "3.cls": b"3"})
    train, test = open_splits(tmp_path)
    assert (levels(train.images), levels(test.images)) == ([1], [3])


@pytest.mark.parametrize(
    ("link", "target", "given", "named"),
    [
        ("val/dog/x.png", "../../train/cat/1.png", ["."], r"1 .*x\.png"),
        ("val/cat", "../train/cat", ["."], r"1 .*cat/1\.png"),
        ("again", "train", ["train", "again"], r"2 .*cat/1\.png"),
        ("t.tar", "s.tar", ["s.tar", "t.tar"], r"t\.tar/1\.png"),
    ],
)
def test_images_of_both_splits_are_reported(tmp_path, link, target, given, named):
    put(tmp_path, {"train/cat/1.png": png(1), "train/dog/2.png": png(2), "val/dog/3.png": png(3)})
    shard(tmp_path / "s.tar", {"1.png": png(), "1.cls": b"3"})
    (tmp_path / link).symlink_to(target)
    with pytest.raises(DataError, match=named):
        open_splits(*(tmp_path / name for name in given))


def test_datasets_with_one_label_and_with_several():
    named = Photos(targets=[1, 0, 1], classes=["x", "y"])
    train, test = open_splits(Photos(targets=[0, 1, 1]), named)  # numbers without names stay
    assert (train.name, test.name) == ("train", "test")
    assert (train.targets.tolist(), test.targets.tolist()) == ([0, 1, 1], [1, 0, 1])
    # one label beside several: both become matrices; images of unknown classes have none
    train = Photos(targets=np.array([[1, 1], [0, 1], [0, 0]]), classes=["a", "c"])
    test = Photos(targets=[1, -1, 0], classes=["b", "c"])
    splits = open_splits(train, test)
    assert [split.targets.tolist() for split in splits] == [
        [[1, 0, 1], [0, 0, 1], [0, 0, 0]],
        [[0, 0, 1], [0, 0, 0], [0, 1, 0]],
    ]
    assert open_splits(test, train)[0].targets.tolist() == splits[1].targets.tolist()
    assert splits[0].with_classes(["c"], several=True).targets.tolist() == [[1], [1], [0]]
    known = open_splits(test)[0].with_classes(["c", "x"], several=False)
    assert (known.targets.tolist(), known.classes) == ([0, -1, -1], {0: "c", 1: "x"})
    arrays = ArrayDataset([noise(16, 4, 3).reshape(4, 4, 4, 3)], Decoder(), targets=np.arange(4))
    arrays = Subset(arrays, np.array([2, 0]))
    assert [split.targets.tolist() for split in open_splits(arrays, arrays)] == [[2, 0], [2, 0]]
    matrix = Photos(targets=np.eye(3, dtype=int))
    assert open_splits(matrix, matrix)[1].targets.tolist() == np.eye(3).tolist()
    for given, message in (
        ([noise(8, 8).reshape(2, 4, 8, 3)], "no classes"),
        ([Photos(targets=[-1] * 3)], "no cl"),
        ([matrix, Photos(targets=np.eye(3, 4, dtype=int))], r"\(3, 3\) and \(3, 4"),
        ([matrix, Photos(targets=[0, 1, 1])], r"\(3, 3\) and \(3"),
        ([matrix, train], r"\(3, 3\) and \(3, 2"),
        ([train, named], "in common"),
    ):
        with pytest.raises(DataError, match=message):
            open_splits(*given)


def test_cifar10(tmp_path, monkeypatch):
    """Files of 10 images, with torchvision's checksums off."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        content = {"data": noise(10, 3072, 1, seed), "labels": list(range(10))}
        put(folder, {name: pickle.dumps(content)})
    put(folder, {"batches.meta": pickle.dumps({"label_names": list("abcdefghij")})})
    for data in (tmp_path, folder, f"torch/cifar10:root={tmp_path}"):
        train, test = open_splits(data)
        assert (len(train.images), len(test.images)) == (50, 10)
        assert classes(test) == list("abcdefghij")
    expected = noise(10, 3072, 1, 5)[3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(test.images.read(3)), expected)
    train, test = open_splits(f"torch/cifar10:root={tmp_path},split=test")
    assert (len(train.images), test) == (10, None)


def test_other_datasets_of_torchvision(tmp_path):
    pets, breeds = tmp_path / "oxford-iiit-pet", ["Abyssinian_1", "beagle_3", "Abyssinian_2"]
    put(pets, {f"images/{name}.jpg": png(i) for i, name in enumerate(breeds)})
    lines = {"trainval": b"Abyssinian_1 1 1 1\nbeagle_3 2 2 1\n", "test": b"Abyssinian_2 1 1 1\n"}
    put(pets, {f"annotations/{split}.txt": text for split, text in lines.items()})
    train, test = open_splits(f"torch/oxford_iiit_pet:root={tmp_path}")
    assert (train.name, classes(train)) == ("trainval", ["Abyssinian", "Beagle"])
    assert classes(test) == ["Abyssinian"]
    put(tmp_path / "eurosat/2750", {"Forest/1.jpg": png(1), "River/2.jpg": png(2)})
    train, test = open_splits(f"torch/eurosat:root={tmp_path}")  # in one part
    assert (classes(train), test) == (["Forest", "River"], None)


def test_inaturalist_and_places(tmp_path):
    put(tmp_path / "i", {"train_val2018/a/1.png": png(1), "train_val2018/b/2.png": png(2)})
    for split, name, number in (("train", "a/1.png", 7), ("val", "b/2.png", 5)):
        found = {
            "images": [{"id": 3, "file_name": f"train_val2018/{name}"}],
            "annotations": [{"image_id": 3, "category_id": number}],
            "categories": [{"id": 5, "name": "five"}, {"id": 7, "name": "seven"}],
        }
        (tmp_path / f"i/{split}2018.json").write_text(json.dumps(found))
    lists = {"train_places205.csv": b"a/a b.png 12\n", "val_places205.csv": b"c.png 3\n\n"}
    put(tmp_path / "p", {"images256/a/a b.png": png(1), "images256/c.png": png(2), **lists})
    for folder, numbers in (("i", [7, 5]), ("p", [12, 3])):
        splits = open_splits(tmp_path / folder)
        assert [split.targets.tolist() for split in splits] == [[number] for number in numbers]
        assert [levels(split.images) for split in splits] == [[1], [2]]
    assert classes(open_splits(tmp_path / "i")[1]) == ["five"]
    (tmp_path / "i/val2018.json").write_text('{"images": []}')
    put(tmp_path / "p", {"val_places205.csv": b"d.png 3\n"})
    for folder, named in (("i", r"val2018\.json"), ("p", r"d\.png")):
        with pytest.raises(DataError, match=named):
            open_splits(tmp_path / folder)
