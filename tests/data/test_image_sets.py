"""Opening what a user names as one list of images."""

import gzip
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ijepa_zoo.data.packed import PackedItems
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ijepa_zoo.data import image_sets
from ijepa_zoo.data.sources import FileSet, ImageSet, list_items, open_images
from ijepa_zoo.errors import DataError, ImageError


def png(level: int, mode: str = "L", size: tuple[int, int] = (3, 2)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, level).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def levels(images: ImageSet) -> list[int]:
    """First channel of the first pixel of every image."""
    return [int(np.asarray(images.read(i)).reshape(-1)[0]) for i in range(len(images))]


CLASSES = {"b/x.png": png(1), "a/y.png": png(2), "b/a.png": png(3), "a/notes.md": b"no"}


def test_folder_of_classes(tmp_path: Path) -> None:
    put(tmp_path, CLASSES)
    images = open_images(tmp_path)
    assert isinstance(images, ImageSet)
    assert levels(images) == [2, 3, 1]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]
    assert images.labels.dtype == np.int64
    assert images.name(2) == str(tmp_path / "b/x.png")


def test_flat_folder_list_and_glob_have_no_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"p/1.png": png(1), "p/2.png": png(2), "q/3.png": png(3)})
    Path("list.txt").write_text("q/3.png\np/1.png\n")
    for source, expected in (
        ("p", [1, 2]),
        ("p/*.png", [1, 2]),
        ("list.txt", [3, 1]),
        (["p/2.png", Path("list.txt")], [2, 3, 1]),
    ):
        images = open_images(source)
        assert levels(images) == expected
        assert images.labels is None


def test_packed_items_are_those_of_the_listing(tmp_path: Path) -> None:
    put(tmp_path, {"a/1.png": b"1", "ü/é.png": b"2", "top.png": b"3"})
    with open(os.fsencode(tmp_path) + b"/a/\xff\xfe.png", "wb") as file:
        file.write(b"4")
    shard(tmp_path / "s.tar", {"0.png": b"5", "d/1.cls": b"7", "d/1.png": b"66"})
    found = [i for _, i in list_items([tmp_path, tmp_path / "s.tar"]) if i.skipped is None]
    packed = PackedItems.of(("", item) for item in found)
    assert len(packed) == len(found) == 6
    for number, item in enumerate(found):
        again = packed[number]
        assert (again.path, again.shard, again.offset) == (item.path, item.shard, item.offset)
        assert again.size == item.size
    names = sorted({i.label for i in found if i.label is not None})
    assert packed.labels.tolist() == [names.index(i.label) if i.label else -1 for i in found]


def test_memory_of_a_million_names() -> None:
    """Arrays alone: no Python object for each image."""
    from ijepa_zoo.data.items import Item

    many = 100_000
    items = PackedItems.of(("r/", Item(f"r/{i // 1000}/{i:08}.JPEG", str(i))) for i in range(many))
    arrays = sum(v.nbytes for v in vars(items).values() if isinstance(v, np.ndarray))
    assert arrays == many * (4 + 13 + 4 * 8)
    assert len(items.table) == 100
    assert items[99_999].path == "r/99/00099999.JPEG"


def test_colour_and_grey(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2), (10, 200, 30)).save(tmp_path / "c.png")
    Image.new("L", (4, 2), 77).save(tmp_path / "g.png")
    colour, grey = open_images(tmp_path), open_images(tmp_path, in_chans=1)
    assert [colour.read(i).mode for i in range(2)] == ["RGB", "RGB"]
    assert [grey.read(i).mode for i in range(2)] == ["L", "L"]
    luma = round(0.299 * 10 + 0.587 * 200 + 0.114 * 30)
    assert levels(grey) == [luma, 77]
    with pytest.raises(DataError, match=r"model\.in_chans is 4: give images of other channels as"):
        open_images(tmp_path, in_chans=4)


def test_broken_files_have_a_reason_and_a_name(tmp_path: Path) -> None:
    put(tmp_path, {"1.png": b"", "2.png": png(2)[:40], "3.npy": b"junk", "4.png": png(4)})
    images = open_images(tmp_path)
    for number, reason in enumerate(("empty file", "image", "broken array")):
        with pytest.raises(ImageError, match=reason):
            images.read(number)
    (tmp_path / "4.png").unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        images.read(3)


