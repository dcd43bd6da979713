"""The front of a device: knobs, lamps, switches, screws, a label and two cables.

The plate has a place for every part. Knobs and screws may be turned, switches pressed
at either end, lamps glow or not, and the label bears a number that differs.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np

from ulsad_jax.data.synthetic import anomalies
from ulsad_jax.data.synthetic.anomalies import Region, Spoiled, exchange
from ulsad_jax.data.synthetic.design import PLASTICS, Cell, Ground, Kind, pick, piece
from ulsad_jax.data.synthetic.parts import STEEL, Colour, Part, View
from ulsad_jax.data.synthetic.scenes import Scene, one, shoot
from ulsad_jax.data.synthetic.shapes import coverage

_ZOOM = 0.95  # shows some of the table around the plate
_MARGIN = 0.12  # of defects from the picture's edges, so that they are on the plate
_REACH = 0.27  # of the sockets from the middle
_ROWS = (-0.09, 0.0, 0.09)  # of the sockets, down from the middle of their field
_TURN = {"knob": 2.3, "screw": math.pi}  # by how much a part may be turned, in radians
_BLACK: Colour = (0.13, 0.13, 0.14)
_PALE: Colour = (0.88, 0.87, 0.83)

_SCREW = Kind("screw", "bolt", 0.058, 0.058, ((0.50, 0.50, 0.52),))
_SOCKET = Kind("socket", "socket", 0.058, 0.058, (STEEL,))
_LABEL = Kind("label", "label", 0.25, 0.15, (PLASTICS["blue"],))
_LAMPS = tuple(
    Kind("lamp", "lamp", 0.10, 0.10, (colour,))
    for colour in ((0.85, 0.16, 0.12), (0.88, 0.70, 0.12), (0.16, 0.66, 0.26))
)
# Parts that a careless hand takes for a knob, a lamp or a switch.
_WRONG = {
    "knob": Kind("knob", "gear", 0.16, 0.16, ((0.24, 0.24, 0.26),)),
    "lamp": Kind("lamp", "nut", 0.10, 0.10, ((0.74, 0.62, 0.38),)),
    "switch": Kind("switch", "button", 0.10, 0.10, (PLASTICS["violet"],)),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a part: its kind, position in units and angle in radians."""

    kind: Kind
    x: float
    y: float
    angle: float = 0.0


@dataclasses.dataclass(frozen=True)
class Panel(Ground):
    """The design of a category of panels.

    Attributes:
        places: places by name.
        cables: kinds of the cables, from the first row of sockets.
    """

    places: dict[str, Place]
    cables: tuple[Kind, Kind]


def draw_design(seed: int, *, size: tuple[int, int] = (256, 256)) -> Panel:
    """Draws the design of a category; the arguments are those of a tray's."""
    rng = np.random.default_rng([seed, 2])
    tall, wide = (n / min(size) for n in size)
    right, down = (float(s) for s in rng.choice((-1, 1), 2))
    knob = Kind("knob", "knob", 0.17, 0.17, (_BLACK, _PALE))
    colour = PLASTICS[pick(rng, ("red", "blue", "green"))]
    switch = Kind("switch", "rocker", 0.125, 0.08, (colour,))
    table = [(lamp, -0.32 + 0.14 * i, -0.29, 0.0) for i, lamp in enumerate(_LAMPS)]
    table += [(_LABEL, 0.22, -0.29, 0.0), (knob, -0.29, -0.06, -math.pi / 2)]
    table += [(knob, -0.07, -0.06, -math.pi / 2)]
    table += [(switch, x, -0.06, -math.pi / 2) for x in (0.12, 0.235, 0.35)]
    table += [(_SCREW, x, y, 0.0) for x in (-0.405, 0.405) for y in (-0.405, 0.405)]
    rows = [(side, 0.25 + row) for side in (-1, 1) for row in _ROWS]
    table += [(_SOCKET, side * _REACH, y, 0.0) for side, y in rows]
    places = {
        f"{kind.type}{i}": Place(kind, right * x * wide, down * y * tall, angle)
        for i, (kind, x, y, angle) in enumerate(table)
    }
    colours = rng.permutation(["red", "blue", "yellow", "white"])[:2]
    field = Cell("field", 0.0, down * 0.25 * tall, 0.34 * wide, 0.14 * tall)
    metal = ("brushed", pick(rng, ((0.62, 0.63, 0.65), (0.55, 0.57, 0.60))))
    return Panel(
        wide=wide,
        tall=tall,
        surround=pick(
            rng, (("wood", (0.55, 0.40, 0.27)), ("carton", (0.66, 0.54, 0.40)))
        ),
        tray=metal,
        floor=("plastic", (0.40, 0.42, 0.45)),
        depth=0.0,
        azimuth=float(rng.uniform(-math.pi, math.pi)),
        cells={"field": field},
        places=places,
        cables=tuple(
            Kind("cable", "cable", 2 * _REACH * wide, 0.034, (PLASTICS[c],))
            for c in colours
        ),
    )


