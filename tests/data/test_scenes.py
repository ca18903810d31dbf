"""Rendered scenes: recorded pixels, labels and splits."""

import hashlib

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

# (seed, index, size, supersample): count, distance, SHA-256 of image, masks and depth (16 digits).
# The shipped model was trained on these pixels, so they must never change.
RECORDED = {
    (0, 0, 64, 2): (8, 9.47498663478379, "60ccca64fd169ff0 1cfc902e0d334136 666997bb2cea22c8"),
    (0, 10**9 + 3, 64, 2): (
        8,
        9.211191879804113,
        "94a44db5808768ba 308922755bd30e2e 79ea123ce41ffd80",
    ),
    (0, 2 * 10**9 + 17, 64, 2): (
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
    scene = render_scene(*arguments[:3], supersample=arguments[3])
    digests = [
        hashlib.sha256(array.tobytes()).hexdigest()[:16]
        for array in (scene.image, scene.masks, scene.depth)
    ]
    assert (scene.count, scene.distance, " ".join(digests)) == RECORDED[arguments]
    for number, name in enumerate(["background", *(item.shape for item in scene.objects)]):
        classes = np.unique(scene.segmentation[scene.masks == number])
        assert classes.tolist() == [SEGMENTATION_CLASSES.index(name)]


def test_every_object_shows_and_labels_are_spread():
    many = render_scenes(3, 0, 120, 32, dense=True)
    for masks, count in zip(many["masks"], many["count"]):
        np.testing.assert_array_equal(np.unique(masks), np.arange(count + 1))
    counts = np.bincount([count_class(int(count)) for count in many["count"]], minlength=8)
    assert counts.min() > 0
    assert counts.max() < 40  # six standard deviations from 120 / 8
    shares = np.bincount([distance_class(float(d)) for d in many["distance"]], minlength=6) / 120
    assert shares.min() > 0.03
    assert shares.max() < 0.4


def test_splits_are_those_of_seed_0_with_any_workers():
    parts = render_splits("scenes:2,3,32", workers=2, dense=True)
    for part, split, count in zip(parts, ("train", "test"), (2, 3)):
        expected = render_scenes(0, SPLIT_STARTS[split], count, 32, dense=True)
        assert part.keys() == expected.keys()
        for name in part:
            np.testing.assert_array_equal(part[name], expected[name])
    one = render_scene(0, SPLIT_STARTS["test"] + 1, 32)
    np.testing.assert_array_equal(parts[1]["images"][1], one.image)
    assert {name: array.dtype.name for name, array in parts[0].items()} == {
        **{"images": "uint8", "count": "int64", "distance": "float32"},
        **{"masks": "uint8", "segmentation": "uint8", "depth": "float32"},
    }
    assert set(render_scenes(0, 0, 1)) == {"images", "count", "distance"}


@pytest.mark.parametrize(
    "source", ["scenes:", "scenes:10", "scenes:a,b", "scenes:0,5", "scenes:5,0", "scenes:5,5,8"]
)
def test_malformed_splits_are_named(source):
    with pytest.raises(DataError, match=source):
        render_splits(source)


def test_arguments_out_of_range_are_refused():
    for options in ({"size": 16}, {"supersample": 0}):
        with pytest.raises(ValueError, match="size must be >= 32 and supersample >= 1"):
            render_scene(0, 0, **options)
    assert [count_class(count) for count in (3, 4, 10)] == [0, 1, 7]
    for count in (2, 11):
        with pytest.raises(ValueError, match=str(count)):
            count_class(count)
