"""Ray casting of solids on a ground plane in NumPy, for `scenes`.

World coordinates have z up and the ground at z = 0. Rays are scaled to have component 1 along the
viewing direction, so the ray parameter is the planar depth. The arithmetic is elementwise (no
BLAS), so pixels do not depend on the number of threads; released weights were trained on them, so
they must never change. Vectors are tuples of Python floats, so that arithmetic with float32 arrays
stays float32.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = tuple[float, float, float]
Floats = NDArray[np.floating[Any]]  # float32 at run time; NumPy's stubs widen it next to a float

TANGENT = math.tan(math.radians(20.0))  # of half the field of view
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


class SceneObject(NamedTuple):
    """One object with CLEVR's attributes."""

    shape: str
    color: str
    material: str  # rubber or metal
    size: str  # large or small
    position: Vector  # center x, y, z in scene units
    yaw: float  # rotation around the vertical axis in radians
    depth: float  # of the center, along the viewing direction

    @property
    def radius(self) -> float:
        """Radius of the circle around the footprint, in scene units."""
        return SIZES[self.size]


class Camera(NamedTuple):
    """A square perspective camera."""

    eye: Vector
    forward: Vector
    right: Vector
    up: Vector

    def project(self, point: Vector) -> Vector:
        """Image x, y (0 at the left and top edges, 1 at the others) and depth."""
        offset = subtract(point, self.eye)
        depth = dot(offset, self.forward)
        scale = 0.5 / (depth * TANGENT)
        return 0.5 + scale * dot(offset, self.right), 0.5 - scale * dot(offset, self.up), depth


class Light(NamedTuple):
    """A distant light: unit vector toward it, strength, penumbra width per unit of distance."""

    direction: Vector
    strength: float
    softness: float


class Hits(NamedTuple):
    """What each ray hits first: id (0 ground, k the k-th object), depth, unit normal, direction."""

    ids: NDArray[np.uint8]
    depth: Floats
    normals: Floats
    rays: Floats


# Ray casting. Objects stand on the ground, so `position[2]` is half the height: the radius of a
# sphere or a cylinder, and half the side of a cube (its radius / sqrt(2)).

# Radius of the sphere around each shape, in units of the object's radius.
_BOUND = {"sphere": 1.0, "cube": math.sqrt(1.5), "cylinder": math.sqrt(2.0)}
_BEVEL = 0.12  # share of a flat face over which its normal bends toward the neighboring face


def trace(camera: Camera, objects: list[SceneObject], resolution: int) -> Hits:
    """Cast `resolution` x `resolution` rays and keep the nearest hit of each (a z-buffer)."""
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) * (2.0 / resolution) - 1.0
    x, y = axis[None, :] * TANGENT, axis[:, None] * -TANGENT
    rays = np.stack([f + r * x + u * y for f, r, u in zip(camera.forward, camera.right, camera.up)])
    # The camera looks down everywhere; the minimum only guards the division.
    depth = -camera.eye[2] / np.minimum(rays[2], np.float32(-1e-3))
    ids = np.zeros((resolution, resolution), np.uint8)
    normals = np.zeros_like(rays)
    normals[2] = 1.0
    for number, item in enumerate(objects, start=1):
        center_x, center_y, center_depth = camera.project(item.position)
        bound = item.radius * _BOUND[item.shape]
        # 1.1 covers the stretching of spheres away from the optical axis.
        half = 1.1 * bound / (center_depth - bound) * 0.5 / TANGENT
        rows, columns = (
            slice(
                max(0, math.floor((center - half) * resolution)),
                min(resolution, math.ceil((center + half) * resolution)),
            )
            for center in (center_y, center_x)
        )
        t, normal = _intersect(camera.eye, rays[:, rows, columns], item)
        nearer = t < depth[rows, columns]
        np.copyto(depth[rows, columns], t, where=nearer)
        np.copyto(ids[rows, columns], np.uint8(number), where=nearer)
        np.copyto(normals[:, rows, columns], normal, where=nearer)
    return Hits(ids, depth, normals, rays)


def _intersect(eye: Vector, rays: Floats, item: SceneObject) -> tuple[Floats, Floats]:
    """Depth (inf where the ray misses) and unit normals `[3, ...]` of one object."""
    axes = _cube_axes(item.yaw if item.shape == "cube" else 0.0)
    offset = subtract(eye, item.position)
    origin = (dot(offset, axes[0]), dot(offset, axes[1]), offset[2])
    half = item.position[2]
    with np.errstate(divide="ignore", invalid="ignore"):
        if item.shape == "cube":
            rays = np.stack([dot(rays, axis) for axis in axes])
            spans = [_slab_span(o, ray, half) for o, ray in zip(origin, rays)]
        elif item.shape == "cylinder":
            spans = [_round_span(origin[:2], rays[:2], half), _slab_span(origin[2], rays[2], half)]
        else:
            spans = [_round_span(origin, rays, half)]
        enter, leave = spans[0]
        for near, far in spans[1:]:
            enter, leave = np.maximum(enter, near), np.minimum(leave, far)
        # A ray that misses has an empty span or, for a round one, NaN: both compare as False.
        depth = np.where(enter < leave, enter, np.float32(np.inf))
        local = np.stack([o + depth * ray for o, ray in zip(origin, rays)])
        normal = _local_normal(item.shape, local, half)
        if item.shape == "cube":
            normal = np.stack([dot(normal, column) for column in zip(*axes)])
    return depth, normal


