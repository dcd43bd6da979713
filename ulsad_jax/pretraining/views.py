"""Three views of a scene: other light and noise, a small shift; defects in the last."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from ulsad_jax.pretraining.scenes import Scene
from ulsad_jax.pretraining.shapes import squared_distance_to_stroke

if TYPE_CHECKING:
    from jaxtyping import Array, Float

VIEWS = 3
SHIFT = 3  # pixels of a view, at most
VISIBLE = 0.1  # change of a pixel, of 1, that is a defect in full
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
    """Makes two sound views and a possibly defective one: a leading axis of 3.

    Args:
        key: decides everything.
        scene: one scene, larger than the view.
        other: image of another scene, to transplant from.
        size: side of the views.
    """
    keys = jax.random.split(key, 6)
    room = scene.image.shape[0] - size
    offset = jax.random.randint(keys[0], (2,), 0, room + 1)
    shifts = jax.random.randint(keys[1], (VIEWS, 2), -SHIFT, SHIFT + 1)
    offsets = jnp.clip(offset + shifts, 0, room)

    def cut(x, offset):
        start = (*offset, *(0,) * (x.ndim - 2))
        return jax.lax.dynamic_slice(x, start, (size, size, *x.shape[2:]))

    views = jax.vmap(lambda offset: jax.tree.map(lambda x: cut(x, offset), scene))(
        offsets
    )
    images = views.image / 255.0
    defective, defect = _add_defect(keys[2], images[-1], cut(other, offset) / 255.0)
    strength = jax.random.uniform(keys[3], (2,)) ** 2  # of blur and noise, all views
    images = jax.vmap(lambda key, image: _expose(key, image, strength))(
        jax.random.split(keys[4], VIEWS), images.at[-1].set(defective)
    )
    # The same scene under another light altogether, in all views.
    gain = 1 + 0.25 * jax.random.normal(keys[5])
    return View(
        jnp.clip(images * gain, 0, 1),
        views.texture.astype(jnp.int32),
        views.shape.astype(jnp.int32),
        defect=jnp.zeros((VIEWS, size, size)).at[-1].set(defect),
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
    return changed, mask * jnp.clip(change / VISIBLE, 0, 1)


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
