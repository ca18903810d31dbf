"""Labels from CSV files, one or several per image."""

import csv
import io
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import labels, levels, png, put

from ijepa_zoo.data import open_images
from ijepa_zoo.data.splits import open_splits
from ijepa_zoo.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    put(path, {f"photos/{i}.png": png(i) for i in range(6)})
    return path


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


names = st.text(st.characters(exclude_characters=";\0", exclude_categories=["Cs"]), max_size=6)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
@given(st.lists(st.lists(names, max_size=3), min_size=1, max_size=6), st.booleans())
def test_labels_of_any_names(folder, given, in_lines):
    """In several lines of an image, or in one with `;`; spaces around names do not count."""
    rows = [(f"photos/{i}.png", "; ".join(found)) for i, found in enumerate(given)]
    if in_lines:
        pairs = ((i, name) for i, found in enumerate(given) for name in found or [""])
        rows = [(f"photos/{i}.png", name) for i, name in pairs]
    text = io.StringIO()
    csv.writer(text).writerows([("path", "label"), *rows])
    images = open_images(write(folder / "any.csv", text.getvalue()))
    expected = [{name.strip() for name in found} - {""} for found in given]
    assert levels(images) == list(range(len(given)))
    assert list(images.classes.values()) == sorted(set().union(*expected))
    for index, found in enumerate(expected):
        assert images.label(index) == (";".join(sorted(found)) or None)
    if images.targets is not None:
        assert (images.targets.ndim > 1) == any(len(found) > 1 for found in expected)


def test_paths_are_relative_to_the_csv(folder, monkeypatch):
    text = f"label,path\ncat,photos/3.png\ndog, ./photos/1.png\n2,{folder}/photos/0.png\n"
    train, test = open_splits(write(folder / "labels.csv", text + "cat,photos/3.png\n"))
    assert (train.targets.tolist(), test) == ([1, 2, 0], None)
    assert (labels(train.images), levels(train.images)) == (["cat", "dog", "2"], [3, 1, 0])
    monkeypatch.chdir(folder)
    assert labels(open_images("labels.csv")) == ["cat", "dog", "2"]
    shutil.copytree(folder / "photos", folder / "moved/photos")
    paths = (folder / "labels.csv", folder / "moved/labels.csv")
    first, moved = (open_images(write(p, "path,label,,\nphotos/3.png,cat,,\n")) for p in paths)
    assert first.fingerprint() == moved.fingerprint()


def test_splits_of_one_csv(folder):
    """As a spreadsheet writes it."""
    given = ["train", "training", "valid", "testing", "Train", "validation"]
    rows = [f'"photos/{i}.png", "{"ab"[i % 2]}, é", {split}' for i, split in enumerate(given)]
    text = "\r\n".join(["Path,Label,split", *rows, "", ""])
    path = write(folder / "labels.csv", text, "utf-8-sig")
    train, test = open_splits(path)
    assert labels(test.images) == ["b, é"]
    assert (levels(train.images), levels(test.images)) == ([0, 1, 4], [3])
    assert (train.name, test.name, train.notes) == ("train", "test", ())
    assert "2 images of the split 'val'" in test.notes[0]
    assert len(open_images(str(path))) == 6
    train, test = open_splits(path, write(folder / "o.csv", 'path,label\nphotos/5.png,"a, é"\n'))
    assert (levels(train.images), levels(test.images)) == ([0, 1, 4], [5])
    with pytest.raises(DataError, match=r"1 .*4\.png"):
        open_splits(path, write(folder / "o.csv", "path,label\nphotos/4.png,a\n"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "path and one label"),
        ("path,label\n", "no images"),
        ("path;label\nphotos/0.png;a\n", "path;label"),
        ("path,label,label\nphotos/0.png,a,b\n", "path, label, label"),
        ("path,label\n,a\n", "line 2"),
        ("path,label\nphotos/0.png,a, b\n", "line 2.*quotes"),
        ("path,label\nphotos/0.png,a\nphotos/9.png,b\n", r"1 of 2 .*9\.png"),
        ("path,label,split\nphotos/0.png,a,here\n", "here"),
        ("path,label,split\nphotos/0.png,a\n", "line 2"),
        (
            "path,label,split\nphotos/0.png,a,train\nphotos/0.png,a,val\n",
            r"line 3.*0\.png.*val.*train",
        ),
        ("path,label,split\nphotos/0.png,a,val\n", "train"),
        ("path,label\nphotos/0.png,\n", "no classes"),
        ("path,label\n\xe4,b\n", "CSV"),
        (None, r"bad\.csv"),
    ],
)
def test_csv_files_that_cannot_be_used(folder, text, found):
    path = folder / "bad.csv"
    path.unlink(missing_ok=True) if text is None else write(path, text, "latin-1")
    with pytest.raises(DataError, match=found):
        open_splits(path)
