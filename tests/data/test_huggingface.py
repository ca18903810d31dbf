"""Datasets of Hugging Face: objects, folders, Parquet, columns."""

import logging
import sys

import numpy as np
import pytest
from inputs import labels, levels, png

from ijepa_zoo.data import open_images
from ijepa_zoo.data.splits import open_splits
from ijepa_zoo.errors import DataError, ImageError, MissingPackageError

datasets = pytest.importorskip("datasets")
STORED = [{"bytes": png(i), "path": None} for i in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def data(column, kind=None, images=None, **more):
    kind = kind or datasets.ClassLabel(names=["x", "y"])
    rows = {"image": images or STORED[: len(column)], "label": column}
    features = {"image": datasets.Image(), "label": kind}
    for name, (values, feature) in more.items():
        rows[name], features[name] = values, feature
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_objects_and_folders(tmp_path):
    (tmp_path / "4.png").write_bytes(png(4))
    odd = [{"bytes": None, "path": str(tmp_path / "4.png")}, {"bytes": b"x", "path": ""}, None]
    whole = data([0, 1, 1, 0, 1, 0], images=[*STORED, *odd])
    whole.save_to_disk(tmp_path / "plain")
    both = datasets.DatasetDict({"train": whole, "test": whole.select([2])})
    both.save_to_disk(tmp_path / "both")
    (tmp_path / "parquet/data").mkdir(parents=True)
    file = tmp_path / "parquet/data/train-00000.parquet"
    whole.to_parquet(file)
    whole.select([1]).to_parquet(tmp_path / "parquet/data/test-00000.parquet")
    prints = set()
    for source in (whole, *(tmp_path / name for name in ("plain", "both", "parquet")), file):
        images = open_images(source)
        assert [int(np.asarray(images.read(i))[0, 0, 0]) for i in range(4)] == [1, 2, 3, 4]
        for index in (4, 5):
            with pytest.raises(ImageError):
                images.read(index)
        assert images.targets.tolist() == [0, 1, 1, 0, 1, 0]
        assert labels(images)[:2] == ["x", "y"]
        assert images.name(2).endswith("[2]")
        prints.add(images.fingerprint())
    assert len(prints) == 2  # with the file, and with its bytes
    assert levels(open_images(f"{tmp_path}/both:split=test", in_chans=1)) == [3]
    assert levels(open_images(f"hfds/{tmp_path}/parquet:split=test")) == [2]
    first_two = open_images(f"hfds/{tmp_path}/parquet:split=train[:2]")
    assert levels(first_two) == [1, 2]
    assert all(path.endswith(".arrow") for path in first_two.files())
    assert first_two.files()
    assert len(open_images(f"{file}:image=image,label=label")) == 6
    file.write_bytes(b"PAR1 junk")
    for source, named in (
        (f"{tmp_path}/both:split=val", "val"),
        (f"hfds/{tmp_path}/absent", "absent"),
        (f"{tmp_path}/both:test", "test"),
        (f"{tmp_path}/both:image=label", "label"),
        (f"{tmp_path}/both:image=absent", "absent"),
        (f"{tmp_path}/both:label=absent", "absent"),
        (both, "DatasetDict"),
        (whole.to_iterable_dataset(), "IterableDataset"),
        (whole.select_columns(["label"]), "0 columns"),
        (whole.select([]), "no rows"),
        (tmp_path / "parquet", "parquet"),
    ):
        with pytest.raises(DataError, match=named):
            open_images(source)


def test_columns_can_be_named_also_below_a_folder_with_a_colon(tmp_path):
    fine = ([5, 4, 3], datasets.Value("int32"))
    rows = data([0, 1, 1], img=(STORED[::-1], datasets.Image()), fine_label=fine)
    rows.save_to_disk(tmp_path / "a:" / "d")
    with pytest.raises(DataError, match="2 columns"):
        open_images(tmp_path / "a:" / "d")
    images = open_images(f"{tmp_path}/a:/d:image=img,label=fine_label")  # as C:\data:label=label
    assert (images.targets.tolist(), levels(images)) == ([5, 4, 3], [3, 2, 1])


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        ([[0, 1], None, [1]], datasets.Sequence(datasets.ClassLabel(names=["x", "y"])),
         ["x;y", None, "y"]),
        (["b", None, "a"], datasets.Value("string"), ["b", None, "a"]),
        ([["b"], ["a", "b"], []], datasets.Sequence(datasets.Value("string")), ["b", "a;b", None]),
        ([[0, -1], [-1], []], datasets.Sequence(datasets.ClassLabel(names=["x", "y"])),
         ["x", None, None]),
        ([[True, False, True], None, [False] * 3], datasets.Sequence(datasets.Value("bool")),
         ["0;2", None, None]),
        ([4, None, 2], datasets.Value("int64"), ["4", None, "2"]),
        ([True, False, True], datasets.Value("bool"), ["1", "0", "1"]),
        ([0, None, 1], None, ["x", None, "y"]),
        ([{"a": 1}] * 3, {"a": datasets.Value("int64")}, None),
        ([0.5] * 3, datasets.Value("float32"), None),
    ],
)  # fmt: skip
def test_columns_of_other_kinds(caplog, column, kind, expected):
    with caplog.at_level(logging.WARNING):
        images = open_images(data(column, kind))
    assert (labels(images) if images.targets is not None else None) == expected
    assert ("'label'" in caplog.text) == (expected is None)


def test_lists_of_numbers_are_no_labels(tmp_path):
    """They may be class numbers, or 0 and 1 for each class."""
    numbers = data([[0, 1], [1, 0]], datasets.Sequence(datasets.Value("int64")))
    numbers.save_to_disk(tmp_path / "a")
    assert open_images(tmp_path / "a").targets is None
    with pytest.raises(DataError, match=r"'label' is .*int64.*ClassLabel"):
        open_images(f"{tmp_path}/a:label=label")


def test_splits(tmp_path):
    # classes of `test` are hidden
    splits = {"train": data([0, 1, 1]), "test": data([-1, -1]), "validation": data([1, 0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for name, split in splits.items():
        split.to_parquet(tmp_path / f"parquet/{name}.parquet")
    for source in (tmp_path / "saved", f"hfds/{tmp_path}/parquet", f"{tmp_path}/saved:image=image"):
        train, test = open_splits(source)
        assert (train.name, test.name) == ("train", "validation")
        assert (labels(train.images), labels(test.images)) == (["x", "y", "y"], ["y", "x"])
    assert open_splits(f"{tmp_path}/saved:split=validation")[1] is None
    (tmp_path / "a:b").symlink_to(tmp_path)
    assert open_splits(tmp_path / "a:b/saved")[1].name == "validation"
    datasets.DatasetDict({"train": splits["train"]}).save_to_disk(tmp_path / "alone")
    assert open_splits(tmp_path / "alone")[1] is None


def test_rows_without_an_image_and_a_missing_package(tmp_path, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stored = pa.array([STORED[0], {"bytes": None, "path": None}])
    parquet.write_table(pa.table({"image": stored}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="image=COLUMN"):  # without the metadata of datasets
        open_images(tmp_path / "a.parquet")
    with pytest.raises(ImageError, match="no image"):
        open_images(f"{tmp_path}/a.parquet:image=image").read(1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match="pip install datasets"):
        open_images("hfds/owner/name")
