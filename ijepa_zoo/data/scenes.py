"""Rendered scenes with labels, similar to CLEVR: a dataset without a download.

A scene is a function of (seed, index): 3 to 10 solids on a ground plane, see `raycast`. Released
weights were trained on these scenes, so they must never change.
"""

import math
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, SettingsError
from ..progress import progress_bar
from ..seeds import Stream, numpy_generator
from .loading import load_in_order
from .raycast import (
    COLORS,
    SIZES,
    TANGENT,
    Camera,
    Floats,
    Hits,
    Light,
    SceneObject,
    cross,
    normalize,
    shade,
    subtract,
    to_srgb,
    trace,
)

COUNTS = range(3, 11)
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
SHAPES = ("cube", "sphere", "cylinder")
SEGMENTATION_CLASSES = ("background", *SHAPES)
# First index of each split, far enough apart that the splits of one seed share no scene.
SPLIT_STARTS = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}

_MATERIALS = ("rubber", "metal")
_SPLITS_SEED = 0  # of `scenes:TRAIN,TEST`; a run's seed must not change what it is tested on


@dataclass(frozen=True)
class Scene:
    """An image and its labels.

    Masks and depth are those of one ray per pixel (through its center, or right of and below it
    where `supersample` is even).
    """

    image: NDArray[np.uint8]  # [H, W, 3], sRGB
    masks: NDArray[np.uint8]  # [H, W], 0 for the background and k for `objects[k - 1]`
    segmentation: NDArray[np.uint8]  # [H, W], indices into `SEGMENTATION_CLASSES`
    depth: Floats  # [H, W], scene units along the viewing direction
    objects: tuple[SceneObject, ...]

    @property
    def count(self) -> int:
        """Number of objects, 3 to 10."""
        return len(self.objects)

    @property
    def distance(self) -> float:
        """Depth of the nearest object's center, in scene units."""
        return min(item.depth for item in self.objects)


def distance_class(distance: float) -> int:
    """The class 0..5 of the nearest object's depth (VTAB's bins for CLEVR)."""
    return bisect_left(DISTANCE_EDGES, distance)


def count_class(count: int) -> int:
    """The class 0..7 of a number of objects from 3 to 10."""
    if count not in COUNTS:
        raise SettingsError(f"a scene has {COUNTS[0]} to {COUNTS[-1]} objects, not {count}")
    return count - COUNTS[0]


