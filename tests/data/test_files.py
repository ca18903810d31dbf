"""Listing folders, globs, lists and tar shards."""

import contextlib
import os
import random
import tarfile
from pathlib import Path

import pytest
from inputs import labels, levels, png, put, shard
from torchvision.datasets import ImageFolder

from ijepa_zoo.data import open_images
from ijepa_zoo.data.files import expand, list_files
from ijepa_zoo.errors import DataError, ImageError


def listed(*paths):
    return list(list_files([str(path) for path in paths]))


def test_folder_is_sorted_by_path_bytes(tmp_path):
    given = ("b.jpg", "a/x.PNG", "a-b/x.jpg", "a.jpg", "é.jpg", "Z.jpg", "line\nbreak.png")
    put(tmp_path, dict.fromkeys((*given, ".hidden.png", ".cache/1.png"), png()))
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png"))).write_bytes(png())
    for path in (tmp_path, f"{tmp_path}/"):
        found = [os.fsencode(os.path.relpath(file.path, tmp_path)) for file in listed(path)]
        assert found == sorted([*map(os.fsencode, given), b"\xff\xfe.png"])


@pytest.mark.parametrize(
    "files",
    [
        {"cat/day/1.jpg": "cat", "cat/2.jpg": "cat", "dog/3.jpg": "dog"},
        {"train/cat/day/1.jpg": "cat", "val/dog/2.jpg": "dog"},
        {"train/n01/images/1.JPEG": "n01", "train/n02/images/2.JPEG": "n02"},  # Tiny-ImageNet
        {"train/1.jpg": None, "val/2.jpg": None},
        {"1.jpg": None, "cat/2.jpg": "cat"},
        {"train/1.jpg": "train", "zebra/2.jpg": "zebra"},
    ],
)
def test_class_is_the_first_folder_below_the_split(tmp_path, files):
    put(tmp_path / "folder", dict.fromkeys(files, png()))
    found = listed(tmp_path / "folder")
    assert {os.path.relpath(f.path, tmp_path / "folder"): f.label for f in found} == files
    path = shard(tmp_path / "s.tar", dict.fromkeys(files, png()))
    assert {f.path.removeprefix(f"{path}/"): f.label for f in listed(path)} == files


def test_classes_are_those_of_torchvisions_image_folder(tmp_path):
    put(tmp_path, dict.fromkeys(["b/x/1.png", "a/2.png", "b/3.png", "a/deep/er/4.png"], png()))
    theirs, images = ImageFolder(str(tmp_path)), open_images(tmp_path)
    ours = {images.name(i): images.label(i) for i in range(len(images))}
    assert ours == {path: theirs.classes[number] for path, number in theirs.samples}


def test_links(tmp_path):
    put(tmp_path, {"in/a/1.png": png(1), "in/a/b/2.png": png(2), "out/3.png": png(3)})
    for link, target in (
        *(("a/b/up", "../.."), ("again", "a"), ("one", "../out"), ("two", "../out")),
        *(("self.png", "self.png"), ("gone.png", "nowhere.png")),
    ):
        (tmp_path / "in" / link).symlink_to(target)
    images = open_images(tmp_path / "in")
    found = [os.path.relpath(images.name(i), tmp_path / "in") for i in range(len(images))]
    assert found == ["a/1.png", "a/b/2.png", "gone.png", "one/3.png", "self.png"]
    assert [Path(path).name for _, path, _ in images.skipped] == ["up", "again", "two"]
    for broken in (2, 4):
        with pytest.raises(ImageError):
            images.read(broken)


def test_files_globs_and_lists_keep_the_given_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("b.jpg", "a.jpg", "c/1.jpg", "c/2.jpg", "[x].jpg", "{1..2}.jpg", "plain")
    put(tmp_path, dict.fromkeys(given, b""))
    Path("list.txt").write_bytes(b"\xef\xbb\xbfc/2.jpg\r\n\n  \nabsent.jpg\na.jpg")
    paths = [p for g in ("b.jpg", "c/*.jpg", "list.txt", *given[4:]) for p in expand(g)]
    assert [file.path for file in list_files(paths)] == [
        *("b.jpg", "c/1.jpg", "c/2.jpg", "c/2.jpg", "absent.jpg", "a.jpg"),
        *("[x].jpg", "{1..2}.jpg", "plain"),
    ]
    assert expand("s-{008..010}.tar") == [f"s-{n:03}.tar" for n in (8, 9, 10)]
    assert expand("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        *(("absent", "absent"), ("*.gif", "gif"), ("empty", "empty"), ("texts", "a.md")),
        *(("z/a.zip", "unpack"), ("z", "unpack"), ("s-{0..3}.tar", "s-1.tar")),
        *(("pipe.txt", "pipe"), ("pipe.tar", "pipe"), ("pipe.png", "regular")),  # not waited for
    ],
)
def test_wrong_inputs_are_named(tmp_path, monkeypatch, given, named):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"empty/.hidden.jpg": b"", "texts/a.md": b"", "z/a.zip": b"PK"})
    shard(tmp_path / "s-0.tar", {"1.png": png()})
    if given.startswith("pipe"):
        os.mkfifo(given)
    with pytest.raises(DataError, match=named):
        open_images(given)[0]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz"])