def _round_span(origin: tuple[float, ...], rays: Floats, radius: float) -> tuple[Floats, Floats]:
    """Entry and exit of rays through |p| = radius over the given axes, NaN where they miss."""
    a, b = dot(rays, rays), dot(rays, origin)
    root = np.sqrt(b * b - a * (dot(origin, origin) - radius * radius))
    return (-b - root) / a, (root - b) / a


def _slab_span(origin: float, ray: Floats, half: float) -> tuple[Floats, Floats]:
    one, two = (-half - origin) / ray, (half - origin) / ray
    return np.minimum(one, two), np.maximum(one, two)


def _local_normal(shape: str, local: Floats, half: float) -> Floats:
    """Unit normals at surface points in the object's own frame, with beveled edges."""
    if shape == "sphere":
        return local / half
    normal = np.copysign(np.maximum(np.abs(local) - (1.0 - _BEVEL) * half, 0.0), local)
    if shape == "cylinder":
        x, y, _ = local
        rim = np.sqrt(x * x + y * y)
        bend = np.maximum(rim - (1.0 - _BEVEL) * half, 0.0) / np.maximum(rim, 0.1 * half)
        normal[0], normal[1] = x * bend, y * bend
    unit: Floats = normal / np.sqrt(dot(normal, normal))
    return unit


# Shading. Light arrives at a point directly or after one reflection in procedural surroundings;
# shadows are computed from the outlines of the objects, without further rays.

_GROUND = (0.42, 0.415, 0.41)


def shade(camera: Camera, objects: list[SceneObject], lights: list[Light], hits: Hits) -> Floats:
    """Linear RGB `[3, resolution, resolution]`, clipped at 1."""
    ids, depth = hits.ids.ravel(), hits.depth.ravel()
    normals, rays = hits.normals.reshape(3, -1), hits.rays.reshape(3, -1)
    points = np.stack([e + depth * ray for e, ray in zip(camera.eye, rays)])

    ambient = (0.22 + 0.12 * normals[2]) * _openness(points, normals, objects)
    arriving = [light.strength * _unshadowed(points, ids, objects, light) for light in lights]
    diffuse = ambient.copy()
    for light, share in zip(lights, arriving):
        diffuse += share * np.maximum(dot(normals, light.direction), 0.0)
    falloff = 0.5 + 0.5 / (1.0 + dot(points[:2], points[:2]) * (1.0 / 160.0))
    diffuse *= np.where(ids == 0, falloff, np.float32(1.0))  # the ground darkens outward
    colors = [tuple(value / 255.0 for value in COLORS[item.color]) for item in objects]
    albedo = np.array([_GROUND, *colors], np.float32).T[:, ids]
    color: Floats = albedo * diffuse

    body = np.flatnonzero(ids)
    metal = np.array([False, *(item.material == "metal" for item in objects)])[ids[body]]
    lamps = [(light.direction, share[body]) for light, share in zip(lights, arriving)]
    color[:, body] *= np.where(metal, np.float32(0.4), np.float32(1.0))
    color[:, body] += _reflection(
        rays[:, body], normals[:, body], albedo[:, body], metal, ambient[body], lamps
    )
    return np.minimum(color, 1.0).reshape(3, *hits.ids.shape)


def _reflection(
    rays: Floats,
    normals: Floats,
    albedo: Floats,
    metal: NDArray[np.bool_],
    ambient: Floats,
    lamps: list[tuple[Vector, Floats]],
) -> Floats:
    """Reflected light `[3, n]`: tinted surroundings and sharp lamps on metal, a sheen on rubber."""
    view = rays / np.sqrt(dot(rays, rays))
    facing = dot(view, normals)
    mirror = view - normals * (2.0 * facing)
    fresnel = (1.0 + np.minimum(facing, 0.0)) ** 3
    # A mirror sees a bright floor, a dark horizon and a sky that brightens upward.
    sky = 0.18 + 0.5 * np.maximum(mirror[2], 0.0)
    reflected = (sky + (0.85 - sky) * _smoothstep(0.5 - mirror[2] * 5.0)) * (0.4 + 1.6 * ambient)
    white = reflected * fresnel * np.where(metal, np.float32(0.3), np.float32(0.06))
    for direction, arriving in lamps:
        cosine = np.maximum(dot(mirror, direction), 0.0)
        lamp = _smoothstep((cosine - 0.93) * 20.0) * 0.9 + cosine**24 * 0.35
        white += np.where(metal, lamp, cosine**10 * 0.14) * arriving
    return np.where(metal, albedo, np.float32(0.0)) * reflected + white