def render_scene(seed: int, index: int, size: int = 64, *, supersample: int = 2) -> Scene:
    """Render scene `index` of the dataset `seed`; its layout does not depend on `size`.

    `size` is height and width in pixels, `supersample` the rays per pixel along each axis.
    """
    if size < 32 or supersample < 1:
        raise SettingsError(
            f"size must be >= 32 and supersample >= 1, not {size} and {supersample}"
        )
    rng = numpy_generator(seed, Stream.SCENES, index)
    camera, lights, objects, hits = _sample_scene(rng)
    resolution = size * supersample
    if resolution != _LAYOUT_RESOLUTION:
        hits = trace(camera, objects, resolution)
    color = shade(camera, objects, lights, hits)
    pixels = np.zeros((3, size, size), np.float32)
    for i, j in product(range(supersample), repeat=2):
        pixels += color[:, i::supersample, j::supersample]
    middle = slice(supersample // 2, None, supersample)
    masks = hits.ids[middle, middle].copy()
    classes = [0, *(SEGMENTATION_CLASSES.index(item.shape) for item in objects)]
    return Scene(
        image=to_srgb(pixels / supersample**2),
        masks=masks,
        segmentation=np.array(classes, np.uint8)[masks],
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
    """Render scenes `start` to `start + count - 1`; see `SPLIT_STARTS` and `render_scene`.

    Returns `images` uint8 `[n, H, W, 3]`, `count` int64 `[n]`, `distance` float32 `[n]`; with
    `dense` also `masks` uint8, `segmentation` uint8 and `depth` float32 `[n, H, W]`, see `Scene`.
    """
    shape = (count, size, size)
    arrays: dict[str, NDArray[Any]] = {
        "images": np.empty((*shape, 3), np.uint8),
        "count": np.empty(count, np.int64),
        "distance": np.empty(count, np.float32),
    }
    if dense:
        arrays["masks"] = np.empty(shape, np.uint8)
        arrays["segmentation"] = np.empty(shape, np.uint8)
        arrays["depth"] = np.empty(shape, np.float32)
    render = partial(render_scene, seed, size=size)
    scenes = load_in_order(render, range(start, start + count), workers)
    with progress_bar(progress, count, "scenes", "image") as bar:
        for row, scene in enumerate(scenes):
            bar.update()
            for name, array in arrays.items():
                array[row] = scene.image if name == "images" else getattr(scene, name)
    return arrays


def render_splits(
    source: str, workers: int = 0, progress: bool = False, *, dense: bool = False
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Render the training and the test set of `scenes:TRAIN,TEST[,SIZE]`, as `render_scenes`."""
    match = re.fullmatch(r"scenes:(\d+),(\d+)(?:,(\d+))?", source)
    train, test, size = (int(group or 64) for group in match.groups()) if match else (0, 0, 0)
    if not train or not test or size < 32:
        raise DataError(
            f"'{source}': write scenes:TRAIN,TEST or scenes:TRAIN,TEST,SIZE with at least one "
            "scene each and SIZE >= 32, for example scenes:8000,4000"
        )
    render = partial(render_scenes, size=size, workers=workers, progress=progress, dense=dense)
    return (
        render(_SPLITS_SEED, SPLIT_STARTS["train"], train),
        render(_SPLITS_SEED, SPLIT_STARTS["test"], test),
    )


# Sampling: cameras, lights and objects.

# The resolution at which visibility is checked, whatever the image's. It is also that of the
# default image, 64 x 64 pixels of 2 x 2 rays, which needs no second trace.
_LAYOUT_RESOLUTION = 128
_MIN_PIXELS = 6  # that each object shows at 64 x 64; CLEVR requires the same share
_GAP = 0.2  # between the footprints of two objects


def _sample_scene(
    rng: np.random.Generator,
) -> tuple[Camera, list[Light], list[SceneObject], Hits]:
    """Draw a scene in which every object is visible."""
    count = int(rng.integers(COUNTS[0], COUNTS[-1] + 1))  # drawn once, so that it stays uniform
    camera, lights = _sample_camera(rng), _sample_lights(rng)
    while True:
        objects = _sample_objects(rng, camera, count)
        if len(objects) == count:
            hits = trace(camera, objects, _LAYOUT_RESOLUTION)
            visible = np.bincount(hits.ids[1::2, 1::2].ravel(), minlength=count + 1)
            if visible.min() >= _MIN_PIXELS:
                return camera, lights, objects, hits


def _sample_camera(rng: np.random.Generator) -> Camera:
    azimuth = math.radians(-43.0 + rng.uniform(-4.0, 4.0))
    elevation = math.radians(rng.uniform(26.0, 32.0))
    distance = rng.uniform(10.4, 12.2)
    target = (rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), 0.3)
    horizontal = distance * math.cos(elevation)
    eye = (
        target[0] + horizontal * math.cos(azimuth),
        target[1] + horizontal * math.sin(azimuth),
        target[2] + distance * math.sin(elevation),
    )
    forward = normalize(subtract(target, eye))
    right = normalize(cross(forward, (0.0, 0.0, 1.0)))
    return Camera(eye, forward, right, cross(right, forward))


def _sample_lights(rng: np.random.Generator) -> list[Light]:
    """A key light from the upper right and a weaker, softer one from the upper left."""
    lights = []
    for azimuth, elevation, strength, softness in ((40, 48, 1.15, 0.2), (-125, 42, 0.4, 0.4)):
        a = math.radians(azimuth + rng.uniform(-12.0, 12.0))
        e = math.radians(elevation + rng.uniform(-5.0, 5.0))
        direction = (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e))
        lights.append(Light(direction, strength * rng.uniform(0.9, 1.1), softness))
    return lights


def _sample_objects(rng: np.random.Generator, camera: Camera, count: int) -> list[SceneObject]:
    """Draw separate objects inside the frame; fewer if one finds no free position."""
    objects: list[SceneObject] = []
    for _ in range(count):
        shape, color, material, extent = (
            names[rng.integers(len(names))]
            for names in (SHAPES, list(COLORS), _MATERIALS, list(SIZES))
        )
        radius = SIZES[extent]
        height = radius / math.sqrt(2.0) if shape == "cube" else radius
        for x, y in rng.uniform(-3.0, 3.0, (30, 2)).tolist():
            left, top, depth = camera.project((x, y, height))
            margin = radius / (2.0 * depth * TANGENT)
            inside = margin < left < 1.0 - margin and margin < top < 1.0 - margin
            if inside and all(
                math.hypot(x - other.position[0], y - other.position[1])
                > radius + other.radius + _GAP
                for other in objects
            ):
                break
        else:
            return objects
        yaw = rng.uniform(0.0, 2.0 * math.pi)
        objects.append(SceneObject(shape, color, material, extent, (x, y, height), yaw, depth))
    return objects
