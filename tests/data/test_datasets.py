"""Datasets of files, arrays, objects and Hugging Face: number, class, name, fingerprint."""

import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import encoded, labels, levels, noise, png, put, shard
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ijepa_zoo.data import Decoder, ImageDataset, open_images
from ijepa_zoo.data.datasets import FileDataset, Subset
from ijepa_zoo.data.files import File
from ijepa_zoo.errors import DataError, ImageError

CLASSES = {"b/x.png": png(1), "a/y.png": png(2), "b/a.png": png(3), "a/notes.md": b"no"}
MEMBERS = {"x/1.png": png(1), "x/1.cls": b"9", "x/2.png": png(2), "x/2.cls": b"10", "3.png": png(3)}
ARRAY = noise(5 * 4, 6).reshape(5, 4, 6, 3)


def test_folder_of_classes(tmp_path: Path) -> None:
    put(tmp_path, CLASSES)
    images = open_images(tmp_path)
    assert levels(images) == [2, 3, 1]
    assert images.targets.tolist() == [0, 1, 1]
    assert images.targets.dtype == np.int64
    assert images.classes == {0: "a", 1: "b"}
    assert images.skipped == [(0, str(tmp_path / "a/notes.md"), images.skipped[0][2])]
    pixels, target, name = images[2]
    assert (np.asarray(pixels)[0, 0, 0], target, name) == (1, 1, str(tmp_path / "b/x.png"))
    assert images.files() == [images.name(i) for i in range(3)]
    batch = next(iter(DataLoader(images, batch_size=3, collate_fn=list)))
    assert [target for _, target, _ in batch] == [0, 1, 1]


def test_shards_number_classes_by_their_names(tmp_path: Path) -> None:
    images = open_images(shard(tmp_path / "a.tar", MEMBERS))
    assert images.targets.tolist() == [1, 0, -1]  # "10" sorts before "9"
    assert labels(images) == ["9", "10", None]
    assert open_images(shard(tmp_path / "b.tar", {"1.png": png()})).targets is None
    assert images.name(0) == f"{tmp_path}/a.tar/x/1.png"


def test_broken_files_have_a_reason(tmp_path: Path) -> None:
    put(tmp_path, {"1.png": b"", "2.png": png(2)[:40], "3.npy": b"junk", "4.png": png(4)})
    images = open_images(tmp_path)
    (tmp_path / "4.png").unlink()
    for index in range(4):
        with pytest.raises(ImageError) as caught:
            images.read(index)
        assert str(tmp_path) not in str(caught.value)  # the name is said by who reports it
    put(tmp_path, {"list.txt": b"with\0nul.png\n" + os.fsencode(tmp_path)})
    for index in range(2):
        with pytest.raises(ImageError):
            open_images(tmp_path / "list.txt").read(index)


def test_member_that_claims_too_much_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, {"a.tar": b"x"})
    path = str(tmp_path / "a.tar")
    file = File(f"{path}/a.png", shard=path, offset=512, size=1 << 40)
    with pytest.raises(ImageError, match="1,099,511,627,776"):
        FileDataset([file], Decoder()).read(0)


