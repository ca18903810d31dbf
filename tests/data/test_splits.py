"""The training and the test split, from what a user names."""

import json
from pathlib import Path

import numpy as np
import pytest
from inputs import labels, levels, noise, png, put, shard
from test_sources import cifar10

from ijepa_zoo.data import Decoder
from ijepa_zoo.data.splits import Split, list_split, open_splits
from ijepa_zoo.errors import DataError


def classes(split: Split) -> list[str]:
    return [split.classes[int(number)] for number in split.targets]


def test_one_folder_of_classes_is_one_split(tmp_path: Path) -> None:
    put(tmp_path, {"cat/1.png": png(1), "dog/2.png": png(2)})
    train, test = open_splits(tmp_path)
    assert test is None
    assert (train.name, classes(train), levels(train.images)) == ("all", ["cat", "dog"], [1, 2])
    some = train.subset(np.array([1]), "half", ["a note"])
    assert (some.name, some.notes, classes(some)) == ("half", ("a note",), ["dog"])
    assert labels(some.images) == ["dog"]


@pytest.mark.parametrize("names", [("train", "test"), ("training", "validation"), ("train", "val")])
def test_folders_of_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    put(tmp_path / names[0], {"cat/day/1.png": png(1), "dog/night/2.png": png(2)})
    put(tmp_path / names[1], {"ape/3.png": png(3), "dog/images/4.png": png(4)})
    train, test = open_splits(tmp_path)
    assert (train.name, test.name) == names
    assert train.classes == test.classes == {0: "ape", 1: "cat", 2: "dog"}
    assert (classes(train), classes(test)) == (["cat", "dog"], ["ape", "dog"])
    pair = open_splits(tmp_path / names[0], tmp_path / names[1])
    assert [classes(split) for split in pair] == [classes(train), classes(test)]


def test_the_test_split_comes_before_the_validation_split(tmp_path: Path) -> None:
    put(tmp_path, {f"{name}/cat/1.png": png() for name in ("train", "val", "test")})
    assert open_splits(tmp_path)[1].name == "test"
    put(tmp_path / "hidden", {"train/cat/1.png": png(), "val/cat/1.png": png(), "test/1.png": b""})
    assert open_splits(tmp_path / "hidden")[1].name == "val"


def test_shards_named_after_their_split(tmp_path: Path) -> None:
    shard(tmp_path / "set-train-0.tar", {"1.png": png(1), "1.cls": b"3"})
    shard(tmp_path / "set-train-1.tar", {"2.png": png(2), "2.cls": b"4"})
    shard(tmp_path / "set-val-0.tar", {"3.png": png(3), "3.cls": b"4"})
    train, test = open_splits(tmp_path)
    assert (levels(train.images), levels(test.images)) == ([1, 2], [3])
    assert (classes(train), classes(test)) == (["3", "4"], ["4"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_images_of_both_splits_are_reported(tmp_path: Path, kind: str) -> None:
    put(tmp_path, {"train/cat/1.png": png(1), "train/dog/2.png": png(2), "val/dog/3.png": png(3)})
    if kind == "file":
        (tmp_path / "val/dog/x.png").symlink_to(tmp_path / "train/cat/1.png")
    else:
        (tmp_path / "val/cat").symlink_to("../train/cat")
    with pytest.raises(DataError, match=r"1 .*x\.png" if kind == "file" else r"1 .*cat/1\.png"):
        open_splits(tmp_path)


def test_an_image_linked_into_two_classes_of_one_split_is_allowed(tmp_path: Path) -> None:
    put(tmp_path, {"train/cat/1.png": png(1), "val/dog/3.png": png(3), "val/cat/4.png": png(4)})
    (tmp_path / "train/dog").mkdir()
    (tmp_path / "train/dog/1.png").symlink_to("../cat/1.png")
    assert classes(open_splits(tmp_path)[0]) == ["cat", "dog"]


def test_a_test_set_inside_the_training_set_is_reported(tmp_path: Path) -> None:
    put(tmp_path, {"all/cat/1.png": png(), "all/dog/2.png": png()})
    with pytest.raises(DataError, match=r"2 .*cat/1\.png"):
        open_splits(tmp_path / "all", tmp_path / "all")
    path = shard(tmp_path / "s.tar", {"1.png": png(), "1.cls": b"3"})
    (tmp_path / "t.tar").symlink_to("s.tar")
    with pytest.raises(DataError, match=r"t\.tar/1\.png"):
        open_splits(path, tmp_path / "t.tar")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["1.png", "2.png"], "no classes"),
        (["train/cat/1.png", "val/1.png"], "test split"),
        (["train/n01/images/1.png", "val/images/2.png"], "images"),  # Tiny-ImageNet as unpacked
    ],
)
def test_splits_without_classes(tmp_path: Path, files: list[str], named: str) -> None:
    put(tmp_path, dict.fromkeys(files, png()))
    with pytest.raises(DataError, match=named):
        open_splits(tmp_path)


