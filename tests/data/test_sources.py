"""Listing of inputs: folders, files, globs, lists and tar shards."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from ijepa_zoo.data.images import ImageReader
from ijepa_zoo.data.items import Item
from PIL import Image

from ijepa_zoo.data.sources import find_items
from ijepa_zoo.errors import DataError, ImageError


def picture(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (3, 2), level).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture())


def names(items: list[Item], root: Path) -> list[str]:
    return [os.path.relpath(item.path, root) for item in items]


def test_folder_is_sorted_by_path_bytes(tmp_path: Path) -> None:
    put(tmp_path, "b.jpg", "a/x.PNG", "a-b/x.jpg", "a.jpg", "é.jpg", "Z.jpg", "a/deep/y.webp")
    items = find_items([tmp_path])
    expected = ["Z.jpg", "a-b/x.jpg", "a.jpg", "a/deep/y.webp", "a/x.PNG", "b.jpg", "é.jpg"]
    assert names(items, tmp_path) == expected
    assert [item.label for item in items] == [None, "a-b", None, "deep", "a", None, None]


def test_duplicate_odd_and_hidden_names(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.jpg", "dog/1.jpg", "line\nbreak.jpg", ".hidden.jpg", ".cache/1.jpg")
    odd = os.fsencode(tmp_path) + b"/\xff\xfe.jpg"
    with open(odd, "wb") as file:
        file.write(picture())
    items = find_items([tmp_path])
    assert [os.fsencode(i.path).rpartition(b"/")[2] for i in items] == [
        *(b"1.jpg", b"1.jpg", b"line\nbreak.jpg", b"\xff\xfe.jpg")
    ]
    assert ImageReader().read(items[-1]).size == (3, 2)


def test_other_files_are_skipped_with_a_reason(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "notes.md", "README", "shard.tar")
    skipped = {Path(i.path).name: i.skipped for i in find_items([tmp_path]) if i.skipped}
    assert skipped["notes.md"] == "no image by its name (.md)"
    assert skipped["README"] == "no image by its name (no suffix)"
    assert "name it as an input" in skipped["shard.tar"]
    assert len(skipped) == 3


def test_links(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "a/b/2.jpg")
    (tmp_path / "a/b/up").symlink_to("../..")
    (tmp_path / "again").symlink_to("a")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    items = find_items([tmp_path])
    found = [name for name, i in zip(names(items, tmp_path), items) if not i.skipped]
    assert found == [
        *("a/1.jpg", "a/b/2.jpg", "again/1.jpg", "again/b/2.jpg", "gone.jpg", "self.jpg")
    ]
    loops = [i for i in items if i.skipped]
    assert [name.rpartition("/")[2] for name in names(loops, tmp_path)] == ["up", "up"]
    for item in items:
        if "gone" in item.path or "self" in item.path:
            with pytest.raises(ImageError, match="cannot be read"):
                ImageReader().read(item)


def test_files_globs_and_lists_keep_the_given_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "b.jpg", "a.jpg", "c/1.jpg", "c/2.jpg", "[x].jpg", "plain")
    Path("list.txt").write_bytes(b"\xef\xbb\xbfc/2.jpg\r\n\n  \nabsent.jpg\na.jpg")
    items = find_items(["b.jpg", "c/*.jpg", "list.txt", "[x].jpg", "plain"])
    expected = ["b.jpg", "c/1.jpg", "c/2.jpg", "c/2.jpg", "absent.jpg", "a.jpg", "[x].jpg", "plain"]
    assert [i.path for i in items] == expected
    assert all(i.label is None and i.skipped is None for i in items)
    assert find_items(items) == items


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("phtos", "no such file or folder: 'phtos'. Did you mean 'photos'"),
        ("photos/cta/1.jpg", "Did you mean 'photos/cat'"),
        ("zzz", "nothing like 'zzz'"),
        ("photos/*.gif", "no file matches the pattern 'photos/[*].gif'"),
        ("empty", "nothing there except hidden files"),
        ("texts", r"1 other files were seen, for example 'texts/a.md': no image by its name"),
    ],
)
def test_wrong_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "photos/cat/1.jpg", "empty/.hidden.jpg", "texts/a.md")
    with pytest.raises(DataError, match=message):
        find_items([given])


def make_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


MEMBERS = {
    "0001.cls": b"7\n",
    "0001.jpg": picture(1),
    "0002.seg.png": picture(2),
    "0002.cls": b"8",
    "./dogs/a b.jpg": picture(3),
    "._0001.jpg": b"resource fork",
    "notes.json": b"{}",
    "ü" * 120 + ".png": picture(4),
}


@pytest.mark.parametrize(
    ("name", "mode"), [("s.tar", "w"), ("s.tar.gz", "w:gz"), ("s.tgz", "w:gz")]
)
def test_shard(tmp_path: Path, name: str, mode: str) -> None:
    path = tmp_path / name
    make_shard(path, MEMBERS, mode)
    items = find_items([path])
    found = [(i.path.removeprefix(f"{path}/"), i.label) for i in items if not i.skipped]
    long = "ü" * 120 + ".png"
    assert found == [
        *(("0001.jpg", "7"), ("0002.seg.png", "8"), ("dogs/a b.jpg", "dogs"), (long, None))
    ]
    assert [i.path for i in items if i.skipped] == [f"{path}/notes.json"]
    reader = ImageReader()
    images = [i for i in items if not i.skipped]
    levels = {i.path: int(np.asarray(reader.read(i))[0, 0, 0]) for i in reversed(images)}
    assert [levels[i.path] for i in images] == [1, 2, 3, 4]


def test_damaged_shards_are_told(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    make_shard(whole, {f"{i}.png": picture(i) for i in range(4)})
    data = bytearray(whole.read_bytes())
    header = data.index(b"2.png")
    broken = data[:]
    broken[header : header + 200] = b"x" * 200
    gzipped = tmp_path / "gzipped.tar.gz"
    make_shard(gzipped, {f"{i}.png": os.urandom(3000) for i in range(4)}, "w:gz")
    cases = {
        "cut_header.tar": (bytes(data[: header + 100]), 2),
        "cut_data.tar": (bytes(data[: header + 520]), 2),
        "broken.tar": (bytes(broken), 2),
        "text.tar": (b"no tar at all", 0),
        "cut.tar.gz": (gzipped.read_bytes()[:8000], 2),
        "empty.tar": (b"", 0),
    }
    for name, (content, readable) in cases.items():
        (tmp_path / name).write_bytes(content)
        items = find_items([tmp_path / name])
        assert len([i for i in items if i.problem is None]) >= readable, name
        assert items[-1].path == str(tmp_path / name), name
        assert items[-1].problem is not None, name
        assert items[-1].problem.startswith(("damaged tar shard", "a tar shard without")), name


@pytest.mark.parametrize("name", ["list.txt", "shard.tar", "shard.tgz"])
def test_pipes_are_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="no regular file"):
        find_items([tmp_path / name])


def test_one_path_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (item,) = find_items([tmp_path])
    assert find_items(tmp_path) == find_items(str(tmp_path)) == find_items(item) == [item]


def test_label_that_unfolds_to_gigabytes_is_cut(tmp_path: Path) -> None:
    make_shard(tmp_path / "a.tar", {"a.png": picture(1), "a.cls": b"7" * 100_000})
    (item,) = find_items([tmp_path / "a.tar"])
    assert item.label == "7" * 4096
