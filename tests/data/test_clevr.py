"""Labels of scene files in CLEVR's real layout, with edges worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ijepa_zoo.data.clevr import open_clevr
from ijepa_zoo.data.scenes import render_scene, write_scenes
from ijepa_zoo.errors import DataError

# Published objects have more fields; this is one of theirs.
OBJECT = {
    "color": "brown",
    "size": "large",
    "rotation": 178.92387258999463,
    "shape": "cylinder",
    "3d_coords": [-1.4937210083007812, -1.9936031103134155, 0.699999988079071],
    "material": "rubber",
    "pixel_coords": [119, 131, 10.801443099975586],
}


def scene(number: int, depths: list[Any], split: str = "train") -> dict[str, Any]:
    return {
        "image_index": number,
        "image_filename": f"CLEVR_{split}_{number:06d}.png",
        "objects": [{**OBJECT, "pixel_coords": [119, 131, depth]} for depth in depths],
        "relationships": {"right": [], "behind": [], "front": [], "left": []},
        "directions": {"right": [0.65, 0.75, 0.0]},
        "split": split,
    }


def write(root: Path, split: str, scenes: list[Any], without: tuple[int, ...] = ()) -> None:
    images = root / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    (root / "scenes").mkdir(exist_ok=True)
    info = {"split": split, "license": "Creative Commons Attribution (CC BY 4.0)", "version": "1.0"}
    path = root / "scenes" / f"CLEVR_{split}_scenes.json"
    path.write_text(json.dumps({"info": info, "scenes": scenes}))
    for number in set(range(len(scenes))) - set(without):
        picture = Image.new("RGB", (48, 32), (number, 0, 0))
        picture.save(images / f"CLEVR_{split}_{number:06d}.png")


# min depth -> class: bins are (-inf, 8], (8, 8.5], (8.5, 9], (9, 9.5], (9.5, 10], (10, 100]
EDGES = [
    (7.999999, 0),
    (8.0, 0),
    (8, 0),  # JSON's integers are depths too
    (math.nextafter(8.0, 9.0), 1),
    (8.25, 1),
    (8.5, 1),
    (math.nextafter(8.5, 9.0), 2),
    (9.0, 2),
    (9.25, 3),
    (9.5, 3),
    (9.75, 4),
    (10.0, 4),
    (math.nextafter(10.0, 11.0), 5),
    (42.0, 5),
    (100.0, 5),
]


def test_distance_classes_by_hand(tmp_path: Path) -> None:
    write(
        tmp_path,
        "train",
        [scene(i, [60.0, depth, 70.0]) for i, (depth, _) in enumerate(EDGES)][:-1],
    )
    write(tmp_path, "val", [scene(0, [100.0], "val")])
    train, val = open_clevr(tmp_path, "distance")
    assert val is not None
    # The sixty in each scene is never the nearest, except before the 100 of the last.
    assert train.numbers.tolist() == [number for _, number in EDGES][:-1]
    assert val.numbers.tolist() == [5]
    assert (train.split, val.split) == ("train", "val")
    assert (train.names[0], train.names[1], train.names[5]) == ("up to 8", "8 to 8.5", "10 to 100")
    assert train.notes == ()


def test_counts_are_numbers_of_objects(tmp_path: Path) -> None:
    write(tmp_path, "train", [scene(i, [9.0] * n) for i, n in enumerate([3, 10, 7, 3])])
    train, test = open_clevr(tmp_path, "count")
    assert test is None
    assert train.numbers.tolist() == [3, 10, 7, 3]
    assert train.numbers.dtype == np.int64
    assert train.names == {3: "3 objects", 7: "7 objects", 10: "10 objects"}
    assert [np.asarray(train.images.read(i))[0, 0, 0] for i in range(4)] == [0, 1, 2, 3]
    assert train.images.name(2).endswith("images/train/CLEVR_train_000002.png")


def test_the_folder_above_is_found_and_val_is_the_test_set(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write(tmp_path / "CLEVR_v1.0", split, [scene(0, [9.0] * 4, split)])
    train, test = open_clevr(tmp_path, "count")
    assert test is not None
    assert (train.split, test.split) == ("train", "val")
    assert test.images.name(0).endswith("CLEVR_v1.0/images/val/CLEVR_val_000000.png")


def test_test_scenes_stand_in_where_there_is_no_val(tmp_path: Path) -> None:
    write(tmp_path, "train", [scene(0, [9.0] * 4)])
    write(tmp_path, "test", [scene(0, [9.0] * 5, "test")])
    test = open_clevr(tmp_path, "count")[1]
    assert test is not None
    assert (test.split, test.numbers.tolist()) == ("test", [5])


def test_scenes_without_what_the_label_needs_are_named_and_left_out(tmp_path: Path) -> None:
    scenes = [scene(i, [9.0, 9.2, 9.6]) for i in range(11)]
    del scenes[1]["image_filename"]
    del scenes[2]["objects"]
    del scenes[3]["objects"][1]["pixel_coords"]
    scenes[4]["objects"][2]["pixel_coords"] = [1, 2]
    scenes[5]["objects"][0]["pixel_coords"][2] = float("nan")
    scenes[6]["objects"][0]["pixel_coords"][2] = "9"
    scenes[7]["objects"] = []
    scenes[8]["objects"] = [{**OBJECT, "pixel_coords": [1, 1, 100.5]}]
    scenes[9] = "scene"
    write(tmp_path, "train", scenes, without=(10,))
    train, _ = open_clevr(tmp_path, "distance")
    assert (len(train.images), train.numbers.tolist()) == (1, [3 - 1])  # min 9.0: (8.5, 9]
    (note,) = train.notes
    assert note.startswith(f"10 scenes of '{tmp_path}/scenes/CLEVR_train_scenes.json' are left out")
    assert "scenes[1] has no 'image_filename'" in note
    assert "scenes[2] ('CLEVR_train_000002.png') has no 'objects'" in note
    assert (
        "scenes[3] ('CLEVR_train_000003.png') has no depth in 'pixel_coords' of objects[1]" in note
    )
    assert note.endswith("; ...")
    # Counting needs no coordinates.
    counted, _ = open_clevr(tmp_path, "count")
    assert counted.numbers.tolist() == [3, 3, 3, 3, 3, 0, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["objects"].clear(), "has no object that could be near"),
        (lambda s: s["objects"][0].update(pixel_coords=[1, 1, 100.5]), "is 100.5 away"),
        (lambda s: s["objects"][0].update(pixel_coords=[1, 1, True]), "has no depth"),
        (lambda s: s["objects"].insert(0, 7), "objects[0]"),
        (lambda s: s.update(image_filename="gone.png"), "has no image '"),
    ],
)
def test_each_reason(tmp_path: Path, change: Any, words: str) -> None:
    scenes = [scene(0, [9.0]), scene(1, [9.0])]
    change(scenes[1])
    write(tmp_path, "train", scenes)
    train, _ = open_clevr(tmp_path, "distance")
    assert len(train.images) == 1
    assert words in train.notes[0]


def test_counts_outside_three_to_ten_are_named_and_kept(tmp_path: Path) -> None:
    write(tmp_path, "train", [scene(i, [9.0] * n) for i, n in enumerate([3, 2, 11, 10])])
    train, _ = open_clevr(tmp_path, "count")
    assert train.numbers.tolist() == [3, 2, 11, 10]
    (note,) = train.notes
    assert note.startswith("2 scenes of ")
    assert note.endswith("'CLEVR_train_000001.png' has 2; 'CLEVR_train_000002.png' has 11")


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no CLEVR: .*scenes:8000,4000"):
        open_clevr(tmp_path, "count")
    write(tmp_path, "train", [])
    with pytest.raises(DataError, match="none of the 0 scenes"):
        open_clevr(tmp_path, "count")
    write(tmp_path, "train", [scene(0, [9.0])], without=(0,))
    with pytest.raises(DataError, match=r"none of the 1 scenes .*has no image"):
        open_clevr(tmp_path, "count")
    path = tmp_path / "scenes" / "CLEVR_train_scenes.json"
    for text in ("{", "[]", '{"scenes": 3}'):
        path.write_text(text)
        with pytest.raises(DataError, match="is no CLEVR scene file"):
            open_clevr(tmp_path, "count")
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read"):
        open_clevr(tmp_path, "count")


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    scenes = [scene(i, [9.0] * 4) for i in range(3)]
    for folder in ("a", "b"):
        write(tmp_path / folder, "train", scenes)
    one, other = (open_clevr(tmp_path / f, "count")[0].images.fingerprint() for f in ("a", "b"))
    assert one == other


def test_rendered_scenes_on_disk_and_in_memory_are_the_same(tmp_path: Path) -> None:
    write_scenes(tmp_path, 0, 12)
    write_scenes(tmp_path, 0, 5, split="test")
    for kind in ("count", "distance"):
        stored = open_clevr(tmp_path, kind)
        made = open_clevr("scenes:12,5", kind)
        for one, other in zip(stored, made):
            assert one is not None
            assert other is not None
            assert one.numbers.tolist() == other.numbers.tolist()
            assert one.split == other.split
            for number in range(len(one.images)):
                np.testing.assert_array_equal(one.images.read(number), other.images.read(number))


def test_the_size_of_rendered_scenes() -> None:
    train, test = open_clevr("scenes:2,1,96", "distance")
    assert test is not None
    np.testing.assert_array_equal(train.images.read(1), render_scene(0, 1, 96).image)
    assert np.asarray(test.images.read(0)).shape == (96, 96, 3)


@pytest.mark.parametrize(
    "order", ["scenes:", "scenes:10", "scenes:a,b", "scenes:0,5", "scenes:5,5,8"]
)
def test_wrong_orders_of_scenes(order: str) -> None:
    with pytest.raises(DataError, match="scene"):
        open_clevr(order, "count")
