"""Labels of scene files in CLEVR's real layout, with edges worked out by hand."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from ijepa_zoo.data.clevr import open_clevr
from ijepa_zoo.data.scenes import SPLIT_STARTS, distance_class, render_scene
from ijepa_zoo.errors import DataError

# One object of the published files.
OBJECT = {
    **{"color": "brown", "size": "large", "rotation": 178.92387258999463, "shape": "cylinder"},
    "3d_coords": [-1.4937210083007812, -1.9936031103134155, 0.699999988079071],
    "material": "rubber",
    "pixel_coords": [119, 131, 10.801443099975586],
}

# Nearest depth and class; the bins are (-inf, 8], (8, 8.5], ..., (9.5, 10], (10, 100].
EDGES = [(7.999999, 0), (8.0, 0), (math.nextafter(8.0, 9.0), 1), (8.5, 1), (8.51, 2), (9, 2)]
EDGES += [(9.25, 3), (9.5, 3), (9.75, 4), (10.0, 4), (math.nextafter(10.0, 11.0), 5), (100.0, 5)]


def write(root, split, depths, without=()):
    """A scene file with objects at the given depths, and images except for those of `without`."""
    images = root / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    (root / "scenes").mkdir(exist_ok=True)
    scenes = [
        {
            "image_index": number,
            "image_filename": f"CLEVR_{split}_{number:06d}.png",
            "objects": [{**OBJECT, "pixel_coords": [119, 131, depth]} for depth in nearby],
            "relationships": {"right": [], "behind": [], "front": [], "left": []},
            "split": split,
        }
        for number, nearby in enumerate(depths)
    ]
    path = root / "scenes" / f"CLEVR_{split}_scenes.json"
    path.write_text(json.dumps({"info": {"split": split, "version": "1.0"}, "scenes": scenes}))
    for number in set(range(len(scenes))) - set(without):
        image = Image.new("RGB", (48, 32), (number, 0, 0))
        image.save(images / f"CLEVR_{split}_{number:06d}.png")
    return path


def test_distance_classes_by_hand(tmp_path):
    write(tmp_path, "train", [[120.0, depth, 110.0] for depth, _ in EDGES])
    train, test = open_clevr(tmp_path, "distance")
    assert test is None
    assert train.targets.tolist() == [number for _, number in EDGES]
    assert [train.classes[n] for n in (0, 1, 5)] == ["up to 8", "8 to 8.5", "10 to 100"]


def test_counts_are_numbers_of_objects(tmp_path):
    write(tmp_path, "train", [[9.0] * n for n in (3, 10, 7, 3)])
    train, _ = open_clevr(tmp_path, "count")
    assert train.targets.tolist() == [3, 10, 7, 3]
    assert train.targets.dtype == np.int64
    assert train.classes == {3: "3 objects", 7: "7 objects", 10: "10 objects"}
    assert [np.asarray(train.images.read(i))[0, 0, 0] for i in range(4)] == [0, 1, 2, 3]
    assert train.images.name(2).endswith("images/train/CLEVR_train_000002.png")


def test_the_test_set_is_val_or_else_test(tmp_path):
    for split in ("train", "test", "val"):
        write(tmp_path / "CLEVR_v1.0", split, [[9.0] * 4])
        train, test = open_clevr(tmp_path, "count")  # the folder above it
        assert train.name == "train"
        assert (test.name if test else None) == (None if split == "train" else split)


@pytest.mark.parametrize("text", ["{", "[]", '{"scenes": 3}', '{"scenes": [{"objects": []}]}'])
def test_malformed_scene_files_are_named(tmp_path, text):
    path = write(tmp_path, "train", [[9.0], []])
    assert open_clevr(tmp_path, "count")[0].targets.tolist() == [1, 0]
    with pytest.raises(DataError, match=str(path)):  # no object has no distance
        open_clevr(tmp_path, "distance")
    path.write_text(text)
    with pytest.raises(DataError, match=str(path)):
        open_clevr(tmp_path, "count")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path / "scenes" / "CLEVR_train_scenes.json")):
        open_clevr(tmp_path, "count")
    write(tmp_path, "train", [[9.0]] * 3, without=(1,))
    with pytest.raises(DataError, match=rf"{tmp_path}/images/train.* 1 of .*_000001\.png"):
        open_clevr(tmp_path, "count")


@pytest.mark.parametrize("kind", ["count", "distance"])
def test_rendered_scenes(kind):
    sets = open_clevr("scenes:3,2,48", kind)
    assert [(len(part.images), part.name) for part in sets] == [(3, "train"), (2, "test")]
    for part in sets:
        for index, number in enumerate(part.targets.tolist()):
            scene = render_scene(0, SPLIT_STARTS[part.name] + index, 48)
            np.testing.assert_array_equal(np.asarray(part.images.read(index)), scene.image)
            assert number == (scene.count if kind == "count" else distance_class(scene.distance))
            assert number in part.classes
