"""Parts of a scene, their damage, and the view in which they are seen."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32

    Field = Float32[np.ndarray, "h w"]
    Picture = Float32[np.ndarray, "h w 3"]

Colour = tuple[float, float, float]
STEEL: Colour = (0.66, 0.67, 0.69)


@dataclasses.dataclass(frozen=True)
class View:
    """The mapping from the world to the pixels of a picture.

    Attributes:
        height: height of the picture in pixels.
        width: width of the picture in pixels.
        zoom: scale factor; 1 shows exactly one unit along the shorter side.
        angle: roll of the camera in radians.
        x: position of the world's origin right of the picture's centre, in lengths of
            the shorter side.
        y: position of the world's origin below the picture's centre, in lengths of the
            shorter side.
    """

    height: int
    width: int
    zoom: float = 1.0
    angle: float = 0.0
    x: float = 0.0
    y: float = 0.0

    @property
    def scale(self) -> float:
        """Number of pixels per world unit."""
        return min(self.height, self.width) * self.zoom

    def finer(self, factor: int) -> View:
        """Returns the same view with `factor` times as many pixels per side."""
        return dataclasses.replace(
            self, height=self.height * factor, width=self.width * factor
        )

    def window(
        self, x: float, y: float, angle: float, half_u: float, half_v: float
    ) -> tuple[tuple[slice, slice], Field, Field]:
        """Returns the pixels around a box, and their coordinates in the box's frame.

        Args:
            x: horizontal position of the box's centre, in units.
            y: vertical position of the box's centre, in units.
            angle: angle of the box in radians.
            half_u: half of the box's length, in units.
            half_v: half of the box's width, in units.

        Returns:
            (rows, columns), u, v. Coordinates u and v are in units and have the
            window's shape, which may be empty.
        """
        c, s = math.cos(self.angle), math.sin(self.angle)
        short = min(self.height, self.width)
        px = self.width / 2 + self.scale * (c * x - s * y) + short * self.x
        py = self.height / 2 + self.scale * (s * x + c * y) + short * self.y
        c, s = math.cos(self.angle + angle), math.sin(self.angle + angle)
        rx = self.scale * (abs(c) * half_u + abs(s) * half_v)
        ry = self.scale * (abs(s) * half_u + abs(c) * half_v)
        rows = _range(py - ry, py + ry, self.height)
        columns = _range(px - rx, px + rx, self.width)
        dy = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - py
        dx = np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - px
        u = (c * dx + s * dy) / self.scale
        v = (c * dy - s * dx) / self.scale
        return (rows, columns), u.astype(np.float32), v.astype(np.float32)


def _range(low: float, high: float, size: int) -> slice:
    start = min(max(math.floor(low), 0), size)
    return slice(start, max(start, min(math.ceil(high), size)))


@dataclasses.dataclass(frozen=True)
class Damage:
    """A change of a part's geometry, in the part's frame.

    Attributes:
        kind: "bend" (beyond `u`, the axis curves away, by `size` at the end) or "chip"
            (a jagged bite of radius `size` around (u, v)).
        u: position along the axis, in units.
        v: position across the axis, in units; not used by a bend.
        size: deflection of a bend, signed, or radius of a chip, in units.
        phase: rotation of a chip's jagged outline, in radians.
    """

    kind: str
    u: float
    v: float
    size: float
    phase: float = 0.0


@dataclasses.dataclass(frozen=True)
class Part:
    """An object in a scene.

    Attributes:
        type: name of the part in the rules, such as "long_screw".
        cell: name of the compartment that holds the part.
        shape: key of `SHAPES`.
        x: horizontal position of the centre, in units.
        y: vertical position of the centre, in units.
        angle: angle of the axis in radians.
        length: length along the axis, in units.
        width: width across the axis, in units.
        colours: colours that the shape needs.
        tint: deviation of this part from `colours`, one factor per channel.
        detail: further numbers that the shape needs.
        damage: structural defect of the geometry; None if there is none.
    """

    type: str
    cell: str
    shape: str
    x: float
    y: float
    angle: float
    length: float
    width: float
    colours: tuple[Colour, ...] = (STEEL,)
    tint: Colour = (1.0, 1.0, 1.0)
    detail: tuple[float, ...] = ()
    damage: Damage | None = None


@dataclasses.dataclass(frozen=True)
class Surface:
    """A shape evaluated on a window: signed distance, height, colour and gloss."""

    distance: Field
    height: Field
    colour: Picture
    gloss: float


# Signed distances -----------------------------------------------------------