# A normal scene -------------------------------------------------------------


def draw_scene(design: Panel, rng: np.random.Generator) -> Scene:
    """Draws a scene that obeys every rule of `design`."""
    parts = [_set(design, rng, name) for name in design.places]
    parts += [_plug(design, rng, i, (i, i)) for i in range(len(design.cables))]
    scene = shoot(design, rng, parts)
    zoom, roll, right, down = scene.camera  # a camera on a stand
    camera = (_ZOOM * zoom, 0.5 * roll, right, down)
    shadow = (rng.uniform(0, 0.4), rng.uniform(0, 6.28), rng.uniform(-0.6, 1.2))
    return dataclasses.replace(scene, camera=camera, shadow=shadow)


def _set(
    design: Panel, rng: np.random.Generator, name: str, kind: Kind | None = None
) -> Part:
    """Returns a part of the usual or another kind in a place."""
    place = design.places[name]
    kind = kind or place.kind
    x, y = (c + rng.uniform(-0.009, 0.009) for c in (place.x, place.y))
    turn = _TURN.get(kind.type, 0.04)
    angle = place.angle + rng.uniform(-turn, turn)
    detail = (float(rng.choice((-1, 1))),)
    if kind.type == "lamp":
        detail = (float(rng.uniform(0, 1)),)
    elif kind.type == "label":
        detail = tuple(rng.integers(0, 2, 28).astype(float))
    return piece(rng, kind, name, x, y, angle, detail=detail)


def _plug(
    design: Panel, rng: np.random.Generator, which: int, rows: tuple[int, int]
) -> Part:
    """Returns a cable from a row of the left sockets to a row of the right ones."""
    cell, kind = design.cells["field"], design.cables[which]
    start, end = (design.tall * _ROWS[row] for row in rows)
    sag, skew = rng.uniform(-0.055, 0.055), rng.uniform(-0.8, 0.8)
    detail = (start, end, float(sag), float(skew))
    fixed = {"length": kind.length, "width": kind.width, "detail": detail}
    return piece(rng, kind, f"cable{which}", cell.x, cell.y, 0.0, **fixed)


def violations(design: Panel, scene: Scene) -> list[str]:
    """Returns the rules of `design` that a scene breaks."""
    broken = []
    found = collections.defaultdict(list)
    for part in scene.parts:
        found[part.cell].append(part)
    for name, place in design.places.items():
        held = [(p.shape, p.colours) for p in found.pop(name, [])]
        if held != [(place.kind.shape, place.kind.colours)]:
            broken.append(f"{name} holds its part alone")
    for part in scene.parts:
        place = design.places.get(part.cell)
        if place and part.type not in _TURN and abs(part.angle - place.angle) > 0.5:
            broken.append(f"{part.cell} is upright")
    for i in range(len(design.cables)):
        rows = [p.detail[:2] for p in found.pop(f"cable{i}", [])]
        if rows != [(design.tall * _ROWS[i],) * 2]:
            broken.append(f"cable{i} joins the sockets of its row")
    return broken + [f"no part in {cell!r}" for cell in found]


# Anomalies ------------------------------------------------------------------


def _any(scene: Scene, rng: np.random.Generator, *types: str) -> Part:
    """Returns a random part of a random one of the types."""
    kind = pick(rng, types)
    return pick(rng, [p for p in scene.parts if p.type == kind])


def _missing_part(design: Panel, scene: Scene, rng: np.random.Generator) -> Spoiled:
    """Leaves a hole in place of a part."""
    del design
    part = _any(scene, rng, "knob", "lamp", "switch", "screw")
    size = 0.7 * min(part.length, part.width)
    hole = dataclasses.replace(
        part, type="hole", shape="socket", length=size, width=size, colours=(_BLACK,)
    )
    return exchange(scene, part, hole), [Region(f"missing_part_{part.type}", (part,))]


