"""Listing folders and tar shards: order, links, damage."""

import contextlib
import os
import random
import tarfile
from pathlib import Path

import pytest
from inputs import png, put, shard

from ijepa_zoo.data import open_images
from ijepa_zoo.data.files import list_files
from ijepa_zoo.errors import DataError, ImageError


def test_folder_is_sorted_by_path_bytes(tmp_path):
    given = ("b.jpg", "a/x.PNG", "a-b/x.jpg", "a.jpg", "é.jpg", "Z.jpg", "line\nbreak.png")
    put(tmp_path, dict.fromkeys(given, png()))
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png"))).write_bytes(png())
    found = [os.fsencode(os.path.relpath(f.path, tmp_path)) for f in list_files([str(tmp_path)])]
    assert found == sorted([*map(os.fsencode, given), b"\xff\xfe.png"])


def test_a_shard_that_was_replaced_is_read_again(tmp_path):
    for seed in (1, 2):
        path = shard(tmp_path / "s.tar", {"a.png": png(seed)})
        (tmp_path / "a.png").write_bytes(png(seed))
        assert open_images(path).read(0) == open_images(tmp_path / "a.png").read(0)


def test_links(tmp_path):
    put(tmp_path, {"in/a/1.png": png(1), "in/a/b/2.png": png(2), "out/3.png": png(3)})
    for link, target in (
        ("a/b/up", "../.."),
        ("again", "a"),
        ("one", "../out"),
        ("two", "../out"),
        ("self.png", "self.png"),
        ("gone.png", "nowhere.png"),
    ):
        (tmp_path / "in" / link).symlink_to(target)
    images = open_images(tmp_path / "in")
    found = [os.path.relpath(images.name(i), tmp_path / "in") for i in range(len(images))]
    assert found == ["a/1.png", "a/b/2.png", "gone.png", "one/3.png", "self.png"]
    assert [Path(path).name for _, path, _ in images.skipped] == ["up", "again", "two"]
    for broken in (2, 4):
        with pytest.raises(ImageError):
            images.read(broken)


def test_damaged_shards_give_what_can_be_read_and_name_the_damage(tmp_path):
    data = shard(tmp_path / "whole.tar", {f"{i}.png": png(i) for i in range(4)}).read_bytes()
    header = data.index(b"2.png")
    zipped = shard(tmp_path / "z.tgz", {f"{i}.png": os.urandom(3000) for i in range(4)}, "w:gz")
    for name, content, readable in (
        ("between_members.tar", data[:header], 2),
        ("in_header.tar", data[: header + 100], 2),
        ("in_data.tar", data[: header + 520], 2),
        ("text.tar", b"no tar at all", 0),
        ("broken.tar", data[:header] + b"x" * 200 + data[header + 200 :], 2),
        ("cut.tar.gz", zipped.read_bytes()[:8000], 2),
        ("empty.tar", b"", 0),
        ("zeros.tar", bytes(10240), 0),
    ):
        (tmp_path / name).write_bytes(content)
        files = list(list_files([str(tmp_path / name)]))
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
