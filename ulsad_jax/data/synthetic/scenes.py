"""Product scenes with rules: a tray of parts seen from above.

`draw_scene` draws a tray that obeys the rules of a design. `violations` lists the rules
that a scene breaks. `photograph` renders a scene at any size.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ulsad_jax.data.synthetic import drawing as drawing
from ulsad_jax.data.synthetic.design import (
    ROWS,
    Cell,
    Design,
    Ground,
    Kind,
    pick,
    piece,
)
from ulsad_jax.data.synthetic.drawing import Light, Mark
from ulsad_jax.data.synthetic.parts import Colour, Part, View
from ulsad_jax.data.synthetic.shapes import coverage

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8

_SUPERSAMPLE = 2


@dataclasses.dataclass(frozen=True)
class Scene:
    """A tray, and how it is photographed.

    Attributes:
        parts: parts in the tray, from the bottom up.
        marks: structural defects of surfaces.
        camera: (zoom, roll, shift right, shift down); see `View`.
        light: lamp.
        exposure: gain of each colour channel.
        gradient: relative change of light from the centre to the right and bottom.
        grain: standard deviation of the sensor's noise.
        seed: seed of the textures and the noise.
        shadow: (depth, azimuth, distance from the centre) of a wide soft shadow.
    """

    parts: tuple[Part, ...]
    marks: tuple[Mark, ...]
    camera: tuple[float, float, float, float]
    light: Light
    exposure: Colour
    gradient: tuple[float, float]
    grain: float
    seed: int
    shadow: tuple[float, float, float] = (0.0, 0.0, 0.0)


# A normal scene -------------------------------------------------------------


def draw_scene(design: Design, rng: np.random.Generator) -> Scene:
    """Draws a scene that obeys every rule of `design`."""
    parts: list[Part] = []
    for name, (kind, count) in design.bins.items():
        parts += fill(rng, design.cells[name], kind, count)
    parts += _rack(design, rng)
    parts.append(_module(design, rng))
    parts += _harness(design, rng)
    return shoot(design, rng, parts)


def shoot(design: Ground, rng: np.random.Generator, parts: Sequence[Part]) -> Scene:
    """Returns a scene of `parts` with a random camera, lamp and exposure."""
    gain = rng.uniform(0.76, 1.24)
    return Scene(
        parts=tuple(parts),
        marks=(),
        camera=(
            rng.uniform(0.988, 1.008),
            rng.uniform(-0.015, 0.015),
            rng.uniform(-0.006, 0.006),
            rng.uniform(-0.006, 0.006),
        ),
        light=Light(
            design.azimuth + rng.uniform(-0.5, 0.5), elevation=rng.uniform(0.8, 1.0)
        ),
        exposure=tuple(gain * rng.uniform(0.95, 1.05, 3)),
        gradient=(rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)),
        grain=rng.uniform(0.008, 0.014),
        seed=int(rng.integers(2**31)),
    )


def fill(rng: np.random.Generator, cell: Cell, kind: Kind, count: int) -> list[Part]:
    """Returns `count` parts in their places in a compartment."""
    return [put(rng, cell, kind, *place) for place in _places(cell, kind, count)]


def put(
    rng: np.random.Generator, cell: Cell, kind: Kind, x: float, y: float, angle: float
) -> Part:
    """Returns a part near its place, with a small random shift and rotation."""
    x, y = x + rng.uniform(-0.011, 0.011), y + rng.uniform(-0.011, 0.011)
    return piece(rng, kind, cell.name, x, y, angle + rng.uniform(-0.12, 0.12))


def _places(cell: Cell, kind: Kind, count: int) -> list[tuple[float, float, float]]:
    """Returns the place (x, y, angle) of each of `count` parts side by side.

    The parts lie along or across the compartment, whichever leaves more room.
    """
    along, across = (2 * side(cell.half_u, cell.half_v) for side in (max, min))
    steps = (np.arange(count) + 0.5) / count - 0.5
    ways = [
        (min(across / count - kind.width, along - kind.length), (0.0, across), 0.0),
        (min(along / count - kind.width, across - kind.length), (along, 0.0), 0.5),
    ]
    _, (u, v), turns = max(ways)
    angle = cell.axis + turns * math.pi
    return [(*map(float, cell.at(step * u, step * v)), angle) for step in steps]


def drop(
    rng: np.random.Generator, cell: Cell, kind: Kind, others: Sequence[Part]
) -> Part:
    """Returns a part without a fixed place at a random position that has room."""
    n = 160
    if kind.length > 1.6 * kind.width:
        angle = (
            cell.axis + rng.uniform(-0.4, 0.4, n) + math.pi * rng.integers(2, size=n)
        )
    else:
        angle = rng.uniform(-math.pi, math.pi, n)
    x = cell.x + cell.half_u * rng.uniform(-1, 1, n)
    y = cell.y + cell.half_v * rng.uniform(-1, 1, n)
    discs = _discs(x, y, angle, kind.length, kind.width)
    r = kind.width / 2
    to_wall = np.minimum(
        cell.half_u - np.abs(discs[..., 0] - cell.x),
        cell.half_v - np.abs(discs[..., 1] - cell.y),
    )
    gap = to_wall.min(-1) - r
    for other in others:
        around = _discs(other.x, other.y, other.angle, other.length, other.width)
        apart = np.linalg.norm(discs[:, :, None] - around, axis=-1).min((1, 2))
        gap = np.minimum(gap, apart - r - other.width / 2)
    room = 0.006
    i = int(np.argmax(np.minimum(gap, room)))  # the first with room, else the best
    return piece(rng, kind, cell.name, float(x[i]), float(y[i]), float(angle[i]))


def _discs(x, y, angle, length: float, width: float) -> Float32[np.ndarray, "... k 2"]:
    """Returns the centres of discs of radius width / 2 that together cover a part."""
    reach = max(0.0, (length - width) / 2)
    along = np.linspace(-reach, reach, 1 + math.ceil(2 * reach / width * 2))
    return np.stack(
        [
            np.asarray(x)[..., None] + along * np.cos(np.asarray(angle)[..., None]),
            np.asarray(y)[..., None] + along * np.sin(np.asarray(angle)[..., None]),
        ],
        axis=-1,
    )


def _rack(design: Design, rng: np.random.Generator) -> list[Part]:
    """Returns the fuses in their order, from either end of the rack."""
    cell = design.cells["rack"]
    order = range(len(design.fuses))
    if rng.integers(2):
        order = reversed(order)
    return [set_fuse(design, rng, cell, slot, i) for slot, i in enumerate(order)]


def set_fuse(
    design: Design, rng: np.random.Generator, cell: Cell, slot: int, which: int
) -> Part:
    """Returns fuse number `which` in a slot of the rack; `detail` is (slot, which)."""
    n = len(design.fuses)
    pitch = 2 * max(cell.half_u, cell.half_v) / n
    u = (slot + 0.5 - n / 2) * pitch + rng.uniform(-0.008, 0.008)
    x, y = cell.at(u, rng.uniform(-0.012, 0.012))
    angle = cell.axis + math.pi / 2 + rng.uniform(-0.12, 0.12)
    detail = (float(slot), float(which))
    return piece(rng, design.fuses[which], cell.name, x, y, angle, detail=detail)


def _module(design: Design, rng: np.random.Generator) -> Part:
    cell = design.cells["module"]
    x = cell.x + rng.uniform(-0.02, 0.02)
    y = cell.y + rng.uniform(-0.02, 0.02)
    angle = design.module_angle + rng.uniform(-0.2, 0.2)
    return piece(rng, design.module, cell.name, x, y, angle)


def _harness(design: Design, rng: np.random.Generator) -> list[Part]:
    """Returns two terminal blocks, the label and the cable."""
    cell, place = design.cells["harness"], design.cells["label"]
    reach = max(cell.half_u, cell.half_v) - 0.6 * design.terminal.length
    row = int(rng.integers(ROWS))
    colour = pick(rng, design.cable.colours)
    blocks = []
    for side in (-1, 1):
        x, y = cell.at(side * reach, 0.0)
        angle = cell.axis + (math.pi if side > 0 else 0.0)
        block = piece(
            rng,
            design.terminal,
            cell.name,
            x,
            y,
            angle,
            width=design.terminal.width,
            detail=(float(ROWS),),
        )
        blocks.append(block)
    label = piece(
        rng,
        design.label,
        place.name,
        place.x + rng.uniform(-0.02, 0.02),
        place.y + rng.uniform(-0.02, 0.02),
        rng.uniform(-0.15, 0.15),
        colours=(colour,),
        detail=tuple(rng.integers(0, 2, 28).astype(float)),
    )
    return [*blocks, label, lay_cable(design, rng, (row, row), colour)]


def lay_cable(
    design: Design, rng: np.random.Generator, rows: tuple[int, int], colour: Colour
) -> Part:
    """Returns a cable from a row of the left block to a row of the right block."""
    cell = design.cells["harness"]
    reach = max(cell.half_u, cell.half_v) - 0.72 * design.terminal.length
    pitch = design.terminal.width / ROWS
    start, end = ((row - (ROWS - 1) / 2) * pitch for row in rows)
    x, y = cell.at(0.0, 0.0)
    # It bends inwards from an outer row, or it would leave its compartment.
    side = -np.sign(start + end) or rng.choice((-1, 1))
    sag = rng.uniform(0.1, 1.0) * pitch * side
    detail = (start, end, float(sag), float(rng.uniform(-0.8, 0.8)))
    kind = dataclasses.replace(design.cable, colours=(colour,))
    length = 2 * (reach - 0.3 * design.terminal.length)
    return piece(rng, kind, cell.name, x, y, cell.axis, length=length, detail=detail)


def violations(design: Design, scene: Scene) -> list[str]:
    """Returns the rules of `design` that a scene breaks.

    Structural defects break no rule.
    """
    broken = []
    for name, (kind, count) in design.bins.items():
        found = collections.Counter(p.type for p in scene.parts if p.cell == name)
        if found != {kind.type: count}:
            broken.append(f"{name} holds {count} {kind.type}")
    fuses = [p for p in scene.parts if p.type == "fuse"]
    order = [int(p.detail[1]) for p in sorted(fuses, key=lambda p: p.detail[0])]
    if sorted((order, order[::-1]))[0] != list(range(len(design.fuses))):
        broken.append("the fuses stand in their order")
    arrow = one(scene, "module").angle - design.module_angle
    if math.cos(arrow) < 0.7:
        broken.append("the module's arrow points the right way")
    cables = [p for p in scene.parts if p.type == "cable"]
    if len(cables) != 1:
        return [*broken, "one cable joins the terminal blocks"]
    if cables[0].detail[0] != cables[0].detail[1]:
        broken.append("the cable joins clamps of the same row")
    if cables[0].colours != one(scene, "label").colours:
        broken.append("the label shows the cable's colour")
    return broken


def one(scene: Scene, kind: str) -> Part:
    """Returns the first part of a type."""
    return next(p for p in scene.parts if p.type == kind)


def contents(scene: Scene, cell: str) -> tuple[Part, ...]:
    """Returns the parts in a compartment."""
    return tuple(p for p in scene.parts if p.cell == cell)


# Pictures ------------------------------------------------------------------


def view(scene: Scene, size: tuple[int, int]) -> View:
    """Returns the view of the scene's camera at `size` (height, width)."""
    return View(*size, *scene.camera)