def _openness(points: Floats, normals: Floats, objects: list[SceneObject]) -> Floats:
    """Share of ambient light that passes the objects, each taken as a sphere of its radius."""
    # A sphere of radius r at distance d and angle a from the normal hides cos(a) (r / d)^2 of the
    # cosine-weighted hemisphere. An object never darkens itself: its normals point outward.
    free = np.ones(points.shape[1], np.float32)
    for item in objects:
        reach = 3.5 * item.radius
        near = np.flatnonzero(
            (np.abs(points[0] - item.position[0]) < reach)
            & (np.abs(points[1] - item.position[1]) < reach)
        )
        offset = np.stack([c - p[near] for c, p in zip(item.position, points)])
        square = dot(offset, offset)
        cosine = dot(offset, normals[:, near]) / np.sqrt(square)
        hidden = np.maximum(cosine, 0.0) * np.minimum(item.radius**2 / square, 1.0)
        free[near] *= 1.0 - np.maximum(0.85 * hidden - 0.012, 0.0)
    return free


def _unshadowed(
    points: Floats, ids: NDArray[np.uint8], objects: list[SceneObject], light: Light
) -> Floats:
    """Share of a light that reaches each point past the other objects."""
    # Seen from the light, an object is a flat outline; the distance to it over the width of the
    # penumbra gives a soft edge. Only objects nearer to the light can shadow a point.
    u_axis = normalize(cross((0.0, 0.0, 1.0), light.direction))
    v_axis = cross(light.direction, u_axis)
    frame = (u_axis, v_axis, light.direction)
    u, v, w = (dot(points, axis) for axis in frame)
    share = np.ones(points.shape[1], np.float32)
    for number, item in enumerate(objects, start=1):
        center_u, center_v, center_w = (dot(item.position, axis) for axis in frame)
        reach = item.radius * _BOUND[item.shape] * (1.0 + 2.0 * light.softness)
        near = np.flatnonzero(
            (np.abs(u - center_u) < reach)
            & (np.abs(v - center_v) < reach)
            & (w < center_w)
            & (ids != number)
        )
        penumbra = light.softness * (center_w - w[near]) + 0.03
        outside = _outline_distance(item, u[near] - center_u, v[near] - center_v, u_axis, v_axis)
        share[near] *= _smoothstep(0.5 + outside / penumbra)
    return share


def _outline_distance(
    item: SceneObject, u: Floats, v: Floats, u_axis: Vector, v_axis: Vector
) -> Floats:
    """Signed distance from points (u, v) to the outline of an object seen along u x v."""
    r = item.radius
    if item.shape == "sphere":
        return np.sqrt(u * u + v * v) - r
    if item.shape == "cylinder":  # an ellipse moved along the projected axis
        sine = math.sqrt(1.0 - v_axis[2] ** 2)
        v = np.maximum(np.abs(v) - r * v_axis[2], 0.0) / sine
        return (np.sqrt(u * u + v * v) - r) * math.sqrt(sine)
    edges = [(dot(axis, u_axis), dot(axis, v_axis)) for axis in _cube_axes(item.yaw)]
    distance = np.full(u.shape, -np.inf, np.float32)
    for du, dv in edges:  # a hexagon: each pair of its sides is parallel to one projected edge
        length = math.hypot(du, dv)
        nu, nv = -dv / length, du / length
        half = item.position[2] * sum(abs(eu * nu + ev * nv) for eu, ev in edges)
        distance = np.maximum(distance, np.abs(u * nu + v * nv) - half)
    return distance


def _smoothstep(x: Floats) -> Floats:
    x = np.clip(x, 0.0, 1.0)
    smooth: Floats = x * x * (3.0 - 2.0 * x)
    return smooth


def to_srgb(linear: Floats) -> NDArray[np.uint8]:
    """Linear light `[3, H, W]` to sRGB bytes `[H, W, 3]`."""
    low = 12.92 * linear
    high = 1.055 * np.maximum(linear, 0.0031308) ** np.float32(1 / 2.4) - 0.055
    srgb = np.where(linear <= 0.0031308, low, high)
    return np.ascontiguousarray((srgb * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _cube_axes(yaw: float) -> tuple[Vector, Vector, Vector]:
    c, s = math.cos(yaw), math.sin(yaw)
    return (c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0)


def dot(a: Any, b: Any) -> Any:
    """Dot product over the first axis, of two vectors or of arrays `[n, ...]`."""
    total = a[0] * b[0]  # much faster than a sum over a short first axis
    for x, y in zip(a[1:], b[1:]):
        total += x * y
    return total


def subtract(a: Vector, b: Vector) -> Vector:
    """`a - b`."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def cross(a: Vector, b: Vector) -> Vector:
    """Cross product."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def normalize(a: Vector) -> Vector:
    """`a` at length 1."""
    length = math.sqrt(dot(a, a))
    return a[0] / length, a[1] / length, a[2] / length