def test_objects_and_arrays() -> None:
    class Images:
        targets = (0, 1, 1)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> np.ndarray:
            return np.full((4, 4, 3), index, np.uint8)

    train, test = open_splits(Images(), Images())
    assert (train.name, test.name) == ("train", "test")
    assert train.targets.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="no classes"):
        open_splits(noise(8, 8).reshape(2, 4, 8, 3))


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path, monkeypatch)
    for data in (tmp_path, tmp_path / "cifar-10-batches-py", f"torch/cifar10:root={tmp_path}"):
        train, test = open_splits(data)
        assert (len(train.images), len(test.images)) == (50, 10)
        assert classes(test) == list("abcdefghij")
    train, test = open_splits(f"torch/cifar10:root={tmp_path},split=test")
    assert (len(train.images), test) == (10, None)


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def data(numbers: list[int]) -> object:
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(len(numbers))]}
        features = datasets.Features(features)
        return datasets.Dataset.from_dict({**rows, "label": numbers}, features=features)

    splits = {"train": data([0, 1, 1]), "test": data([-1, -1]), "validation": data([1, 0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for name, split in splits.items():
        split.to_parquet(tmp_path / f"parquet/{name}.parquet")
    for source in (tmp_path / "saved", f"hfds/{tmp_path}/parquet", f"{tmp_path}/saved:image=image"):
        train, test = open_splits(source)
        assert (train.name, test.name) == ("train", "validation")  # classes of `test` are hidden
        assert (classes(train), classes(test)) == (["x", "y", "y"], ["y", "x"])
    assert open_splits(f"{tmp_path}/saved:split=validation")[1] is None


def test_inaturalist_and_places(tmp_path: Path) -> None:
    put(tmp_path / "i", {"train_val2018/a/1.png": png(1), "train_val2018/b/2.png": png(2)})
    for split, name, number in (("train", "a/1.png", 7), ("val", "b/2.png", 5)):
        found = {
            "images": [{"id": 3, "file_name": f"train_val2018/{name}"}],
            "annotations": [{"image_id": 3, "category_id": number}],
            "categories": [{"id": 5, "name": "five"}, {"id": 7, "name": "seven"}],
        }
        (tmp_path / f"i/{split}2018.json").write_text(json.dumps(found))
    train, test = open_splits(tmp_path / "i")
    assert (classes(train), classes(test)) == (["seven"], ["five"])
    assert (levels(train.images), levels(test.images)) == ([1], [2])

    put(tmp_path / "p", {"images256/a/a b.png": png(1), "images256/c.png": png(2)})
    put(
        tmp_path / "p",
        {"train_places205.csv": b"a/a b.png 12\n", "val_places205.csv": b"c.png 3\n"},
    )
    train, test = open_splits(tmp_path / "p")
    assert (train.targets.tolist(), test.targets.tolist()) == ([12], [3])
    assert (levels(train.images), levels(test.images)) == ([1], [2])
    (tmp_path / "i/val2018.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"val2018\.json"):
        open_splits(tmp_path / "i")
    (tmp_path / "p/images256/c.png").unlink()
    with pytest.raises(DataError, match=r"c\.png"):
        open_splits(tmp_path / "p")


def test_list_split_and_decoder(tmp_path: Path) -> None:
    put(tmp_path, {"a/1.png": png(1), "2.png": png(2)})
    targets = np.array([4, 2])
    split = list_split(tmp_path, ["2.png", "a/1.png"], targets, {}, "some", decoder=Decoder(1))
    assert levels(split.images) == [2, 1]
    assert split.images.read(0).mode == "L"
    assert (split.images.target(0), split.images.label(1)) == (4, "2")