MEMBERS = {
    **{"x/1.png": png(1), "x/1.cls": b"9", "x/1.json": b"{}"},
    **{"x/2.png": png(2), "x/2.cls": b"10", "3.png": png(3)},
}


def test_shards(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", MEMBERS)
    shard(tmp_path / "b.tar", {"1.png": png(4), "link.txt": b"x"})
    images = open_images([tmp_path / "b.tar", tmp_path / "a.tar"])
    assert levels(images) == [4, 1, 2, 3]
    assert images.labels is not None
    assert images.labels.tolist() == [-1, 1, 0, -1]  # "10" sorts before "9"
    assert images.name(1) == f"{tmp_path}/a.tar/x/1.png"
    assert levels(open_images(str(tmp_path / "*.tar"))) == [1, 2, 3, 4]
    with pytest.raises(DataError, match="name it as an input"):
        open_images(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_shards_are_refused(tmp_path: Path, name: str) -> None:
    shard(tmp_path / "plain", MEMBERS)
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    with pytest.raises(DataError, match=r"compressed with gzip.*at random.*gunzip"):
        open_images(tmp_path / name)


def test_damaged_shard_is_no_small_matter(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(5)})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:2700])
    with pytest.raises(DataError, match=r"a\.tar': damaged tar shard"):
        open_images(tmp_path / "a.tar")


def test_index_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    shard(paths[0], MEMBERS)
    shard(paths[1], {"é/1.png": png(4)})
    index = tmp_path / "cache" / "index"
    first = open_images(paths, index=index)
    listed: list[object] = []
    packed = image_sets._packed
    monkeypatch.setattr(image_sets, "_packed", lambda i: listed.append(i) or packed(i))
    again = open_images(paths, index=index)
    assert not listed
    assert levels(again) == levels(first) == [1, 2, 3, 4]
    assert again.labels.tolist() == first.labels.tolist()
    assert again.fingerprint() == first.fingerprint() == open_images(paths).fingerprint()

    listed.clear()
    shard(paths[1], {"1.png": png(5), "2.png": png(6)})
    assert levels(open_images(paths, index=index)) == [1, 2, 3, 5, 6]
    assert levels(open_images(paths[:1], index=index)) == [1, 2, 3]
    assert len(listed) == 2
    assert levels(open_images(paths, index=index)) == [1, 2, 3, 5, 6]
    with np.load(index) as saved:
        whole = dict(saved)
    about = json.loads(whole["about"].tobytes())
    for change in (
        {"holders": whole["holders"] + 2},
        {"ends": whole["ends"][:-1]},
        {"sizes": whole["sizes"].astype(float)},
        {"about": np.frombuffer(json.dumps([about]).encode(), np.uint8)},
        {"about": np.frombuffer(json.dumps({**about, "table": [3]}).encode(), np.uint8)},
        {"about": np.frombuffer(json.dumps({**about, "problems": None}).encode(), np.uint8)},
        None,
    ):
        if change is None:
            index.write_bytes(index.read_bytes()[:300])
        else:
            with index.open("wb") as file:
                np.savez(file, **{**whole, **change})
        listed.clear()
        assert levels(open_images(paths, index=index)) == [1, 2, 3, 5, 6]
        assert len(listed) == 1
    with index.open("wb") as file:
        np.save(file, np.zeros(3))
    assert levels(open_images(paths, index=index)) == [1, 2, 3, 5, 6]
    assert not list(index.parent.glob("*.partial"))


def test_fingerprint_is_of_the_list_and_not_of_its_place(tmp_path: Path) -> None:
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
    assert renamed != first
    put(tmp_path / "one", {"b/new.png": png(4)})
    assert open_images(tmp_path / "one").fingerprint() not in (first, renamed)
    shard(tmp_path / "s.tar", {**MEMBERS, "3.png": png(3, size=(300, 200))})
    assert open_images(tmp_path / "s.tar").fingerprint() != shards[0]


