"""Listing folders, globs, lists and tar shards."""

import contextlib
import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from inputs import levels, png, put, shard

from ijepa_zoo.data import Decoder, open_images
from ijepa_zoo.data.datasets import FileDataset
from ijepa_zoo.data.files import File, expand, list_files
from ijepa_zoo.errors import DataError, ImageError


def listed(*paths: Path | str) -> list[File]:
    return list(list_files([str(path) for path in paths]))


def names(root: Path, files: list[File]) -> list[str]:
    return [os.path.relpath(file.path, root) for file in files]


def folder_labels(root: Path) -> dict[str, str | None]:
    return {os.path.relpath(f.path, root): f.label for f in listed(root) if not f.skipped}


def test_folder_is_sorted_by_path_bytes(tmp_path: Path) -> None:
    given = ("b.jpg", "a/x.PNG", "a-b/x.jpg", "a.jpg", "é.jpg", "Z.jpg", "a/deep/y.webp")
    put(tmp_path, dict.fromkeys(given, b""))
    expected = sorted(given, key=os.fsencode)
    assert names(tmp_path, listed(tmp_path)) == expected
    assert names(tmp_path, listed(f"{tmp_path}/")) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["cat/day/1.jpg", "cat/2.jpg", "dog/3.jpg"], ["cat", "cat", "dog"]),
        (["train/cat/day/1.jpg", "val/dog/2.jpg"], ["cat", "dog"]),
        (["train/n01/images/1.JPEG", "train/n02/images/2.JPEG"], ["n01", "n02"]),
        (["train/1.jpg", "val/2.jpg"], [None, None]),
        (["1.jpg", "cat/2.jpg"], [None, "cat"]),
        (["train/1.jpg", "zebra/2.jpg"], ["train", "zebra"]),
    ],
)
def test_class_is_the_first_folder_below_the_split(
    tmp_path: Path, files: list[str], expected: list[str | None]
) -> None:
    put(tmp_path, dict.fromkeys(files, b""))
    found = folder_labels(tmp_path)
    assert [found[name] for name in files] == expected


def test_classes_are_those_of_torchvisions_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    put(tmp_path, dict.fromkeys(["b/x/1.png", "a/2.png", "b/3.png", "a/deep/er/4.png"], png()))
    theirs = ImageFolder(str(tmp_path))
    images = open_images(tmp_path)
    ours = {images.name(i): images.label(i) for i in range(len(images))}
    assert ours == {path: theirs.classes[number] for path, number in theirs.samples}


def test_odd_and_hidden_names(tmp_path: Path) -> None:
    put(tmp_path, dict.fromkeys(["line\nbreak.png", ".hidden.png", ".cache/1.png"], png()))
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.png", "wb") as file:
        file.write(png(9))
    images = open_images(tmp_path)
    assert [os.fsencode(os.path.basename(images.name(i))) for i in range(len(images))] == [
        *(b"line\nbreak.png", b"\xff\xfe.png")
    ]
    assert levels(images) == [0, 9]


def test_links(tmp_path: Path) -> None:
    put(tmp_path, {"in/a/1.png": png(1), "in/a/b/2.png": png(2), "out/3.png": png(3)})
    (tmp_path / "in/a/b/up").symlink_to("../..")
    (tmp_path / "in/again").symlink_to("a")
    (tmp_path / "in/one").symlink_to("../out")
    (tmp_path / "in/two").symlink_to("../out")
    (tmp_path / "in/self.png").symlink_to("self.png")
    (tmp_path / "in/gone.png").symlink_to("nowhere.png")
    images = open_images(tmp_path / "in")
    found = [os.path.relpath(images.name(i), tmp_path / "in") for i in range(len(images))]
    assert found == ["a/1.png", "a/b/2.png", "gone.png", "one/3.png", "self.png"]
    assert [Path(path).name for _, path, _ in images.skipped] == ["up", "again", "two"]
    for broken in (2, 4):
        with pytest.raises(ImageError):
            images.read(broken)


def test_siblings_that_link_each_other_are_read_once(tmp_path: Path) -> None:
    folders = [f"c{number}" for number in range(6)]
    for folder in folders:
        put(tmp_path, {f"{folder}/1.png": png()})
        for other in folders:
            (tmp_path / folder / f"to_{other}").symlink_to(f"../{other}")
    assert len(open_images(tmp_path)) == 6


def test_files_globs_and_lists_keep_the_given_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("b.jpg", "a.jpg", "c/1.jpg", "c/2.jpg", "[x].jpg", "{1..2}.jpg", "plain")
    put(tmp_path, dict.fromkeys(given, b""))
    Path("list.txt").write_bytes(b"\xef\xbb\xbfc/2.jpg\r\n\n  \nabsent.jpg\na.jpg")
    paths = [p for g in ("b.jpg", "c/*.jpg", "list.txt", *given[4:]) for p in expand(g)]
    assert [file.path for file in list_files(paths)] == [
        *("b.jpg", "c/1.jpg", "c/2.jpg", "c/2.jpg", "absent.jpg", "a.jpg"),
        *("[x].jpg", "{1..2}.jpg", "plain"),
    ]
    assert expand("s-{008..011}.tar") == [f"s-{n:03}.tar" for n in (8, 9, 10, 11)]
    assert expand("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]


@pytest.mark.parametrize("given", ["absent", "*.gif", "empty", "texts", "a.zip", "s-{0..3}.tar"])
def test_wrong_inputs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"empty/.hidden.jpg": b"", "texts/a.md": b"", "a.zip": b"PK"})
    shard(tmp_path / "s-0.tar", {"1.png": png()})
    with pytest.raises(DataError, match={"s-{0..3}.tar": "s-1.tar"}.get(given, given[-4:])):
        open_images(given)


