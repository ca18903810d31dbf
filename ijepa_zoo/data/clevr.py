"""CLEVR v1.0 as distributed, and rendered scenes, as images with the labels of two tasks.

The label rules are those of VTAB and of VISSL's `create_clevr_{count,dist}_data_files.py`: how many
objects a scene has, and the bin of the depth of the nearest one's centre.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .array_sets import ArraySet
from .labelled import Labelled, listed
from .scene_layout import COUNTS
from .scenes import DISTANCE_EDGES, SPLIT_STARTS, distance_class, render_scenes

Kind = Literal["count", "distance"]

_RENDERED = re.compile(r"scenes:(\d+),(\d+)(?:,(\d+))?")
_RENDER_SEED = 0  # of the data set; a run's seed must not change what it is tested on
_NAMED = 3  # examples in a note
_FARTHEST = 1e9  # more is no distance; whole numbers of any length come out of JSON
_DISTANCES = (
    f"up to {DISTANCE_EDGES[0]:g}",
    *(f"{low:g} to {high:g}" for low, high in pairwise(DISTANCE_EDGES)),
)


def open_clevr(
    data: str | os.PathLike[str], kind: Kind, *, workers: int = 0, progress: bool = False
) -> tuple[Labelled, Labelled | None]:
    """Open CLEVR or rendered scenes with the labels of one task.

    Args:
        data: A folder with `images/{train,val}` and `scenes/CLEVR_{train,val}_scenes.json` (or
            `CLEVR_v1.0` that has them), as distributed or as
            :func:`~ijepa_zoo.data.scenes.write_scenes` writes it; or `scenes:TRAIN,TEST` or
            `scenes:TRAIN,TEST,SIZE`, which renders so many scenes of SIZE x SIZE (64) pixels now.
        kind: 'count' for the number of objects, 'distance' for the bin 0..5 of the smallest
            `pixel_coords[2]`; upper edges 8, 8.5, 9, 9.5, 10 and 100 belong to their bins.
        workers: Processes that render; 0 renders in this one.
        progress: Show a progress bar while rendering.

    Returns:
        The training part and the test part, which is `val` (`test` where there is no `val`), None
        where there is neither. Counts are numbers of objects, not classes. Scenes without label or
        image are left out, and the notes name them.

    Raises:
        DataError: There are no such scenes, or none can be used.
    """
    if os.fspath(data).startswith("scenes:"):
        return _render(os.fspath(data), kind, workers, progress)
    root = Path(data)
    folders = [f for f in (root, root / "CLEVR_v1.0") if _scene_file(f, "train").is_file()]
    if not folders:
        raise DataError(
            f"'{root}' is no CLEVR: '{_scene_file(root, 'train')}' is missing. Unpack "
            "CLEVR_v1.0.zip and name its folder, or write scenes:8000,4000 to render some"
        )
    tests = [name for name in ("val", "test") if _scene_file(folders[0], name).is_file()]
    train = _read(folders[0], "train", kind)
    return train, _read(folders[0], tests[0], kind) if tests else None


def _scene_file(root: Path, split: str) -> Path:
    return root / "scenes" / f"CLEVR_{split}_scenes.json"


def _read(root: Path, split: str, kind: Kind) -> Labelled:
    path = _scene_file(root, split)
    folder = root / "images" / split
    try:
        scenes = json.loads(path.read_text(encoding="utf-8"))["scenes"]
        present = {entry.name for entry in os.scandir(folder)}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"CLEVR's {split} part cannot be read: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' is no CLEVR scene file (JSON with 'scenes'): {error}") from error
    if not isinstance(scenes, list):
        raise DataError(f"'{path}' is no CLEVR scene file: 'scenes' is no list")
    files, numbers, left_out = [], [], []
    for place, scene in enumerate(scenes):
        try:
            name, number = _labelled(scene, kind)
        except _SceneError as error:
            left_out.append(f"scenes[{place}] {error}")
            continue
        if name not in present:
            left_out.append(f"scenes[{place}] has no image '{folder / name}'")
            continue
        files.append(name)
        numbers.append(number)
    if not files:
        why = f": {left_out[0]}" if left_out else ""
        raise DataError(f"none of the {len(scenes)} scenes of '{path}' can be used{why}")
    notes = [*_missing(path, left_out), *(_odd_counts(path, files, numbers, kind))]
    return listed(
        folder,
        files,
        np.array(numbers, np.int64),
        names=_names(numbers, kind),
        split=split,
        notes=tuple(notes),
    )


class _SceneError(ValueError):
    """A scene without what its label needs; the text says what is missing."""


def _labelled(scene: Any, kind: Kind) -> tuple[str, int]:
    """File name and number of a record of a scene file."""
    if not isinstance(scene, dict):
        raise _SceneError("is no record")
    name, objects = scene.get("image_filename"), scene.get("objects")
    if not isinstance(name, str):
        raise _SceneError("has no 'image_filename'")
    if not isinstance(objects, list):
        raise _SceneError(f"('{name}') has no 'objects'")
    if kind == "count":
        return name, len(objects)
    if not objects:
        raise _SceneError(f"('{name}') has no object that could be near")
    return name, _bin(min(_depth(item, number, name) for number, item in enumerate(objects)), name)


def _depth(item: Any, number: int, name: str) -> float:
    coords = item.get("pixel_coords") if isinstance(item, dict) else None
    depth = coords[2] if isinstance(coords, list) and len(coords) == 3 else None
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not abs(depth) < _FARTHEST:
        raise _SceneError(f"('{name}') has no depth in 'pixel_coords' of objects[{number}]")
    return float(depth)


def _bin(depth: float, name: str) -> int:
    if depth > DISTANCE_EDGES[-1]:
        raise _SceneError(f"('{name}') is {depth:g} away, beyond the last bin")
    return distance_class(depth)


def _missing(path: Path, left_out: list[str]) -> Iterator[str]:
    if left_out:
        shown = "; ".join(left_out[:_NAMED]) + ("; ..." if len(left_out) > _NAMED else "")
        yield f"{len(left_out)} scenes of '{path}' are left out: {shown}"


def _odd_counts(path: Path, files: list[str], numbers: list[int], kind: Kind) -> Iterator[str]:
    """Published scenes have 3 to 10 objects; others count as the protocol counts them."""
    odd = [f"'{f}' has {n}" for f, n in zip(files, numbers) if n not in COUNTS]
    if kind == "count" and odd:
        shown = "; ".join(odd[:_NAMED]) + ("; ..." if len(odd) > _NAMED else "")
        yield (
            f"{len(odd)} scenes of '{path}' have fewer than {COUNTS[0]} or more than {COUNTS[-1]} "
            f"objects, which is a class of its own if training has it: {shown}"
        )


def _names(numbers: list[int], kind: Kind) -> dict[int, str]:
    if kind == "count":
        return {number: f"{number} objects" for number in set(numbers)}
    return dict(enumerate(_DISTANCES))


def _render(data: str, kind: Kind, workers: int, progress: bool) -> tuple[Labelled, Labelled]:
    asked = _RENDERED.fullmatch(data)
    if asked is None:
        raise DataError(
            f"'{data}' is no order for scenes: write scenes:TRAIN,TEST, such as scenes:8000,4000, "
            "or scenes:TRAIN,TEST,SIZE for pictures of SIZE x SIZE pixels (64 if absent)"
        )
    train, test, size = int(asked[1]), int(asked[2]), int(asked[3] or 64)
    if not train or not test or size < 32:
        raise DataError(f"'{data}': at least one scene for each part, of 32 pixels or more")
    parts = [
        _rendered(split, count, size, kind, workers, progress)
        for split, count in (("train", train), ("test", test))
    ]
    return parts[0], parts[1]


def _rendered(
    split: str, count: int, size: int, kind: Kind, workers: int, progress: bool
) -> Labelled:
    made = render_scenes(_RENDER_SEED, SPLIT_STARTS[split], count, size, workers, progress)
    if kind == "count":
        numbers = made["count"]
    else:
        numbers = np.array([distance_class(d) for d in made["distance"].tolist()], np.int64)
    images = ArraySet(made["images"], 3, f"scenes-{split}")
    return Labelled(images, numbers, _names(numbers.tolist(), kind), split)
