"""Images with dense targets: what is paired with what, the numbers that are read, the split."""

import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from ijepa_zoo.data.dense import open_depth, open_segmentation
from ijepa_zoo.data.dense_files import read_depth, read_mask
from ijepa_zoo.data.scenes import SPLIT_STARTS, render_scene
from ijepa_zoo.errors import DataError, ImageError


def save(path, array):
    """An image or a `.npy` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def save_pair(image, target, numbers):
    """An image filled with the first number, and its target."""
    save(image, np.full((*numbers.shape, 3), numbers.flat[0], np.uint8))
    save(target, numbers)


def values(dataset):
    """One value of each image and of its target."""
    return [(np.asarray(image)[0, 0, 0], target[0, 0]) for image, target, _ in dataset]


def depths(number):
    return np.full((4, 6), number, np.uint16)


def ids(*numbers):
    return np.array([numbers, numbers], np.uint8)


@pytest.mark.parametrize(
    "layout",
    [
        ("rgb/{s}/a/{n}.bmp", "depth/{s}/a/{n}.png"),
        ("{s}/images/{n}.png", "{s}/depths/{n}.npy"),
        ("{s}/room/{n}_colors.png", "{s}/room/{n}_depth.png"),
        ("{s}/room/rgb_{n}.bmp", "{s}/room/sync_depth_{n}.png"),
        ("{s}/{n}.png", "{s}/{n}.npy"),
    ],
)
def test_pairs_are_found_by_their_names(tmp_path, layout):
    for n, split in enumerate(("train", "train", "train", "valid", "valid")):
        save_pair(*(tmp_path / part.format(s=split, n=f"{n:05}") for part in layout), depths(n + 1))
    data = open_depth(tmp_path, depth_scale=1)
    assert values(data.train) == [(1, 1), (2, 2), (3, 3)]
    assert values(data.test) == [(4, 4), (5, 5)]
    assert data.train[2][2] == data.train.names[2]
    assert data.train.fingerprint != data.test.fingerprint


def test_a_folder_without_a_split_has_a_fixed_one(tmp_path):
    for n in range(1, 11):
        save_pair(tmp_path / f"{n}.png", tmp_path / f"{n}_depth.png", depths(n))
    data, again = (open_depth(tmp_path, depth_scale=1) for _ in range(2))
    assert sorted(values(data.train) + values(data.test)) == [(n, n) for n in range(1, 11)]
    assert len(data.test) == 2
    assert data.test.names == again.test.names


def test_files_that_are_no_pairs_are_named(tmp_path):
    def check(named, folder="", **options):
        with pytest.raises(DataError, match=named):
            open_depth(tmp_path / folder, **options)

    check("nowhere", "nowhere")
    check("depth_scale is nan", depth_scale=float("nan"))
    save_pair(tmp_path / "train/1.png", tmp_path / "train/1_depth.png", depths(1))
    check("test set")
    save(tmp_path / "train/2.png", np.zeros((4, 4, 3), np.uint8))
    check(r"train/2\.png")
    (tmp_path / "train/2.png").rename(tmp_path / "train/1.jpg")
    check(r"train/1\.jpg' and '.*train/1\.png'")


def test_a_target_of_another_aspect_ratio_is_refused(tmp_path):
    for split in ("train", "test"):
        save_pair(tmp_path / split / "1.png", tmp_path / split / "1_depth.png", depths(1))
    save(tmp_path / "test/1.png", np.zeros((6, 4, 3), np.uint8))
    with pytest.raises(ImageError, match=r"4 x 6.* 6 x 4"):
        open_depth(tmp_path).test[0]
    save(tmp_path / "test/1.png", np.zeros((8, 12, 3), np.uint8))  # another size may be
    assert open_depth(tmp_path).test[0][1].shape == (4, 6)


@pytest.mark.parametrize(
    ("read", "name", "stored", "options", "expected"),
    [
        (read_depth, "a.png", np.array([[0, 1500, 65535]], np.uint16), (), [[0, 1.5, 65.535]]),
        (read_depth, "a.png", np.array([[0, 1536]], np.uint16), (256,), [[0, 6]]),
        (read_depth, "a.npy", np.array([[np.nan, np.inf, -1, 2.5]]), (), [[0, 0, 0, 2.5]]),
        (read_depth, "a.npy", np.array([[[7.5]]]), (), [[7.5]]),
        (read_depth, "a.png", np.array([[51]], np.uint8), (25.5,), [[2]]),
        (read_mask, "a.png", np.array([[0, 300, 65535]], np.uint16), (), [[0, 300, 65535]]),
        (read_mask, "a.png", np.array([[False, True]]), (), [[0, 1]]),
        (read_mask, "a.npy", np.array([[0, 5, 255, 300]], np.int32), (True,), [[255, 4, 255, 299]]),
        # files without such numbers
        (read_depth, "eight.png", np.array([[51]], np.uint8), (), "depth_scale"),
        (read_mask, "mask.jpg", np.zeros((2, 2), np.uint8), (), "PNG"),
        *(
            (read, name, stored, (), name)
            for read in (read_depth, read_mask)
            for name, stored in (
                ("color.png", np.zeros((4, 4, 3), np.uint8)),
                ("flat.npy", np.zeros(4)),
                ("broken.png", b"\x89PNG nothing"),
                ("absent.png", None),
            )
        ),
    ],
)
def test_numbers_of_depth_maps_and_masks(tmp_path, read, name, stored, options, expected):
    if isinstance(stored, bytes):
        (tmp_path / name).write_bytes(stored)
    elif stored is not None:
        save(tmp_path / name, stored)
    if isinstance(expected, str):
        with pytest.raises(ImageError, match=expected):
            read(str(tmp_path / name), *options)
    else:
        found = read(str(tmp_path / name), *options)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.dtype == np.float32 or read is read_mask


# NYU Depth v2's own file: a small one with the arrays, types and axes of the real one

HEIGHT, WIDTH, PAIRS = 12, 16, 14
TRAIN, TEST = [3, 1, 7, 8, 9, 10, 12, 14], [2, 5, 13]  # from 1, as in MATLAB
IMAGES = np.random.default_rng(0).integers(0, 256, (PAIRS, HEIGHT, WIDTH, 3), np.uint8)
DEPTHS = np.random.default_rng(1).uniform(0.7, 9.9, (PAIRS, HEIGHT, WIDTH)).astype(np.float32)
DEPTHS[1, 0, :4] = np.nan, np.inf, -1, 0  # of pair 2, the first of the test set


@pytest.fixture
def nyu(tmp_path):
    """The two files; the first axis of a MATLAB array is the last one in HDF5."""
    h5py, matlab = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    arrays = {"images": IMAGES.transpose(1, 2, 3, 0), "depths": DEPTHS.transpose(1, 2, 0)}
    file = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(file, "w", userblock_size=512) as opened:
        for name, array in arrays.items():
            opened.create_dataset(name, data=array.T, chunks=(1, *array.T.shape[1:]), compression=3)
    columns = {"trainNdxs": TRAIN, "testNdxs": TEST}
    columns = {name: np.array(value, np.uint16)[:, None] for name, value in columns.items()}
    matlab.savemat(tmp_path / "splits.mat", columns)
    return file


def test_nyu_pairs_stand_upright_and_are_those_of_the_split(nyu):
    known = np.where(np.isfinite(DEPTHS) & (DEPTHS > 0), DEPTHS, 0)
    for source in (nyu, nyu.parent):
        data = open_depth(source)
        assert (data.max_depth, data.crop, data.unit) == (10, "eigen", "m")
        for part, numbers in ((data.train, TRAIN), (data.test, TEST)):
            part = pickle.loads(pickle.dumps(part))  # as for loader processes that are not forked
            assert part.names == [f"nyu_depth_v2_labeled.mat[{number}]" for number in numbers]
            for (image, depth, _), number in zip(part, numbers, strict=True):
                np.testing.assert_array_equal(np.asarray(image), IMAGES[number - 1])
                np.testing.assert_array_equal(depth, known[number - 1])
                assert depth.dtype == np.float32
        assert data.train.fingerprint != data.test.fingerprint


def test_missing_and_damaged_files_of_nyu_are_named(nyu, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match="pip install h5py scipy"):
            open_depth(nyu)
    splits, good = nyu.with_name("splits.mat"), nyu.read_bytes()
    with pytest.importorskip("h5py").File(nyu, "r") as opened:
        _, packed = opened["depths"].id.read_direct_chunk((TEST[1] - 1, 0, 0))
    nyu.write_bytes(good.replace(packed, packed[:10] + b"\xff" * (len(packed) - 10)))
    data = open_depth(nyu)
    assert data.test[0][1].shape == (HEIGHT, WIDTH)
    with pytest.raises(ImageError):  # of one pair
        data.test[1]
    nyu.write_bytes(good[:2000])
    with pytest.raises(DataError, match=str(nyu)):
        open_depth(nyu)
    nyu.write_bytes(good)
    for content in (b"junk" * 99, None):
        splits.unlink() if content is None else splits.write_bytes(content)
        with pytest.raises(DataError, match=str(splits)):
            open_depth(nyu)


def test_masks_of_a_folder(tmp_path):
    masks, images = tmp_path / "masks", tmp_path / "images"
    save_pair(images / "train/a/1.png", masks / "train/a/1.png", ids(0, 3, 255))
    save_pair(images / "val/1.png", masks / "val/1.png", ids(2, 0, 1))
    data = open_segmentation(tmp_path)
    image, mask, name = data.train[0]
    assert (image.size, image.mode, name) == ((3, 2), "RGB", str(images / "train/a/1.png"))
    assert (mask.dtype, mask.tolist()) == (np.uint8, [[0, 3, 255]] * 2)
    assert (data.test[0][1][0].tolist(), data.num_classes) == ([2, 0, 1], 4)
    reduced = open_segmentation(tmp_path, reduce_zero_label=True, workers=1)
    assert (reduced.train[0][1][0].tolist(), reduced.num_classes) == ([255, 2, 255], 3)
    save(masks / "train/a/1.png", ids(0, 0, 0))
    for top, named in ((0, "largest class of all masks is 0"), (4096, r"4096 .*/val/1\.png")):
        save(masks / "val/1.png", np.full((2, 3), top, np.uint16))
        with pytest.raises(DataError, match=named):
            open_segmentation(tmp_path)


def test_masks_of_ade20k_begin_at_1(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, short in (("training", "train"), ("validation", "val")):
        for n in (1, 2):
            name = f"{split}/ADE_{short}_{n:08}"
            pair = root / f"images/{name}.jpg", root / f"annotations/{name}.png"
            save_pair(*pair, ids(0, n, 150))
    for source in (tmp_path, root):
        data = open_segmentation(source)
        assert (data.name, data.num_classes, data.class_names) == ("ADE20K", 150, None)
        for part in (data.train, data.test):
            assert [mask[0].tolist() for _, mask, _ in part] == [[255, 0, 149], [255, 1, 149]]
    rows = [f"{n}\t0.1\t9\t9\t1\tclass {n}  " for n in range(1, 151)]
    text = "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows])
    (root / "objectInfo150.txt").write_text(text)
    names = open_segmentation(root).class_names
    assert (len(names), names[0], names[149]) == (150, "class 1", "class 150")
    whole = open_segmentation(root, reduce_zero_label=False)
    assert whole.class_names == ("other", *names)
    assert (whole.num_classes, whole.train[1][1][0].tolist()) == (151, [0, 2, 150])


def test_masks_of_voc_are_palette_indices(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    mask = Image.fromarray(np.array([[0, 15, 255]] * 2, np.uint8), "P")
    mask.putpalette([v for n in range(256) for v in (n * 7 % 256, n * 5 % 256, n)])
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in ("2007_1", "2007_2", "2007_3", "2007_4"):
        save(root / f"JPEGImages/{name}.jpg", np.zeros((2, 3, 3), np.uint8))
        mask.save(root / f"SegmentationClass/{name}.png")
    (root / "SegmentationClass/2007_3.png").unlink()
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("2007_2\n2007_1\n")
    (lists / "val.txt").write_text("2007_4\n")
    for source in (tmp_path, root):
        data = open_segmentation(source)
        assert (data.name, data.num_classes, len(data.class_names)) == ("PASCAL VOC", 21, 21)
        assert [name[-10:] for name in data.train.names] == ["2007_2.jpg", "2007_1.jpg"]
        assert [mask[0].tolist() for _, mask, _ in data.test] == [[0, 15, 255]]
    for text, named in (("2007_3\n", r"SegmentationClass/2007_3\.png"), ("\n", r"val\.txt")):
        (lists / "val.txt").write_text(text)
        with pytest.raises(DataError, match=named):
            open_segmentation(root)


def test_rendered_scenes():
    depth, segmentation = open_depth("scenes:2,3,32"), open_segmentation("scenes:2,3,32")
    for split, count in (("train", 2), ("test", 3)):
        parts = [getattr(data, split) for data in (depth, segmentation)]
        assert [len(part) for part in parts] == [count, count]
        for index in range(count):
            scene = render_scene(0, SPLIT_STARTS[split] + index, 32)
            for part, expected in zip(parts, (scene.depth, scene.segmentation)):
                np.testing.assert_array_equal(np.asarray(part[index][0]), scene.image)
                np.testing.assert_array_equal(part[index][1], expected)
    assert depth.max_depth == max(target.max() for _, target, _ in depth.train)
    assert segmentation.num_classes == 4
