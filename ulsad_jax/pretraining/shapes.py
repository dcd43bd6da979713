"""Shape classes: contours, glyphs and fractals, each from a formula."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

HARMONICS, STROKES, CORNERS = 6, 6, 8  # at most, of a contour or glyph
MAPS = 4  # of a fractal
ORBITS, STEPS, SETTLED = 32, 36, 6  # points a fractal: 32 * (36 - 6)


class Contour(NamedTuple):
    """Parameters of a closed contour or of a glyph.

    A contour is a circle or regular polygon whose radius swings with the angle (as in
    Kataoka et al., "Replacing Labeled Real-image Datasets with Auto-generated
    Contours", CVPR 2022), with or without a hole; a glyph is made of thick strokes.

    Attributes:
        corners: of the polygon; 0 for a circle.
        swing: [harmonics] amplitudes of the radius.
        phase: [harmonics] radians.
        aspect: width over height.
        hole: radius of the hole over that of the contour; 0 for none.
        strokes: [strokes, 2, 2] end points in -1..1.
        thickness: of the strokes.
        is_glyph: 1 for a glyph.
    """

    corners: jax.Array
    swing: jax.Array
    phase: jax.Array
    aspect: jax.Array
    hole: jax.Array
    strokes: jax.Array
    thickness: jax.Array
    is_glyph: jax.Array


def make_contour(key: jax.Array) -> Contour:
    """Draws the parameters of a class."""
    keys = jax.random.split(key, 11)
    harmonics = jnp.arange(1, HARMONICS + 1) + 1
    strength = 0.9 * jax.random.uniform(keys[0]) / harmonics
    chosen = jax.random.uniform(keys[1], (HARMONICS,)) < 0.35
    hole = jax.random.uniform(keys[2], minval=0.3, maxval=0.75)
    points = jax.random.uniform(keys[3], (STROKES + 1, 2), minval=-1, maxval=1)
    chained = jax.random.uniform(keys[4], (STROKES, 1)) < 0.6
    loose = jax.random.uniform(keys[5], (STROKES, 2), minval=-1, maxval=1)
    start = jnp.where(chained, points[:-1], loose)
    count = jax.random.randint(keys[6], (), 1, STROKES + 1)
    strokes = jnp.stack([start, points[1:]], 1)
    strokes = strokes[jnp.arange(STROKES) % count]
    return Contour(
        corners=jax.random.choice(keys[7], jnp.array([0, 0, 3, 4, 4, 5, 6, 8])),
        swing=strength * chosen,
        phase=jax.random.uniform(keys[8], (HARMONICS,), maxval=2 * jnp.pi),
        aspect=jnp.exp(jax.random.uniform(keys[9], minval=-0.9, maxval=0.9)),
        hole=jnp.where(jax.random.uniform(keys[2]) < 0.3, hole, 0.0),
        strokes=strokes,
        thickness=jax.random.uniform(keys[10], minval=0.08, maxval=0.3),
        is_glyph=jax.random.uniform(keys[6]) < 0.35,
    )


def signed_distance(
    contour: Contour, place: Float[Array, "h w 2"], radius: Float[Array, ""]
) -> Float[Array, "h w"]:
    """About the distance to the outline in pixels, negative inside.

    Shapes without a hole have one of no size: distances fall again towards the centre.

    Args:
        contour: the class.
        place: of the pixels, with the shape's centre at 0, in pixels.
        radius: of the shape in pixels.
    """
    scaled = place / radius
    stretched = scaled * jnp.stack(
        [contour.aspect**-0.5, contour.aspect**0.5]  # the area stays
    )
    x, y = stretched[..., 0], stretched[..., 1]
    rho = jnp.sqrt(x * x + y * y) + 1e-6
    side = 2 * jnp.pi * jnp.arange(CORNERS) / jnp.maximum(contour.corners, 1)
    polygon = jnp.zeros_like(rho)
    for i in range(CORNERS):  # the farthest of its sides; some count twice
        polygon = jnp.maximum(polygon, x * jnp.cos(side[i]) + y * jnp.sin(side[i]))
    size = jnp.where(contour.corners > 0, polygon, rho)
    # Radii swing with cos(n * angle + phase), taken from powers of a unit number.
    cos, sin = x / rho, y / rho
    outline, re, im = jnp.ones_like(rho), cos, sin
    for i in range(HARMONICS):
        re, im = re * cos - im * sin, re * sin + im * cos
        swing, phase = contour.swing[i], contour.phase[i]
        outline += swing * (re * jnp.cos(phase) - im * jnp.sin(phase))
    outline = jnp.maximum(outline, 0.15)
    ring = jnp.maximum(size - outline, contour.hole * outline - size)
    start, end = contour.strokes[:, 0], contour.strokes[:, 1]
    along = end - start
    glyph = jnp.full(rho.shape, jnp.inf)
    for i in range(STROKES):
        stroke = squared_distance_to_stroke(scaled, start[i], along[i])
        glyph = jnp.minimum(glyph, stroke)
    glyph = jnp.sqrt(glyph)
    return radius * jnp.where(contour.is_glyph, glyph - contour.thickness, ring)


def squared_distance_to_stroke(
    place: Float[Array, "h w 2"], start: Float[Array, "2"], along: Float[Array, "2"]
) -> Float[Array, "h w"]:
    """The squared distance to the straight stroke from `start` to `start + along`."""
    x, y = place[..., 0] - start[0], place[..., 1] - start[1]
    u, v = along
    t = jnp.clip((x * u + y * v) / jnp.maximum(u * u + v * v, 1e-6), 0, 1)
    return (x - t * u) ** 2 + (y - t * v) ** 2


class Fractal(NamedTuple):
    """Parameters of an iterated function system (Kataoka et al., FractalDB, 2020).

    Attributes:
        matrices: [maps, 2, 2], contractions.
        offsets: [maps, 2].
    """

    matrices: jax.Array
    offsets: jax.Array


def make_fractal(key: jax.Array) -> Fractal:
    """Draws contractions from rotations and singular values, as MixFractals does."""
    keys = jax.random.split(key, 4)
    angles = jax.random.uniform(keys[0], (2, MAPS), maxval=2 * jnp.pi)
    values = jax.random.uniform(keys[1], (MAPS, 2), minval=0.25, maxval=0.85)
    flips = jnp.where(jax.random.uniform(keys[2], (MAPS, 2)) < 0.3, -1, 1)
    left, right = (rotation(a) for a in angles)
    matrices = jnp.einsum("mij,mj,mjk->mik", left, values * flips, right)
    offsets = jax.random.uniform(keys[3], (MAPS, 2), minval=-1, maxval=1)
    return Fractal(matrices, offsets)


def draw_fractal(
    fractal: Fractal,
    key: jax.Array,
    *,
    center: Float[Array, "2"],
    radius: Float[Array, ""],
    size: int,
) -> Float[Array, "size size"]:
    """How densely the fractal's points cover each pixel, softly in 0..1.

    Args:
        fractal: the class.
        key: decides the instance: its points, its direction, a little of its form.
        center: x, y in pixels.
        radius: in pixels.
        size: of the square image.
    """
    keys = jax.random.split(key, 4)
    choices = jax.random.randint(keys[0], (STEPS, ORBITS), 0, MAPS)
    jitter = 1 + 0.05 * jax.random.normal(keys[1], fractal.matrices.shape)
    matrices = fractal.matrices * jitter

    def step(points, choice):
        moved = jnp.einsum("oij,oj->oi", matrices[choice], points)
        moved += fractal.offsets[choice]
        return moved, moved

    start = jax.random.normal(keys[2], (ORBITS, 2))
    _, points = jax.lax.scan(step, start, choices)
    points = points[SETTLED:].reshape(-1, 2)
    middle, spread = points.mean(0), jnp.sqrt(points.var(0).sum()) + 1e-3
    turn = rotation(jax.random.uniform(keys[3], maxval=2 * jnp.pi))
    cell = center + radius / (1.6 * spread) * (points - middle) @ turn
    cell = jnp.floor(cell).astype(jnp.int32)
    inside = ((cell >= 0) & (cell < size)).all(-1)
    cell = jnp.clip(cell, 0, size - 1)
    count = jnp.zeros((size, size)).at[cell[:, 1], cell[:, 0]].add(inside)
    # Larger fractals would be thinner, with the same number of points.
    count *= jnp.square(radius / 10)
    return 1 - jnp.exp(-1.5 * _smooth(count))


def rotation(angle: Float[Array, "..."]) -> Float[Array, "... 2 2"]:
    """Matrices that turn by an angle in radians."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)


def _smooth(x: Float[Array, "h w"]) -> Float[Array, "h w"]:
    padded = jnp.pad(x, 1)
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
