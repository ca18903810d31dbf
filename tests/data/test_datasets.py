"""Datasets of files, arrays and objects: number, class, name, fingerprint."""

import io
import json
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from inputs import encoded, labels, levels, noise, png, put, shard
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ijepa_zoo.data import Decoder, open_images
from ijepa_zoo.data.datasets import FileDataset, Subset
from ijepa_zoo.data.files import File
from ijepa_zoo.errors import DataError, ImageError

CLASSES = {"b/x.png": png(1), "a/y.png": png(2), "b/a.png": png(3), "a/notes.md": b"no"}
MEMBERS = {"x/1.png": png(1), "x/1.cls": b"9", "x/2.png": png(2), "x/2.cls": b"10", "3.png": png(3)}
ARRAY = noise(5 * 4, 6).reshape(5, 4, 6, 3)


def test_folder_of_classes(tmp_path):
    put(tmp_path, CLASSES)
    images = open_images(tmp_path)
    assert levels(images) == [2, 3, 1]
    assert images.targets.tolist() == [0, 1, 1]
    assert images.classes == {0: "a", 1: "b"}
    assert [(number, path) for number, path, _ in images.skipped] == [(0, f"{tmp_path}/a/notes.md")]
    pixels, target, name = images[2]
    assert (np.asarray(pixels)[0, 0, 0], target, name) == (1, 1, str(tmp_path / "b/x.png"))
    assert images.files() == [images.name(i) for i in range(3)]
    batch = next(iter(DataLoader(images, batch_size=3, collate_fn=list)))
    assert [target for _, target, _ in batch] == [0, 1, 1]


def test_shards_number_classes_by_their_names(tmp_path):
    images = open_images(shard(tmp_path / "a.tar", MEMBERS))
    assert images.targets.tolist() == [1, 0, -1]  # "10" sorts before "9"
    assert labels(images) == ["9", "10", None]
    assert open_images(shard(tmp_path / "b.tar", {"1.png": png()})).targets is None


def test_broken_files_have_a_reason(tmp_path):
    put(tmp_path, {"1.png": b"", "2.png": png(2)[:40], "3.npy": b"junk", "4.png": png(4)})
    images = open_images(tmp_path)
    (tmp_path / "4.png").unlink()
    put(tmp_path, {"list.txt": b"with\0nul.png\n" + os.fsencode(tmp_path), "a.tar": b"x"})
    path = str(tmp_path / "a.tar")
    claims = File(f"{path}/a.png", shard=path, offset=512, size=1 << 40)
    for data in (images, open_images(tmp_path / "list.txt"), FileDataset([claims], Decoder())):
        for index in range(len(data)):
            with pytest.raises(ImageError) as caught:
                data.read(index)
            assert str(tmp_path) not in str(caught.value)  # the name is said by who reports it