def test_a_list_of_many_images_stays_small() -> None:
    """Arrays alone: no Python object for each image, and little to send to a worker."""
    many = 200_000
    files = (File(f"r/{i // 1000}/{i:08}.JPEG", "r/", str(i // 1000)) for i in range(many))
    images = FileDataset(files, Decoder())
    packed = pickle.dumps(images)
    assert len(packed) < 52 * many
    again = pickle.loads(packed)
    assert again.name(199_999) == "r/199/00199999.JPEG"
    assert again.label(1000) == "1"
    assert again.fingerprint() == images.fingerprint()
    assert len(images.folders) == 200


def test_forked_processes_do_not_share_the_place_in_a_shard(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i, size=(200, 200)) for i in range(40)}
    images = open_images(shard(tmp_path / "a.tar", members))
    images.read(0)  # opens the shard in this process
    reading, writing = os.pipe()
    child = os.fork()
    found: list[list[int]] = [levels(images) for _ in range(10)]
    if child == 0:
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert found == json.loads(os.read(reading, 100_000)) == [list(range(40))] * 10
    assert levels(pickle.loads(pickle.dumps(images))) == list(range(40))


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
    put(tmp_path / "one", {"b/new.png": png(4)})
    assert len({first, renamed, open_images(tmp_path / "one").fingerprint()}) == 3
    shard(tmp_path / "s.tar", {**MEMBERS, "3.png": png(3, size=(300, 200))})
    assert open_images(tmp_path / "s.tar").fingerprint() != shards[0]


def test_subset(tmp_path: Path) -> None:
    put(tmp_path, CLASSES)
    shard(tmp_path / "s.tar", MEMBERS)
    images = open_images([tmp_path / "a", tmp_path / "b", tmp_path / "s.tar"])
    some = Subset(images, np.array([4, 0, 3]))
    assert levels(some) == [levels(images)[i] for i in (4, 0, 3)]
    assert some.targets.tolist() == images.targets[[4, 0, 3]].tolist()
    assert labels(some) == [images.label(i) for i in (4, 0, 3)]
    assert some.files() == [str(tmp_path / "s.tar"), images.name(0)]
    prints = {Subset(images, np.array(i)).fingerprint() for i in ([0, 3], [3, 0], [0, 3])}
    assert len(prints) == 2
    assert levels(Subset(some, np.array([1]))) == levels(images)[:1]


def test_arrays() -> None:
    images = open_images(ARRAY)
    assert len(images) == 5
    for number, expected in enumerate(ARRAY):
        assert np.array_equal(np.asarray(images.read(number)), expected)
    assert images.name(3) == "array[3]"
    assert images.targets is None
    assert images.fingerprint() == open_images(ARRAY.copy()).fingerprint()
    assert images.fingerprint() != open_images(ARRAY[::-1]).fingerprint()
    tensor = torch.from_numpy(ARRAY).permute(0, 3, 1, 2)
    assert open_images(tensor).fingerprint() == images.fingerprint()
    grey = open_images(ARRAY[..., 0], in_chans=1)
    assert np.array_equal(np.asarray(grey.read(2)), ARRAY[2, ..., 0])
    with pytest.raises(IndexError):
        images.read(5)


@pytest.mark.parametrize("channels", [1, 2, 5, 12])
def test_arrays_of_any_channels(tmp_path: Path, channels: int) -> None:
    values = noise(3 * 4, 6, channels).reshape(3, 4, 6, channels)
    for number, image in enumerate(values):
        np.save(tmp_path / f"{number}.npy", image)
    for source in (values, torch.from_numpy(values).permute(0, 3, 1, 2), tmp_path):
        images = open_images(source, in_chans=channels)
        assert len(images) == 3
        found = np.asarray(images.read(2))
        expected = values[2, ..., 0] if channels == 1 else np.moveaxis(values[2], -1, 0)
        assert np.array_equal(found, expected)
    put(tmp_path, {"4.png": png(4)})
    if channels > 1:
        with pytest.raises(ImageError, match=f"{channels} channels"):
            open_images(tmp_path, in_chans=channels).read(3)


@pytest.mark.parametrize("array", [ARRAY[0, 0], ARRAY[:0], ARRAY.astype(complex), ARRAY[..., :2]])
def test_wrong_arrays(array: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"2 channels|\[0, 4, 6, 3\]|\[6, 3\]|complex128"):
        open_images(array)


class Images(Dataset):
    """Items of every kind that is allowed, and some that are not."""

    targets = (3, 1, 1, 1, 1, 1)
    classes = ("zero", "one", "two", "three")

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> object:
        return [
            Image.new("RGB", (3, 2), (5, 5, 5)),
            (np.full((2, 3, 3), 6, np.uint8), 1),
            [torch.full((3, 2, 3), 7, dtype=torch.uint8), "label", 0],
            Image.open(io.BytesIO(encoded(Image.fromarray(noise(9, 9)))[:150])),
            (np.zeros((2, 3, 4)), 0),
            {"image": 1},
        ][index]


def test_dataset_objects() -> None:
    images = open_images(Images())
    assert len(images) == 6
    assert [int(np.asarray(images.read(i)).reshape(-1)[0]) for i in range(3)] == [5, 6, 7]
    assert images.targets.tolist() == [3, 1, 1, 1, 1, 1]
    assert labels(images)[:2] == ["three", "one"]
    assert images.name(4) == "Images[4]"
    for index, error in ((3, ImageError), (4, ImageError), (5, DataError)):
        with pytest.raises(error):
            images.read(index)
    assert open_images(images) is images
    assert levels(open_images([Image.new("L", (2, 2), 9)] * 2)) == [9, 9]
    loaded = DataLoader(images, sampler=[0, 1, 2], batch_size=3, num_workers=1, collate_fn=list)
    assert [target for _, target, _ in next(iter(loaded))] == [3, 1, 1]


@pytest.mark.parametrize(
    "targets",
    [
        *([[1, 2], [3], [], [], [], []], [0.5] * 6, list("abcdef"), np.full((6, 2), 2)),
        *({"boxes": 1}, [1, 2, 3], [{"a": 1}] * 6),
    ],
)
def test_targets_that_are_no_classes_are_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture, targets: object
) -> None:
    data = Images()
    data.targets = targets
    with caplog.at_level(logging.WARNING):
        images = open_images(data)
    assert images.targets is None
    assert "Images.targets" in caplog.text


class Faulty(Images):
    def __getitem__(self, index: int) -> object:
        return self.no_such_thing


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[object]:
        return iter(())


def test_faults_of_a_datasets_code_keep_their_traceback() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        open_images(Faulty()).read(0)


@pytest.mark.parametrize("source", [Stream(), 7, {"a": 1}, np.array(3), None])
def test_what_cannot_be_read_by_number_is_named(source: object) -> None:
    with pytest.raises(DataError, match=type(source).__name__ if source != np.array(3) else "int"):
        open_images(source)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[object]]:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "4.png").write_bytes(png(4))
    stored: list[object] = [{"bytes": png(i), "path": None} for i in (1, 2, 3)]
    stored += [{"bytes": None, "path": str(tmp_path / "4.png")}, {"bytes": b"x", "path": ""}, None]
    return {"image": stored, "label": [0, 1, 1, 0, 1, 0]}


