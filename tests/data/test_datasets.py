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
from inputs import Photos, encoded, labels, levels, noise, png, put, shard
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from ijepa_zoo.data import Decoder, open_images
from ijepa_zoo.data.datasets import FileDataset, Subset
from ijepa_zoo.data.files import File
from ijepa_zoo.errors import DataError, ImageError

CLASSES = {"b/x.png": png(1), "a/y.png": png(2), "b/a.png": png(3)}
MEMBERS = {"x/1.png": png(1), "x/1.cls": b"9", "x/2.png": png(2), "x/2.cls": b"10", "3.png": png(3)}
ARRAY = noise(5 * 4, 6).reshape(5, 4, 6, 3)


def test_numbers_classes_and_names(tmp_path):
    put(tmp_path / "f", CLASSES)
    images = open_images(tmp_path / "f")
    assert images.classes == {0: "a", 1: "b"}
    assert images[2][1:] == (1, str(tmp_path / "f/b/x.png"))
    batch = next(iter(DataLoader(images, batch_size=3, collate_fn=list)))
    assert [target for _, target, _ in batch] == [0, 1, 1]
    images = open_images([tmp_path / "f", shard(tmp_path / "a.tar", MEMBERS)])
    assert images.targets.tolist() == [2, 3, 3, 1, 0, -1]  # "10" sorts before "9"
    some = Subset(images, np.array([4, 0, 5]))
    assert levels(some) == [levels(images)[i] for i in (4, 0, 5)]
    assert (some.targets.tolist(), labels(some)) == ([0, 2, -1], ["10", "a", None])
    assert some.files() == [str(tmp_path / "a.tar"), some.name(1)]
    assert some.name(1) == images.name(0)
    prints = {Subset(images, np.array(i)).fingerprint() for i in ([0, 3], [3, 0], [0, 3])}
    assert len(prints) == 2


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
    assert str(caught.value).startswith("too large: 1,099,511,627,776 bytes")


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
    shard(tmp_path / "one.tar", MEMBERS)
    shutil.copytree(tmp_path, tmp_path / "else/where")
    seen = []
    for name in ("one", "one.tar"):
        seen.append(open_images(tmp_path / name).fingerprint())
        assert open_images(tmp_path / "else/where" / name).fingerprint() == seen[-1]
    (tmp_path / "one/a/y.png").rename(tmp_path / "one/a/z.png")
    seen.append(open_images(tmp_path / "one").fingerprint())
    put(tmp_path / "one", {"b/new.png": png(4)})
    seen.append(open_images(tmp_path / "one").fingerprint())
    shard(tmp_path / "one.tar", {**MEMBERS, "3.png": png(3, size=(300, 200))})
    seen.append(open_images(tmp_path / "one.tar").fingerprint())
    assert len({*seen}) == 5


@pytest.mark.parametrize("channels", [1, 2, 3, 12])
def test_arrays_of_any_channels(tmp_path, channels):
    values = noise(3 * 4, 6, channels).reshape(3, 4, 6, channels)
    np.save(tmp_path / "a.npy", values)
    mapped = open_images(tmp_path / "a.npy", in_chans=channels)
    packed = pickle.dumps(mapped)  # other processes open the file again
    assert len(packed) < 2000
    assert mapped.files() == [str(tmp_path / "a.npy")]
    tensor = torch.from_numpy(values).permute(0, 3, 1, 2)
    opened = [open_images(source, in_chans=channels) for source in (values, tensor)]
    expected = values[2] if channels in (1, 3) else np.moveaxis(values[2], -1, 0)
    for images in (mapped, pickle.loads(packed), *opened):
        assert np.array_equal(np.asarray(images.read(2)).reshape(expected.shape), expected)
        assert (images.fingerprint(), images.targets) == (mapped.fingerprint(), None)
    assert opened[0].name(2) == "array[2]"
    with pytest.raises(IndexError):
        opened[0].read(3)
    assert open_images(values[::-1], in_chans=channels).fingerprint() != mapped.fingerprint()


def test_a_part_of_a_memory_map_stays_that_part_in_other_processes(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3, dtype=np.uint8).repeat(16).reshape(3, 4, 4, 1))
    images = open_images(np.load(tmp_path / "a.npy", mmap_mode="r")[1:], in_chans=1)
    again = pickle.loads(pickle.dumps(images))
    assert levels(again) == levels(images) == [1, 2]


class Items(list):
    """A map-style dataset of given items, of which bytes are opened as images."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return Image.open(io.BytesIO(item)) if isinstance(item, bytes) else item


class Faulty(Photos):
    """Has a fault in its code, and other images in every reading."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        return np.full((4, 4, 3), self.read, np.uint8) if index < 3 else self.no_such_thing


def test_dataset_objects():
    good = [
        Image.new("RGB", (3, 2), (5, 5, 5)),
        (np.full((2, 3, 3), 6, np.uint8), 1),
        [torch.full((3, 2, 3), 7, dtype=torch.uint8), "label", 0],
    ]
    truncated = encoded(Image.fromarray(noise(9, 9)))[:150]
    images = open_images(Items([*good, truncated, (np.zeros((2, 3, 4)), 0), {"image": 1}]))
    assert [int(np.asarray(images.read(i)).reshape(-1)[0]) for i in range(3)] == [5, 6, 7]
    assert images.name(4) == "Items[4]"
    for index, error in ((3, ImageError), (4, ImageError), (5, DataError)):
        with pytest.raises(error):
            images.read(index)
    with pytest.raises(AttributeError, match="no_such_thing"):  # with its traceback
        open_images(Faulty(4)).read(3)
    assert open_images(images) is images
    prints = [open_images(Items(items)).fingerprint() for items in (good, list(good), good[::-1])]
    assert prints[0] == prints[1] != prints[2]
    assert open_images(Faulty()).fingerprint() == open_images(Faulty(read=7)).fingerprint()


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
        *(({"targets": ignored}, None) for ignored in (
            [[1, 2], [3], []], [0.5] * 3, list("abc"), np.eye(3) / 2, [1, 2], [{"a": 1}] * 3
        )),
    ],
)  # fmt: skip
def test_attributes_of_datasets(caplog, attributes, expected):
    with caplog.at_level(logging.WARNING):
        images = open_images(Photos(**attributes))
    assert (labels(images) if images.targets is not None else None) == expected
    assert ("Photos.targets" in caplog.text) == (expected is None)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("source", "named"),
    [
        *((source, type(source).__name__) for source in (Stream(), 7, {"a": 1}, None)),
        (Photos(targets=[0, 1, 1], classes=["a", "a"]), "two classes"),
        (ARRAY[0, 0], r"\[6, 3\]"),
        (ARRAY[:0], r"\[0, 4, 6, 3\]"),
        (ARRAY.astype(complex), "complex128"),
        (ARRAY[..., :2], "2 channels"),
    ],
)
def test_other_objects_and_arrays_are_named(source, named):
    with pytest.raises(DataError, match=named):
        open_images(source)
