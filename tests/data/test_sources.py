"""`open_images`: what a user names, as one dataset."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import encoded, levels, noise, png, put, shard
from PIL import Image

import ijepa_zoo.data.sources as sources
from ijepa_zoo.data import Decoder, open_images
from ijepa_zoo.data.datasets import ArrayDataset, FileDataset, ObjectDataset
from ijepa_zoo.errors import DataError, ImageError, MissingPackageError

MEMBERS = {"x/1.png": png(1), "x/1.cls": b"9", "x/2.png": png(2), "3.png": png(3), "n.txt": b""}
ARRAY = noise(5 * 4, 6).reshape(5, 4, 6, 3)


def test_paths_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"p/1.png": png(1), "p/2.png": png(2), "q/3.png": png(3)})
    for number in (8, 9, 10):
        shard(tmp_path / f"s/{number:03}.tar", {f"{number}.png": png(number)})
    Path("list.txt").write_text("q/3.png\np/1.png\n")
    for source, expected in (
        ("p", [1, 2]),
        (Path("p"), [1, 2]),
        ("p/*.png", [1, 2]),
        ("p/1.png", [1]),
        ("*/*.png", [1, 2, 3]),
        ("list.txt", [3, 1]),
        (["p/2.png", Path("list.txt")], [2, 3, 1]),
        ("s", [8, 9, 10]),
        ("s/{008..010}.tar", [8, 9, 10]),
        (("s/{009..010}.tar", "q"), [9, 10, 3]),
    ):
        images = open_images(source)
        assert isinstance(images, FileDataset)
        assert levels(images) == expected


def test_settings_of_the_decoder(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2), (10, 200, 30)).save(tmp_path / "c.png")
    assert open_images(tmp_path, in_chans=1).read(0).mode == "L"
    assert open_images(tmp_path, bands=(2, 1, 0)).read(0).getpixel((0, 0)) == (30, 200, 10)
    with pytest.raises(ImageError, match="8 pixels"):
        open_images(tmp_path, decoder=Decoder(1, max_pixels=7)).read(0)


def twelve_bit(folder: Path, high: int = 4095, offset: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(4):
        values = noise(8, 8, 1, number).astype(int) * high // 255 + offset
        kind = ("tif", "png")[number % 2]
        Image.fromarray(values.astype(np.uint16)).save(folder / f"{number}.{kind}")


def test_value_range_restores_8_bits_and_dark_files_give_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "dark"
    twelve_bit(folder)
    with caplog.at_level(logging.WARNING):
        dark = open_images(folder)
    assert str(folder) in caplog.text
    assert dark.read(0).getextrema()[0] == (0, 15)  # of 255 levels
    caplog.clear()
    images = open_images(folder, value_range=(0, 4095))
    for number in range(4):
        difference = np.asarray(images.read(number))[..., 0].astype(int) - noise(8, 8, 1, number)
        assert np.abs(difference).max() <= 1
    twelve_bit(tmp_path / "bright", high=65535)
    twelve_bit(tmp_path / "half", high=9000)
    put(tmp_path, {"8/1.png": png(3), "8/2.jpg": encoded(Image.new("L", (2, 2)), "JPEG")})
    for name in ("bright", "half", "8"):
        open_images(tmp_path / name)
    assert not caplog.text


@pytest.mark.parametrize("kind", ["shard", "shifted", "npy", "array", "tensor", "color"])
def test_dark_images_of_other_kinds_give_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    twelve_bit(tmp_path, offset=3000 if kind == "shifted" else 0)
    source: object = tmp_path
    values = ARRAY.astype(np.int64)  # 8 bits in a larger type, which would be almost black
    if kind == "shard":
        source = shard(tmp_path / "s.tar", {p.name: p.read_bytes() for p in tmp_path.iterdir()})
    elif kind == "npy":
        np.save(tmp_path / "one.npy", values[0])
        source = tmp_path / "one.npy"
    elif kind == "color":
        tifffile = pytest.importorskip("tifffile")
        source = tmp_path / "color.tif"
        tifffile.imwrite(source, ARRAY[0].astype(np.uint16) * 4, photometric="rgb")
    elif kind in ("array", "tensor"):
        source = values if kind == "array" else torch.from_numpy(values).permute(0, 3, 1, 2)
    with caplog.at_level(logging.WARNING):
        open_images(source)
    assert "--value-range" in caplog.text
    assert ("3048,7095" in caplog.text) == (kind == "shifted")


def test_dark_images_of_hugging_face_give_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")
    twelve_bit(tmp_path)
    rows = {"image": [str(path) for path in sorted(tmp_path.iterdir())]}
    features = datasets.Features({"image": datasets.Image()})
    with caplog.at_level(logging.WARNING):
        open_images(datasets.Dataset.from_dict(rows, features=features))
    assert "--value-range" in caplog.text


def test_index_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [shard(tmp_path / "s/a.tar", MEMBERS), shard(tmp_path / "s/b.tar", {"é/1.png": png(4)})]
    index = tmp_path / "cache" / "index"
    first = open_images(paths, index=index)
    listed: list[object] = []
    list_files = sources.list_files
    monkeypatch.setattr(sources, "list_files", lambda p: listed.append(p) or list_files(p))
    for source in (paths, tmp_path / "s", f"{tmp_path}/s/*.tar"):
        again = open_images(source, index=index)
        assert not listed
        assert levels(again) == levels(first) == [1, 2, 3, 4]
        assert again.targets.tolist() == first.targets.tolist()
        assert (again.classes, again.skipped) == (first.classes, first.skipped)
        assert again.fingerprint() == first.fingerprint()

    shard(paths[1], {"1.png": png(5), "../2.png": png(6)})
    for source, count in ((paths, 5), (paths[:1], 3), (paths, 5)):
        assert len(open_images(source, index=index)) == count
    assert len(listed) == 3
    assert sorted(open_images(paths, index=index).problems) == [4]
    for content in (index.read_bytes()[:300], b"", b"junk"):
        index.write_bytes(content)
        assert len(open_images(paths, index=index)) == 5
    assert len(listed) == 6
    assert not list(index.parent.glob("*.tmp"))


def test_array_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAY)
    np.save(tmp_path / "b.npy", ARRAY[::-1])
    images = open_images(tmp_path / "a.npy")
    assert isinstance(images, ArrayDataset)
    assert isinstance(images.arrays[0], np.memmap)  # stays on the disk
    assert images.name(3) == "a.npy[3]"
    both = open_images(f"{tmp_path}/*.npy")
    assert len(both) == 10
    for number, expected in enumerate([*ARRAY, *ARRAY[::-1]]):
        assert np.array_equal(np.asarray(both.read(number)), expected)
    np.save(tmp_path / "g1.npy", ARRAY[..., 0])
    np.save(tmp_path / "g2.npy", ARRAY[..., 1])
    grey = open_images(f"{tmp_path}/g*.npy", in_chans=1)
    assert levels(grey) == [int(v) for v in (*ARRAY[:, 0, 0, 0], *ARRAY[:, 0, 0, 1])]


def test_array_files_of_one_image(tmp_path: Path) -> None:
    for number, image in enumerate(ARRAY):
        np.save(tmp_path / f"{number}.npy", image)
    for source, count in ((tmp_path, 5), (f"{tmp_path}/*.npy", 5), (tmp_path / "0.npy", 1)):
        images = open_images(source)
        assert len(images) == count
        assert np.array_equal(np.asarray(images.read(count - 1)), ARRAY[count - 1])
    put(tmp_path, {"x.npy": b"\x93NUMPY junk"})
    with pytest.raises(ImageError):
        open_images([tmp_path / "0.npy", tmp_path / "x.npy"]).read(1)
    with pytest.raises(DataError, match=r"x\.npy"):
        open_images(tmp_path / "x.npy")


def test_npz_with_labels(tmp_path: Path) -> None:
    for name, numbers in (("a", [2, 0, 1, 0, 2]), ("b", [1] * 5)):
        np.savez(tmp_path / f"{name}.npz", images=ARRAY, labels=np.array(numbers, np.int32))
    images = open_images([tmp_path / "a.npz", tmp_path / "b.npz"])
    assert images.targets.tolist() == [2, 0, 1, 0, 2, 1, 1, 1, 1, 1]
    assert np.array_equal(np.asarray(images.read(6)), ARRAY[1])
    np.savez(tmp_path / "c.npz", x=ARRAY)
    with pytest.raises(DataError, match=r"'x'"):
        open_images(tmp_path / "c.npz")
    for labels in (np.array(list("abcde")), np.linspace(0, 1, 5), np.arange(4)):
        np.savez(tmp_path / "d.npz", images=ARRAY, labels=labels)
        with pytest.raises(DataError, match=r"d\.npz"):
            open_images(tmp_path / "d.npz")


MODULE = """
import numpy as np
class Images:
    def __init__(self): self.labels = np.array([0, 1])
    def __len__(self): return 2
    def __getitem__(self, index): return np.full((4, 4, 3), 10 + index, np.uint8), 0