def test_an_image_that_is_named_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"p/1.png": png(1), "p/c/2.png": png(2), "q/1.png": png(3)})
    shard(tmp_path / "s.tar", MEMBERS)
    Path("list.txt").write_text("q/1.png\np/1.png\nq/1.png\n")
    (tmp_path / "link").symlink_to("p")
    assert len(open_images(["p", "q", "s.tar"])) == 6
    for source, words in (
        (["p/1.png", "p/1.png"], "p/1.png' is named twice: "),
        ("list.txt", "q/1.png' is named twice: "),
        (["p", "q", "./p/"], "./p/1.png' is named twice, also as 'p/1.png'"),
        (["p", "p/c"], "p/c/2.png' is named twice: "),
        (["q", "p/1.png", "link"], "link/1.png' is named twice, also as 'p/1.png'"),
        (["s.tar", tmp_path / "s.tar"], "s.tar/x/1.png' is named twice, also as 's.tar/x/1.png'"),
    ):
        for index in (None, tmp_path / "index"):
            with pytest.raises(DataError) as caught:
                open_images(source, index=index)
            assert words in str(caught.value)


def test_readers_of_forked_processes_do_not_share_a_place(tmp_path: Path) -> None:
    """Open files are shared over a fork; two readers of one file would move each other's place."""
    shard(tmp_path / "a.tar", {f"{i}.png": png(i, size=(200, 200)) for i in range(40)})
    images = open_images(tmp_path / "a.tar")
    images.read(0)  # opens the shard in this process
    reading, writing = os.pipe()
    child = os.fork()
    found = []
    for _ in range(20):
        found = levels(images)
        if found != list(range(40)):
            break
    if child == 0:
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert found == json.loads(os.read(reading, 10_000)) == list(range(40))
    again = pickle.loads(pickle.dumps(images))
    assert isinstance(again, FileSet)
    assert levels(again) == found


ARRAY = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)


def test_array_file_stays_on_the_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAY)
    images = open_images(tmp_path / "a.npy")
    assert isinstance(images.images, np.memmap)
    for number, expected in enumerate(ARRAY):
        assert np.array_equal(np.asarray(images.read(number)), expected)
    assert images.labels is None
    assert images.name(3) == "a.npy[3]"
    assert images.fingerprint() == open_images(ARRAY).fingerprint()
    assert images.fingerprint() != open_images(ARRAY[::-1]).fingerprint()


def test_arrays_of_any_channels(tmp_path: Path) -> None:
    grey = ARRAY[..., 0]
    assert np.array_equal(np.asarray(open_images(grey, in_chans=1).read(2)), grey[2])
    assert open_images(ARRAY[..., :1], in_chans=1).read(2).mode == "L"
    many = np.concatenate([ARRAY, ARRAY[..., :2] + 1], axis=3)
    read = open_images(many, in_chans=5).read(4)
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), many[4].transpose(2, 0, 1))
    tensor = torch.from_numpy(many.transpose(0, 3, 1, 2).copy())
    assert torch.equal(open_images(tensor, in_chans=5).read(4), read)
    for number, image in enumerate(many):
        np.save(tmp_path / f"{number}.npy", image)
    folder = open_images(tmp_path, in_chans=5)
    assert len(folder) == 5
    assert torch.equal(folder.read(4), read)


