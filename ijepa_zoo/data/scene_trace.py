"""Ray casting of simple solids on a ground plane, in pure NumPy.

World frame: z is up and the ground is z = 0. Rays are scaled to have component 1 along the viewing
direction, so the ray parameter is the planar depth, which is what depth means everywhere here.
Only elementwise arithmetic is used (no BLAS), so results do not depend on thread counts.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = tuple[float, float, float]
Floats = NDArray[np.floating[Any]]  # float32 at run time; the stubs widen it next to a float

# Radius of the sphere around each shape, in units of `Solid.radius`.
BOUND = {"sphere": 1.0, "cube": math.sqrt(1.5), "cylinder": math.sqrt(2.0)}
_BEVEL = 0.12  # share of a flat face over which its normal bends towards the neighbouring face


@dataclass(frozen=True)
class Solid:
    """A convex body with a vertical axis.

    `radius` is that of the circle around its footprint: a sphere of that radius, a cylinder of that
    radius and half height, or a cube of half side `radius / sqrt(2)` turned by `yaw` radians.
    """

    shape: str
    center: Vector
    radius: float
    yaw: float
    albedo: Vector
    metal: bool


def half_height(shape: str, radius: float) -> float:
    """Return how high above the ground the centre of a standing `Solid` is."""
    return radius / math.sqrt(2.0) if shape == "cube" else radius


@dataclass(frozen=True)
class Camera:
    """A square perspective camera; `tangent` is that of half the field of view."""

    eye: Vector
    forward: Vector
    right: Vector
    up: Vector
    tangent: float

    @classmethod
    def look_at(cls, eye: Vector, target: Vector, tangent: float) -> "Camera":
        """Place an upright camera at `eye` that points to `target`."""
        forward = unit(sub(target, eye))
        right = unit(cross(forward, (0.0, 0.0, 1.0)))
        return cls(eye, forward, right, cross(right, forward), tangent)

    def project(self, point: Vector) -> Vector:
        """Return image x, y (0 at the left and upper edge, 1 at the others) and depth."""
        offset = sub(point, self.eye)
        depth = dot(offset, self.forward)
        scale = 0.5 / (depth * self.tangent)
        return (
            0.5 + scale * dot(offset, self.right),
            0.5 - scale * dot(offset, self.up),
            depth,
        )

    def rays(self, resolution: int) -> Floats:
        """Return directions [3, resolution, resolution] with component 1 along `forward`."""
        axis = (np.arange(resolution, dtype=np.float32) + 0.5) * (2.0 / resolution) - 1.0
        x, y = axis[None, :] * self.tangent, axis[:, None] * -self.tangent
        return np.stack([f + r * x + u * y for f, r, u in zip(self.forward, self.right, self.up)])


@dataclass(frozen=True)
class Hits:
    """What each ray meets first: id (0 ground, k the k-th solid), depth, unit normal, direction."""

    ids: NDArray[np.uint8]
    depth: Floats
    normals: Floats
    rays: Floats


def trace(camera: Camera, solids: list[Solid], resolution: int) -> Hits:
    """Cast `resolution` x `resolution` rays and keep the nearest hit of each (a z-buffer)."""
    rays = camera.rays(resolution)
    # The camera looks down everywhere; the clip only guards the division.
    depth = -camera.eye[2] / np.minimum(rays[2], np.float32(-1e-3))
    ids = np.zeros((resolution, resolution), np.uint8)
    normals = np.zeros_like(rays)
    normals[2] = 1.0
    for number, solid in enumerate(solids, start=1):
        rows, columns = _screen_box(camera, solid, resolution)
        t, normal = _intersect(camera.eye, rays[:, rows, columns], solid)
        nearer = t < depth[rows, columns]
        np.copyto(depth[rows, columns], t, where=nearer)
        np.copyto(ids[rows, columns], np.uint8(number), where=nearer)
        np.copyto(normals[:, rows, columns], normal, where=nearer)
    return Hits(ids, depth, normals, rays)


def _screen_box(camera: Camera, solid: Solid, resolution: int) -> tuple[slice, slice]:
    x, y, depth = camera.project(solid.center)
    bound = solid.radius * BOUND[solid.shape]
    # 1.1 covers the stretching of spheres away from the optical axis.
    half = 1.1 * bound / (depth - bound) * 0.5 / camera.tangent
    low = [max(0, math.floor((p - half) * resolution)) for p in (y, x)]
    high = [min(resolution, math.ceil((p + half) * resolution)) for p in (y, x)]
    return slice(low[0], high[0]), slice(low[1], high[1])


def _intersect(eye: Vector, rays: Floats, solid: Solid) -> tuple[Floats, Floats]:
    """Return depth (inf where the ray misses) and unit normals [3, ...] of one solid."""
    axes = cube_axes(solid.yaw if solid.shape == "cube" else 0.0)
    offset = sub(eye, solid.center)
    origin = (dot(offset, axes[0]), dot(offset, axes[1]), offset[2])
    half = half_height(solid.shape, solid.radius)
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "cube":
            rays = np.stack([along(rays, axis) for axis in axes])
            spans = [_slab(o, ray, half) for o, ray in zip(origin, rays)]
        elif solid.shape == "cylinder":
            spans = [_round_span(origin[:2], rays[:2], half), _slab(origin[2], rays[2], half)]
        else:
            spans = [_round_span(origin, rays, half)]
        enter, leave = spans[0]
        for near, far in spans[1:]:
            enter, leave = np.maximum(enter, near), np.minimum(leave, far)
        # A ray that misses has an empty span or, for a round one, NaN: both compare as False.
        depth = np.where(enter < leave, enter, np.float32(np.inf))
        local = np.stack([o + depth * ray for o, ray in zip(origin, rays)])
        normal = _local_normal(solid.shape, local, half)
        if solid.shape == "cube":
            normal = np.stack([along(normal, column) for column in zip(*axes)])
    return depth, normal


def _local_normal(shape: str, local: Floats, half: float) -> Floats:
    """Unit normals at points of the surface in the solid's own frame, with bevelled edges."""
    if shape == "sphere":
        return local / half
    if shape == "cube":
        normal = np.copysign(np.maximum(np.abs(local) - (1.0 - _BEVEL) * half, 0.0), local)
    else:
        x, y, z = local
        rim = np.sqrt(x * x + y * y)
        bend = np.maximum(rim - (1.0 - _BEVEL) * half, 0.0) / np.maximum(rim, 0.1 * half)
        flat = np.copysign(np.maximum(np.abs(z) - (1.0 - _BEVEL) * half, 0.0), z)
        normal = np.stack([x * bend, y * bend, flat])
    return normal / np.sqrt(dots(normal, normal))


