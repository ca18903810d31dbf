"""CLEVR v1.0 and rendered scenes, as images with the labels of CLEVR's two VTAB tasks.

The label rules are those of VISSL's `create_clevr_{count,dist}_data_files.py`: the number of
objects, and the bin of the depth of the nearest object's center.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .datasets import ArrayDataset, Targets
from .decode import Decoder
from .scenes import DISTANCE_EDGES, distance_class, render_splits
from .splits import Split, list_split

Kind = Literal["count", "distance"]


def open_clevr(
    data: str | os.PathLike[str],
    kind: Kind,
    *,
    workers: int = 0,
    decoder: Decoder | None = None,
    progress: bool = False,
) -> tuple[Split, Split | None]:
    """Open the training and the test set (`val`, or else `test`, or None) for one task.

    `data` is a folder with `images/{train,val}` and `scenes/CLEVR_{train,val}_scenes.json`, the
    folder above `CLEVR_v1.0`, or `scenes:TRAIN,TEST[,SIZE]`. 'distance' is the bin 0..5 of the
    smallest `pixel_coords[2]`; the upper edges 8, 8.5, 9, 9.5, 10 and 100 belong to their bins.
    """
    decoder = decoder or Decoder()
    if os.fspath(data).startswith("scenes:"):
        parts = render_splits(os.fspath(data), workers, progress)
        train, test = (_rendered(*part, kind, decoder) for part in zip(parts, ("train", "test")))
        return train, test
    folder = Path(data)
    if _scene_file(folder / "CLEVR_v1.0", "train").is_file():
        folder /= "CLEVR_v1.0"
    tests = [split for split in ("val", "test") if _scene_file(folder, split).is_file()]
    tested = _read(folder, tests[0], kind, decoder) if tests else None
    return _read(folder, "train", kind, decoder), tested


def _scene_file(folder: Path, split: str) -> Path:
    return folder / "scenes" / f"CLEVR_{split}_scenes.json"


def _read(folder: Path, split: str, kind: Kind, decoder: Decoder) -> Split:
    path, images = _scene_file(folder, split), folder / "images" / split
    try:
        scenes = json.loads(path.read_text(encoding="utf-8"))["scenes"]
        labels = {scene["image_filename"]: _label(scene["objects"], kind) for scene in scenes}
        missing = labels.keys() - set(os.listdir(images))
    except OSError as error:
        raise DataError(
            f"'{error.filename}' cannot be read ({error.strerror}): give the folder of an unpacked "
            "CLEVR_v1.0.zip, or scenes:8000,4000 to render scenes"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"'{path}' is not a scene file of CLEVR ({type(error).__name__}: {error})"
        ) from error
    if missing:
        raise DataError(
            f"'{images}' lacks {len(missing)} of the {len(labels)} images of '{path}', such as "
            f"{min(missing)}: unpack all of CLEVR_v1.0.zip"
        )
    names = _class_names(np.array([*labels.values()]), kind)
    return list_split(images, labels, names, split, decoder)


def _label(objects: list[dict[str, Any]], kind: Kind) -> int:
    if kind == "count":
        return len(objects)
    return distance_class(min(item["pixel_coords"][2] for item in objects))


def _rendered(scenes: dict[str, Targets], split: str, kind: Kind, decoder: Decoder) -> Split:
    numbers = scenes["count"]
    if kind == "distance":
        numbers = np.array([distance_class(d) for d in scenes["distance"].tolist()], np.int64)
    images = ArrayDataset([scenes["images"]], decoder, f"scenes-{split}")
    return Split(images, numbers, _class_names(numbers, kind), split)


def _class_names(numbers: Targets, kind: Kind) -> dict[int, str]:
    if kind == "distance":
        bins = (f"{low:g} to {high:g}" for low, high in pairwise(DISTANCE_EDGES))
        return dict(enumerate([f"up to {DISTANCE_EDGES[0]:g}", *bins]))
    return {number: f"{number} objects" for number in sorted(set(numbers.tolist()))}
