"""Where things stand: random cameras, lights and objects of a CLEVR-like scene."""

import math
from dataclasses import dataclass

import numpy as np

from ijepa_zoo.data.scene_shade import Light
from ijepa_zoo.data.scene_trace import Camera, Hits, Solid, Vector, half_height, trace

COUNTS = range(3, 11)
SHAPES = ("cube", "sphere", "cylinder")
MATERIALS = ("rubber", "metal")
SIZES = {"large": 0.7, "small": 0.35}
# CLEVR's palette, used as CLEVR does: the bytes are linear light.
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
# A layout is judged at this size whatever the picture's, so that it does not depend on the latter.
# It is what a picture of 64 x 64 pixels with 2 x 2 rays each needs anyway.
TRACE_SIZE = 128

_MIN_PIXELS = 6  # that an object shows in a picture of 64 x 64; CLEVR asks for the same share
_TANGENT = math.tan(math.radians(20.0))  # of half the camera's field of view
_GAP = 0.2  # between the footprints of two objects


@dataclass(frozen=True)
class Piece:
    """A solid with CLEVR's names for its looks."""

    color: str
    material: str
    size: str
    solid: Solid


@dataclass(frozen=True)
class Layout:
    """All that a scene is made of, and its trace at `TRACE_SIZE` x `TRACE_SIZE` rays."""

    camera: Camera
    lights: list[Light]
    pieces: list[Piece]
    hits: Hits


def sample_layout(rng: np.random.Generator) -> Layout:
    """Draw a scene of 3 to 10 objects, each number as likely, in which every object shows.

    Objects are drawn again until none is hidden or without room; the camera, the lights and the
    number of objects stay, so the number keeps its distribution.
    """
    count = int(rng.integers(COUNTS[0], COUNTS[-1] + 1))
    camera, lights = _camera(rng), _lights(rng)
    while True:
        pieces = _pieces(rng, camera, count)
        if len(pieces) == count:
            hits = trace(camera, [piece.solid for piece in pieces], TRACE_SIZE)
            seen = np.bincount(hits.ids[1::2, 1::2].ravel(), minlength=count + 1)
            if seen.min() >= _MIN_PIXELS:
                return Layout(camera, lights, pieces, hits)


def _camera(rng: np.random.Generator) -> Camera:
    azimuth = math.radians(-43.0 + rng.uniform(-4.0, 4.0))
    elevation = math.radians(rng.uniform(26.0, 32.0))
    distance = rng.uniform(10.4, 12.2)
    target = (rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), 0.3)
    level = distance * math.cos(elevation)
    eye = (
        target[0] + level * math.cos(azimuth),
        target[1] + level * math.sin(azimuth),
        target[2] + distance * math.sin(elevation),
    )
    return Camera.look_at(eye, target, _TANGENT)


def _lights(rng: np.random.Generator) -> list[Light]:
    """A key light from the upper right and a weaker, softer one from the upper left."""
    lights = []
    for azimuth, elevation, strength, softness in ((40, 48, 1.15, 0.2), (-125, 42, 0.4, 0.4)):
        turn = math.radians(azimuth + rng.uniform(-12.0, 12.0))
        rise = math.radians(elevation + rng.uniform(-5.0, 5.0))
        level = math.cos(rise)
        direction = (level * math.cos(turn), level * math.sin(turn), math.sin(rise))
        lights.append(Light(direction, strength * rng.uniform(0.9, 1.1), softness))
    return lights


def _pieces(rng: np.random.Generator, camera: Camera, count: int) -> list[Piece]:
    """Draw objects that stand apart and inside the frame; fewer when one finds no room."""
    pieces: list[Piece] = []
    for _ in range(count):
        shape, color, material, size = (
            names[rng.integers(len(names))]
            for names in (SHAPES, list(COLORS), MATERIALS, list(SIZES))
        )
        radius = SIZES[size]
        center = _free_place(rng, camera, pieces, radius, half_height(shape, radius))
        if center is None:
            break
        yaw = rng.uniform(0.0, 2.0 * math.pi)
        red, green, blue = (value / 255.0 for value in COLORS[color])
        solid = Solid(shape, center, radius, yaw, (red, green, blue), material == "metal")
        pieces.append(Piece(color, material, size, solid))
    return pieces


def _free_place(
    rng: np.random.Generator, camera: Camera, pieces: list[Piece], radius: float, height: float
) -> Vector | None:
    for x, y in rng.uniform(-3.0, 3.0, (30, 2)).tolist():
        left, top, depth = camera.project((x, y, height))
        margin = radius / (2.0 * depth * camera.tangent)
        inside = margin < left < 1.0 - margin and margin < top < 1.0 - margin
        others = (piece.solid for piece in pieces)
        if inside and all(
            math.hypot(x - other.center[0], y - other.center[1]) > radius + other.radius + _GAP
            for other in others
        ):
            return x, y, height
    return None
