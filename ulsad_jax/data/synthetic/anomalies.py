"""Anomalies of a scene: broken rules and damage.

`LOGICAL` holds functions that break a rule of the design. `STRUCTURAL` holds functions
that damage a tray without breaking a rule. Each takes a normal scene, the twin of its
result, and changes one thing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from ulsad_jax.data.synthetic.design import ROWS, Design, Ground, Kind, pick
from ulsad_jax.data.synthetic.drawing import Mark
from ulsad_jax.data.synthetic.parts import Damage, Part, View
from ulsad_jax.data.synthetic.scenes import (
    Scene,
    contents,
    drop,
    fill,
    lay_cable,
    one,
    put,
    set_fuse,
)
from ulsad_jax.data.synthetic.shapes import SHAPES, coverage


@dataclasses.dataclass(frozen=True)
class Region:
    """The region of a logical anomaly.

    Attributes:
        defect: name of the defect, a key of `saturations`.
        parts: parts that cover the region, or would cover it if they were there.
    """

    defect: str
    parts: tuple[Part, ...]


# Logical anomalies ----------------------------------------------------------

Spoiled = tuple[Scene, list[Region]]


def exchange(scene: Scene, old: Part, *new: Part) -> Scene:
    """Returns the scene with `old` replaced by `new`, at the same place in the pile."""
    i = scene.parts.index(old)
    parts = (*scene.parts[:i], *new, *scene.parts[i + 1 :])
    return dataclasses.replace(scene, parts=parts)


def _missing_part(design: Design, scene: Scene, rng: np.random.Generator) -> Spoiled:
    name = pick(rng, [*design.bins, "rack", "harness"])
    if name == "harness":
        cable = one(scene, "cable")
        paths = tuple(
            lay_cable(design, rng, (row, row), cable.colours[0]) for row in range(ROWS)
        )
        region = Region("missing_part_cable", (cable, *paths))
        return exchange(scene, cable), [region]
    part = pick(rng, contents(scene, name))
    return exchange(scene, part), [Region(f"missing_part_{part.type}", (part,))]


def _surplus_part(design: Design, scene: Scene, rng: np.random.Generator) -> Spoiled:
    name = pick(rng, list(design.bins))
    there = contents(scene, name)
    extra = drop(rng, design.cells[name], design.bins[name][0], there)
    region = Region(f"surplus_part_{extra.type}", (extra,))
    return exchange(scene, there[-1], there[-1], extra), [region]


def _misplaced_part(design: Design, scene: Scene, rng: np.random.Generator) -> Spoiled:
    source, target = (str(n) for n in rng.permutation(list(design.bins))[:2])
    part = pick(rng, contents(scene, source))
    there = contents(scene, target)
    moved = drop(rng, design.cells[target], design.bins[source][0], there)
    scene = exchange(exchange(scene, part), there[-1], there[-1], moved)
    return scene, [
        Region(f"misplaced_part_{part.type}", (moved,)),
        Region(f"missing_part_{part.type}", (part,)),
    ]


def _swapped_bins(design: Design, scene: Scene, rng: np.random.Generator) -> Spoiled:
    pair = pick(rng, (("bin0", "bin1"), ("bin2", "bin3")))
    regions = []
    for name, other in (pair, pair[::-1]):
        old = contents(scene, name)
        new = fill(rng, design.cells[name], *design.bins[other])
        scene = exchange(scene, old[0], *new)
        for part in old[1:]:
            scene = exchange(scene, part)
        regions.append(Region("swapped_bins", tuple(new)))
    return scene, regions


def _wrong_size(design: Design, scene: Scene, rng: np.random.Generator) -> Spoiled:
    name, other = pick(rng, (("bin0", "bin1"), ("bin1", "bin0")))
    part = pick(rng, contents(scene, name))
    place = part.x, part.y, part.angle
    wrong = put(rng, design.cells[name], design.bins[other][0], *place)
    return exchange(scene, part, wrong), [Region(f"wrong_size_{wrong.type}", (wrong,))]


def _wrong_order(design: Design, scene: Scene, rng: np.random.Generator) -> Spoiled:
    fuses = sorted(contents(scene, "rack"), key=lambda p: p.detail[0])
    i = int(rng.integers(len(fuses) - 1))
    cell = design.cells["rack"]
    pair = fuses[i : i + 2]
    new = [
        set_fuse(design, rng, cell, i + k, int(pair[1 - k].detail[1])) for k in range(2)
    ]
    for old, part in zip(pair, new, strict=True):
        scene = exchange(scene, old, part)
    return scene, [Region("wrong_order", tuple(new))]


def _reversed_part(design: Design, scene: Scene, rng: np.random.Generator) -> Spoiled:
    del design, rng
    module = one(scene, "module")
    turned = dataclasses.replace(module, angle=module.angle + math.pi)
    return exchange(scene, module, turned), [Region("reversed_part", (turned,))]


def _mismatched_colour(
    design: Design, scene: Scene, rng: np.random.Generator
) -> Spoiled:
    label, cable = one(scene, "label"), one(scene, "cable")
    others = [c for c in design.cable.colours if c != cable.colours[0]]
    wrong = dataclasses.replace(label, colours=(pick(rng, others),))
    region = Region("mismatched_colour", (wrong, cable))  # either may be the wrong one
    return exchange(scene, label, wrong), [region]


def _crossed_cable(design: Design, scene: Scene, rng: np.random.Generator) -> Spoiled:
    cable = one(scene, "cable")
    start, end = (int(n) for n in rng.permutation(ROWS)[:2])
    wrong = lay_cable(design, rng, (start, end), cable.colours[0])
    return exchange(scene, cable, wrong), [Region("crossed_cable", (wrong,))]


LOGICAL: dict[str, Callable[[Design, Scene, np.random.Generator], Spoiled]] = {
    "missing_part": _missing_part,
    "surplus_part": _surplus_part,
    "misplaced_part": _misplaced_part,
    "swapped_bins": _swapped_bins,
    "wrong_size": _wrong_size,
    "wrong_order": _wrong_order,
    "reversed_part": _reversed_part,
    "mismatched_colour": _mismatched_colour,
    "crossed_cable": _crossed_cable,
}


# Structural anomalies -------------------------------------------------------


def _scratch(design: Design, scene: Scene, rng: np.random.Generator) -> Scene:
    return marked(design, scene, rng, "scratch", rng.uniform(0.16, 0.26), 0.008)


def _dent(design: Design, scene: Scene, rng: np.random.Generator) -> Scene:
    length = rng.uniform(0.075, 0.105)
    return marked(design, scene, rng, "dent", length, length * rng.uniform(0.7, 1))


def _stain(design: Design, scene: Scene, rng: np.random.Generator) -> Scene:
    length = rng.uniform(0.08, 0.12)
    return marked(design, scene, rng, "stain", length, length * rng.uniform(0.6, 1))


def marked(
    design: Ground,
    scene: Scene,
    rng: np.random.Generator,
    kind: str,
    length: float,
    width: float,
    margin: float = 0.07,
) -> Scene:
    """Returns the scene with a mark where no part hides it."""
    x, y = free_spot(design, scene, rng, 0.5 * length, margin)
    mark = Mark(
        kind,
        x,
        y,
        float(rng.uniform(-math.pi, math.pi)),
        float(length),
        float(width),
        int(rng.integers(2**31)),
    )
    return dataclasses.replace(scene, marks=(mark,))


def free_spot(
    design: Ground,
    scene: Scene,
    rng: np.random.Generator,
    clearance: float,
    margin: float = 0.07,
) -> tuple[float, float]:
    """Returns a point of the ground about `clearance` units away from every part.

    The point is at least `margin` units away from the picture's edges.
    """
    view = View(round(96 * design.tall), round(96 * design.wide))
    taken = np.zeros((view.height, view.width), bool)
    for part in scene.parts:
        taken |= coverage(view, part)
    edge = round(margin * view.scale)
    inside = np.zeros_like(taken)
    inside[edge:-edge, edge:-edge] = True
    room = ndimage.distance_transform_edt(~taken) * inside
    spots = np.argwhere(room >= min(clearance * view.scale, 0.8 * room.max()))
    row, column = pick(rng, spots)
    x = (column + 0.5 - view.width / 2) / view.scale
    y = (row + 0.5 - view.height / 2) / view.scale
    return float(x), float(y)


def _crack(design: Design, scene: Scene, rng: np.random.Generator) -> Scene:
    del design
    part = _victim(scene, rng, ("module", "terminal", "fuse", "label"))
    short = min(part.length, part.width)
    mark = Mark(
        "crack",
        part.x + float(rng.uniform(-0.1, 0.1)) * short,
        part.y + float(rng.uniform(-0.1, 0.1)) * short,
        float(rng.uniform(-math.pi, math.pi)),
        1.1 * short,
        0.012,
        int(rng.integers(2**31)),
        part=scene.parts.index(part),
    )
    return dataclasses.replace(scene, marks=(mark,))


def _chipped_edge(design: Design, scene: Scene, rng: np.random.Generator) -> Scene:
    del design
    shapes = ("module", "terminal", "fuse", "gear", "button", "washer", "label")
    shapes += ("knob", "rocker")
    part = _victim(scene, rng, shapes)
    theta = rng.uniform(-math.pi, math.pi)
    r = np.linspace(0, part.length + part.width, 400, dtype=np.float32)[None]
    u, v = r * np.float32(math.cos(theta)), r * np.float32(math.sin(theta))
    solid = SHAPES[part.shape](u, v, part, 1e-3).distance[0] < 0
    edge = int(np.flatnonzero(solid)[-1])
    size = max(0.026, 0.26 * min(part.length, part.width)) * rng.uniform(0.9, 1.2)
    damage = Damage(
        "chip", float(u[0, edge]), float(v[0, edge]), float(size), rng.uniform(0, 6.3)
    )
    return exchange(scene, part, dataclasses.replace(part, damage=damage))


def _bent_part(design: Design, scene: Scene, rng: np.random.Generator) -> Scene:
    del design
    part = _victim(scene, rng, ("screw", "pin", "link"))
    size = rng.choice((-1, 1)) * rng.uniform(0.040, 0.055)
    damage = Damage("bend", -0.1 * part.length, 0.0, float(size))
    return exchange(scene, part, dataclasses.replace(part, damage=damage))


def _victim(scene: Scene, rng: np.random.Generator, shapes: Sequence[str]) -> Part:
    """Returns a random part of one of the shapes; each type is equally likely."""
    kinds = sorted({p.type for p in scene.parts if p.shape in shapes})
    kind = pick(rng, kinds)
    return pick(rng, [p for p in scene.parts if p.type == kind])


def _fibre(design: Design, scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with a thread on the tray."""
    t = np.linspace(0, 1, 24)
    turn = rng.uniform(0, 2 * math.pi) + rng.uniform(-3, 3) * t
    turn += rng.uniform(0.5, 1.5) * np.sin(rng.uniform(3, 9) * t + rng.uniform(0, 6))
    step = rng.uniform(0.0055, 0.008)
    points = np.cumsum(step * np.stack([np.cos(turn), np.sin(turn)], 1), axis=0)
    points -= (points.max(0) + points.min(0)) / 2
    shade = pick(rng, ((0.62, 0.60, 0.56), (0.14, 0.14, 0.16), (0.55, 0.30, 0.27)))
    x, y = free_spot(design, scene, rng, 0.02)
    reach = float(np.abs(points).max())
    fibre = Part(
        "fibre",
        "",
        "fibre",
        x,
        y,
        0.0,
        2 * reach + 0.01,
        0.010,
        (shade,),
        detail=tuple(points.ravel().tolist()),
    )
    return dataclasses.replace(scene, parts=(*scene.parts, fibre))


