"""Two views of a scene: other light and noise, a small shift, and defects in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from ulsad_jax.pretraining.scenes import Scene
from ulsad_jax.pretraining.shapes import squared_distance_to_stroke

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SHIFT = 3  # pixels between the views, at most
DEFECTS = 3  # tried in the second view
STROKES = 2  # of a defect


class View(NamedTuple):
    """What the trunk is shown, and what is at each pixel of it.

    Attributes:
        image: [size, size, 3] float32 in 0..1.
        texture: [size, size] class.
        shape: [size, size] class.
        defect: [size, size] in 0..1, how much of the pixel a defect changed.
    """

    image: jax.Array
    texture: jax.Array
    shape: jax.Array
    defect: jax.Array


def make_views(key: jax.Array, scene: Scene, other: jax.Array, size: int) -> View:
    """Makes a clean and a possibly defective view; fields get a leading axis of 2.

    Args:
        key: decides everything.
        scene: one scene, larger than the view.
        other: image of another scene, to transplant from.
        size: side of the views.
    """
    keys = jax.random.split(key, 7)
    room = scene.image.shape[0] - size
    offset = jax.random.randint(keys[0], (2,), 0, room + 1)
    shift = jax.random.randint(keys[1], (2,), -SHIFT, SHIFT + 1)
    offsets = jnp.stack([offset, jnp.clip(offset + shift, 0, room)])

    def cut(x, offset):
        start = (*offset, *(0,) * (x.ndim - 2))
        return jax.lax.dynamic_slice(x, start, (size, size, *x.shape[2:]))

    clean, shifted = (jax.tree.map(lambda x, o=o: cut(x, o), scene) for o in offsets)
    strength = jax.random.uniform(keys[2], (2,)) ** 2  # of blur and noise, both views
    first = _expose(keys[3], clean.image / 255.0, strength)
    defective, defect = shifted.image / 255.0, jnp.zeros((size, size))
    foreign = cut(other, offset) / 255.0
    for defect_key in jax.random.split(keys[4], DEFECTS):
        defective, new = _add_defect(defect_key, defective, foreign)
        defect = jnp.maximum(defect, new)
    second = _expose(keys[5], defective, strength)
    # The same scene under another light altogether, in both views.
    gain = 1 + 0.25 * jax.random.normal(keys[6])
    images = jnp.clip(jnp.stack([first, second]) * gain, 0, 1)
    classes = jax.tree.map(
        lambda *x: jnp.stack(x).astype(jnp.int32), clean[1:], shifted[1:]
    )
    return View(
        images,
        *classes,
        defect=jnp.stack([jnp.zeros_like(defect), defect]),
    )


def _expose(
    key: jax.Array, image: Float[Array, "h w 3"], strength: Float[Array, "2"]
) -> Float[Array, "h w 3"]:
    """A photograph of the image: light from a side, colour cast, blur, noise."""
    keys = jax.random.split(key, 3)
    size = image.shape[0]
    axis = (jnp.arange(size) + 0.5) / size - 0.5
    tilt = 0.15 * jax.random.normal(keys[0], (2,))
    light = 1 + 0.08 * jax.random.normal(keys[1], (3,))
    light += (tilt[0] * axis[:, None] + tilt[1] * axis)[..., None]
    image = image * light
    image = image + strength[0] * (_blur(image) - image)
    return image + 0.05 * strength[1] * jax.random.normal(keys[2], image.shape)


def _add_defect(
    key: jax.Array, image: Float[Array, "h w 3"], other: Float[Array, "h w 3"]
) -> tuple[Float[Array, "h w 3"], Float[Array, "h w"]]:
    """Paints, blurs, transplants, moves or roughens a stroke or blob; often nothing."""
    keys = jax.random.split(key, 10)
    size = image.shape[0]
    axis = jnp.arange(size) + 0.5
    place = jnp.stack(jnp.meshgrid(axis, axis), -1)
    mask = _draw_mask(keys[0], place)
    mask *= jax.random.uniform(keys[1]) < 0.65
    tone = jax.random.uniform(keys[2], (3,))
    grey = jax.random.uniform(keys[3]) < 0.5
    tone = jnp.where(grey, tone[0], tone)
    shift = jax.random.randint(keys[4], (2,), 6, size - 6)
    smooth = _blur(_blur(_blur(image)))
    kinds = jnp.stack(
        [
            jnp.broadcast_to(tone, image.shape),
            image + jax.random.uniform(keys[5], minval=-0.4, maxval=0.4),
            smooth,
            other,
            jnp.roll(image, shift, (0, 1)),
            image + 0.25 * jax.random.normal(keys[6], image.shape[:2])[..., None],
            image.swapaxes(0, 1),
        ]
    )
    kind = jax.random.randint(keys[7], (), 0, len(kinds))
    opacity = jax.random.uniform(keys[8], minval=0.3, maxval=1.0)
    changed = image + opacity * mask[..., None] * (kinds[kind] - image)
    # A defect is where something changed, not where something was tried.
    change = jnp.abs(changed - image).max(-1)
    return changed, mask * jnp.clip(change / 0.05, 0, 1)


def _draw_mask(key: jax.Array, place: Float[Array, "h w 2"]) -> Float[Array, "h w"]:
    """A thin bent stroke or a blob, soft-edged."""
    keys = jax.random.split(key, 5)
    size = place.shape[0]
    start = jax.random.uniform(keys[0], (2,), maxval=size)
    thin = jax.random.uniform(keys[1]) < 0.4
    reach = jnp.where(thin, 0.35 * size, 0.08 * size)
    moves = reach * jax.random.normal(keys[2], (STROKES, 2))
    points = start + jnp.concatenate([jnp.zeros((1, 2)), jnp.cumsum(moves, 0)])
    nearest = jnp.full(place.shape[:2], jnp.inf)
    for i in range(STROKES):
        stroke = squared_distance_to_stroke(place, points[i], moves[i])
        nearest = jnp.minimum(nearest, stroke)
    width = jnp.where(
        thin,
        jax.random.uniform(keys[3], minval=0.5, maxval=2.0),
        jnp.exp(jax.random.uniform(keys[3], minval=0.4, maxval=2.2)),
    )
    edge = jax.random.uniform(keys[4], minval=0.7, maxval=3.0)
    return jax.nn.sigmoid(2 * edge * (width - jnp.sqrt(nearest)))


def _blur(image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
