"""NYU Depth v2's labelled file: small ones with the datasets, types and axes of the real one."""

import math
import pickle
import sys

import numpy as np
import pytest

from ijepa_zoo import cli
from ijepa_zoo.errors import DataError, ImageError
from ijepa_zoo.eval.dense_depth import evaluate_dense_depth
from ijepa_zoo.eval.depth_training import DepthProtocol
from ijepa_zoo.eval.models import open_model
from ijepa_zoo.eval.nyu_depth import labelled_file, open_labelled
from ijepa_zoo.eval.result_files import find_results

h5py = pytest.importorskip("h5py")
matlab = pytest.importorskip("scipy.io")

HEIGHT, WIDTH, PAIRS = 48, 64, 14
TRAIN, TEST = [3, 1, 7, 8, 9, 10, 12, 14], [2, 5, 13]  # as MATLAB counts, from 1 on
PROTOCOL = DepthProtocol(epochs=1, batch_size=4, lrs=(1e-2,), bins=8, upsample=1)


def _pictures():
    """Images `[n, H, W, 3]` and depths `[n, H, W]` in which every place has its own value."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (PAIRS, HEIGHT, WIDTH, 3), np.uint8)
    return images, rng.uniform(0.7, 9.9, (PAIRS, HEIGHT, WIDTH)).astype(np.float32)


def _write(folder, train=TRAIN, test=TEST, **others):
    """The two files; MATLAB's arrays begin with rows, which HDF5 shows as the last axis."""
    images, depths = _pictures()
    arrays = {
        "images": images.transpose(1, 2, 3, 0),  # H x W x 3 x N in MATLAB
        "depths": depths.transpose(1, 2, 0),  # H x W x N
        "rawDepths": np.zeros((HEIGHT, WIDTH, PAIRS), np.float32),
        **others,
    }
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array.T, chunks=(1, *array.T.shape[1:]), compression=3)
    columns = {"trainNdxs": train, "testNdxs": test}
    columns = {name: np.array(value, np.uint16)[:, None] for name, value in columns.items()}
    matlab.savemat(folder / "splits.mat", columns)
    return folder


@pytest.fixture
def nyu(tmp_path):
    return _write(tmp_path / "nyu")


@pytest.fixture(scope="module")
def subject():
    return open_model("vit_nano8_64_ijepa", random=True)


def test_images_and_depths_stand_upright_and_are_those_of_the_split(nyu):
    with h5py.File(nyu / "nyu_depth_v2_labeled.mat") as file:  # as the real one
        assert file["images"].shape == (PAIRS, 3, WIDTH, HEIGHT)
        assert file["depths"].shape == (PAIRS, WIDTH, HEIGHT)
    data = open_labelled(nyu / "nyu_depth_v2_labeled.mat")
    assert (data.max_depth, data.crop, data.unit, data.split) == (10, "eigen", "m", "splits.mat")
    images, depths = _pictures()
    for part, numbers in ((data.train, TRAIN), (data.test, TEST)):
        assert len(part) == len(numbers)
        for place, number in enumerate(numbers):
            image, depth = part.read(place)
            np.testing.assert_array_equal(np.asarray(image), images[number - 1])
            np.testing.assert_array_equal(depth, depths[number - 1])
            assert depth.dtype == np.float32
            assert part.name(place) == f"nyu_depth_v2_labeled.mat[{number}]"
    assert data.train.fingerprint() != data.test.fingerprint()


def test_depths_that_are_none_are_unknown(tmp_path):
    depths = _pictures()[1].transpose(1, 2, 0).copy()
    depths[0, :4, 1] = np.nan, np.inf, -1, 0  # of pair 2, the first to test on
    data = open_labelled(_write(tmp_path, depths=depths) / "nyu_depth_v2_labeled.mat")
    depth = data.test.read(0)[1]
    assert depth[0, :4].tolist() == [0, 0, 0, 0]
    assert (depth[1:] > 0).all()


def test_what_names_the_labelled_file(nyu, tmp_path):
    file = nyu / "nyu_depth_v2_labeled.mat"
    assert labelled_file(nyu) == labelled_file(file) == labelled_file(str(file)) == file
    (nyu / "nyu_train.txt").touch()  # a copy with lists is opened by them
    assert labelled_file(nyu) is None
    assert labelled_file(tmp_path) is None
    assert labelled_file("scenes:20,4") is None


def test_the_command_reads_the_folder_with_any_number_of_workers(nyu, tmp_path, capsys):
    found = []
    for workers, data in (("0", nyu), ("1", nyu / "nyu_depth_v2_labeled.mat")):
        out = tmp_path / f"out{workers}"
        words = ["eval", "depth", "--task", "dense", "--model", "vit_nano8_64_ijepa", "--random"]
        words += ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--quiet"]
        words += ["--data", str(data), "--out", str(out), "--workers", workers]
        assert cli.main(words) == 0, capsys.readouterr().err
        ((_, result),) = find_results([out])
        found.append(result)
    one, two = found
    assert (one.figure, one.heads) == (two.figure, two.heads)
    assert math.isfinite(one.figure)
    assert one.task == "dense depth, NYU Depth v2, labelled"
    assert one.images == {"fit": 7, "choose": 1, "test": 3}
    assert one.selection == "a seeded 10 % of the training images"
    assert one.data["test"]["split"] == "splits.mat"
    assert one.data["train"]["name"] == "nyu"
    assert (one.protocol["crop"], one.protocol["max_depth"]) == ("eigen", 10)


