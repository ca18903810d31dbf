"""Rendered, labelled scenes in the manner of CLEVR: a data set that needs no download.

A scene is a pure function of (seed, index): 3 to 10 solids on a ground plane. Its layout does not
depend on the picture's size: the same scene can be drawn small to train on and large to look at.
"""

import json
import math
import multiprocessing
import signal
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_zoo.data.scene_layout import COUNTS, TRACE_SIZE, sample_layout
from ijepa_zoo.data.scene_shade import shade
from ijepa_zoo.data.scene_trace import Floats, Vector, trace
from ijepa_zoo.progress import progress_bar
from ijepa_zoo.seeds import Stream, numpy_generator

from ..errors import SettingsError

DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
# First index of each split, far enough apart that splits of one seed never share a scene.
SPLIT_STARTS = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}


@dataclass(frozen=True)
class SceneObject:
    """One object: CLEVR's attributes, centre `position` in scene units, `rotation` in degrees.

    `pixel` is the projected centre x, y in pixels (0 at the left and upper edge of the picture)
    and its depth in scene units along the viewing direction.
    """

    shape: str
    color: str
    material: str
    size: str
    position: Vector
    rotation: float
    pixel: Vector


@dataclass(frozen=True)
class Scene:
    """A picture and its labels.

    `image` uint8 [H, W, 3]; `masks` uint8 [H, W], 0 for the background and k for `objects[k - 1]`;
    `depth` float32 [H, W] in scene units along the viewing direction. Masks and depth are those of
    one ray per pixel (its middle, or right and below of it where `supersample` is even).
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    depth: Floats
    objects: tuple[SceneObject, ...]

    @property
    def count(self) -> int:
        """Number of objects, 3 to 10."""
        return len(self.objects)

    @property
    def distance(self) -> float:
        """Depth of the nearest object's centre."""
        return min(item.pixel[2] for item in self.objects)


def distance_class(distance: float) -> int:
    """Return the class 0..5 of the nearest object's depth (VTAB's bins for CLEVR)."""
    return bisect_left(DISTANCE_EDGES, distance)


def count_class(count: int) -> int:
    """Return the class 0..7 of a number of objects from 3 to 10.

    Raises:
        ValueError: if `count` is outside 3..10.
    """
    if count not in COUNTS:
        raise SettingsError(f"a scene has {COUNTS[0]} to {COUNTS[-1]} objects, not {count}")
    return count - COUNTS[0]


