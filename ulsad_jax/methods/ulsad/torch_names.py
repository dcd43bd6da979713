"""Converts PyTorch-named arrays of ULSAD's networks to Flax variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.ulsad.autoencoder import GlobalAutoencoder
from ulsad_jax.methods.ulsad.local import LocalReconstructor
from ulsad_jax.trunks.torch_names import Variables, import_arrays


def import_local(
    arrays: Mapping[str, np.ndarray], *, channels: int, width: int
) -> Variables:
    """Returns the variables of a `LocalReconstructor`.

    Args:
        arrays: arrays by their PyTorch names.
        channels: number of feature channels.
        width: number of channels, see `LocalReconstructor.width`.

    Raises:
        UserError: an array is missing, unknown, or of another shape.
    """
    features = jnp.zeros((1, 8, 8, channels))
    shapes = _shapes(LocalReconstructor(width), features)
    return import_arrays(arrays, shapes, "the local reconstructor")


def import_global(
    arrays: Mapping[str, np.ndarray], *, channels: int, image_size: tuple[int, int]
) -> Variables:
    """Returns the variables of a `GlobalAutoencoder`.

    Args:
        arrays: arrays by their PyTorch names.
        channels: number of feature channels.
        image_size: (height, width) in pixels.

    Raises:
        UserError: an array is missing, unknown, or of another shape.
    """
    image = jnp.zeros((1, *image_size, 3))
    shapes = _shapes(GlobalAutoencoder(channels), image)
    return import_arrays(arrays, shapes, "the global autoencoder")


def join_networks(local: Variables, global_: Variables) -> Variables:
    """Joins the variables of both networks."""
    return {
        kind: {"local": local[kind], "global": global_[kind]}
        for kind in ("params", "batch_stats")
    }


def _shapes(module: Any, x: jax.Array) -> Variables:
    """Returns the shapes of a module's variables, without computing them."""
    return jax.eval_shape(
        lambda key: module.init(key, x, train=False), jax.random.key(0)
    )
