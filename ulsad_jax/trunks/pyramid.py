"""Computes the frozen feature pyramid, which the reconstructors have to reproduce."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import resize
from ulsad_jax.trunks import base

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

    # One array, or with `levels` one for each output's name.
    Features = Float[Array, "b gh gw c"] | dict[str, Float[Array, "b gh gw c"]]


def pyramid_variables(architecture: str, trunk: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables of a `FeaturePyramid`.

    Args:
        architecture: name of the architecture; see `base.find`.
        trunk: variables of the architecture's module, as published.
    """
    folded = base.find(architecture).fold(trunk)
    return {kind: {"trunk": tree} for kind, tree in folded.items()}


class FeaturePyramid(nn.Module):
    """A trunk whose outputs are resized to one grid and concatenated.

    The channels are pooled if the architecture says so. The variables are those of
    `pyramid_variables`. With `levels`, it returns the outputs themselves.

    Attributes:
        architecture: name of the trunk's architecture; see `base.find`.
        dtype: computation type of the trunk.
        layers: names of outputs, joined with "+"; None for the architecture's own.
        levels: True to return the outputs by name, each at its own size.
        image_size: (height, width) in pixels of the images beside the features, see
            `features.resize_images`; None for the trunk's.
    """

    architecture: str
    dtype: DTypeLike = jnp.float32
    layers: str | None = None
    levels: bool = False
    image_size: tuple[int, int] | None = None

    def setup(self):
        """Makes the trunk."""
        make = base.find(self.architecture).make
        self.trunk = make(dtype=self.dtype, folded=True)

    def __call__(
        self, image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
    ) -> Features:
        """Returns features in float32, not standardised."""
        architecture = base.find(self.architecture)
        outputs = self.trunk(image)
        chosen = {
            name: outputs[name].astype(jnp.float32)
            for name in (self.layers or architecture.layers).split("+")
        }
        if self.levels:
            return chosen
        size = outputs[architecture.grid].shape[1:3]
        features = jnp.concatenate([resize(x, size) for x in chosen.values()], axis=-1)
        if architecture.channels is None:
            return features
        return pool_channels(features, architecture.channels)


@functools.cache
def feature_shapes(pyramid: FeaturePyramid, image_size: tuple[int, int]) -> Any:
    """Returns the shapes of one image's features, [1, gh, gw, c], without computing.

    Args:
        pyramid: frozen network.
        image_size: (height, width) in pixels.

    Returns:
        A `jax.ShapeDtypeStruct`, or with `FeaturePyramid.levels` one for each name.
    """
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.uint8)
    found, _ = jax.eval_shape(pyramid.init_with_output, jax.random.key(0), image)
    return found


def pool_channels(x: Float[Array, "b h w c"], bins: int) -> Float[Array, "b h w bins"]:
    """Averages neighbouring channels, as PyTorch's `adaptive_avg_pool1d` does.

    Bin i covers the channels floor(i * c / bins) up to ceil((i + 1) * c / bins).
    """
    channels = x.shape[-1]
    if channels % bins == 0:
        return x.reshape(*x.shape[:-1], bins, channels // bins).mean(-1)
    matrix = np.zeros((channels, bins), np.float32)
    for i in range(bins):
        start, end = i * channels // bins, -(-(i + 1) * channels // bins)
        matrix[start:end, i] = 1.0 / (end - start)
    return jnp.matmul(x, matrix, precision="highest")