def hf_data(rows: dict[str, list[object]], label: object = None, **more: object) -> object:
    datasets = pytest.importorskip("datasets")
    label = label or datasets.ClassLabel(names=["x", "y"])
    features = {"image": datasets.Image(), "label": label, **more}
    given = {name: rows[name] for name in features}
    return datasets.Dataset.from_dict(given, features=datasets.Features(features))


def check_hf(images: ImageDataset) -> None:
    assert [int(np.asarray(images.read(i))[0, 0, 0]) for i in range(4)] == [1, 2, 3, 4]
    for index in (4, 5):
        with pytest.raises(ImageError):
            images.read(index)
    assert images.targets.tolist() == [0, 1, 1, 0, 1, 0]
    assert labels(images)[:2] == ["x", "y"]
    assert images.name(2).endswith("[2]")


def test_hugging_face_row_without_bytes_and_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    stored = pa.array([{"bytes": png(1), "path": None}, {"bytes": None, "path": None}])
    parquet.write_table(pa.table({"image": stored}), tmp_path / "a.parquet")
    with pytest.raises(ImageError, match="no image"):
        open_images(tmp_path / "a.parquet").read(1)


def test_hugging_face_objects_and_folders(rows: dict[str, list[object]], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = hf_data(rows)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "both")
    (tmp_path / "parquet/data").mkdir(parents=True)
    data.to_parquet(tmp_path / "parquet/data/train-00000.parquet")
    data.select([1]).to_parquet(tmp_path / "parquet/data/test-00000.parquet")
    file = tmp_path / "parquet/data/train-00000.parquet"
    sources = (data, *(tmp_path / name for name in ("plain", "both", "parquet")), file)
    prints = set()
    for source in sources:
        images = open_images(source)
        check_hf(images)
        prints.add(images.fingerprint())
    assert len(prints) == 2  # with the file, and with its bytes
    assert levels(open_images(f"{tmp_path}/both:split=test", in_chans=1)) == [3]
    assert levels(open_images(f"hfds/{tmp_path}/parquet:split=test")) == [2]
    assert len(open_images(f"{file}:image=image,label=label")) == 6
    for source, named in (
        (f"{tmp_path}/both:split=val", "val"),
        (f"hfds/{tmp_path}/absent", "absent"),
        (f"{tmp_path}/both:test", "test"),
        (f"{tmp_path}/both:image=label", "label"),
        (f"{tmp_path}/both:label=absent", "absent"),
        (datasets.DatasetDict({"train": data}), "DatasetDict"),
        (data.to_iterable_dataset(), "IterableDataset"),
        (data.select_columns(["label"]), "0 columns"),
    ):
        with pytest.raises(DataError, match=named):
            open_images(source)
    file.write_bytes(b"PAR1 junk")
    with pytest.raises(DataError, match="parquet"):
        open_images(tmp_path / "parquet")


