"""Light, soft shadows and materials for ray-cast scenes, in pure NumPy.

Every light that reaches a point does so directly or after one reflection in surroundings that are
a formula; what hides it is found from the outlines of the solids, without casting further rays.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ijepa_zoo.data.scene_trace import (
    BOUND,
    Camera,
    Floats,
    Hits,
    Solid,
    Vector,
    along,
    cross,
    cube_axes,
    dot,
    dots,
    half_height,
    unit,
)

_GROUND = (0.42, 0.415, 0.41)


@dataclass(frozen=True)
class Light:
    """A far light: unit direction towards it, strength, and penumbra width per unit of distance."""

    direction: Vector
    strength: float
    softness: float


def shade(camera: Camera, solids: list[Solid], lights: list[Light], hits: Hits) -> Floats:
    """Return linear RGB [3, resolution, resolution] in 0..1; brighter light is cut off."""
    ids, depth = hits.ids.ravel(), hits.depth.ravel()
    normals, rays = hits.normals.reshape(3, -1), hits.rays.reshape(3, -1)
    points = np.stack([e + depth * ray for e, ray in zip(camera.eye, rays)])

    ambient = (0.22 + 0.12 * normals[2]) * _openness(points, normals, solids)
    arriving = [light.strength * _unshadowed(points, ids, solids, light) for light in lights]
    diffuse = ambient.copy()
    for light, share in zip(lights, arriving):
        diffuse += share * np.maximum(along(normals, light.direction), 0.0)
    diffuse *= np.where(ids == 0, _ground_falloff(points), np.float32(1.0))
    albedo = np.array([_GROUND, *(solid.albedo for solid in solids)], np.float32).T[:, ids]
    color: Floats = albedo * diffuse

    body = np.flatnonzero(ids)
    metal = np.array([False, *(solid.metal for solid in solids)])[ids[body]]
    lamps = [(light.direction, share[body]) for light, share in zip(lights, arriving)]
    color[:, body] *= np.where(metal, np.float32(0.4), np.float32(1.0))
    color[:, body] += _mirrored(
        rays[:, body], normals[:, body], albedo[:, body], metal, ambient[body], lamps
    )
    return np.minimum(color, 1.0).reshape(3, *hits.ids.shape)


def _ground_falloff(points: Floats) -> Floats:
    """The ground grows darker away from the middle of the scene."""
    square = dots(points[:2], points[:2])
    return 0.5 + 0.5 / (1.0 + square * (1.0 / 160.0))


def _mirrored(
    rays: Floats,
    normals: Floats,
    albedo: Floats,
    metal: NDArray[np.bool_],
    ambient: Floats,
    lamps: list[tuple[Vector, Floats]],
) -> Floats:
    """Mirror light [3, n]: tinted surroundings and sharp lamps on metal, a faint sheen on rubber.

    `lamps` has the direction of each light and how much of it arrives at each of the n points.
    """
    view = rays / np.sqrt(dots(rays, rays))
    facing = dots(view, normals)
    mirror = view - normals * (2.0 * facing)
    fresnel = (1.0 + np.minimum(facing, 0.0)) ** 3
    reflected = _surroundings(mirror[2]) * (0.4 + 1.6 * ambient)
    white = reflected * fresnel * np.where(metal, np.float32(0.3), np.float32(0.06))
    for direction, arriving in lamps:
        cosine = np.maximum(along(mirror, direction), 0.0)
        lamp = _smooth((cosine - 0.93) * 20.0) * 0.9 + cosine**24 * 0.35
        white += np.where(metal, lamp, cosine**10 * 0.14) * arriving
    return np.where(metal, albedo, np.float32(0.0)) * reflected + white


def _surroundings(rise: Floats) -> Floats:
    """What a mirror sees: a bright floor, a dark horizon and a sky that brightens upwards."""
    sky = 0.18 + 0.5 * np.maximum(rise, 0.0)
    return sky + (0.85 - sky) * _smooth(0.5 - rise * 5.0)


def _smooth(x: Floats) -> Floats:
    """The smooth step from 0 at x <= 0 to 1 at x >= 1."""
    x = np.clip(x, 0.0, 1.0)
    smooth: Floats = x * x * (3.0 - 2.0 * x)
    return smooth


def _openness(points: Floats, normals: Floats, solids: list[Solid]) -> Floats:
    """Share of ambient light that the solids let through, each taken as a sphere of its radius.

    A sphere of radius r at distance d and angle a from the normal hides cos(a) (r / d)^2 of the
    cosine-weighted hemisphere. A solid never darkens itself: its normals point away from its
    centre.
    """
    free = np.ones(points.shape[1], np.float32)
    for solid in solids:
        reach = 3.5 * solid.radius
        near = np.flatnonzero(
            (np.abs(points[0] - solid.center[0]) < reach)
            & (np.abs(points[1] - solid.center[1]) < reach)
        )
        offset = np.stack([c - p[near] for c, p in zip(solid.center, points)])
        square = dots(offset, offset)
        cosine = dots(offset, normals[:, near]) / np.sqrt(square)
        hidden = np.maximum(cosine, 0.0) * np.minimum(solid.radius**2 / square, 1.0)
        free[near] *= 1.0 - np.maximum(0.85 * hidden - 0.012, 0.0)
    return free


def _unshadowed(
    points: Floats, ids: NDArray[np.uint8], solids: list[Solid], light: Light
) -> Floats:
    """Share of a light that reaches each point past the other solids.

    Seen from the light, a solid is a flat outline; the distance to that outline over the width of
    the penumbra gives a soft edge. A point can only be shadowed by what is nearer to the light.
    """
    u_axis = unit(cross((0.0, 0.0, 1.0), light.direction))
    v_axis = cross(light.direction, u_axis)
    frame = (u_axis, v_axis, light.direction)
    u, v, w = (along(points, axis) for axis in frame)
    seen = np.ones(points.shape[1], np.float32)
    for number, solid in enumerate(solids, start=1):
        cu, cv, cw = (dot(solid.center, axis) for axis in frame)
        reach = solid.radius * BOUND[solid.shape] * (1.0 + 2.0 * light.softness)
        near = np.flatnonzero(
            (np.abs(u - cu) < reach) & (np.abs(v - cv) < reach) & (w < cw) & (ids != number)
        )
        width = light.softness * (cw - w[near]) + 0.03
        outside = _outline_distance(solid, u[near] - cu, v[near] - cv, u_axis, v_axis)
        seen[near] *= _smooth(0.5 + outside / width)
    return seen


def _outline_distance(solid: Solid, u: Floats, v: Floats, u_axis: Vector, v_axis: Vector) -> Floats:
    """Signed distance from points (u, v) to the outline of a solid seen along u x v."""
    r = solid.radius
    if solid.shape == "sphere":
        return np.sqrt(u * u + v * v) - r
    if solid.shape == "cylinder":  # an ellipse moved along the projected axis
        sine = math.sqrt(1.0 - v_axis[2] ** 2)
        v = np.maximum(np.abs(v) - r * v_axis[2], 0.0) / sine
        return (np.sqrt(u * u + v * v) - r) * math.sqrt(sine)
    edges = [(dot(axis, u_axis), dot(axis, v_axis)) for axis in cube_axes(solid.yaw)]
    distance = np.full(u.shape, -np.inf, np.float32)
    for du, dv in edges:  # a hexagon: each pair of its sides is parallel to one projected edge
        length = math.hypot(du, dv)
        nu, nv = -dv / length, du / length
        half = half_height("cube", r) * sum(abs(eu * nu + ev * nv) for eu, ev in edges)
        distance = np.maximum(distance, np.abs(u * nu + v * nv) - half)
    return distance
