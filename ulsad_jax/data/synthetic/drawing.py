"""A small rasteriser that draws parts, marks and sheets of material with shading.

A canvas is a float picture that is changed in place and that a `View` describes.
Colours are display values, about 0..1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage

from ulsad_jax.data.synthetic.parts import Colour, Part, View
from ulsad_jax.data.synthetic.shapes import box, dome, evaluate, inside

if TYPE_CHECKING:
    from jaxtyping import Float32

    Field = Float32[np.ndarray, "h w"]
    Picture = Float32[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True)
class Light:
    """A lamp, given by its direction in the picture's frame.

    Attributes:
        azimuth: angle in radians; 0 means light from the right, and the angle increases
            towards the picture's bottom.
        elevation: angle above the table in radians.
    """

    azimuth: float
    elevation: float = 0.9

    @property
    def x(self) -> float:
        """Horizontal component of the unit vector to the lamp."""
        return math.cos(self.azimuth) * math.cos(self.elevation)

    @property
    def y(self) -> float:
        """Vertical component of the unit vector, downwards in the picture."""
        return math.sin(self.azimuth) * math.cos(self.elevation)

    @property
    def z(self) -> float:
        """Component of the unit vector towards the camera."""
        return math.sin(self.elevation)


@dataclasses.dataclass(frozen=True)
class Mark:
    """A structural defect of a surface, which changes its shading but not its geometry.

    Attributes:
        kind: "scratch", "crack", "stain" or "dent".
        x: horizontal position of the centre, in units.
        y: vertical position of the centre, in units.
        angle: angle of the axis in radians.
        length: length along the axis, in units.
        width: width across the axis, in units; for lines, the width of the line.
        seed: seed of the outline.
        part: index of the part that has the mark; None means the tray.
    """

    kind: str
    x: float
    y: float
    angle: float
    length: float
    width: float
    seed: int
    part: int | None = None


# Light and paint ------------------------------------------------------------


def _relief(
    height: Field, px: float, light: Light, gloss: float
) -> tuple[Field, Field]:
    """Returns the shading of a surface: a factor (1 if flat) and a highlight to add."""
    dy, dx = np.gradient(height, px)
    norm = 1 / np.sqrt(1 + dx * dx + dy * dy)
    facing = np.maximum((light.z - dx * light.x - dy * light.y) * norm, 0)
    # The half vector between the lamp and the camera, which looks straight down.
    half = math.sqrt(2 + 2 * light.z)
    mirror = (light.z + 1 - dx * light.x - dy * light.y) * norm / half
    shine = gloss * np.maximum(mirror, 0) ** 40
    flat = gloss * ((1 + light.z) / half) ** 40
    return 0.35 + 0.65 * facing / light.z, 0.55 * (shine - flat)


def paint(canvas: Picture, view: View, part: Part, light: Light) -> None:
    """Draws a part and its soft shadow onto `canvas`, which `view` describes."""
    drop = 0.16 * min(part.width, 0.1)
    window, surface = evaluate(view, part, margin=2 * drop + 0.008)
    if min(surface.distance.shape) < 2:
        return
    px = 1 / view.scale
    alpha = inside(surface.distance, px)
    shift = (-round(drop * light.y / px), -round(drop * light.x / px))
    shade = ndimage.uniform_filter(
        np.roll(alpha, shift, (0, 1)), max(1, round(1.4 * drop / px)), mode="constant"
    )
    factor, shine = _relief(surface.height, px, light, surface.gloss)
    lit = surface.colour * factor[..., None] + shine[..., None]
    patch = canvas[window]
    patch *= 1 - 0.5 * shade[..., None]
    patch += alpha[..., None] * (np.maximum(lit, 0.01) - patch)


def paint_mark(
    canvas: Picture,
    view: View,
    mark: Mark,
    light: Light,
    within: Field | None = None,
) -> None:
    """Changes the shading of `canvas` under a mark.

    Args:
        canvas: picture, float32 [h, w, 3], changed in place.
        view: view that describes the canvas.
        mark: mark to draw.
        light: lamp.
        within: float32 [h, w], 1 on the surface that has the mark, 0 elsewhere; None
            means 1 everywhere.
    """
    half_v = max(mark.width, 0.3 * mark.length)
    window, u, v = view.window(mark.x, mark.y, mark.angle, 0.6 * mark.length, half_v)
    if min(u.shape) < 2:
        return
    gain = _MARKS[mark.kind](u, v, mark, light, 1 / view.scale)
    if within is not None:
        gain = gain * within[window][..., None]
    patch = canvas[window]
    # The offset lets a mark show on black surfaces too.
    patch += gain * (patch + 0.06)


def _line(u: Field, mark: Mark, points: int, swing: float) -> Field:
    rng = np.random.default_rng(mark.seed)
    knots = np.cumsum(rng.normal(0, swing * mark.length, points))
    knots -= np.linspace(knots[0], knots[-1], points)
    return np.interp(u, np.linspace(-mark.length / 2, mark.length / 2, points), knots)


def _scratch(u: Field, v: Field, mark: Mark, light: Light, px: float) -> Picture:
    del light
    offset = v - _line(u, mark, 4, 0.04)
    fade = np.clip(4 - np.abs(u) * (8 / mark.length), 0, 1)
    bright = inside(np.abs(offset) - mark.width / 2, px)
    flank = inside(np.abs(offset - mark.width) - mark.width / 2, px)
    return (fade * (0.5 * bright - 0.32 * flank))[..., None]


def _crack(u: Field, v: Field, mark: Mark, light: Light, px: float) -> Picture:
    del light
    along = np.clip(1 - np.abs(u) * (2 / mark.length), 0, 1)
    width = mark.width * np.sqrt(along)
    offset = v - _line(u, mark, 12, 0.045)
    core = inside(np.abs(offset) - width / 2, px) * (along > 0)
    rim = inside(np.abs(offset + width) - width / 2, px) * (along > 0)
    return (0.3 * rim - 0.75 * core)[..., None]


def _stain(u: Field, v: Field, mark: Mark, light: Light, px: float) -> Picture:
    del light, px
    rng = np.random.default_rng(mark.seed)
    theta = np.arctan2(v / mark.width, u / mark.length)
    outline = 1 + sum(
        rng.uniform(0.05, 0.13) * np.cos(k * theta + rng.uniform(0, 6.3))
        for k in (2, 3, 5)
    )
    r = np.hypot(2 * u / mark.length, 2 * v / mark.width) / outline
    body = np.clip((1 - r) * 6, 0, 1)
    rim = np.exp(-(((r - 0.92) / 0.08) ** 2)) * body
    tint = np.asarray(_STAINS[mark.seed % len(_STAINS)], np.float32)
    return ((0.75 + 0.25 * rim) * body)[..., None] * (tint - 1)


_STAINS = ((0.62, 0.52, 0.38), (0.55, 0.56, 0.58), (0.68, 0.55, 0.45))


def _dent(u: Field, v: Field, mark: Mark, light: Light, px: float) -> Picture:
    r = np.hypot(2 * u / mark.length, 2 * v / mark.width)
    depth = 0.16 * mark.length * np.maximum(1 - r * r, 0) ** 2
    factor, shine = _relief(-depth, px, light, 0.5)
    return (factor - 1 + shine)[..., None]


_MARKS = {"scratch": _scratch, "crack": _crack, "stain": _stain, "dent": _dent}


# Ground ---------------------------------------------------------------------


def paint_sheet(
    canvas: Picture,
    view: View,
    light: Light,
    texture: Picture,
    *,
    sheet: tuple[float, float, float, float],
    radius: float,
    depth: float,
) -> None:
    """Draws a rounded sheet of `texture` onto the canvas, raised or sunk.

    Args:
        canvas: picture, float32 [h, w, 3], changed in place.
        view: view that describes the canvas.
        light: lamp.
        texture: picture of the material, with the shape of the canvas.
        sheet: (centre x, centre y, half width, half height) in units.
        radius: radius of the corners in units.
        depth: height of the edge in units; negative for a pocket; 0 for a printed
            field, which gets an outline.
    """
    x, y, half_u, half_v = sheet
    reach = 3 * abs(depth) + 0.01
    window, u, v = view.window(x, y, 0.0, half_u + reach, half_v + reach)
    px = 1 / view.scale
    distance = box(u, v, half_u, half_v, radius)
    alpha = inside(distance, px)
    patch = canvas[window]
    top = texture[window]
    if depth == 0:
        line = inside(np.abs(distance + 0.006) - 0.0025, px)
        patch += alpha[..., None] * (top * (1 - 0.45 * line[..., None]) - patch)
        return
    c, s = math.cos(view.angle), math.sin(view.angle)
    lx, ly = c * light.x + s * light.y, c * light.y - s * light.x
    cast = 1.4 * abs(depth)
    sign = math.copysign(1, depth)
    moved = box(u + cast * lx, v + cast * ly, half_u, half_v, radius)
    shadow = np.clip(0.5 - sign * moved / (1.2 * abs(depth)), 0, 1)[..., None]
    edge, shine = _relief(sign * dome(distance, 0.5 * abs(depth)), px, light, 0.4)
    rim = (np.clip(edge, 0.6, 1.5) + shine)[..., None]
    if depth > 0:
        patch *= 1 - 0.45 * shadow
        patch += alpha[..., None] * (top * rim - patch)
    else:
        patch += alpha[..., None] * (top * (1 - 0.45 * shadow) * rim - patch)


def noise(
    rng: np.random.Generator, shape: tuple[int, int], rows: float, columns: float
) -> Field:
    """Draws smooth noise, mostly within -1..1.

    Args:
        rng: random generator.
        shape: (height, width) in pixels.
        rows: number of grains along the height.
        columns: number of grains along the width.
    """
    grid = (max(2, round(rows)), max(2, round(columns)))
    grains = Image.fromarray(rng.uniform(-1, 1, grid).astype(np.float32))
    return np.asarray(grains.resize(shape[::-1], Image.Resampling.BICUBIC))


def texture(
    kind: str, colour: Colour, shape: tuple[int, int], rng: np.random.Generator
) -> Picture:
    """Draws a sheet of a material with random grain.

    Args:
        kind: key of `TEXTURES`.
        colour: mean colour of the material.
        shape: (height, width) in pixels.
        rng: random generator of the grain.
    """
    tall, wide = (n / min(shape) for n in shape)
    relief = TEXTURES[kind](rng, shape, tall, wide)
    return (1 + relief)[..., None] * np.asarray(colour, np.float32)


def _brushed(
    rng: np.random.Generator, shape: tuple[int, int], tall: float, wide: float
) -> Field:
    fine = noise(rng, shape, 180 * tall, 5 * wide)
    return 0.07 * fine + 0.06 * noise(rng, shape, 40 * tall, 2)


def _wood(
    rng: np.random.Generator, shape: tuple[int, int], tall: float, wide: float
) -> Field:
    y = np.linspace(0, tall, shape[0], dtype=np.float32)[:, None]
    warp = noise(rng, shape, 3 * tall, 2 * wide)
    rings = np.sin(2 * math.pi * (9 * y + 1.1 * warp + rng.uniform()))
    grain = noise(rng, shape, 130 * tall, 7 * wide)
    return 0.09 * rings + 0.08 * grain + 0.05 * warp


def _fabric(
    rng: np.random.Generator, shape: tuple[int, int], tall: float, wide: float
) -> Field:
    threads = 42
    y = np.linspace(0, tall, shape[0], dtype=np.float32)[:, None]
    x = np.linspace(0, wide, shape[1], dtype=np.float32)
    bend = 0.1 * noise(rng, shape, 4 * tall, 4 * wide)
    weft = np.sin(2 * math.pi * (threads * y + bend + rng.uniform()))
    warp = np.sin(2 * math.pi * (threads * x + bend + rng.uniform()))
    slub = noise(rng, shape, 90 * tall, 12 * wide)
    fold = noise(rng, shape, 3 * tall, 3 * wide)
    return 0.09 * weft * warp + 0.05 * slub + 0.04 * fold


def _carton(
    rng: np.random.Generator, shape: tuple[int, int], tall: float, wide: float
) -> Field:
    fibres = noise(rng, shape, 110 * tall, 60 * wide)
    flutes = noise(rng, shape, 3, 34 * wide)
    return 0.06 * fibres + 0.05 * flutes + 0.05 * noise(rng, shape, 7, 7)


def _plastic(
    rng: np.random.Generator, shape: tuple[int, int], tall: float, wide: float
) -> Field:
    pores = noise(rng, shape, 150 * tall, 150 * wide)
    return 0.035 * pores + 0.03 * noise(rng, shape, 4 * tall, 4 * wide)


def _felt(
    rng: np.random.Generator, shape: tuple[int, int], tall: float, wide: float
) -> Field:
    tufts = noise(rng, shape, 100 * tall, 100 * wide)
    return 0.10 * tufts + 0.06 * noise(rng, shape, 14 * tall, 14 * wide)


TEXTURES = {
    "brushed": _brushed,
    "wood": _wood,
    "fabric": _fabric,
    "carton": _carton,
    "plastic": _plastic,
    "felt": _felt,
}