def photograph(
    design: Ground, scene: Scene, size: tuple[int, int]
) -> Float32[np.ndarray, "h w 3"]:
    """Renders a scene without the sensor's noise, which `with_grain` adds.

    If two scenes differ in one thing, only the pixels of that thing differ.

    Args:
        design: design of the category.
        scene: scene to render.
        size: (height, width) in pixels, with the aspect ratio of the design.

    Returns:
        Display values, about 0..1, float32 [h, w, 3].
    """
    coarse = view(scene, size)
    canvas = _ground(design, scene, coarse)
    # Only the parts have detail finer than a pixel; the ground is smooth enough.
    canvas = canvas.repeat(_SUPERSAMPLE, 0).repeat(_SUPERSAMPLE, 1)
    fine = coarse.finer(_SUPERSAMPLE)
    for mark in scene.marks:
        if mark.part is None:
            drawing.paint_mark(canvas, fine, mark, scene.light)
    for i, part in enumerate(scene.parts):
        drawing.paint(canvas, fine, part, scene.light)
        for mark in scene.marks:
            if mark.part == i:
                within = coverage(fine, part).astype(np.float32)
                drawing.paint_mark(canvas, fine, mark, scene.light, within)
    steps = range(_SUPERSAMPLE)
    pixels = sum(canvas[i::_SUPERSAMPLE, j::_SUPERSAMPLE] for i in steps for j in steps)
    return _expose(scene, pixels / _SUPERSAMPLE**2)


