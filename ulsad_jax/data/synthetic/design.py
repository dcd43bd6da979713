"""The design of a synthetic category: a tray, and the parts in its compartments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ulsad_jax.data.synthetic.parts import Colour, Part

_T = TypeVar("_T")

ROWS = 3  # clamps of a terminal block

PLASTICS: dict[str, Colour] = {
    "red": (0.70, 0.20, 0.18),
    "blue": (0.20, 0.36, 0.66),
    "green": (0.24, 0.52, 0.31),
    "yellow": (0.82, 0.68, 0.22),
    "orange": (0.84, 0.46, 0.17),
    "violet": (0.48, 0.32, 0.58),
    "white": (0.84, 0.84, 0.82),
}
_METALS: tuple[Colour, ...] = (
    (0.66, 0.67, 0.69),
    (0.74, 0.62, 0.38),
    (0.70, 0.49, 0.38),
    (0.46, 0.47, 0.50),
)
_SURROUNDS = (
    ("brushed", (0.60, 0.61, 0.63)),
    ("wood", (0.62, 0.46, 0.31)),
    ("fabric", (0.44, 0.47, 0.52)),
    ("carton", (0.66, 0.54, 0.40)),
)
_TRAYS = (
    ("plastic", (0.52, 0.54, 0.56)),
    ("plastic", (0.66, 0.62, 0.53)),
    ("plastic", (0.36, 0.43, 0.50)),
    ("wood", (0.67, 0.53, 0.37)),
    ("carton", (0.62, 0.50, 0.37)),
)
_FLOORS = (
    ("felt", (0.27, 0.28, 0.30)),
    ("felt", (0.22, 0.29, 0.27)),
    ("fabric", (0.29, 0.31, 0.38)),
    ("plastic", (0.33, 0.34, 0.35)),
    ("felt", (0.38, 0.29, 0.27)),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A compartment of the tray.

    Attributes:
        name: name of the compartment.
        x: horizontal position of the centre, in units.
        y: vertical position of the centre, in units.
        half_u: half of the width, in units.
        half_v: half of the height, in units.
    """

    name: str
    x: float
    y: float
    half_u: float
    half_v: float

    @property
    def axis(self) -> float:
        """Angle of the longer side, in radians."""
        return 0.0 if self.half_u >= self.half_v else math.pi / 2

    def at(self, u: float, v: float) -> tuple[float, float]:
        """Returns the world coordinates of a point along and across the longer side."""
        if self.axis:
            return self.x - v, self.y + u
        return self.x + u, self.y + v


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of part; see `Part` for the attributes."""

    type: str
    shape: str
    length: float
    width: float
    colours: tuple[Colour, ...]


@dataclasses.dataclass(frozen=True)
class Ground:
    """The surfaces under the parts, common to all images of a category.

    Attributes:
        wide: width of the frame in units.
        tall: height of the frame in units; the smaller of both is 1.
        surround: texture and colour of the surface under the tray.
        tray: texture and colour of the tray.
        floor: texture and colour of the compartments.
        depth: depth of the compartments in units; 0 means printed fields.
        azimuth: usual direction of the lamp in radians.
        cells: compartments by name.
    """

    wide: float
    tall: float
    surround: tuple[str, Colour]
    tray: tuple[str, Colour]
    floor: tuple[str, Colour]
    depth: float
    azimuth: float
    cells: dict[str, Cell]


@dataclasses.dataclass(frozen=True)
class Design(Ground):
    """The design of a category of trays.

    Attributes:
        bins: (kind, count) of the parts in each bin, by the name of the cell.
        fuses: kinds of the fuses, in the order of the rack (in either direction).
        module: kind of the part that has a direction.
        module_angle: direction of the module's arrow in radians.
        terminal: kind of the block at each end of the harness.
        label: kind of the paper that shows the cable's colour.
        cable: kind of the cable, with all colours that it may have.
    """

    bins: dict[str, tuple[Kind, int]]
    fuses: tuple[Kind, ...]
    module: Kind
    module_angle: float
    terminal: Kind
    label: Kind
    cable: Kind


def draw_design(seed: int, *, size: tuple[int, int] = (256, 256)) -> Design:
    """Draws the design of a category.

    Args:
        seed: seed of the category.
        size: (height, width) of the images in pixels.
    """
    rng = np.random.default_rng([seed, 1])
    tall, wide = (n / min(size) for n in size)
    cells = _layout(rng, wide, tall)
    big = max(wide, tall) ** 0.35
    names = list(PLASTICS)
    fuse_colours = rng.permutation(names[:6])[:4]
    cable_colours = rng.permutation(["red", "blue", "green", "yellow"])[:3]
    dark = ((0.15, 0.15, 0.17), (0.14, 0.20, 0.30), (0.16, 0.25, 0.20))
    return Design(
        wide=wide,
        tall=tall,
        surround=pick(rng, _SURROUNDS),
        tray=pick(rng, _TRAYS),
        floor=pick(rng, _FLOORS),
        depth=float(pick(rng, (0.014, 0.010, 0.010, 0.0))),
        azimuth=float(rng.uniform(-math.pi, math.pi)),
        cells=cells,
        bins=_bins(rng, big),
        fuses=tuple(
            Kind("fuse", "fuse", 0.150 * big, 0.066 * big, (PLASTICS[c],))
            for c in fuse_colours
        ),
        module=Kind(
            "module",
            "module",
            0.135 * big,
            0.105 * big,
            (pick(rng, dark), (0.85, 0.85, 0.80)),
        ),
        module_angle=float(rng.integers(4)) * math.pi / 2,
        terminal=Kind(
            "terminal",
            "terminal",
            0.105 * big,
            0.185 * big,
            (PLASTICS[pick(rng, ("white", "green", "blue", "orange"))],),
        ),
        label=Kind("label", "label", 0.130 * big, 0.125 * big, ()),
        cable=Kind(
            "cable",
            "cable",
            0.0,
            0.026 * big,
            tuple(PLASTICS[c] for c in cable_colours),
        ),
    )


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """Returns a random option; each is equally likely."""
    return options[rng.integers(len(options))]


def piece(
    rng: np.random.Generator,
    kind: Kind,
    cell: str,
    x: float,
    y: float,
    angle: float,
    **fields,
) -> Part:
    """Returns a part of a kind, slightly off its nominal size and colour."""
    size = rng.uniform(0.97, 1.03)
    return Part(
        **{
            "type": kind.type,
            "cell": cell,
            "shape": kind.shape,
            "x": x,
            "y": y,
            "angle": angle,
            "length": size * kind.length,
            "width": size * kind.width,
            "colours": kind.colours,
            "tint": tuple(rng.uniform(0.88, 1.12) * rng.uniform(0.97, 1.03, 3)),
            **fields,
        }
    )


def _bins(rng: np.random.Generator, big: float) -> dict[str, tuple[Kind, int]]:
    """Draws the parts of the bins: two sizes of one kind, and two compact kinds."""
    shape, width = pick(rng, (("screw", 0.066), ("pin", 0.046), ("link", 0.060)))
    metal = (pick(rng, _METALS),)
    plastics = list(PLASTICS.values())
    compact = [
        Kind("nut", "nut", 0.084, 0.084, (pick(rng, _METALS),)),
        Kind("washer", "washer", 0.084, 0.084, (pick(rng, _METALS),)),
        Kind("gear", "gear", 0.088, 0.088, (pick(rng, plastics),)),
        Kind("button", "button", 0.078, 0.078, (pick(rng, plastics),)),
        Kind(
            "capsule",
            "capsule",
            0.108,
            0.056,
            tuple(plastics[i] for i in rng.permutation(len(plastics))[:2]),
        ),
    ]
    third, fourth = (compact[i] for i in rng.permutation(len(compact))[:2])
    kinds = (
        (Kind(f"long_{shape}", shape, 0.215, width, metal), 2),
        (Kind(f"short_{shape}", shape, 0.135, width, metal), int(rng.integers(2, 4))),
        (third, int(rng.integers(2, 4))),
        (fourth, int(rng.integers(2, 4))),
    )
    return {
        f"bin{i}": (
            dataclasses.replace(k, length=k.length * big, width=k.width * big),
            count,
        )
        for i, (k, count) in enumerate(kinds)
    }


def _layout(rng: np.random.Generator, wide: float, tall: float) -> dict[str, Cell]:
    """Draws the compartments in three strips, which may have any order.

    The strips are the harness; four bins; and the rack, the module and the label.
    """
    turned = bool(rng.integers(2)) if max(wide, tall) < 1.25 else tall > wide
    if turned:
        wide, tall = tall, wide
    flip_x, flip_y = rng.choice((-1, 1), 2)
    wall = float(rng.uniform(0.010, 0.018))
    strips = {
        "harness": (0.28, [("harness", 1.0, 1)]),
        "bins": (0.46, [("bin0", 0.28, 1), ("bin1", 0.26, 1), ("bin2", 0.46, 2)]),
        "row": (0.26, [("rack", 0.50, 1), ("module", 0.25, 1), ("label", 0.25, 1)]),
    }
    cells = {}
    top = -0.455 * tall
    for strip in rng.permutation(list(strips)):
        share, columns = strips[str(strip)]
        height = 0.91 * tall * share
        left = -0.455 * wide
        portions = np.array([c[1] for c in columns]) * rng.uniform(
            0.95, 1.05, len(columns)
        )
        portions /= portions.sum()
        for i in rng.permutation(len(columns)):
            name, _, stack = columns[i]
            width = 0.91 * wide * float(portions[i])
            for k in range(stack):
                x, y = left + width / 2, top + height * (k + 0.5) / stack
                x, y = float(flip_x) * x, float(flip_y) * y
                half_u, half_v = width / 2 - wall, height / stack / 2 - wall
                if turned:
                    x, y, half_u, half_v = y, x, half_v, half_u
                key = name if k == 0 else "bin3"
                cells[key] = Cell(key, x, y, half_u, half_v)
            left += width
        top += height
    return cells
