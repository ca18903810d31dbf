"""`open_images`: what a user names, as one dataset."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import levels, noise, png, put, shard
from PIL import Image

from ijepa_zoo.data import Decoder, open_images
from ijepa_zoo.data.datasets import FileDataset
from ijepa_zoo.errors import DataError, ImageError

ARRAY = noise(5 * 4, 6).reshape(5, 4, 6, 3)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        *(("p", [1, 2]), (Path("p"), [1, 2]), ("p/*.png", [1, 2]), ("p/1.png", [1])),
        *(("*/*.png", [1, 2, 3]), ("list.txt", [3, 1]), ("s", [8, 9, 10])),
        *((["p/2.png", Path("list.txt")], [2, 3, 1]), (("s/{009..010}.tar", "q"), [9, 10, 3])),
    ],
)
def test_paths_of_every_kind(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"p/1.png": png(1), "p/2.png": png(2), "q/3.png": png(3)})
    for number in (8, 9, 10):
        shard(tmp_path / f"s/{number:03}.tar", {f"{number}.png": png(number)})
    Path("list.txt").write_text("q/3.png\np/1.png\n")
    images = open_images(source)
    assert isinstance(images, FileDataset)
    assert levels(images) == expected


def test_settings_of_the_decoder(tmp_path):
    Image.new("RGB", (4, 2), (10, 200, 30)).save(tmp_path / "c.png")
    assert open_images(tmp_path, in_chans=1).read(0).mode == "L"
    assert open_images(tmp_path, bands=(2, 1, 0)).read(0).getpixel((0, 0)) == (30, 200, 10)
    with pytest.raises(ImageError, match="8 pixels"):
        open_images(tmp_path, decoder=Decoder(1, max_pixels=7)).read(0)
    with pytest.raises(DataError, match="no images"):
        open_images(tmp_path, exclude=lambda path: path.endswith("c.png"))


@pytest.mark.parametrize(
    ("kind", "high", "warns"),
    [
        *((kind, 4095, True) for kind in ("folder", "shard", "npy", "tensor", "color", "hf")),
        *(("shifted", 4095, True), ("bright", 65535, False), ("half", 9000, False)),
        *(("chosen", 4095, False), ("8 bits", 4095, False)),
    ],
)
def test_16_bit_images_of_a_small_range_give_a_warning(tmp_path, caplog, kind, high, warns):
    for number in range(4):
        values = noise(8, 8, 1, number).astype(int) * high // 255 + 3000 * (kind == "shifted")
        suffix = ("tif", "png")[number % 2]
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / f"{number}.{suffix}")
    files, source = sorted(tmp_path.iterdir()), tmp_path
    if kind == "shard":
        source = shard(tmp_path / "s.tar", {p.name: p.read_bytes() for p in files})
    elif kind == "npy":
        source = tmp_path / "one.npy"
        np.save(source, ARRAY[0].astype(np.int64))  # 8 bits in a larger type, almost black
    elif kind == "color":
        source, colors = tmp_path / "color.tif", ARRAY[0].astype(np.uint16) * 4
        pytest.importorskip("tifffile").imwrite(source, colors, photometric="rgb")
    elif kind == "tensor":
        source = torch.from_numpy(ARRAY.astype(np.int64)).permute(0, 3, 1, 2)
    elif kind == "hf":
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"image": datasets.Image()})
        source = datasets.Dataset.from_dict({"image": list(map(str, files))}, features=features)
    elif kind == "8 bits":
        source = tmp_path / "8"
        put(source, {"1.png": png(3), "2.png": png(4, "RGB")})
    with caplog.at_level(logging.WARNING):
        images = open_images(source, value_range=(0, 4095) if kind == "chosen" else None)
    assert ("--value-range" in caplog.text) == warns
    assert ("3048,7095" in caplog.text) == (kind == "shifted")
    if kind == "chosen":  # restores 8 bits
        difference = np.asarray(images.read(3))[..., 0].astype(int) - noise(8, 8, 1, 3)
        assert np.abs(difference).max() <= 1


def test_array_files(tmp_path):
    np.save(tmp_path / "a.npy", ARRAY)
    np.save(tmp_path / "b.npy", ARRAY[::-1])
    images = open_images(f"{tmp_path}/*.npy")
    assert isinstance(images.arrays[0], np.memmap)  # stays on the disk
    assert (images.name(3), images.name(5)) == ("a.npy[3]", "b.npy[0]")
    assert np.array_equal([np.asarray(images.read(i)) for i in range(10)], [*ARRAY, *ARRAY[::-1]])
    np.save(tmp_path / "grey.npy", ARRAY[..., 0])
    assert levels(open_images(tmp_path / "grey.npy", in_chans=1)) == ARRAY[:, 0, 0, 0].tolist()


def test_array_files_of_one_image(tmp_path):
    for number, image in enumerate(ARRAY):
        np.save(tmp_path / f"{number}.npy", image)
    for source, count in ((tmp_path, 5), (f"{tmp_path}/*.npy", 5), (tmp_path / "0.npy", 1)):
        images = open_images(source)
        assert np.array_equal(np.asarray(images.read(count - 1)), ARRAY[count - 1])
    put(tmp_path, {"x.npy": b"\x93NUMPY junk"})
    with pytest.raises(ImageError):
        open_images([tmp_path / "0.npy", tmp_path / "x.npy"]).read(1)
    with pytest.raises(DataError, match=r"x\.npy"):
        open_images(tmp_path / "x.npy")


def test_npz_with_labels(tmp_path):
    for name, numbers in (("a", [2, 0, 1, 0, 2]), ("b", [1] * 5)):
        np.savez(tmp_path / f"{name}.npz", images=ARRAY, labels=np.array(numbers, np.int32))
    images = open_images([tmp_path / "a.npz", tmp_path / "b.npz"])
    assert images.targets.tolist() == [2, 0, 1, 0, 2, 1, 1, 1, 1, 1]
    assert np.array_equal(np.asarray(images.read(6)), ARRAY[1])
    wrong = (np.array(list("abcde")), np.linspace(0, 1, 5), np.arange(4))
    for arrays in ({"x": ARRAY}, *({"images": ARRAY, "labels": labels} for labels in wrong)):
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(DataError, match=r"d\.npz"):
            open_images(tmp_path / "d.npz")


MODULE = """
from inputs import Photos
class Images(Photos):
    labels = [0, 1, 0]
