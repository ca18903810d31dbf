"""Labels of scene files in CLEVR's real layout, with edges worked out by hand."""

import json
import math

import numpy as np
import pytest
from inputs import levels, png, put

from ijepa_zoo.data.clevr import open_clevr
from ijepa_zoo.data.scenes import SPLIT_STARTS, distance_class, render_scene
from ijepa_zoo.errors import DataError

# Nearest depth and class; the bins are (-inf, 8], (8, 8.5], ..., (9.5, 10], (10, 100].
EDGES = [(7.999999, 0), (8.0, 0), (math.nextafter(8.0, 9.0), 1), (8.5, 1), (8.51, 2), (9, 2)]
EDGES += [(9.25, 3), (9.5, 3), (9.75, 4), (10.0, 4), (math.nextafter(10.0, 11.0), 5), (100.0, 5)]
SCENES = "scenes/CLEVR_train_scenes.json"


def write(root, split, depths):
    """A scene file with objects at the given depths, and images."""
    names = [f"CLEVR_{split}_{number:06d}.png" for number in range(len(depths))]
    scenes = [
        {"image_filename": name, "objects": [{"pixel_coords": [119, 131, d]} for d in nearby]}
        for name, nearby in zip(names, depths)
    ]
    text = json.dumps({"info": {"split": split}, "scenes": scenes})
    put(root, {f"scenes/CLEVR_{split}_scenes.json": text.encode()})
    put(root / "images" / split, {name: png(number) for number, name in enumerate(names)})


def test_labels_of_both_tasks_and_both_splits(tmp_path):
    depths = [[120.0, depth, *[110.0] * (index % 3)] for index, (depth, _) in enumerate(EDGES)]
    for split, folder in (("train", tmp_path / "CLEVR_v1.0"), ("test", None), ("val", None)):
        write(tmp_path / "CLEVR_v1.0", split, depths)
        train, test = open_clevr(folder or tmp_path, "distance")
        assert (test.name if test else None) == (None if split == "train" else split)
    assert (train.name, train.targets.tolist()) == ("train", [number for _, number in EDGES])
    assert [train.classes[n] for n in (0, 1, 5)] == ["up to 8", "8 to 8.5", "10 to 100"]
    counted, _ = open_clevr(tmp_path, "count")
    assert counted.targets.tolist() == [2, 3, 4] * 4
    assert counted.classes == {2: "2 objects", 3: "3 objects", 4: "4 objects"}
    assert levels(counted.images) == list(range(12))


@pytest.mark.parametrize(
    ("text", "kind", "named"),
    [
        *((text, "count", SCENES) for text in ("{", "[]", '{"scenes": 3}', '{"scenes": [{}]}')),
        (None, "count", SCENES),
        ('{"scenes": [{"image_filename": "a.png", "objects": []}]}', "distance", SCENES),
        ('{"scenes": [{"image_filename": "a.png", "objects": []}]}', "count", r"1 of .*a\.png"),
    ],
)
def test_malformed_and_missing_files_are_named(tmp_path, text, kind, named):
    write(tmp_path, "train", [[9.0]])
    (tmp_path / SCENES).write_text(text) if text else (tmp_path / SCENES).unlink()
    with pytest.raises(DataError, match=named):
        open_clevr(tmp_path, kind)


def test_rendered_scenes():
    for kind in ("count", "distance"):
        for part, count in zip(open_clevr("scenes:3,2,48", kind), (3, 2), strict=True):
            first = SPLIT_STARTS[part.name]
            scenes = [render_scene(0, first + index, 48) for index in range(count)]
            images = [np.asarray(part.images.read(index)) for index in range(count)]
            np.testing.assert_array_equal(images, [scene.image for scene in scenes])
            counts, bins = zip(*((s.count, distance_class(s.distance)) for s in scenes))
            assert part.targets.tolist() == list(counts if kind == "count" else bins)
            assert part.classes.keys() >= {*part.targets.tolist()}
