"""Drawn materials with drawn defects: no layout, and every image another piece.

Brushed metal, cast metal, concrete, woven cloth, wood and leather, each piece with a
grain, a light and a contrast of its own, as on a production line. What is normal is
the material and not a place.

    python benchmarks/surface_defects.py --output=surfaces --seed=0

writes them as `photo_defects.py` does its photographs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import photo_defects
from photo_defects import Sample
from scipy import ndimage

if TYPE_CHECKING:
    from jaxtyping import Float

# A blurred spot would often not be seen: the grain is fine and faint.
TYPES = ("painted", "scratched")


def draw_sample(category: str, *, seed: int, split: str, type: str, i: int, size: int):
    """Draws image number `i` of a split and type, whatever else is drawn.

    Args:
        category: one of `CATEGORIES`.
        seed: decides pieces and defects.
        split: "train", "validation" or "test".
        type: "good" or one of `TYPES`.
        i: the image's number.
        size: side of the image in pixels.
    """
    rng = photo_defects.generator(seed, f"{category}/{split}/{type}/{i}")
    color, amplitude, draw = _MATERIALS[category]
    grain = amplitude * np.exp(rng.normal(0, 0.15)) * draw(rng, size)
    piece = 255 * np.clip(
        _light(rng, size) * (np.array(color) + grain[..., None]), 0, 1
    )
    image, mask = photo_defects.add_defect(piece, category, type, rng)
    image = image + rng.normal(0, 2.0, image.shape)
    return Sample(np.clip(np.round(image), 0, 255).astype(np.uint8), mask)


def _light(rng: np.random.Generator, size: int) -> Float[np.ndarray, "h w 1"]:
    """Brighter or darker as a whole, and towards one side."""
    across, down = rng.normal(0, 0.12, 2)
    axis = (np.arange(size) + 0.5) / size - 0.5
    field = 1 + across * axis + down * axis[:, None]
    return (np.exp(rng.normal(0, 0.15)) * field)[..., None]


# Grains: (rng, size) -> [size, size] about 0, deviation about 1; lengths are in pixels
# of 128 x 128 images ---------------------------------------------------------


def _brushed(rng, size):
    return (
        0.6 * _noise(rng, size, (14, 0.7))
        + 0.4 * _noise(rng, size, (5, 0.7))
        + 0.3 * _noise(rng, size, (0.6, 0.6))
    )


def _cast(rng, size):
    return (
        0.8 * _noise(rng, size, (1.2, 1.2))
        + 0.5 * _noise(rng, size, (0.6, 0.6))
        + 0.4 * _noise(rng, size, (4, 4))
    )


def _concrete(rng, size):
    pores = _noise(rng, size, (1.1, 1.1)) > 2.4
    octaves = sum(2**k * _noise(rng, size, (2**k, 2**k)) for k in range(4)) / 9
    return octaves + 0.7 * _noise(rng, size, (0.6, 0.6)) - 1.5 * pores


def _woven(rng, size):
    u, v = _turned(rng, size, 0.02)
    period = 6 * np.exp(rng.normal(0, 0.02))
    u, v = (2 * np.pi * (x / period + rng.uniform()) for x in (u, v))
    threads = np.where(np.sin(v / 2) > 0, np.sin(u), np.sin(v))
    return threads + 0.5 * _noise(rng, size, (1, 1))


def _wood(rng, size):
    _, v = _turned(rng, size, 0.05)
    rings = (v + 9 * _noise(rng, size, (20, 20))) / rng.uniform(9, 12)
    fibres = 0.8 * _noise(rng, size, (12, 0.7)) + 0.3 * _noise(rng, size, (0.6, 0.6))
    return np.sin(2 * np.pi * rings) + fibres


def _leather(rng, size):
    cells = 1.5 * np.abs(_noise(rng, size, (2.2, 2.2))) - 1.2
    return cells + 0.4 * _noise(rng, size, (0.7, 0.7))


# Colour, amplitude of the grain (both of 1), and the grain.
_MATERIALS = {
    "brushed": ((0.62, 0.62, 0.64), 0.05, _brushed),
    "cast": ((0.40, 0.40, 0.41), 0.07, _cast),
    "concrete": ((0.60, 0.58, 0.55), 0.07, _concrete),
    "woven": ((0.35, 0.42, 0.55), 0.09, _woven),
    "wood": ((0.62, 0.45, 0.30), 0.07, _wood),
    "leather": ((0.38, 0.25, 0.18), 0.06, _leather),
}
CATEGORIES = tuple(_MATERIALS)


def _noise(rng, size: int, sigma: tuple[float, float]) -> Float[np.ndarray, "h w"]:
    """White noise blurred by `sigma` across and down, of deviation 1."""
    across, down = (s * size / 128 for s in sigma)
    noise = ndimage.gaussian_filter(
        rng.standard_normal((size, size)), (down, across), mode="wrap"
    )
    return (noise - noise.mean()) / noise.std()


def _turned(rng, size: int, deviation: float):
    """Coordinates of the pixels along and across an axis that is about level."""
    angle = rng.normal(0, deviation)
    y, x = np.mgrid[:size, :size] * 128 / size
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


if __name__ == "__main__":
    photo_defects.main(sys.modules[__name__])