def _surplus_part(design: Panel, scene: Scene, rng: np.random.Generator) -> Spoiled:
    kind = _any(scene, rng, "screw", "lamp")
    x, y = anomalies.free_spot(design, scene, rng, 0.6 * kind.width, _MARGIN)
    extra = dataclasses.replace(kind, cell="", x=x, y=y)
    parts = (*scene.parts, extra)
    region = Region(f"surplus_part_{extra.type}", (extra,))
    return dataclasses.replace(scene, parts=parts), [region]


def _wrong_kind(design: Panel, scene: Scene, rng: np.random.Generator) -> Spoiled:
    part = _any(scene, rng, *_WRONG)
    wrong = _set(design, rng, part.cell, _WRONG[part.type])
    region = Region(f"wrong_kind_{part.type}", (wrong,))
    return exchange(scene, part, wrong), [region]


def _swapped_parts(design: Panel, scene: Scene, rng: np.random.Generator) -> Spoiled:
    lamps = [p for p in scene.parts if p.type == "lamp"]
    pair = [lamps[i] for i in rng.permutation(len(lamps))[:2]]
    new = [
        _set(design, rng, part.cell, design.places[other.cell].kind)
        for part, other in zip(pair, pair[::-1], strict=True)
    ]
    for old, part in zip(pair, new, strict=True):
        scene = exchange(scene, old, part)
    return scene, [Region("swapped_parts", tuple(new))]


def _turned_part(design: Panel, scene: Scene, rng: np.random.Generator) -> Spoiled:
    """Turns the label upside down, or a switch by a quarter."""
    del design
    part = _any(scene, rng, "label", "switch")
    turn = math.pi if part.type == "label" else math.pi / 2
    turned = dataclasses.replace(part, angle=part.angle + turn)
    region = Region(f"turned_part_{part.type}", (turned, part))
    return exchange(scene, part, turned), [region]


def _wrong_connection(design: Panel, scene: Scene, rng: np.random.Generator) -> Spoiled:
    which, end = int(rng.integers(2)), len(_ROWS) - 1  # the last row is free
    rows = pick(rng, ((which, end), (end, which)))
    cable = next(p for p in scene.parts if p.cell == f"cable{which}")
    wrong = _plug(design, rng, which, rows)
    return exchange(scene, cable, wrong), [Region("wrong_connection", (wrong,))]


LOGICAL = {
    "missing_part": _missing_part,
    "surplus_part": _surplus_part,
    "wrong_kind": _wrong_kind,
    "swapped_parts": _swapped_parts,
    "turned_part": _turned_part,
    "wrong_connection": _wrong_connection,
}


def _scratch(design: Panel, scene: Scene, rng: np.random.Generator) -> Scene:
    length = rng.uniform(0.20, 0.28)
    return anomalies.marked(design, scene, rng, "scratch", length, 0.013, _MARGIN)


def _dent(design: Panel, scene: Scene, rng: np.random.Generator) -> Scene:
    length = rng.uniform(0.10, 0.13)
    return anomalies.marked(design, scene, rng, "dent", length, 0.9 * length, _MARGIN)


def _stain(design: Panel, scene: Scene, rng: np.random.Generator) -> Scene:
    length = rng.uniform(0.11, 0.15)
    return anomalies.marked(design, scene, rng, "stain", length, 0.8 * length, _MARGIN)


STRUCTURAL = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "chipped_edge": anomalies.STRUCTURAL["chipped_edge"],
}


def saturations(design: Panel, size: tuple[int, int]) -> dict[str, tuple[float, bool]]:
    """Returns the saturation threshold of every defect; see a tray's for the terms."""
    scene = draw_scene(design, np.random.default_rng(0))
    lamp, label, switch = (
        round(0.85 * float(coverage(View(*size, _ZOOM), one(scene, t)).sum()))
        for t in ("lamp", "label", "switch")
    )
    whole = [f"missing_part_{t}" for t in ("knob", "lamp", "switch", "screw")]
    whole += [f"surplus_part_{t}" for t in ("screw", "lamp")]
    whole += [f"wrong_kind_{t}" for t in _WRONG]
    return {
        # Either lamp, or either of the places where a part is and should be, is enough.
        "swapped_parts": (lamp, False),
        "turned_part_label": (label, False),
        "turned_part_switch": (switch, False),
        **dict.fromkeys([*whole, "wrong_connection", *STRUCTURAL], (1.0, True)),
    }