class Nested: images = Images()
def make(): return Images()
text = "photos"
"""


def test_module_and_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_images.py").write_text(MODULE)
    for attribute in ("Images", "make", "Nested.images"):
        images = open_images(f"my_images:{attribute}")
        assert isinstance(images, ObjectDataset)
        assert levels(images) == [10, 11]
        assert images.name(1) == f"my_images:{attribute}[1]"
        assert images.targets.tolist() == [0, 1]
    Path("needs_more.py").write_text("import no_such_package_y")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_y"):
        open_images("needs_more:Images")
    for path, named in (
        ("no_such_module_x:Images", "no_such_module_x"),
        ("my_images:absent", "absent"),
        ("my_images:text", "str"),
        ("my_images:Images.__len__.x", "x"),
    ):
        with pytest.raises(DataError, match=named):
            open_images(path)


def test_a_module_of_the_users_may_be_called_datasets(tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text(MODULE)
    code = "import datasets, ijepa_zoo.data as d; print(len(d.open_images(datasets.make())))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "2", done.stderr


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of CIFAR-10, with 10 images each, for torchvision with its checksums off."""
    import pickle

    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        data = {"data": noise(10, 3072, 1, seed), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(data))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)


def test_datasets_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path, monkeypatch)
    train = open_images(f"torch/cifar10:root={tmp_path}")
    test = open_images(f"torch/cifar10:root={tmp_path},split=test")
    assert (len(train), len(test)) == (50, 10)
    assert test.targets.tolist() == list(range(10))
    assert test.label(9) == "j"
    expected = noise(10, 3072, 1, 5)[3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(test.read(3)), expected)
    for path, named in (
        ("torch/cifar10", "root"),
        (f"torch/cifar10:root={tmp_path},spilt=test", "spilt"),
        (f"torch/no_such_set:root={tmp_path}", "no_such_set"),
    ):
        with pytest.raises(DataError, match=named):
            open_images(path)


def test_hugging_face_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match="pip install datasets"):
        open_images("hfds/owner/name")


@pytest.mark.parametrize(
    ("source", "named"),
    [([], "no input"), (["hfds/a/b", "photos"], "hfds/a/b"), ("hfds.json", r"hfds\.json")],
)
def test_wrong_sources(source: object, named: str) -> None:
    with pytest.raises(DataError, match=named):
        open_images(source)
