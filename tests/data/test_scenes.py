import hashlib
import math

import numpy as np
import pytest

from ijepa_zoo.data.scenes import (
    SEGMENTATION_CLASSES,
    SPLIT_STARTS,
    count_class,
    distance_class,
    render_scene,
    render_scenes,
    render_splits,
)
from ijepa_zoo.errors import DataError

RADII = {"large": 0.7, "small": 0.35}

# (seed, index, size, supersample): count, distance, SHA-256 of image, masks and depth (16 digits).
# The shipped model was trained on these pixels, so they must never change.
RECORDED = {
    (0, 0, 64, 2): (8, 9.47498663478379, "60ccca64fd169ff0 1cfc902e0d334136 666997bb2cea22c8"),
    (0, 1_000_000_003, 64, 2): (
        8,
        9.211191879804113,
        "94a44db5808768ba 308922755bd30e2e 79ea123ce41ffd80",
    ),
    (0, 2_000_000_017, 64, 2): (
        9,
        7.957353919060017,
        "41b0163bb0b29034 e424c11493eaad8a 00625c1575feb49f",
    ),
    (7, 5, 64, 2): (8, 7.674148980959748, "369c4dcdde551cd2 bdc5bf5add558fde 9705cba4b50bc625"),
    (3, 41, 32, 2): (3, 10.7798374434026, "3b087f26772f6a5b a4ded49b3ea8bdb5 0b895145f85b1374"),
    (1, 4, 96, 2): (7, 9.126887336710377, "1d2f16d1532e676e 48542a457eda2b7e 6d9919bc1f661c91"),
    (5, 12, 128, 1): (6, 9.905909713937858, "4b1bc1e1af8eb6b5 2134df6dcc5177c1 d2b4e177b137f161"),
    (2**63, 9, 48, 3): (4, 8.53575285212862, "d891c1f78cfd9a6d bc4580ae432d6e0f 15cc48dddabefe09"),
}


@pytest.mark.parametrize("arguments", RECORDED)
def test_pixels_and_labels_are_the_recorded_ones(arguments):
    *arguments_before, supersample = arguments
    scene = render_scene(*arguments_before, supersample=supersample)
    digests = [
        hashlib.sha256(array.tobytes()).hexdigest()[:16]
        for array in (scene.image, scene.masks, scene.depth)
    ]
    assert (scene.count, scene.distance, " ".join(digests)) == RECORDED[arguments]


@pytest.fixture(scope="module")
def many():
    return render_scenes(3, 0, 120, 32, dense=True)


@pytest.fixture(scope="module")
def full_scenes():
    """Scenes with enough objects to recover the camera from the labels."""
    scenes = (render_scene(5, index, 128, supersample=1) for index in range(16))
    return [scene for scene in scenes if scene.count >= 8]


def test_the_layout_does_not_depend_on_the_size_of_the_picture():
    small, large = render_scene(1, 4, 48), render_scene(1, 4, 192, supersample=1)
    assert [item.position for item in small.objects] == [item.position for item in large.objects]
    assert small.distance == large.distance
    for one, other in zip(small.objects, large.objects):
        np.testing.assert_allclose(np.multiply(one.pixel_coords, (4, 4, 1)), other.pixel_coords)


def test_shapes_and_types(many):
    assert {name: (array.shape, array.dtype.name) for name, array in many.items()} == {
        "images": ((120, 32, 32, 3), "uint8"),
        "count": ((120,), "int64"),
        "distance": ((120,), "float32"),
        "masks": ((120, 32, 32), "uint8"),
        "segmentation": ((120, 32, 32), "uint8"),
        "depth": ((120, 32, 32), "float32"),
    }
    assert set(render_scenes(0, 0, 1)) == {"images", "count", "distance"}


def test_segmentation_is_the_shape_of_the_object_in_each_pixel(full_scenes):
    assert SEGMENTATION_CLASSES == ("background", "cube", "sphere", "cylinder")
    for scene in full_scenes:
        names = ["background", *(item.shape for item in scene.objects)]
        for number, name in enumerate(names):
            classes = np.unique(scene.segmentation[scene.masks == number])
            assert classes.tolist() == [SEGMENTATION_CLASSES.index(name)]