def render_scene(seed: int, index: int, size: int = 64, *, supersample: int = 2) -> Scene:
    """Draw scene `index` of `seed` as a `size` x `size` picture.

    Args:
        seed: names the data set.
        index: number of the scene in the data set.
        size: width and height in pixels, at least 32.
        supersample: rays per pixel along each axis.

    Raises:
        ValueError: if an argument is out of range.
    """
    if size < 32 or supersample < 1:
        raise SettingsError(
            f"size must be >= 32 and supersample >= 1, not {size} and {supersample}"
        )
    layout = sample_layout(numpy_generator(seed, Stream.SCENES, index))
    camera, solids = layout.camera, [piece.solid for piece in layout.pieces]
    rays = size * supersample
    hits = layout.hits if rays == TRACE_SIZE else trace(camera, solids, rays)
    color = shade(camera, solids, layout.lights, hits)
    steps = range(supersample)
    pixels = np.zeros((3, size, size), np.float32)
    for i, j in product(steps, steps):
        pixels += color[:, i::supersample, j::supersample]
    middle = slice(supersample // 2, None, supersample)
    objects = []
    for piece in layout.pieces:
        solid = piece.solid
        x, y, depth = camera.project(solid.center)
        objects.append(
            SceneObject(
                shape=solid.shape,
                color=piece.color,
                material=piece.material,
                size=piece.size,
                position=solid.center,
                rotation=math.degrees(solid.yaw),
                pixel=(x * size, y * size, depth),
            )
        )
    return Scene(
        image=_to_srgb(pixels / supersample**2),
        masks=hits.ids[middle, middle].copy(),
        depth=hits.depth[middle, middle].copy(),
        objects=tuple(objects),
    )


def render_scenes(
    seed: int,
    start: int,
    count: int,
    size: int = 64,
    workers: int = 0,
    progress: bool = False,
    *,
    dense: bool = False,
) -> dict[str, NDArray[Any]]:
    """Draw scenes `start` to `start + count - 1` of `seed`.

    Args:
        seed: names the data set.
        start: index of the first scene; `SPLIT_STARTS` has the splits' first indices.
        count: number of scenes.
        size: width and height of the pictures.
        workers: processes that draw; 0 draws in this one. The result does not depend on it.
        progress: show a progress bar.
        dense: also return `masks` and `depth`.

    Returns:
        `images` uint8 [n, H, W, 3], `count` int64 [n], `distance` float32 [n] and, if asked for,
        `masks` uint8 [n, H, W] and `depth` float32 [n, H, W].
    """
    arrays: dict[str, NDArray[Any]] = {
        "images": np.empty((count, size, size, 3), np.uint8),
        "count": np.empty(count, np.int64),
        "distance": np.empty(count, np.float32),
    }
    if dense:
        arrays["masks"] = np.empty((count, size, size), np.uint8)
        arrays["depth"] = np.empty((count, size, size), np.float32)
    for row, scene in enumerate(_draw(seed, start, count, size, workers, progress)):
        arrays["images"][row] = scene.image
        arrays["count"][row] = scene.count
        arrays["distance"][row] = scene.distance
        if dense:
            arrays["masks"][row] = scene.masks
            arrays["depth"][row] = scene.depth
    return arrays


def write_scenes(
    folder: str | Path,
    seed: int,
    count: int,
    size: int = 64,
    split: str = "train",
    workers: int = 0,
    progress: bool = False,
) -> Path:
    """Write one split as PNG files and labels in the layout of CLEVR v1.0.

    `images/<split>/CLEVR_<split>_NNNNNN.png` and `scenes/CLEVR_<split>_scenes.json`. Splits of one
    seed hold different scenes (see `SPLIT_STARTS`).

    Returns:
        The path of the label file.

    Raises:
        ValueError: if `split` is not train, val or test.
    """
    from PIL import Image

    if split not in SPLIT_STARTS:
        raise SettingsError(f"split {split!r} is unknown; choose one of {', '.join(SPLIT_STARTS)}")
    images = Path(folder, "images", split)
    labels = Path(folder, "scenes", f"CLEVR_{split}_scenes.json")
    images.mkdir(parents=True, exist_ok=True)
    labels.parent.mkdir(parents=True, exist_ok=True)
    records = []
    drawn = _draw(seed, SPLIT_STARTS[split], count, size, workers, progress)
    for number, scene in enumerate(drawn):
        name = f"CLEVR_{split}_{number:06d}.png"
        Image.fromarray(scene.image).save(images / name)
        records.append(
            {
                "split": split,
                "image_index": number,
                "image_filename": name,
                "objects": [_clevr_record(item) for item in scene.objects],
            }
        )
    labels.write_text(json.dumps({"info": {"split": split, "version": "1.0"}, "scenes": records}))
    return labels


def _clevr_record(item: SceneObject) -> dict[str, Any]:
    x, y, depth = item.pixel
    return {
        "shape": item.shape,
        "color": item.color,
        "material": item.material,
        "size": item.size,
        "3d_coords": list(item.position),
        "pixel_coords": [int(x), int(y), depth],
        "rotation": item.rotation,
    }


def _draw(
    seed: int, start: int, count: int, size: int, workers: int, progress: bool
) -> Iterator[Scene]:
    draw = partial(render_scene, seed, size=size)
    indices = range(start, start + count)
    leave_interrupts = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # they are for this process
    with ExitStack() as stack:
        drawn: Iterator[Scene] = map(draw, indices)
        if workers:
            context = multiprocessing.get_context()
            pool = stack.enter_context(context.Pool(workers, *leave_interrupts))
            drawn = pool.imap(draw, indices, chunksize=16)
        bar = stack.enter_context(progress_bar(progress, count, "scenes"))
        for scene in drawn:
            bar.update()
            yield scene


def _to_srgb(linear: Floats) -> NDArray[np.uint8]:
    """Linear light [3, H, W] to sRGB bytes [H, W, 3]."""
    low = 12.92 * linear
    high = 1.055 * np.maximum(linear, 0.0031308) ** np.float32(1 / 2.4) - 0.055
    srgb = np.where(linear <= 0.0031308, low, high)
    return np.ascontiguousarray((srgb * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0))
