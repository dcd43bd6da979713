"""Shapes of parts, given by signed distances, and their evaluation in a view.

World coordinates have their origin in the picture's centre, with x to the right and y
downwards. The picture's shorter side is one unit long, so a scene looks the same at
every resolution. A shape is drawn in its own frame, with u along its axis and v across
it. Distances are negative inside. Heights are in world units, so shading does not
depend on the resolution either.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ulsad_jax.data.synthetic.parts import STEEL, Colour, Damage, Part, Surface, View

if TYPE_CHECKING:
    from jaxtyping import Bool

    from ulsad_jax.data.synthetic.parts import Field, Picture

_DARK: Colour = (0.10, 0.10, 0.11)
_PAPER: Colour = (0.90, 0.89, 0.86)


def box(u: Field, v: Field, half_u: float, half_v: float, radius: float) -> Field:
    """Returns the signed distance to a rectangle with rounded corners."""
    a, b = np.abs(u) - (half_u - radius), np.abs(v) - (half_v - radius)
    outside = np.hypot(np.maximum(a, 0), np.maximum(b, 0))
    return outside + np.minimum(np.maximum(a, b), 0) - radius


def dome(distance: Field, width: float) -> Field:
    """Returns the height of a quarter-round edge of `width`, flat further inside."""
    t = np.clip(1 + distance / width, 0, 1)
    return width * np.sqrt(1 - t * t)


def _tube(offset: Field, radius: Field | float) -> Field:
    return np.sqrt(np.maximum(radius * radius - offset * offset, 0))


def _mix(colour: Picture, other: Colour, weight: Field) -> Picture:
    w = np.clip(weight, 0, 1)[..., None]
    return colour + w * (np.asarray(other, np.float32) - colour)


def _flat(u: Field, colour: Colour) -> Picture:
    return np.broadcast_to(np.asarray(colour, np.float32), (*u.shape, 3))


def inside(distance: Field, px: float) -> Field:
    """Returns a soft indicator of distance < 0, in 0..1.

    Its edge is one pixel wide. A pixel has `px` units.
    """
    return np.clip(0.5 - distance / px, 0, 1)


# Shapes ---------------------------------------------------------------------


def _screw(u: Field, v: Field, part: Part, px: float) -> Surface:
    length, w = part.length, part.width
    head = box(u + length / 2 - 0.2 * w, v, 0.2 * w, w / 2, 0.14 * w)
    taper = np.clip((length / 2 - u) / (0.7 * w), 0.05, 1)
    thread = np.sin((u + 0.2 * v) * (2 * math.pi / (0.27 * w)))
    radius = 0.27 * w * taper * (1 + 0.06 * thread)
    neck = -length / 2 + 0.3 * w
    shaft = np.maximum(np.abs(v) - radius, np.maximum(neck - u, u - length / 2))
    rise = np.maximum(dome(head, 0.2 * w), _tube(v, radius) * (1 + 0.1 * thread))
    groove = 0.22 * np.clip(-thread, 0, 1) * (head > 0)
    colour = _mix(_flat(u, part.colours[0]), _DARK, groove)
    return Surface(np.minimum(head, shaft), rise, colour, 0.8)


def _pin(u: Field, v: Field, part: Part, px: float) -> Surface:
    length, w = part.length, part.width
    distance = box(u, v, length / 2, w / 2, 0.22 * w)
    ring = np.abs(np.abs(u) - 0.32 * length) - 0.09 * w
    colour = _mix(_flat(u, part.colours[0]), _DARK, 0.75 * inside(ring, px))
    rise = np.minimum(_tube(v, w / 2), dome(distance, 0.3 * w) + 0.25 * w)
    return Surface(distance, rise, colour, 0.9)


def _capsule(u: Field, v: Field, part: Part, px: float) -> Surface:
    length, w = part.length, part.width
    distance = box(u, v, length / 2, w / 2, w / 2)
    colour = _mix(_flat(u, part.colours[0]), part.colours[1], inside(-u, px))
    colour = _mix(colour, _DARK, 0.35 * inside(np.abs(u) - 0.03 * w, px))
    return Surface(distance, dome(distance, w / 2), colour, 0.7)


def _link(u: Field, v: Field, part: Part, px: float) -> Surface:
    length, w = part.length, part.width
    t = 0.11 * w
    ring = box(u, v, length / 2 - t, w / 2 - t, w / 2 - t)
    inner = box(u - 0.16 * w, v, length / 2 - 0.5 * w, 0.16 * w, 0.16 * w)
    gap = box(u + 0.12 * length, v - w / 2, 0.13 * length, 0.3 * w, 0.01 * w)
    outer = np.maximum(np.abs(ring), -gap)
    distance = np.minimum(outer, np.abs(inner)) - t
    return Surface(distance, dome(distance, t), _flat(u, part.colours[0]), 0.8)


def _nut(u: Field, v: Field, part: Part, px: float) -> Surface:
    r = part.width / 2 * 0.92
    distance = np.abs(v)
    for sign in (1, -1):
        distance = np.maximum(distance, np.abs(0.866 * u + sign * 0.5 * v))
    radial = np.hypot(u, v)
    distance = np.maximum(distance - r, 0.56 * r - radial)
    rise = 0.5 * r + np.minimum(dome(distance, 0.16 * r), 0.9 * (1.02 * r - radial))
    return Surface(distance, rise, _flat(u, part.colours[0]), 0.7)


def _washer(u: Field, v: Field, part: Part, px: float) -> Surface:
    r = part.width / 2
    radial = np.hypot(u, v)
    distance = np.maximum(radial - r, 0.48 * r - radial)
    ripple = 0.05 * np.sin(radial * (40 / r))
    colour = _flat(u, part.colours[0]) * (1 + ripple[..., None])
    return Surface(distance, dome(distance, 0.13 * r), colour, 0.6)


def _gear(u: Field, v: Field, part: Part, px: float) -> Surface:
    r = part.width / 2
    radial, theta = np.hypot(u, v), np.arctan2(v, u)
    teeth = np.clip(1.6 * np.cos(9 * theta), -1, 1)
    distance = np.maximum(radial - r * (0.88 + 0.12 * teeth), 0.26 * r - radial)
    rise = dome(distance, 0.15 * r) + 0.2 * r * inside(radial - 0.5 * r, px)
    return Surface(distance, rise, _flat(u, part.colours[0]), 0.4)


def _button(u: Field, v: Field, part: Part, px: float) -> Surface:
    r = part.width / 2
    radial = np.hypot(u, v)
    holes = np.hypot(np.abs(u) - 0.26 * r, np.abs(v) - 0.26 * r) - 0.13 * r
    distance = np.maximum(radial - r, -holes)
    rise = dome(radial - r, 0.3 * r) - 0.14 * r * inside(radial - 0.6 * r, px)
    return Surface(distance, rise, _flat(u, part.colours[0]), 0.6)


def _fuse(u: Field, v: Field, part: Part, px: float) -> Surface:
    length, w = part.length, part.width
    body = box(u + 0.12 * length, v, 0.38 * length, w / 2, 0.13 * w)
    blade = box(u - 0.3 * length, np.abs(v) - 0.26 * w, 0.2 * length, 0.12 * w, 0.0)
    colour = _mix(_flat(u, STEEL), part.colours[0], inside(body, px))
    window = box(u + 0.14 * length, v, 0.2 * length, 0.26 * w, 0.1 * w)
    colour = _mix(colour, (0.95, 0.95, 0.95), 0.3 * inside(window, px))
    bridge = np.abs(u + 0.14 * length - 0.5 * v) - 0.06 * w
    colour = _mix(colour, _DARK, 0.7 * inside(np.maximum(bridge, window), px))
    rise = np.maximum(dome(body, 0.16 * w) + 0.1 * w * inside(body, px), 0.08 * w)
    return Surface(np.minimum(body, blade), rise, colour, 0.5)


def _module(u: Field, v: Field, part: Part, px: float) -> Surface:
    length, w = part.length, part.width
    body = box(u, v, length / 2, 0.38 * w, 0.04 * w)
    pitch = length / 5
    leg = np.abs(np.mod(u, pitch) - pitch / 2) - 0.22 * pitch
    legs = np.maximum(np.maximum(leg, np.abs(v) - w / 2), np.abs(u) - length / 2)
    colour = _mix(_flat(u, STEEL), part.colours[0], inside(body, px))
    tip = np.maximum(u - 0.34 * length, 0.07 * length - u)
    arrow = np.maximum(tip, np.abs(v) - 0.85 * (0.34 * length - u))
    stem = box(u + 0.03 * length, v, 0.13 * length, 0.05 * w, 0.0)
    dot = np.hypot(u + 0.34 * length, v) - 0.1 * w
    ink = np.minimum(np.minimum(arrow, stem), dot)
    colour = _mix(colour, part.colours[1], 0.9 * inside(ink, px))
    rise = dome(body, 0.07 * w) + 0.1 * w * inside(body, px)
    return Surface(np.minimum(body, legs), rise, colour, 0.35)


def _terminal(u: Field, v: Field, part: Part, px: float) -> Surface:
    """Returns a block of `detail[0]` clamps.

    Coordinate u runs from the back to the cable's side.
    """
    length, w = part.length, part.width
    rows = int(part.detail[0])
    pitch = w / rows
    row = np.mod(v + w / 2, pitch) - pitch / 2
    distance = box(u, v, length / 2, w / 2, 0.06 * w)
    clamp = np.hypot(u + 0.16 * length, row) - 0.28 * pitch
    slot = np.maximum(np.abs(u + 0.16 * length - row) - 0.05 * pitch, clamp)
    port = box(u - 0.4 * length, row, 0.16 * length, 0.22 * pitch, 0.05 * pitch)
    groove = np.abs(np.abs(row) - pitch / 2) - 0.04 * pitch
    colour = _flat(u, part.colours[0])
    colour = _mix(colour, _DARK, 0.45 * inside(groove, px))
    colour = _mix(colour, _DARK, 0.85 * inside(port, px))
    colour = _mix(colour, STEEL, inside(clamp, px))
    colour = _mix(colour, _DARK, 0.7 * inside(slot, px))
    rise = dome(distance, 0.07 * w) - 0.04 * w * inside(clamp, px)
    return Surface(distance, rise + 0.1 * w, colour, 0.4)


def _label(u: Field, v: Field, part: Part, px: float) -> Surface:
    """Returns a paper with a field of `colours[0]` and a bar code given by `detail`."""
    length, w = part.length, part.width
    distance = box(u, v, length / 2, w / 2, 0.06 * w)
    field = box(u, v + 0.17 * w, 0.4 * length, 0.23 * w, 0.04 * w)
    code = box(u, v - 0.28 * w, 0.38 * length, 0.12 * w, 0.0)
    bars = np.interp(u / length, np.linspace(-0.4, 0.4, len(part.detail)), part.detail)
    colour = _mix(_flat(u, _PAPER), part.colours[0], inside(field, px))
    colour = _mix(colour, _DARK, 0.8 * inside(code, px) * (bars > 0.5))
    return Surface(distance, dome(distance, 0.02 * w), colour, 0.15)


def _cable(u: Field, v: Field, part: Part, px: float) -> Surface:
    """Returns a cable from v = detail[0] on the left to detail[1] on the right.

    It sags by detail[2]; detail[3] makes the sag asymmetric.
    """
    course = _course(u, part)
    slope = (_course(u + px, part) - course) / px
    offset = (v - course) / np.sqrt(1 + slope * slope)
    ferrule = np.clip((np.abs(u) - part.length / 2 + 1.2 * part.width) / px, 0, 1)
    radius = part.width / 2 * (1 - 0.35 * ferrule)
    distance = np.maximum(np.abs(offset) - radius, np.abs(u) - part.length / 2)
    colour = _mix(_flat(u, part.colours[0]), STEEL, ferrule)
    return Surface(distance, _tube(offset, radius), colour, 0.45)


def _course(u: Field, part: Part) -> Field:
    start, end, sag, skew = part.detail
    t = np.clip((u / part.length + 0.42) / 0.84, 0, 1)
    wave = np.sin(math.pi * t) ** 2 * (1 + skew * np.cos(2 * math.pi * t))
    return start + (end - start) * t * t * (3 - 2 * t) + sag * wave


def _fibre(u: Field, v: Field, part: Part, px: float) -> Surface:
    """Returns a curved thread through the points (detail[0], detail[1]), ..."""
    points = np.reshape(np.asarray(part.detail, np.float32), (-1, 2))
    nearest = np.full(u.shape, np.inf, np.float32)
    for (ax, ay), (bx, by) in itertools.pairwise(points):
        dx, dy = bx - ax, by - ay
        t = ((u - ax) * dx + (v - ay) * dy) / max(dx * dx + dy * dy, 1e-9)
        t = np.clip(t, 0, 1)
        square = (u - ax - t * dx) ** 2 + (v - ay - t * dy) ** 2
        nearest = np.minimum(nearest, square)
    offset, radius = np.sqrt(nearest), part.width / 2
    rise = _tube(offset, radius)
    return Surface(offset - radius, rise, _flat(u, part.colours[0]), 0.1)


def _knob(u: Field, v: Field, part: Part, px: float) -> Surface:
    r = part.width / 2
    radial, theta = np.hypot(u, v), np.arctan2(v, u)
    distance = radial - r * (0.96 + 0.04 * np.cos(14 * theta))
    cap = radial - 0.68 * r
    pointer = box(u - 0.5 * r, v, 0.42 * r, 0.1 * r, 0.05 * r)
    colour = _mix(_flat(u, part.colours[0]), part.colours[1], inside(pointer, px))
    rise = dome(distance, 0.25 * r) + dome(cap, 0.2 * r)
    return Surface(distance, rise, colour, 0.5)


def _lamp(u: Field, v: Field, part: Part, px: float) -> Surface:
    """Returns a lens in a metal ring, which glows by `detail[0]`, 0..1."""
    r = part.width / 2
    radial = np.hypot(u, v)
    distance, lens = radial - r, radial - 0.76 * r
    glow = part.detail[0] * np.clip(1.4 - radial / r, 0, 1)
    glass = (0.5 + 0.5 * glow)[..., None] * _flat(u, part.colours[0])
    glass = _mix(glass, _PAPER, 0.2 * glow)  # too bright for the camera
    lit = inside(lens, px)[..., None]
    colour = _flat(u, STEEL) * (1 - lit) + glass * lit
    rise = dome(distance, 0.2 * r) + dome(lens, 0.5 * r)
    return Surface(distance, rise, colour, 0.8)


def _rocker(u: Field, v: Field, part: Part, px: float) -> Surface:
    """Returns a rocker switch that is pressed at the end of the sign of `detail[0]`."""
    length, w = part.length, part.width
    frame = box(u, v, length / 2, w / 2, 0.12 * w)
    lever = box(u, v, 0.4 * length, 0.36 * w, 0.06 * w)
    dash = box(u - 0.24 * length, v, 0.09 * length, 0.06 * w, 0.0)
    colour = _mix(_flat(u, _DARK), part.colours[0], inside(lever, px))
    colour = _mix(colour, _PAPER, inside(dash, px))
    tip = inside(lever, px) * (0.1 * w - 0.25 * part.detail[0] * u)
    return Surface(frame, dome(frame, 0.1 * w) + tip, colour, 0.5)


def _socket(u: Field, v: Field, part: Part, px: float) -> Surface:
    r = part.width / 2
    distance = np.hypot(u, v) - r
    colour = _mix(_flat(u, part.colours[0]), _DARK, inside(distance + 0.4 * r, px))
    return Surface(distance, dome(distance, 0.3 * r), colour, 0.4)


def _bolt(u: Field, v: Field, part: Part, px: float) -> Surface:
    r = part.width / 2
    distance = np.hypot(u, v) - r
    slot = box(u, v, 0.75 * r, 0.14 * r, 0.0)
    colour = _mix(_flat(u, part.colours[0]), _DARK, 0.9 * inside(slot, px))
    return Surface(distance, dome(distance, 0.5 * r), colour, 0.7)


SHAPES: dict[str, Callable[[Field, Field, Part, float], Surface]] = {
    "screw": _screw,
    "pin": _pin,
    "capsule": _capsule,
    "link": _link,
    "nut": _nut,
    "washer": _washer,
    "gear": _gear,
    "button": _button,
    "fuse": _fuse,
    "module": _module,
    "terminal": _terminal,
    "label": _label,
    "cable": _cable,
    "fibre": _fibre,
    "knob": _knob,
    "lamp": _lamp,
    "rocker": _rocker,
    "socket": _socket,
    "bolt": _bolt,
}


def evaluate(
    view: View, part: Part, margin: float = 0.0
) -> tuple[tuple[slice, slice], Surface]:
    """Returns the window and the surface of a part in a view.

    Args:
        view: view in which the part is seen.
        part: part to evaluate.
        margin: width in units that is added on each side of the window.

    Returns:
        (rows, columns) of the window, and the surface on it.
    """
    half_u, half_v = part.length / 2, part.width / 2
    if part.shape == "cable":
        half_v += max(map(abs, part.detail[:2])) + 1.6 * abs(part.detail[2])
    elif part.shape == "fibre":
        half_v = half_u
    damage = part.damage
    if damage is not None and damage.kind == "bend":
        half_v += abs(damage.size)
    window, u, v = view.window(
        part.x, part.y, part.angle, half_u + margin, half_v + margin
    )
    shape, px = SHAPES[part.shape], 1 / view.scale
    if damage is not None and damage.kind == "bend":
        along = np.maximum(u - damage.u, 0) / (part.length / 2 - damage.u)
        v = v - damage.size * along**2
    surface = shape(u, v, part, px)
    tint = np.asarray(part.tint, np.float32)
    surface = dataclasses.replace(surface, colour=surface.colour * tint)
    if damage is not None and damage.kind == "chip":
        surface = _chipped(surface, u, v, damage)
    return window, surface


def _chipped(surface: Surface, u: Field, v: Field, damage: Damage) -> Surface:
    """Cuts a jagged disc out of a surface; the break is paler than the surface."""
    du, dv = u - damage.u, v - damage.v
    theta = np.arctan2(dv, du) + damage.phase
    ragged = 1 + 0.22 * np.sin(3 * theta) + 0.12 * np.sin(7 * theta + 1)
    bite = np.hypot(du, dv) - damage.size * ragged
    rim = np.clip(1 - bite / (0.35 * damage.size), 0, 1)
    pale = _mix(surface.colour, (0.75, 0.73, 0.70), 0.45 * rim)
    rise = surface.height * (1 - 0.6 * rim)
    return Surface(np.maximum(surface.distance, -bite), rise, pale, surface.gloss)


def coverage(view: View, part: Part) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels whose centres a part covers, bool [h, w]."""
    covered = np.zeros((view.height, view.width), bool)
    window, surface = evaluate(view, part)
    covered[window] = surface.distance < 0
    return covered