def test_every_object_shows_and_labels_are_spread(many):
    for masks, count in zip(many["masks"], many["count"]):
        np.testing.assert_array_equal(np.unique(masks), np.arange(count + 1))
    counts = np.bincount([count_class(int(count)) for count in many["count"]], minlength=8)
    assert counts.min() > 0
    assert counts.max() < 40  # six standard deviations from 120 / 8
    shares = np.bincount([distance_class(float(d)) for d in many["distance"]], minlength=6) / 120
    assert shares.min() > 0.03
    assert shares.max() < 0.4


def _affine(positions, values):
    """Fit values = positions @ a + b and check that the fit is exact."""
    design = np.column_stack([positions, np.ones(len(positions))])
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    np.testing.assert_allclose(design @ solution, values, atol=1e-6)
    return solution


def test_depth_and_masks_agree_with_the_labels(full_scenes):
    """Recover the projection from the labels alone and look where each pixel's ray ended.

    In a pinhole camera x * depth, y * depth and depth are affine in the position.
    """
    assert len(full_scenes) >= 5
    for scene in full_scenes:
        positions = np.array([item.position for item in scene.objects])
        x, y, depth = np.array([item.pixel_coords for item in scene.objects]).T
        matrix = np.stack([_affine(positions, v) for v in (x * depth, y * depth, depth)])
        rows, columns = np.indices(scene.depth.shape) + 0.5
        image = np.stack([columns * scene.depth, rows * scene.depth, scene.depth], -1)
        points = (image - matrix[:, 3]) @ np.linalg.inv(matrix[:, :3]).T
        assert np.abs(points[scene.masks == 0][:, 2]).max() < 1e-3
        for number, item in enumerate(scene.objects, start=1):
            surface = _surface(item, points[scene.masks == number] - item.position)
            np.testing.assert_allclose(surface, 0.0, atol=2e-3)


def _surface(item, points):
    """Zero where points, relative to the centre, lie on the surface of the object."""
    radius = RADII[item.size]
    if item.shape == "sphere":
        return np.linalg.norm(points, axis=1) - radius
    if item.shape == "cylinder":
        return np.maximum(np.hypot(points[:, 0], points[:, 1]), np.abs(points[:, 2])) - radius
    cos, sin = math.cos(item.yaw), math.sin(item.yaw)
    turn = np.array([[cos, sin], [-sin, cos]])
    sides = np.column_stack([points[:, :2] @ turn.T, points[:, 2]])
    return np.abs(sides).max(1) - radius / math.sqrt(2)


def test_the_result_does_not_depend_on_workers():
    alone, shared = (render_scenes(9, 20, 8, 32, workers=n, dense=True) for n in (0, 2))
    assert alone.keys() == shared.keys()
    for name in alone:
        np.testing.assert_array_equal(alone[name], shared[name])
    np.testing.assert_array_equal(alone["images"][3], render_scene(9, 23, 32).image)


def test_count_classes():
    assert [count_class(count) for count in (3, 4, 10)] == [0, 1, 7]
    for count in (2, 11):
        with pytest.raises(ValueError, match=str(count)):
            count_class(count)


def test_splits_are_those_of_seed_0():
    train, test = render_splits("scenes:2,3,32", dense=True)
    for part, start in ((train, SPLIT_STARTS["train"]), (test, SPLIT_STARTS["test"])):
        expected = render_scenes(0, start, len(part["images"]), 32, dense=True)
        assert part.keys() == expected.keys()
        for name in part:
            np.testing.assert_array_equal(part[name], expected[name])
    assert (len(train["images"]), len(test["images"])) == (2, 3)


@pytest.mark.parametrize(
    "source", ["scenes:", "scenes:10", "scenes:a,b", "scenes:0,5", "scenes:5,0", "scenes:5,5,8"]
)
def test_malformed_splits_are_named(source):
    with pytest.raises(DataError, match=source):
        render_splits(source)


@pytest.mark.parametrize("arguments", [{"size": 16}, {"supersample": 0}])
def test_sizes_that_are_too_small_are_refused(arguments):
    with pytest.raises(ValueError, match="size must be >= 32 and supersample >= 1"):
        render_scene(0, 0, **arguments)
