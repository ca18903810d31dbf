"""`open_images`: what a user names, as one dataset."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import labels, levels, noise, png, put, shard
from PIL import Image

from ijepa_zoo.data import Decoder, open_images
from ijepa_zoo.data.files import expand
from ijepa_zoo.errors import DataError, ImageError

ARRAY = noise(5 * 4, 6).reshape(5, 4, 6, 3)
FIRST = ARRAY[:, 0, 0, 0].tolist()
FOLDERS = {
    "nested": {"cat/2.png": png(2), "cat/day/1.png": png(1), "dog/3.png": png(3)},
    "splits": {"train/cat/day/1.png": png(1), "val/dog/2.png": png(2)},
    "tiny": {"train/n01/images/1.png": png(1), "train/n02/images/2.png": png(2)},  # Tiny-ImageNet
    "flat": {"train/1.png": png(1), "val/2.png": png(2)},
    "mixed": {"1.png": png(1), "cat/2.png": png(2), "notes.json": b"{}"},
    "other": {"train/1.png": png(1), "zebra/2.png": png(2)},
}
MODULE = """
from inputs import Photos
class Images(Photos):
    labels = [0, 1, 0]
class Nested: images = Images()
def make(): return Images()
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder of sources; the first value of an image is the number in its name."""
    root = tmp_path_factory.mktemp("tree")
    put(root, {f"p/{n}.png": png(n) for n in (1, 2)} | {"q/3.png": png(3), "[x].png": png(7)})
    put(root, {"list.txt": b"\xef\xbb\xbfq/3.png\r\n\n  \np/1.png", "m.py": MODULE.encode()})
    put(
        root, {"needs_more.py": b"import no_such_package_y", "s/README.md": b"", "s/a.parquet": b""}
    )
    put(root, {"beside/3.png": png(3), "texts/a.md": b"", "z/a.zip": b"PK", "junk.npy": b"\x93N"})
    put(root, {"p/.hidden.png": b"", ".cache/1.png": b"", "empty/.hidden.png": b""})
    for number in (8, 9, 10):
        shard(root / f"s/{number:03}.tar", {f"{number}.png": png(number)})
    shard(root / "beside/b.tar", {"2.png": png(2)})
    long = "ü" * 120 + ".png"
    texts = {"4.cls": b"7\n", "4.png": png(4), "5.seg.png": png(5), "5.cls": b"8"}
    texts |= {"./dogs/a b.png": png(6), "._4.png": b"resource fork", long: png(7)}
    for name, mode in (("cls.tar", "w"), ("cls.tar.gz", "w:gz"), ("cls.tgz", "w:gz")):
        shard(root / name, texts, mode)
    for name, files in FOLDERS.items():
        put(root / name, files)
        shard(root / f"{name}.tar", files)
    for number, image in enumerate(ARRAY):
        put(root, {f"one/{number}.npy": b""})
        np.save(root / f"one/{number}.npy", image)
    np.save(root / "n-a.npy", ARRAY)
    np.save(root / "n-b.npy", ARRAY[::-1])
    for name, numbers in (("a", [2, 0, 1, 0, 2]), ("b", [1] * 5)):
        np.savez(root / f"{name}.npz", images=ARRAY, labels=np.array(numbers, np.int32))
    wrong = [{"x": ARRAY}, {"images": ARRAY, "labels": np.linspace(0, 1, 5)}]
    wrong += [{"images": ARRAY, "labels": np.arange(4)}]
    for number, arrays in enumerate(wrong):
        np.savez(root / f"wrong-{number}.npz", **arrays)
    return root


@pytest.fixture(autouse=True)
def _inside(tree, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize(
    ("source", "expected", "classes"),
    [
        ("p", [1, 2], None),
        (Path("p/"), [1, 2], None),
        ("p/1.png", [1], None),
        ("[pq]/*.png", [1, 2, 3], None),
        ("list.txt", [3, 1], None),
        ("[x].png", [7], None),
        (["p/2.png", Path("list.txt")], [2, 3, 1], None),
        ("s", [8, 9, 10], None),
        (("s/{009..010}.tar", "q"), [9, 10, 3], None),
        ("s/*.tar", [8, 9, 10], None),
        # the class is the first folder below the split
        ("nested", [2, 1, 3], ["cat", "cat", "dog"]),
        ("splits", [1, 2], ["cat", "dog"]),
        ("tiny", [1, 2], ["n01", "n02"]),
        ("flat", [1, 2], None),
        ("mixed", [1, 2], [None, "cat"]),
        ("other", [1, 2], ["train", "zebra"]),
        ("beside", [3], None),
        *((f"cls.{kind}", [4, 5, 6, 7], ["7", "8", "dogs", None]) for kind in ("tar", "tar.gz")),
        ("cls.tgz", [4, 5, 6, 7], ["7", "8", "dogs", None]),
        ("one", FIRST, None),
        ("one/*.npy", FIRST, None),
        ("one/0.npy", FIRST[:1], None),
        ("n-a.npy", FIRST, None),
        ("n-?.npy", [*FIRST, *FIRST[::-1]], None),
        (["a.npz", "b.npz"], FIRST * 2, list("2010211111")),
        *(
            (f"m:{name}", [0, 1, 2], ["0", "1", "0"])
            for name in ("Images", "make", "Nested.images")
        ),
    ],
)
def test_sources_of_every_kind(source, expected, classes):
    images = open_images(source)
    assert levels(images) == expected
    assert (None if images.targets is None else labels(images)) == classes
    if str(source) in FOLDERS:
        inside = open_images(f"{source}.tar")
        assert (levels(inside), labels(inside)) == (expected, labels(images))
    left_out = {"mixed": ["notes.json"], "beside": ["b.tar"], "s": []}.get(str(source), [])
    assert [Path(path).name for _, path, _ in images.skipped] == left_out


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("absent", "absent"),
        ("*.gif", "gif"),
        ("empty", "empty"),
        ("texts", "a.md"),
        ("z/a.zip", "unpack"),
        ("z", "unpack"),
        ("s/{007..009}.tar", "007.tar"),
        ([], "no input"),
        (["hfds/a/b", "photos"], "hfds/a/b"),
        ("hfds.json", r"hfds\.json"),
        ("no_such_module_x:Images", "no_such_module_x"),
        ("json:absent", "absent"),
        ("string:digits", "str"),
        ("json:dumps.x", "x"),
        ("junk.npy", "junk"),
        *((f"wrong-{number}.npz", f"wrong-{number}") for number in range(3)),
        ("torch/cifar10", "root"),
        ("torch/cifar10:root=.,spilt=test", "spilt"),
        ("torch/no_such_set:root=.", "no_such_set"),
        ("torch/food101:root=.", "food101"),
    ],
)
def test_wrong_sources_are_named(source, named):
    with pytest.raises(DataError, match=named):
        open_images(source)[0]


def test_names_and_options(tree):
    assert open_images("n-?.npy").name(5) == "n-b.npy[0]"
    assert isinstance(open_images("n-a.npy").arrays[0], np.memmap)  # stays on the disk
    assert open_images("m:make").name(1) == "m:make[1]"
    packed = open_images("cls.tgz")
    assert (packed.files(), packed.compressed_shards()) == (["cls.tgz"], ["cls.tgz"])
    assert open_images("cls.tar").compressed_shards() == []
    assert expand("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    with pytest.raises(ModuleNotFoundError, match="no_such_package_y"):
        open_images("needs_more:Images")
    with pytest.raises(ImageError):
        open_images(["one/0.npy", "junk.npy"]).read(1)
    assert open_images("p", in_chans=1).read(0).mode == "L"
    assert open_images("p", bands=(0, 0), in_chans=2).read(0).shape == (2, 2, 3)
    with pytest.raises(ImageError, match="6 pixels"):
        open_images("p", decoder=Decoder(1, max_pixels=5)).read(0)
    with pytest.raises(DataError, match="no images"):
        open_images("p", exclude=lambda path: path.startswith("p/"))


@pytest.mark.parametrize(
    ("kind", "high", "warns"),
    [
        *((kind, 4095, True) for kind in ("folder", "npy", "array", "color", "shifted")),
        ("half", 9000, False),
        ("chosen", 4095, False),
        ("8 bits", 4095, False),
    ],
)
def test_16_bit_images_of_a_small_range_give_a_warning(tmp_path, caplog, kind, high, warns):
    for number in range(4):
        values = noise(8, 8, 1, number).astype(int) * high // 255 + 3000 * (kind == "shifted")
        suffix = ("tif", "png")[number % 2]
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / f"{number}.{suffix}")
    source = tmp_path
    if kind == "npy":
        source = tmp_path / "one.npy"
        np.save(source, ARRAY[0].astype(np.int64))  # 8 bits in a larger type, almost black
    elif kind == "array":
        source = ARRAY.astype(np.int64)
    elif kind == "color":
        source, colors = tmp_path / "color.tif", ARRAY[0].astype(np.uint16) * 4
        pytest.importorskip("tifffile").imwrite(source, colors, photometric="rgb")
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