def test_a_list_of_many_images_stays_small():
    """Arrays alone: no Python object for each image, and little to send to a worker."""
    many = 20_000
    files = (File(f"r/{i // 100}/{i:08}.JPEG", "r/", str(i // 100)) for i in range(many))
    images = FileDataset(files, Decoder())
    packed = pickle.dumps(images)
    assert len(packed) < 53 * many
    again = pickle.loads(packed)
    assert (again.name(19_999), again.label(100)) == ("r/199/00019999.JPEG", "1")
    assert again.fingerprint() == images.fingerprint()


def test_forked_processes_do_not_share_the_place_in_a_shard(tmp_path):
    members = {f"{i}.png": png(i, size=(200, 200)) for i in range(40)}
    images = open_images(shard(tmp_path / "a.tar", members))
    images.read(0)  # opens the shard in this process
    reading, writing = os.pipe()
    child = os.fork()
    found = [levels(images) for _ in range(5)]
    if child == 0:
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert found == json.loads(os.read(reading, 100_000)) == [list(range(40))] * 5


def test_fingerprint_is_of_the_list_and_not_of_its_place(tmp_path):
    put(tmp_path / "one", CLASSES)
    shutil.copytree(tmp_path / "one", tmp_path / "else/where/two")
    shard(tmp_path / "s.tar", MEMBERS)
    shutil.copy(tmp_path / "s.tar", tmp_path / "else/s.tar")
    first = open_images(tmp_path / "one").fingerprint()
    assert first == open_images(f"{tmp_path}/else/where/two/").fingerprint()
    shards = [open_images(p / "s.tar").fingerprint() for p in (tmp_path, tmp_path / "else")]
    assert shards[0] == shards[1] != first
    (tmp_path / "one/a/y.png").rename(tmp_path / "one/a/z.png")
    renamed = open_images(tmp_path / "one").fingerprint()
    put(tmp_path / "one", {"b/new.png": png(4)})
    assert len({first, renamed, open_images(tmp_path / "one").fingerprint()}) == 3
    shard(tmp_path / "s.tar", {**MEMBERS, "3.png": png(3, size=(300, 200))})
    assert open_images(tmp_path / "s.tar").fingerprint() != shards[0]


def test_subset(tmp_path):
    put(tmp_path, CLASSES)
    shard(tmp_path / "s.tar", MEMBERS)
    images = open_images([tmp_path / "a", tmp_path / "b", tmp_path / "s.tar"])
    some = Subset(images, np.array([4, 0, 3]))
    assert levels(some) == [levels(images)[i] for i in (4, 0, 3)]
    assert some.targets.tolist() == images.targets[[4, 0, 3]].tolist()
    assert labels(some) == [images.label(i) for i in (4, 0, 3)]
    assert some.files() == [str(tmp_path / "s.tar"), images.name(0)]
    assert some.name(1) == images.name(0)
    prints = {Subset(images, np.array(i)).fingerprint() for i in ([0, 3], [3, 0], [0, 3])}
    assert len(prints) == 2


def test_arrays(tmp_path):
    images = open_images(ARRAY)
    assert all(np.array_equal(np.asarray(images.read(i)), ARRAY[i]) for i in range(5))
    assert (images.name(3), images.targets) == ("array[3]", None)
    assert images.fingerprint() != open_images(ARRAY[::-1]).fingerprint()
    tensor = torch.from_numpy(ARRAY).permute(0, 3, 1, 2)
    assert open_images(tensor).fingerprint() == images.fingerprint()
    with pytest.raises(IndexError):
        images.read(5)
    np.save(tmp_path / "a.npy", np.arange(30 * 8 * 8 * 3, dtype=np.uint8).reshape(30, 8, 8, 3))
    mapped = open_images(tmp_path / "a.npy")
    packed = pickle.dumps(mapped)  # other processes open the file again
    assert len(packed) < 2000
    assert pickle.loads(packed).fingerprint() == mapped.fingerprint()
    assert mapped.files() == [str(tmp_path / "a.npy")]


@pytest.mark.parametrize("channels", [1, 2, 12])
def test_arrays_of_any_channels(tmp_path, channels):
    values = noise(3 * 4, 6, channels).reshape(3, 4, 6, channels)
    for number, image in enumerate(values):
        np.save(tmp_path / f"{number}.npy", image)
    for source in (values, torch.from_numpy(values).permute(0, 3, 1, 2), tmp_path):
        found = np.asarray(open_images(source, in_chans=channels).read(2))
        expected = values[2, ..., 0] if channels == 1 else np.moveaxis(values[2], -1, 0)
        assert np.array_equal(found, expected)
    put(tmp_path, {"4.png": png(4)})
    if channels > 1:
        with pytest.raises(ImageError, match=f"{channels} channels"):
            open_images(tmp_path, in_chans=channels).read(3)


@pytest.mark.parametrize("array", [ARRAY[0, 0], ARRAY[:0], ARRAY.astype(complex), ARRAY[..., :2]])
def test_wrong_arrays(array):
    with pytest.raises(DataError, match=r"2 channels|\[0, 4, 6, 3\]|\[6, 3\]|complex128"):
        open_images(array)


class Images(Dataset):
    """Items of every kind that is allowed, and some that are not."""

    targets = (3, 1, 1, 1, 1, 1)
    classes = ("zero", "one", "two", "three")

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return [
            Image.new("RGB", (3, 2), (5, 5, 5)),
            (np.full((2, 3, 3), 6, np.uint8), 1),
            [torch.full((3, 2, 3), 7, dtype=torch.uint8), "label", 0],
            Image.open(io.BytesIO(encoded(Image.fromarray(noise(9, 9)))[:150])),
            (np.zeros((2, 3, 4)), 0),
            {"image": 1},
        ][index]


def test_dataset_objects():
    images = open_images(Images())
    assert [int(np.asarray(images.read(i)).reshape(-1)[0]) for i in range(3)] == [5, 6, 7]
    assert images.targets.tolist() == [3, 1, 1, 1, 1, 1]
    assert labels(images)[:2] == ["three", "one"]
    assert images.name(4) == "Images[4]"
    for index, error in ((3, ImageError), (4, ImageError), (5, DataError)):
        with pytest.raises(error):
            images.read(index)
    assert open_images(images) is images
    assert levels(open_images([Image.new("L", (2, 2), 9)] * 2)) == [9, 9]


class Photos:
    """A map-style dataset with attributes as given."""

    def __init__(self, length=3, **attributes):
        self.length = length
        self.__dict__.update(attributes)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return Image.new("L", (2, 2), index), 0


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"targets": torch.tensor([2, 0, 1])}, ["2", "0", "1"]),  # MNIST, CIFAR
        ({"labels": np.array([2, -1, 1]), "classes": list("abc")}, ["c", None, "b"]),  # STL10, SVHN
        ({"_labels": [None, 0, 1]}, [None, "0", "1"]),  # CLEVR
        # Caltech101
        ({"y": [1, 0, 1], "index": [7, 8, 9], "categories": ["x", "y"]}, ["y", "x", "y"]),
        ({"_samples": [("1.jpg", None), ("2.jpg", 0), ("3.jpg", 1)]}, [None, "0", "1"]),  # FER
        ({"index": [(1, "1.jpg"), (0, "2.jpg"), (1, "3.jpg")], "all_categories": ["x", "y"]},
         ["y", "x", "y"]),  # INaturalist
        ({"attr": torch.tensor([[1, 1], [0, 0], [0, 1]]), "attr_names": ["hat", "tie", ""]},
         ["hat;tie", None, "tie"]),  # CelebA
        ({"targets": np.eye(3, dtype=bool), "classes": [("a", "b"), "c", "d"]}, ["a, b", "c", "d"]),
    ],
)  # fmt: skip
def test_attributes_of_datasets(attributes, expected):
    assert labels(open_images(Photos(**attributes))) == expected