def _ground(design: Ground, scene: Scene, coarse: View) -> Float32[np.ndarray, "h w 3"]:
    """Renders the empty tray and the surface under it."""
    rng = np.random.default_rng([scene.seed, 0])
    shape = (coarse.height, coarse.width)

    def sheet(material: tuple[str, Colour]) -> Float32[np.ndarray, "h w 3"]:
        kind, colour = material
        return rng.uniform(0.92, 1.08) * drawing.texture(kind, colour, shape, rng)

    canvas = sheet(design.surround)
    outline = (0.0, 0.0, 0.47 * design.wide, 0.47 * design.tall)
    drawing.paint_sheet(
        canvas,
        coarse,
        scene.light,
        sheet(design.tray),
        sheet=outline,
        radius=0.03,
        depth=0.01,
    )
    floor = sheet(design.floor)
    for cell in design.cells.values():
        drawing.paint_sheet(
            canvas,
            coarse,
            scene.light,
            floor,
            sheet=(cell.x, cell.y, cell.half_u, cell.half_v),
            radius=0.02,
            depth=-design.depth,
        )
    return canvas


def _expose(
    scene: Scene, light: Float32[np.ndarray, "h w 3"]
) -> Float32[np.ndarray, "h w 3"]:
    """Returns the light that reaches the sensor from an unevenly lit tray."""
    h, w = light.shape[:2]
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, w, dtype=np.float32)
    lamp = 1 + scene.gradient[0] * x + scene.gradient[1] * y - 0.05 * (x * x + y * y)
    depth, azimuth, distance = scene.shadow
    edge = x * math.cos(azimuth) + y * math.sin(azimuth) - distance
    lamp *= 1 - depth / (1 + np.exp(-8 * edge))
    return light * lamp[..., None] * np.asarray(scene.exposure, np.float32)


def with_grain(
    scene: Scene, picture: Float32[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Adds the sensor's noise to a photograph and rounds it to 8 bits."""
    rng = np.random.default_rng([scene.seed, 1])
    grain = rng.standard_normal(picture.shape, np.float32)
    spread = scene.grain * np.sqrt(np.maximum(picture, 0) + 0.3)
    return np.round(255 * np.clip(picture + spread * grain, 0, 1)).astype(np.uint8)
