"""Scenes: textured and shaded shapes over textures, with a class at every pixel."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from ulsad_jax.pretraining import shapes, textures

if TYPE_CHECKING:
    from jaxtyping import Array, Float

TEXTURES, CONTOURS, FRACTALS = 256, 160, 64  # classes
SHAPES = 1 + CONTOURS + FRACTALS  # 0 is "no shape"
LAYERS = 9  # shapes a scene, at most
BARE = 0.2  # of the scenes have none: a material and no product
CLASS_SEED = 2024  # of the classes: fixed, so that scene seeds draw the same classes


class Scene(NamedTuple):
    """A drawn image and what is at each of its pixels.

    Attributes:
        image: [h, w, 3] uint8.
        texture: [h, w] class of the texture.
        shape: [h, w] class of the shape, 0 where there is none.
    """

    image: jax.Array
    texture: jax.Array
    shape: jax.Array


class _Plan(NamedTuple):
    """Where the shapes of a scene are; all [layers]."""

    present: jax.Array
    shape: jax.Array  # class, from 1
    texture: jax.Array
    center: jax.Array  # [layers, 2] in pixels
    radius: jax.Array
    angle: jax.Array


@functools.partial(jax.jit, static_argnames=("size", "count"))
def draw_scenes(key: jax.Array, *, size: int, count: int) -> Scene:
    """Draws `count` scenes of `size` x `size` pixels; fields get a leading axis."""
    classes = _make_classes()
    return jax.vmap(lambda k: _draw_scene(k, size, classes))(
        jax.random.split(key, count)
    )


def _make_classes() -> tuple[textures.Texture, shapes.Contour, shapes.Fractal]:
    keys = jax.random.split(jax.random.key(CLASS_SEED), 3)
    return (
        jax.vmap(textures.make_class)(jax.random.split(keys[0], TEXTURES)),
        jax.vmap(shapes.make_contour)(jax.random.split(keys[1], CONTOURS)),
        jax.vmap(shapes.make_fractal)(jax.random.split(keys[2], FRACTALS)),
    )


def _draw_scene(key: jax.Array, size: int, classes) -> Scene:
    texture_classes, contours, fractals = classes
    keys = jax.random.split(key, 8)
    axis = jnp.arange(size) + 0.5
    place = jnp.stack(jnp.meshgrid(axis, axis), -1)  # x, y
    palette = _draw_palette(keys[0])
    plan = _plan(keys[1], size)
    light = jax.random.uniform(keys[2], (2,), minval=-1, maxval=1)
    relief = jax.random.uniform(keys[3]) * (jax.random.uniform(keys[4]) < 0.6)

    def paint(key, texture_class):
        keys = jax.random.split(key, 3)
        texture = jax.tree.map(lambda t: t[texture_class], texture_classes)
        value = textures.draw(texture, keys[0], place)[..., None]
        pair = jax.random.choice(keys[1], palette, (2,), replace=False)
        contrast = jax.random.uniform(keys[2], minval=0.15, maxval=1.0)
        return pair[0] + contrast * value * (pair[1] - pair[0])

    background = jax.random.randint(keys[5], (), 0, TEXTURES)
    scene = (
        paint(keys[6], background),
        jnp.full((size, size), background),
        jnp.zeros((size, size), jnp.int32),
    )

    def add(scene, layer):
        key, plan = layer
        image, texture, shape = scene
        keys = jax.random.split(key, 4)
        turn = shapes.rotation(plan.angle)
        local = (place - plan.center) @ turn
        index = plan.shape - 1
        contour = jax.tree.map(lambda t: t[jnp.minimum(index, CONTOURS - 1)], contours)
        distance = shapes.signed_distance(contour, local, plan.radius)
        fractal = jax.tree.map(lambda t: t[jnp.maximum(index - CONTOURS, 0)], fractals)
        density = shapes.draw_fractal(
            fractal, keys[0], center=plan.center, radius=plan.radius, size=size
        )
        is_fractal = index >= CONTOURS
        cover = jnp.where(is_fractal, density, jax.nn.sigmoid(-2.5 * distance))
        cover *= plan.present
        height = jnp.where(is_fractal, density, jnp.clip(-distance / 3, 0, 1))
        slope = jnp.stack(jnp.gradient(height)[::-1], -1) @ light
        painted = paint(keys[1], plan.texture) * (1 + 0.9 * relief * slope[..., None])
        outline = jax.random.uniform(keys[2]) * (jax.random.uniform(keys[3]) < 0.3)
        edge = jnp.where(is_fractal, 0.0, jnp.exp(-jnp.square(distance)))
        painted *= 1 - outline * edge[..., None]
        shadow = relief * 0.5 * jnp.exp(-jnp.maximum(distance, 0) / 2.5)
        shadow = jnp.where(is_fractal, 0.0, shadow) * plan.present
        image = image * (1 - shadow[..., None])
        image = image + cover[..., None] * (painted - image)
        covered = cover > 0.5
        return (
            image,
            jnp.where(covered & ~is_fractal, plan.texture, texture),
            jnp.where(covered, plan.shape, shape),
        ), None

    layers = (jax.random.split(keys[7], LAYERS), plan)
    (image, texture, shape), _ = jax.lax.scan(add, scene, layers)
    image = jnp.clip(image, 0, 1) * 255
    return Scene(
        image.astype(jnp.uint8), texture.astype(jnp.uint8), shape.astype(jnp.uint8)
    )


def _plan(key: jax.Array, size: int) -> _Plan:
    """Scattered shapes, or rows of equal ones as in an assembly, or a bare texture."""
    keys = jax.random.split(key, 12)
    scattered = jax.random.uniform(keys[0], (LAYERS, 2), maxval=size)
    columns = jax.random.randint(keys[1], (), 2, 5)
    pitch = size / columns
    index = jnp.arange(LAYERS)
    grid = (jnp.stack([index % columns, index // columns], -1) + 0.5) * pitch
    grid += jax.random.normal(keys[2], (LAYERS, 2))
    ordered = jax.random.uniform(keys[3]) < 0.4
    shape = jax.random.randint(keys[4], (LAYERS,), 1, SHAPES)
    kinds = jax.random.randint(keys[5], (), 1, 4)
    radius = jnp.exp(
        jax.random.uniform(
            keys[6], (LAYERS,), minval=jnp.log(0.03), maxval=jnp.log(0.3)
        )
    )
    same = index % kinds
    angle = jax.random.uniform(keys[7], (LAYERS,), maxval=2 * jnp.pi)
    texture = jax.random.randint(keys[8], (LAYERS,), 0, TEXTURES)
    share = jax.random.uniform(keys[9]) ** 0.7
    share *= jax.random.uniform(keys[11]) > BARE
    return _Plan(
        present=(jax.random.uniform(keys[10], (LAYERS,)) < share).astype(jnp.float32),
        shape=jnp.where(ordered, shape[same], shape),
        texture=jnp.where(ordered, texture[same], texture),
        center=jnp.where(ordered, grid, scattered),
        radius=jnp.where(
            ordered, jnp.minimum(radius[same] * size, 0.45 * pitch), radius * size
        ),
        angle=jnp.where(ordered, angle[same], angle),
    )


def _draw_palette(key: jax.Array) -> Float[Array, "6 3"]:
    """Colours that go together; grey in 40 % of the scenes."""
    keys = jax.random.split(key, 4)
    center = jax.random.uniform(keys[0], (3,))
    spread = jax.random.uniform(keys[1], minval=0.15, maxval=0.6)
    colors = center + spread * jax.random.normal(keys[2], (6, 3))
    grey = jax.random.uniform(keys[3]) < 0.4
    colors = jnp.where(grey, colors.mean(-1, keepdims=True) * 1.3 - 0.15, colors)
    return jnp.clip(colors, 0.02, 0.98)
