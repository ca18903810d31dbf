"""Labels from CSV files and from attributes of datasets, one or several per image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import labels, levels, png, put
from PIL import Image

from ijepa_zoo.data import open_images
from ijepa_zoo.data.datasets import ObjectDataset
from ijepa_zoo.data.decode import Decoder
from ijepa_zoo.data.splits import Split, open_splits
from ijepa_zoo.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path, {f"photos/{i}.png": png(i) for i in range(6)})
    return tmp_path


def named(split: Split) -> list[str | None]:
    return labels(split.images)


def test_one_label_per_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"label,path\ncat,photos/3.png\ndog, ./photos/1.png\n2,{folder}/photos/0.png\n"
    path = write(folder / "labels.csv", text + "cat,photos/3.png\n")
    train, test = open_splits(path)
    assert test is None
    assert train.targets.tolist() == [1, 2, 0]
    assert (named(train), levels(train.images)) == (["cat", "dog", "2"], [3, 1, 0])
    monkeypatch.chdir(folder)
    assert labels(open_images("labels.csv")) == ["cat", "dog", "2"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_spreadsheets(folder: Path, encoding: str, end: str) -> None:
    lines = [
        "Path,Label,split",
        '"photos/0.png","Dog, small",train',
        "photos/1.png, Größe ,Val",
        "",
    ]
    train, test = open_splits(write(folder / "l.csv", end.join(lines), encoding))
    assert (named(train), named(test)) == (["Dog, small"], ["Größe"])
    assert (train.name, test.name) == ("train", "val")


@pytest.mark.parametrize(
    "lines",
    [
        "photos/0.png,cat\nphotos/1.png,dog\nphotos/0.png,ape\nphotos/2.png,\n",
        "photos/0.png,cat; ape\nphotos/1.png,dog\nphotos/2.png,\n",
    ],
)
def test_several_labels_per_image(folder: Path, lines: str) -> None:
    train, _ = open_splits(write(folder / "labels.csv", "path,label\n" + lines))
    assert train.classes == {0: "ape", 1: "cat", 2: "dog"}
    assert train.targets.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert named(train) == ["ape;cat", "dog", None]
    assert train.images.target(0) == -1


def test_both_splits_are_matrices_with_the_same_columns(folder: Path) -> None:
    head = "path,label\n"
    train = write(folder / "train.csv", head + "photos/0.png,b;c\nphotos/1.png,c\n")
    test = write(folder / "test.csv", head + "photos/2.png,a\nphotos/3.png,c\nphotos/4.png,\n")
    for first, second in ((train, test), (test, train)):
        splits = open_splits(first, second)
        assert all(split.classes == {0: "a", 1: "b", 2: "c"} for split in splits)
        found = {split.name: split.targets.tolist() for split in splits}
        assert found["train.csv"] == [[0, 1, 1], [0, 0, 1]]
        assert found["test.csv"] == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_splits_of_one_csv(folder: Path) -> None:
    rows = [f"photos/{i}.png,{'ab'[i % 2]},{split}" for i, split in
            enumerate(["train", "train", "val", "test", "train", "valid"])]  # fmt: skip
    path = write(folder / "labels.csv", "\n".join(["path,label,split", *rows]))
    train, test = open_splits(path)
    assert (levels(train.images), levels(test.images)) == ([0, 1, 4], [3])
    assert len(open_images(str(path))) == 6
    other = write(folder / "other.csv", "path,label\nphotos/5.png,a\n")
    train, test = open_splits(path, other)
    assert (levels(train.images), levels(test.images)) == ([0, 1, 4], [5])
    other = write(folder / "other.csv", "path,label\nphotos/4.png,a\n")
    with pytest.raises(DataError, match=r"1 .*4\.png"):
        open_splits(path, other)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "path and label"),
        ("path,label\n", "no images"),
        ("path;label\nphotos/0.png;a\n", "path;label"),
        ("path,label\n,a\n", "line 2"),
        ("path,label\nphotos/0.png,a, b\n", "quotes"),
        ("path,label\nphotos/0.png,a\nphotos/9.png,b\n", r"1 of 2 .*9\.png"),
        ("path,label,split\nphotos/0.png,a,here\n", "here"),
        ("path,label,split\nphotos/0.png,a\n", "line 2"),
        ("path,label,split\nphotos/0.png,a,train\nphotos/0.png,a,val\n", r"0\.png"),
        ("path,label,split\nphotos/0.png,a,val\n", "train"),
        ("path,label\nphotos/0.png,\n", "no classes"),
    ],
)
def test_csv_files_that_cannot_be_used(folder: Path, text: str, found: str) -> None:
    with pytest.raises(DataError, match=found):
        open_splits(write(folder / "labels.csv", text))


def test_unreadable_csv_files(folder: Path) -> None:
    with pytest.raises(DataError, match="CSV"):
        open_splits(write(folder / "labels.csv", "path,label\nä,b\n", "latin-1"))
    with pytest.raises(DataError, match=r"no\.csv"):
        open_splits(folder / "no.csv")


class Photos:
    """A map-style dataset with attributes as given."""

    def __init__(self, length: int = 3, **attributes: Any) -> None:
        self.length = length
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (2, 2), index), 0


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"targets": torch.tensor([2, 0, 1])}, ["2", "0", "1"]),  # MNIST, CIFAR
        ({"labels": np.array([2, -1, 1]), "classes": list("abc")}, ["c", None, "b"]),  # STL10, SVHN
        ({"_labels": [2, 0, 1], "classes": list("abc")}, ["c", "a", "b"]),  # Food101, Pets, DTD
        ({"_labels": [None, 0, 1]}, [None, "0", "1"]),  # CLEVR
        # Caltech101
        ({"y": [1, 0, 1], "index": [7, 8, 9], "categories": ["x", "y"]}, ["y", "x", "y"]),
        ({"_samples": [("1.jpg", 1), ("2.jpg", 0), ("3.jpg", 1)]}, ["1", "0", "1"]),  # Cars, GTSRB
        ({"_samples": [("1.jpg", None), ("2.jpg", 0), ("3.jpg", 1)]}, [None, "0", "1"]),  # FER
        ({"index": [(1, "1.jpg"), (0, "2.jpg"), (1, "3.jpg")], "all_categories": ["x", "y"]},
         ["y", "x", "y"]),  # INaturalist
        ({"attr": torch.tensor([[1, 1], [0, 0], [0, 1]]), "attr_names": ["hat", "tie", ""]},
         ["hat;tie", None, "tie"]),  # CelebA
        ({"targets": np.eye(3, dtype=bool), "classes": [("a", "b"), "c", "d"]}, ["a, b", "c", "d"]),
        ({"targets": [["a"], ["b"], []], "labels": [2, 0, 1]}, ["2", "0", "1"]),
    ],
)  # fmt: skip
def test_attributes_of_datasets(attributes: dict[str, Any], expected: list[str | None]) -> None:
    images = ObjectDataset(Photos(**attributes), Decoder(), "photos")
    assert labels(images) == expected


def test_labels_that_are_no_classes() -> None:
    for values in (np.eye(3) / 2, [[1, 2, 3]] * 3, [0.5, 1, 2], [1, 2], lambda: [1, 2, 3]):
        assert ObjectDataset(Photos(targets=values), Decoder(), "photos").targets is None


def test_matrices_of_unequal_width_are_refused() -> None:
    first, second = Photos(targets=np.eye(3, dtype=int)), Photos(targets=np.eye(3, 4, dtype=int))
    with pytest.raises(DataError, match=r"\(3, 3\) and \(3, 4\)"):
        open_splits(first, second)
    train, test = open_splits(first, first)
    assert train.targets.tolist() == test.targets.tolist() == np.eye(3).tolist()


def test_oxford_pets_and_textures_as_distributed(tmp_path: Path) -> None:
    pets, breeds = tmp_path / "oxford-iiit-pet", ["Abyssinian_1", "beagle_3", "Abyssinian_2"]
    put(pets / "images", {f"{name}.jpg": png(i) for i, name in enumerate(breeds)})
    lines = {"trainval": ["Abyssinian_1 1 1 1", "beagle_3 2 2 1"], "test": ["Abyssinian_2 1 1 1"]}
    for split, rows in lines.items():
        write(pets / f"annotations/{split}.txt", "\n".join(rows) + "\n")
    train, test = open_splits(f"torch/oxford_iiit_pet:root={tmp_path}")
    assert (train.name, named(train), named(test)) == (
        "trainval",
        ["Abyssinian", "Beagle"],
        ["Abyssinian"],
    )
    textures = tmp_path / "dtd/dtd"
    for i, split in enumerate(("train", "val", "test")):
        put(textures / "images", {f"knit/knit_{i}.jpg": png(i), f"dots/dots_{i}.jpg": png(9)})
        write(textures / f"labels/{split}1.txt", f"knit/knit_{i}.jpg\ndots/dots_{i}.jpg\n")
    train, test = open_splits(f"torch/DTD:root={tmp_path}")
    assert (test.name, named(train), named(test)) == ("test", ["knit", "dots"], ["knit", "dots"])
    assert levels(test.images) == [2, 9]
    assert open_splits(f"torch/dtd:root={tmp_path},split=val")[1] is None


def test_a_torchvision_dataset_in_one_part(tmp_path: Path) -> None:
    put(tmp_path / "eurosat/2750", {"Forest/1.jpg": png(1), "River/2.jpg": png(2)})
    train, test = open_splits(f"torch/eurosat:root={tmp_path}")
    assert (named(train), test) == (["Forest", "River"], None)


def test_hugging_face_columns_of_lists_and_of_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def opened(column: list[Any], kind: Any) -> Any:
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": column}
        return open_images(datasets.Dataset.from_dict(rows, features=features))

    names = datasets.ClassLabel(names=["x", "y", "z"])
    images = opened([[0, 1], [], [1]], datasets.Sequence(names))
    assert images.targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert labels(images) == ["x;y", None, "y"]
    assert labels(opened([[0, 1], None, [1]], datasets.Sequence(names))) == ["x;y", None, "y"]
    text = datasets.Value("string")
    assert labels(opened(["b", None, "a"], text)) == ["b", None, "a"]
    assert labels(opened([["b"], ["a", "b"], []], datasets.Sequence(text))) == ["b", "a;b", None]
    numbers = opened([4, None, 2], datasets.Value("int64"))
    assert numbers.targets.tolist() == [4, -1, 2]
    assert opened([True, False, True], datasets.Value("bool")).targets.tolist() == [1, 0, 1]