STRUCTURAL: dict[str, Callable[[Design, Scene, np.random.Generator], Scene]] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "crack": _crack,
    "chipped_edge": _chipped_edge,
    "bent_part": _bent_part,
    "fibre": _fibre,
}


# Names and thresholds -------------------------------------------------------


def saturations(design: Design, size: tuple[int, int]) -> dict[str, tuple[float, bool]]:
    """Returns the saturation threshold of every defect, by the defect's name.

    A defect's name starts with the kind of the anomaly.

    Args:
        design: design of the category.
        size: (height, width) of the images in pixels.

    Returns:
        (threshold, relative) by name. If the place of the defect is ambiguous, it is
        enough to find the area of one object, and the threshold is in pixels. Otherwise
        it is the fraction of the region that must be found.
    """
    bins = [kind for kind, _ in design.bins.values()]
    area = {kind.type: _area(_nominal(kind), size) for kind in (*bins, design.fuses[0])}
    paper = _area(_nominal(design.label), size)
    rng = np.random.default_rng(0)
    wire = _area(lay_cable(design, rng, (1, 1), design.cable.colours[0]), size)
    absolute = {
        "missing_part_cable": wire,
        "swapped_bins": min(area[kind.type] for kind in bins),
        "wrong_order": area["fuse"],
        # The label or the cable may be the wrong one.
        "mismatched_colour": min(paper, wire),
    }
    whole = [f"missing_part_{name}" for name in area]
    whole += [f"surplus_part_{kind.type}" for kind in bins]
    whole += [f"misplaced_part_{kind.type}" for kind in bins]
    whole += [f"wrong_size_{kind.type}" for kind in bins[:2]]
    whole += ["reversed_part", "crossed_cable", *STRUCTURAL]
    return {
        **{name: (round(pixels), False) for name, pixels in absolute.items()},
        **dict.fromkeys(whole, (1.0, True)),
    }


def _nominal(kind: Kind) -> Part:
    colours = kind.colours or ((0.0, 0.0, 0.0),)
    return Part(
        kind.type,
        "",
        kind.shape,
        0.0,
        0.0,
        0.0,
        kind.length,
        kind.width,
        colours,
        detail=(0.0, 0.0),
    )


def _area(part: Part, size: tuple[int, int]) -> float:
    """Returns the area of a part in pixels, times 0.85.

    The factor allows for a small part that is seen from a little further away.
    """
    return 0.85 * float(coverage(View(*size), part).sum())