def _round_span(origin: tuple[float, ...], rays: Floats, radius: float) -> tuple[Floats, Floats]:
    """Entry and exit of rays through |p| = radius over the given axes, NaN where they miss."""
    a = dots(rays, rays)
    b = origin[0] * rays[0]
    for o, ray in zip(origin[1:], rays[1:]):
        b += o * ray
    root = np.sqrt(b * b - a * (sum(o * o for o in origin) - radius * radius))
    return (-b - root) / a, (root - b) / a


def _slab(origin: float, ray: Floats, half: float) -> tuple[Floats, Floats]:
    one, two = (-half - origin) / ray, (half - origin) / ray
    return np.minimum(one, two), np.maximum(one, two)


def cube_axes(yaw: float) -> tuple[Vector, Vector, Vector]:
    """Unit vectors along the edges of a cube turned by `yaw` radians."""
    c, s = math.cos(yaw), math.sin(yaw)
    return (c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0)


def along(vectors: Floats, axis: Vector) -> Floats:
    """Components [...] of vectors [3, ...] along one axis."""
    total: Floats = vectors[0] * axis[0]
    total += vectors[1] * axis[1]
    total += vectors[2] * axis[2]
    return total


def dots(a: Floats, b: Floats) -> Floats:
    """Dot products [...] of vectors [n, ...] over the first axis."""
    # Much faster than a sum over a short first axis.
    total: Floats = a[0] * b[0]
    for one, other in zip(a[1:], b[1:]):
        total += one * other
    return total


def dot(a: Vector, b: Vector) -> float:
    """Dot product of two vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def sub(a: Vector, b: Vector) -> Vector:
    """Difference of two vectors."""
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


def cross(a: Vector, b: Vector) -> Vector:
    """Cross product of two vectors."""
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


def unit(a: Vector) -> Vector:
    """The vector scaled to length 1."""
    length = math.sqrt(dot(a, a))
    return (a[0] / length, a[1] / length, a[2] / length)
