"""Draws defects on images: textures in places where Perlin noise is high.

The places are those of Zavrtanik et al. (see `method`). The textures are drawn, too,
where the paper takes photographs (DTD, Cimpoi et al., 2014).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key

# Perlin noise has 2^k cells along an axis, for k from 0 up to (not including) this.
SCALES = 6
# Cells until noise repeats itself: more than a turned image covers, 2^5 times root 2.
LATTICE = 64
THRESHOLD = 0.5
SHARE = 0.5  # of images that get a defect
MOST_TRANSPARENT = 0.8
GRAIN = 0.2  # largest standard deviation of a texture's grains
WAVES = 64.0  # largest number of a texture's waves across the image


def draw_defects(
    image: Float[Array, "b h w 3"], keys: Key[Array, " b"]
) -> tuple[Float[Array, "b h w 3"], Float[Array, "b h w"]]:
    """Draws a defect on about half of the images.

    Args:
        image: images in 0..1.
        keys: random key of each.

    Returns:
        The images with defects, and their masks: 1 where there is one, else 0.
    """
    return jax.vmap(_draw_defect)(image, keys)


def perlin(
    angles: Float[Array, "n n"], y: Float[Array, "h w"], x: Float[Array, "h w"]
) -> Float[Array, "h w"]:
    """Returns Perlin noise, about -1 to 1 (Perlin, "Improving Noise", 2002).

    Args:
        angles: directions of the gradients at the corners of the cells, in radians; the
            noise repeats itself after n cells.
        y: vertical positions in cells.
        x: horizontal positions in cells.
    """
    cell_y, cell_x = (jnp.floor(v).astype(jnp.int32) for v in (y, x))
    y, x = y - cell_y, x - cell_x

    def project(i, j):
        """Returns the slope at a corner times the distance from it."""
        angle = angles[(cell_y + i) % len(angles), (cell_x + j) % len(angles)]
        return jnp.cos(angle) * (y - i) + jnp.sin(angle) * (x - j)

    def mix(a, b, t):
        return a + (b - a) * t**3 * (t * (6 * t - 15) + 10)

    rows = [mix(project(0, j), project(1, j), y) for j in (0, 1)]
    return math.sqrt(2) * mix(*rows, x)


def _draw_defect(
    image: Float[Array, "h w 3"], key: jax.Array
) -> tuple[Float[Array, "h w 3"], Float[Array, "h w"]]:
    """Draws a defect on an image, or none."""
    keys = jax.random.split(key, 4)
    mask = _draw_noise(keys[0], image.shape[:2]) > THRESHOLD
    mask = (mask & jax.random.bernoulli(keys[1], SHARE)).astype(image.dtype)
    texture = _draw_texture(keys[2], image.shape[:2])
    transparency = jax.random.uniform(keys[3], maxval=MOST_TRANSPARENT)
    defect = transparency * image + (1 - transparency) * texture
    return jnp.where(mask[..., None] > 0, defect, image), mask


def _draw_noise(key: jax.Array, size: tuple[int, int]) -> Float[Array, "h w"]:
    """Draws Perlin noise with a random number of cells on each axis, turned."""
    keys = jax.random.split(key, 3)
    cells = 2.0 ** jax.random.randint(keys[0], 2, 0, SCALES)
    y, x = _draw_turned(keys[1], size)
    angles = 2 * jnp.pi * jax.random.uniform(keys[2], (LATTICE, LATTICE))
    return perlin(angles, (y + 0.5) * cells[0], (x + 0.5) * cells[1])


def _draw_texture(key: jax.Array, size: tuple[int, int]) -> Float[Array, "h w 3"]:
    """Draws a texture in 0..1.

    It has three random colours: one on the ground, the second where Perlin noise is
    positive, the third on waves of a random length and direction; and grains.
    """
    keys = jax.random.split(key, 6)
    ground, spots, lines = jax.random.uniform(keys[0], (3, 3))
    spotted = jax.nn.sigmoid(16 * _draw_noise(keys[1], size))[..., None]
    _, x = _draw_turned(keys[2], size)
    waves = WAVES ** jax.random.uniform(keys[3])
    strength = jax.random.uniform(keys[4])
    lined = strength * (0.5 + 0.5 * jnp.sin(2 * jnp.pi * waves * x))[..., None]
    colour = ground + (spots - ground) * spotted
    colour += (lines - colour) * lined
    grain_keys = jax.random.split(keys[5])
    grain = GRAIN * jax.random.uniform(grain_keys[0])
    grains = jax.random.normal(grain_keys[1], (*size, 3))
    return jnp.clip(colour + grain * grains, 0, 1)


def _draw_turned(
    key: jax.Array, size: tuple[int, int]
) -> tuple[Float[Array, "h w"], Float[Array, "h w"]]:
    """Returns pixels' positions, -1/2 to 1/2, after a turn by up to 90 degrees."""
    turn = jax.random.uniform(key, minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    y, x = jnp.meshgrid(*((jnp.arange(n) + 0.5) / n - 0.5 for n in size), indexing="ij")
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    return cos * y - sin * x, sin * y + cos * x