def test_shard(tmp_path, name):
    long = "ü" * 120 + ".png"
    members = {
        **{"0001.cls": b"7\n", "0001.jpg": b"1", "0002.seg.png": b"2", "0002.cls": b"8"},
        **{"./dogs/a b.jpg": b"3", "._0001.jpg": b"resource fork", "notes.json": b"{}"},
        long: b"4",
    }
    path = shard(tmp_path / name, members, "w" if name == "s.tar" else "w:gz")
    images = open_images(path)
    names = [images.name(i).removeprefix(f"{path}/") for i in range(len(images))]
    assert names == ["0001.jpg", "0002.seg.png", "dogs/a b.jpg", long]
    assert labels(images) == ["7", "8", "dogs", None]
    assert [path for _, path, _ in images.skipped] == [f"{path}/notes.json"]
    assert [images.raw(i) for i in reversed(range(4))] == [b"4", b"3", b"2", b"1"]
    assert images.compressed_shards() == ([] if name == "s.tar" else [str(path)])
    assert images.files() == [str(path)]


def test_folder_of_shards_and_shards_beside_images(tmp_path):
    shard(tmp_path / "s/b.tar", {"2.png": png(2)})
    shard(tmp_path / "s/a.tar.gz", {"1.png": png(1)}, "w:gz")
    put(tmp_path, {"s/README.md": b"", "s/data.parquet": b""})
    assert levels(open_images(tmp_path / "s")) == [1, 2]  # tars win over Parquet
    put(tmp_path, {"s/3.png": png(3)})
    (tmp_path / "s/data.parquet").unlink()
    beside = open_images(tmp_path / "s")
    assert levels(beside) == [3]
    assert {Path(path).name for _, path, _ in beside.skipped} == {"a.tar.gz", "b.tar", "README.md"}


def test_damaged_shards_give_what_can_be_read_and_name_the_damage(tmp_path):
    data = shard(tmp_path / "whole.tar", {f"{i}.png": png(i) for i in range(4)}).read_bytes()
    header = data.index(b"2.png")
    zipped = shard(tmp_path / "z.tgz", {f"{i}.png": os.urandom(3000) for i in range(4)}, "w:gz")
    for name, content, readable in (
        ("cut_between_members.tar", data[:header], 2),
        ("cut_header.tar", data[: header + 100], 2),
        ("cut_data.tar", data[: header + 520], 2),
        ("broken.tar", data[:header] + b"x" * 200 + data[header + 200 :], 2),
        ("text.tar", b"no tar at all", 0),
        ("cut.tar.gz", zipped.read_bytes()[:8000], 2),
        ("empty.tar", b"", 0),
        ("zeros.tar", bytes(10240), 0),
    ):
        (tmp_path / name).write_bytes(content)
        files = listed(tmp_path / name)
        assert len([f for f in files if f.problem is None]) >= readable, name
        assert files[-1].path == str(tmp_path / name), name
        assert files[-1].problem, name


def test_links_and_changed_bytes_inside_a_shard_end_in_image_errors(tmp_path):
    """Bytes changed anywhere, with and without a fitting checksum of the header."""
    rng = random.Random(0)
    members = {"a/1.png": png(1), "a/1.cls": b"3", "ü" * 120 + ".png": png(2), "3.png": png(3)}
    path = shard(tmp_path / "w.tar", members)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("soft.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ImageError, match="refused"):
        open_images(path).read(3)
    whole = path.read_bytes()
    headers = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
    for number in range(100):
        content, start = bytearray(whole), rng.choice(headers)
        for _ in range(rng.choice((1, 4))):
            content[start + rng.randrange(1024)] = rng.choice((0, 0x80, 0xFF, rng.randrange(256)))
        if number % 2:
            content[start + 148 : start + 156] = b" " * 8
            total = sum(content[start : start + 512])
            content[start + 148 : start + 156] = b"%06o\0 " % total
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            images = open_images(path)
            for index in range(len(images)):
                with contextlib.suppress(ImageError):
                    images.read(index)