def test_npz_with_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=ARRAY, labels=np.array([2, 0, 1, 0, 2], np.int32))
    images = open_images(tmp_path / "a.npz")
    assert np.array_equal(np.asarray(images.read(1)), ARRAY[1])
    assert images.labels is not None
    assert images.labels.tolist() == [2, 0, 1, 0, 2]
    np.savez(tmp_path / "b.npz", x=ARRAY)
    with pytest.raises(DataError, match=r"holds x; the array of the images must be called images"):
        open_images(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read as arrays"):
        open_images(tmp_path / "c.npz")


@pytest.mark.parametrize(
    ("array", "in_chans", "message"),
    [
        (ARRAY.astype(np.float32), 3, r"float32 \[5, 4, 6, 3\]; images are uint8"),
        (ARRAY[0, 0], 3, r"images are uint8 \[n, H, W, C\]"),
        (ARRAY[:0], 3, "images are uint8"),
        (ARRAY, 1, "3 channels, the model takes 1: use model.in_chans=3"),
        (ARRAY[..., 0], 3, "1 channels, the model takes 3"),
        (ARRAY[0], 3, r"looks like one image \[H, W, C\].*folder"),
        (ARRAY.transpose(0, 3, 1, 2), 3, r"looks like \[C, H, W\].*to the end with numpy.moveaxis"),
        (ARRAY.transpose(0, 3, 1, 2), 1, r"looks like \[C, H, W\].*use model.in_chans=3$"),
        (torch.from_numpy(ARRAY), 3, r"looks like \[H, W, C\].*torch\.movedim\(tensor, -1, -3\)"),
    ],
)
def test_wrong_arrays(array: np.ndarray, in_chans: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_images(array, in_chans=in_chans)


def test_the_advice_for_wrong_axes_works() -> None:
    first = ARRAY.transpose(0, 3, 1, 2)
    assert levels(open_images(np.moveaxis(first, -3, -1))) == levels(open_images(ARRAY))
    tensor = torch.movedim(torch.from_numpy(ARRAY), -1, -3)
    assert levels(open_images(tensor)) == levels(open_images(ARRAY))
    with pytest.raises(ImageError, match=r"looks like \[C, H, W\]"):
        open_images([first[0]]).read(0)
    with pytest.raises(ImageError, match=r"looks like \[H, W, C\]"):
        open_images([torch.from_numpy(ARRAY[0])]).read(0)


@pytest.mark.parametrize("labels", [np.array(list("abcde")), np.linspace(0, 1, 5)])
def test_labels_that_are_no_numbers_of_classes(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", images=ARRAY, labels=labels)
    with pytest.raises(DataError, match=r"labels of a\.npz are .*numbers are whole numbers"):
        open_images(tmp_path / "a.npz")
    numbers = np.unique(labels, return_inverse=True)[1]
    np.savez(tmp_path / "a.npz", images=ARRAY, labels=numbers)
    assert open_images(tmp_path / "a.npz").labels.tolist() == [0, 1, 2, 3, 4]


def test_an_array_of_images_stands_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "many.npy", ARRAY)
    np.save(tmp_path / "one.npy", ARRAY[0])
    (tmp_path / "spoilt.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"many\.npy' holds many images \[n, H, W, C\]"):
        open_images([tmp_path / "one.npy", tmp_path / "many.npy"])
    images = open_images([tmp_path / "one.npy", tmp_path / "spoilt.npy"])
    assert np.array_equal(np.asarray(images.read(0)), ARRAY[0])


class Pictures(Dataset):
    """Items of every kind that is allowed, and some that are not."""

    targets = (3, 1, 1, 1, 1, 1)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> object:
        return [
            Image.new("RGB", (3, 2), (5, 5, 5)),
            (np.full((2, 3, 3), 6, np.uint8), 1),
            [torch.full((3, 2, 3), 7, dtype=torch.uint8), "label", 0],
            Image.open(io.BytesIO(png(8)[:50])),
            (np.zeros((2, 3, 3)), 0),
            {"image": 1},
        ][index]


def test_data_set_object() -> None:
    images = open_images(Pictures())
    assert len(images) == 6
    assert [int(np.asarray(images.read(i)).reshape(-1)[0]) for i in range(3)] == [5, 6, 7]
    assert all(isinstance(images.read(i), Image.Image) for i in range(3))
    assert images.labels is not None
    assert images.labels.tolist() == [3, 1, 1, 1, 1, 1]
    assert images.name(4) == "Pictures[4]"
    with pytest.raises(ImageError):
        images.read(3)
    with pytest.raises(ImageError, match=r"float64 \[2, 3, 3\]; an image is uint8"):
        images.read(4)
    with pytest.raises(DataError, match=r"Pictures\[5\] is of type dict"):
        images.read(5)
    assert open_images(images) is images
    assert levels(open_images([Image.new("L", (2, 2), 9)] * 2)) == [9, 9]


class Faulty(Pictures):
    """A data set whose code fails in ways of its own."""

    targets = ()
    lengths = 0

    def __len__(self) -> int:
        self.lengths += 1
        return 40

    def __getitem__(self, index: int) -> object:
        if index == 1:
            raise SystemExit("enough")
        return self.no_such_thing if index else [][index]


@pytest.mark.parametrize(
    ("index", "cause", "words"),
    [
        (0, IndexError, r"\[0\] \(of 40 items by its length\) cannot be read: IndexError: list"),
        (1, SystemExit, r"\[1\] .*: SystemExit: enough \(.*test_image_sets\.py, line \d+\)"),
        (2, AttributeError, r"\[2\] .*: AttributeError: .* has no attribute 'no_such_thing'"),
    ],
)
def test_faults_of_a_data_set_are_named(index: int, cause: type, words: str) -> None:
    data = Faulty()
    images = open_images(data)
    assert len(images) == len(images) == 40
    assert data.lengths == 1
    with pytest.raises(DataError, match=rf"^Faulty{words}") as caught:
        images.read(index)
    assert isinstance(caught.value.__cause__, cause)


def test_a_data_set_whose_length_or_labels_fail() -> None:
    class Endless(Pictures):
        def __len__(self) -> int:
            raise NotImplementedError

    class Boxes(Pictures):
        targets = ([1, 2], [3], [], [], [], [])

    with pytest.raises(DataError, match="length of Endless cannot be told: NotImplementedError"):
        open_images(Endless())
    with pytest.raises(DataError, match=r"Boxes\.targets are no class numbers, which are whole"):
        open_images(Boxes())


class Stream(IterableDataset):
    def __iter__(self) -> object:
        return iter(())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Stream(), "Stream is no list of images: it is iterable only"),
        (7, "it has no length or items"),
        ([], "list is empty"),
        (["hf-dataset:a/b", "photos"], "cannot be joined with other inputs"),
        ("hf_dataset.json", "no such file or folder: 'hf_dataset.json'"),
        ("no_such_module_x:Images", "no such file or folder, and no module 'no_such_module_x'"),
        ("io:Images", "module io has no Images"),
    ],
)
def test_wrong_sources(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_images(source)


MODULE = """
import numpy as np
class Images:
    def __init__(self): self.labels = np.array([0, 1])
    def __len__(self): return 2
    def __getitem__(self, index): return np.full((4, 4, 3), 10 + index, np.uint8), 0
class Nested: images = Images()
def make(): return Images()
def leave(): raise SystemExit(3)
text = "photos"
"""


def test_module_and_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("pictures_of_mine.py").write_text(MODULE)
    for attribute in ("Images", "make", "Nested.images"):
        images = open_images(f"pictures_of_mine:{attribute}")
        assert levels(images) == [10, 11]
        assert images.name(1) == f"pictures_of_mine:{attribute}[1]"
        assert images.labels is not None
    Path("needs_more.py").write_text("import no_such_package_y")
    Path("no_python.py").write_text("def f(:")
    for path, words in (
        ("needs_more:Images", r"cannot be imported: ModuleNotFoundError: .*no_such_package_y'"),
        ("no_python:f", "module no_python cannot be imported: SyntaxError: "),
        ("pictures_of_mine:leave", "cannot be called without arguments: SystemExit: 3"),
        ("pictures_of_mine:np.zeros", "cannot be called without arguments: TypeError: "),
        ("pictures_of_mine:text", "is a str, no list of images"),
        ("pictures_of_mine:Images.__len__.x", "has no Images.__len__.x"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            open_images(path)
        assert "\n" not in str(caught.value)


def test_data_sets_of_the_hub_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        open_images("hf-dataset:owner/name")


@pytest.fixture
def rows() -> dict[str, list[object]]:
    pictures = [{"bytes": png(i), "path": None} for i in (1, 2, 3)] + [{"bytes": b"x", "path": ""}]
    return {"image": pictures, "label": [0, 1, 1, 0], "text": list("abcd")}


def hub_data(rows: dict[str, list[object]]) -> object:
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    features["text"] = datasets.Value("string")
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_data_set_of_the_hub(rows: dict[str, list[object]], tmp_path: Path) -> None:
    data = hub_data(rows)
    datasets = pytest.importorskip("datasets")
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "both")
    (tmp_path / "parquet/data").mkdir(parents=True)
    data.to_parquet(tmp_path / "parquet/data/train-00000.parquet")
    data.select([1]).to_parquet(tmp_path / "parquet/data/test-00000.parquet")
    sources = (data, *(tmp_path / name for name in ("plain", "both", "parquet")))
    for images in map(open_images, sources):
        assert len(images) == 4
        assert [int(np.asarray(images.read(i))[0, 0, 0]) for i in range(3)] == [1, 2, 3]
        with pytest.raises(ImageError, match="not an image"):
            images.read(3)
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1, 1, 0]
        assert images.fingerprint() == open_images(data).fingerprint()
    assert levels(open_images(f"hf-dataset:{tmp_path}/both:test", in_chans=1)) == [3]
    with pytest.raises(DataError, match=r"no split 'val', it has train, test: write hf-dataset:"):
        open_images(f"hf-dataset:{tmp_path}/both:val")
    with pytest.raises(DataError, match=r"cannot be loaded"):
        open_images(f"hf-dataset:{tmp_path}/absent")
    with pytest.raises(DataError, match=r"0 columns of images \(text\)"):
        open_images(data.select_columns(["text"]))