@pytest.mark.parametrize(
    "targets", [[[1, 2], [3], []], [0.5] * 3, list("abc"), np.eye(3) / 2, [1, 2], [{"a": 1}] * 3]
)
def test_other_targets_are_ignored_with_a_warning(caplog, targets):
    with caplog.at_level(logging.WARNING):
        images = open_images(Photos(targets=targets))
    assert images.targets is None
    assert "Photos.targets" in caplog.text


class Faulty(Images):
    def __getitem__(self, index):
        return self.no_such_thing


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_wrong_objects_are_named_and_faults_of_their_code_keep_their_traceback():
    with pytest.raises(AttributeError, match="no_such_thing"):
        open_images(Faulty()).read(0)
    with pytest.raises(DataError, match="two classes"):
        open_images(Photos(targets=[0, 1, 1], classes=["a", "a"]))
    for source in (Stream(), 7, {"a": 1}, None):
        with pytest.raises(DataError, match=type(source).__name__):
            open_images(source)


class Listed:
    """Images in memory, the same or others in every reading."""

    def __init__(self, level, changes=False):
        self.level, self.changes, self.read = level, changes, 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.read += self.changes
        return np.full((4, 4, 3), self.level + self.read, np.uint8)


def test_datasets_of_other_images_have_other_fingerprints_unless_images_change():
    one, same, other = (open_images(Listed(level)).fingerprint() for level in (1, 1, 2))
    assert one == same != other
    first, second = (open_images(Listed(level, changes=True)).fingerprint() for level in (1, 2))
    assert first == second