class Nested: images = Images()
def make(): return Images()
"""


def test_module_and_attribute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_images.py").write_text(MODULE)
    for attribute in ("Images", "make", "Nested.images"):
        images = open_images(f"my_images:{attribute}")
        assert images.name(1) == f"my_images:{attribute}[1]"
        assert (levels(images), images.targets.tolist()) == ([0, 1, 2], [0, 1, 0])
    Path("needs_more.py").write_text("import no_such_package_y")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_y"):
        open_images("needs_more:Images")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        *(([], "no input"), (["hfds/a/b", "photos"], "hfds/a/b"), ("hfds.json", r"hfds\.json")),
        *(("no_such_module_x:Images", "no_such_module_x"), ("json:absent", "absent")),
        *(("string:digits", "str"), ("json:dumps.x", "x")),
        *(("torch/cifar10", "root"), ("torch/cifar10:root=.,spilt=test", "spilt")),
        *(("torch/no_such_set:root=.", "no_such_set"), ("torch/food101:root=.", "food101")),
    ],
)
def test_wrong_sources(source, named):
    with pytest.raises(DataError, match=named):
        open_images(source)


def test_datasets_of_torchvision(cifar10):
    assert len(open_images(f"torch/cifar10:root={cifar10}")) == 50
    test = open_images(f"torch/cifar10:root={cifar10},split=test")
    assert (test.targets.tolist(), test.label(9)) == (list(range(10)), "j")
    expected = noise(10, 3072, 1, 5)[3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(test.read(3)), expected)