def test_pairs_travel_to_loader_processes_that_are_not_forked(nyu):
    part = open_labelled(nyu / "nyu_depth_v2_labeled.mat").test
    part.read(0)
    image, depth = pickle.loads(pickle.dumps(part)).read(2)
    np.testing.assert_array_equal(np.asarray(image), _pictures()[0][TEST[2] - 1])
    np.testing.assert_array_equal(depth, _pictures()[1][TEST[2] - 1])


@pytest.mark.parametrize("package", ["h5py", "scipy.io"])
def test_packages_that_are_not_installed_are_named_with_what_to_type(
    nyu, monkeypatch, capsys, package
):
    monkeypatch.setitem(sys.modules, package, None)
    words = ["eval", "depth", "--task", "dense", "--model", "vit_nano8_64_ijepa", "--data"]
    assert cli.main([*words, str(nyu)]) == 2
    assert capsys.readouterr().err == (
        "ijepa-zoo: error: nyu_depth_v2_labeled.mat needs h5py and scipy: "
        "pip install 'ijepa-zoo[nyu]'\n"
    )


def test_units_are_known(nyu, subject, tmp_path):
    with pytest.raises(ValueError, match=r"--depth-scale.*labeled\.mat' is in metres: leave it"):
        evaluate_dense_depth(subject, nyu, tmp_path, depth_scale=1000)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (TRAIN, [2, 3], "a pair twice, and no training pair may be tested on"),
        ([0, *TRAIN], TEST, "numbers from 1 to 14"),
        (TRAIN, [15], "numbers from 1 to 14"),
        (TRAIN, [], "numbers from 1 to 14"),
    ],
)
def test_other_splits_are_refused(tmp_path, train, test, words):
    folder = _write(tmp_path, train, test)
    with pytest.raises(DataError, match=rf"splits\.mat' is not the .*{words}"):
        open_labelled(folder / "nyu_depth_v2_labeled.mat")


def test_missing_and_damaged_files_are_named(nyu, subject, tmp_path):
    file, splits = nyu / "nyu_depth_v2_labeled.mat", nyu / "splits.mat"
    good = splits.read_bytes()
    for content in (b"", b"junk" * 99, good[:200]):
        splits.write_bytes(content)
        with pytest.raises(DataError, match=r"splits\.mat' is (damaged|not the split)"):
            open_labelled(file)
    matlab.savemat(splits, {"trainNdxs": [[1]]})
    with pytest.raises(DataError, match=r"splits\.mat' is not the split.* no testNdxs"):
        open_labelled(file)
    splits.unlink()
    with pytest.raises(DataError, match=r"labeled\.mat' needs the official split.*splits\.mat'"):
        evaluate_dense_depth(subject, nyu, tmp_path / "out")
    splits.write_bytes(good)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"labeled\.mat' is damaged or not the labelled file"):
        open_labelled(file)
    with pytest.raises(DataError, match=r"absent\.mat' does not exist"):
        open_labelled(nyu / "absent.mat")


@pytest.mark.parametrize(
    "others",
    [
        {"images": np.zeros((HEIGHT, WIDTH, PAIRS), np.uint8)},
        {"images": np.zeros((HEIGHT, WIDTH, 3, PAIRS), np.float32)},
        {"depths": np.zeros((WIDTH, HEIGHT, PAIRS), np.float32)},
        {"depths": np.zeros((HEIGHT, WIDTH, PAIRS - 1), np.float32)},
        {"depths": np.zeros((HEIGHT, WIDTH, PAIRS), np.uint16)},
    ],
)
def test_files_of_other_arrays_are_refused(tmp_path, others):
    folder = _write(tmp_path, **others)
    with pytest.raises(DataError, match=r"is not the labelled file .* this one has images .* and"):
        open_labelled(folder / "nyu_depth_v2_labeled.mat")


def test_a_damaged_pair_is_named_and_the_rest_goes_on(nyu, subject, tmp_path):
    file, row = nyu / "nyu_depth_v2_labeled.mat", TEST[1] - 1
    with h5py.File(file, "r") as opened:
        _, packed = opened["depths"].id.read_direct_chunk((row, 0, 0))
    content = file.read_bytes().replace(packed, packed[:10] + b"\xff" * (len(packed) - 10))
    file.write_bytes(content)
    part = open_labelled(file).test
    with pytest.raises(ImageError, match="the file is damaged there"):
        part.read(1)
    result = evaluate_dense_depth(subject, nyu, tmp_path, protocol=PROTOCOL, workers=0, pictures=0)
    assert result.images["test"] == 2
    assert "could not be decoded (nyu_depth_v2_labeled.mat[5]: the file is dam" in result.notes[-1]