def test_a_colon_in_a_folder_is_not_an_option(
    rows: dict[str, list[object]], tmp_path: Path
) -> None:
    hf_data(rows).save_to_disk(tmp_path / "a:" / "b:c")
    assert len(open_images(tmp_path / "a:" / "b:c")) == 6
    hf_data(rows).save_to_disk(tmp_path / "a:" / "d")
    assert len(open_images(f"{tmp_path}/a:/d:label=label")) == 6  # as C:\data:label=label


def test_columns_of_hugging_face_can_be_named(
    rows: dict[str, list[object]], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {**rows, "img": rows["image"][::-1], "fine_label": [5, 4, 3, 2, 1, 0]}
    more = {"img": datasets.Image(), "fine_label": datasets.Value("int32")}
    data = hf_data(rows, **more)
    data.save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="2 columns"):
        open_images(tmp_path / "d")
    images = open_images(f"hfds/{tmp_path}/d:image=img,label=fine_label")
    assert images.targets.tolist() == [5, 4, 3, 2, 1, 0]
    assert images.label(0) == "5"
    assert images.read(2).tobytes() == bytes([4] * 18)
    assert open_images(f"{tmp_path}/d:image=image").targets.tolist() == rows["label"]


def test_other_kinds_of_labels_are_ignored_with_a_warning(
    rows: dict[str, list[object]], caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")
    for values, kind in (
        ([{"a": 1}] * 6, {"a": datasets.Value("int64")}),
        ([0.5] * 6, datasets.Value("float32")),
    ):
        caplog.clear()
        images = open_images(hf_data({**rows, "label": values}, kind))
        assert images.targets is None
        assert "'label'" in caplog.text
    with_holes = hf_data({**rows, "label": [0, None, 1, None, 1, 0]})
    assert open_images(with_holes).targets.tolist() == [0, -1, 1, -1, 1, 0]


def test_arrays_on_the_disk_are_opened_again_in_other_processes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(30 * 8 * 8 * 3, dtype=np.uint8).reshape(30, 8, 8, 3))
    images = open_images(tmp_path / "a.npy")
    packed = pickle.dumps(images)
    assert len(packed) < 2000
    assert pickle.loads(packed).fingerprint() == images.fingerprint()


class Listed:
    """Images in memory, the same or others in every reading."""

    def __init__(self, level: int, changes: bool = False) -> None:
        self.level, self.changes, self.read = level, changes, 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> np.ndarray:
        self.read += self.changes
        return np.full((4, 4, 3), self.level + self.read, np.uint8)


def test_datasets_of_other_images_have_other_fingerprints_unless_images_change() -> None:
    one, same, other = (open_images(Listed(level)).fingerprint() for level in (1, 1, 2))
    assert one == same != other
    first, second = (open_images(Listed(level, changes=True)).fingerprint() for level in (1, 2))
    assert first == second