MEMBERS = {
    **{"0001.cls": b"7\n", "0001.jpg": b"1", "0002.seg.png": b"2", "0002.cls": b"8"},
    **{"./dogs/a b.jpg": b"3", "._0001.jpg": b"resource fork", "notes.json": b"{}"},
    "ü" * 120 + ".png": b"4",
}


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz"])
def test_shard(tmp_path: Path, name: str) -> None:
    path = shard(tmp_path / name, MEMBERS, "w" if name == "s.tar" else "w:gz")
    files = listed(path)
    found = {f.path.removeprefix(f"{path}/"): f.label for f in files if not f.skipped}
    long = "ü" * 120 + ".png"
    assert found == {"0001.jpg": "7", "0002.seg.png": "8", "dogs/a b.jpg": "dogs", long: None}
    assert [f.path for f in files if f.skipped] == [f"{path}/notes.json"]
    images = FileDataset(files, Decoder())
    assert [images.raw(i) for i in reversed(range(4))] == [b"4", b"3", b"2", b"1"]
    assert images.compressed_shards() == ([] if name == "s.tar" else [str(path)])
    assert images.files() == [str(path)]


def test_folder_of_shards_and_shards_beside_images(tmp_path: Path) -> None:
    shard(tmp_path / "s/b.tar", {"2.png": png(2)})
    shard(tmp_path / "s/a.tar.gz", {"1.png": png(1)}, "w:gz")
    put(tmp_path, {"s/README.md": b"", "s/data.parquet": b""})
    assert levels(open_images(tmp_path / "s")) == [1, 2]  # tars win over Parquet
    assert levels(open_images(f"{tmp_path}/s/*.tar")) == [2]
    put(tmp_path, {"s/3.png": png(3)})
    (tmp_path / "s/data.parquet").unlink()
    beside = open_images(tmp_path / "s")
    assert levels(beside) == [3]
    assert {Path(path).name for _, path, _ in beside.skipped} == {"a.tar.gz", "b.tar", "README.md"}


def test_splits_inside_a_shard(tmp_path: Path) -> None:
    members = {"train/cat/1.png": b"1", "val/dog/x/2.png": b"2", "val/3.png": b"3"}
    files = listed(shard(tmp_path / "s.tar", members))
    assert [file.label for file in files] == ["cat", "dog", None]


def test_links_duplicates_and_paths_that_lead_out_are_refused(tmp_path: Path) -> None:
    put(tmp_path, {"secret.png": png()})
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("1.png", "../2.png", "a/../../3.png", "/4.png", "1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
    images = open_images(tmp_path / "s.tar")
    assert len(images) == 7
    assert sorted(images.problems) == [1, 2, 3, 4, 5, 6]
    assert images.read(0).size == (3, 2)
    for number in range(1, 7):
        with pytest.raises(ImageError, match="refused"):
            images.read(number)


def test_damaged_shards_give_what_can_be_read_and_name_the_damage(tmp_path: Path) -> None:
    data = shard(tmp_path / "whole.tar", {f"{i}.png": png(i) for i in range(4)}).read_bytes()
    header = data.index(b"2.png")
    broken = data[:header] + b"x" * 200 + data[header + 200 :]
    zipped = shard(tmp_path / "z.tgz", {f"{i}.png": os.urandom(3000) for i in range(4)}, "w:gz")
    for name, content, readable in (
        ("cut_between_members.tar", data[:header], 2),
        ("cut_header.tar", data[: header + 100], 2),
        ("cut_data.tar", data[: header + 520], 2),
        ("broken.tar", broken, 2),
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
        assert {f.label for f in files} == {None}, name


def checksummed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_fuzzed_shards_are_listed_or_named(tmp_path: Path) -> None:
    """Bytes changed anywhere, with and without a fitting checksum of the header."""
    rng = random.Random(0)
    members = {"a/1.png": png(1), "a/1.cls": b"3", "ü" * 120 + ".png": png(2), "3.png": png(3)}
    whole = {}
    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "w.tar", "w", format=style) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name if style != tarfile.USTAR_FORMAT else name[:20])
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        whole[style] = (tmp_path / "w.tar").read_bytes()
    for number in range(500):
        content = bytearray(whole[rng.choice(list(whole))])
        headers = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"]
        start = rng.choice(headers)
        for _ in range(rng.choice((1, 4))):
            content[start + rng.randrange(1024)] = rng.choice((0, 0x80, 0xFF, rng.randrange(256)))
        if number % 2:
            content[start : start + 512] = checksummed(content[start : start + 512])
        if number % 5 == 0:
            del content[rng.randrange(len(content)) :]
        (tmp_path / "f.tar").write_bytes(content)
        with contextlib.suppress(DataError):
            images = open_images(tmp_path / "f.tar")
            for index in range(len(images)):
                with contextlib.suppress(ImageError):
                    images.read(index)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["list.txt", "shard.tar", "shard.tgz", "a.png"])
def test_pipes_are_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError):
        open_images(tmp_path / name)[0]
