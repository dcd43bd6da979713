"""The frozen feature pyramid: what the reconstructors have to reproduce."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import normalize_image, resize
from ulsad_jax.trunks.resnet import ResNet, fold_batch_norm

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

FEATURE_CHANNELS = 384
# Which outputs of the trunk are features; all are put on layer2's grid.
LAYERS = {"layer2+layer3": (0, 1), "layer2": (0,), "layer3": (1,)}


def pyramid_variables(trunk: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a `FeaturePyramid`, as arrays of NumPy.

    Args:
        trunk: variables of a `ResNet`, with batch norm.
    """
    return {"params": {"trunk": fold_batch_norm(trunk)["params"]}}


def feature_shape(image_size: tuple[int, int]) -> tuple[int, int, int]:
    """(h/8, w/8, c) of the features of an image of (height, width) pixels."""
    height, width = image_size
    return height // 8, width // 8, FEATURE_CHANNELS


class FeaturePyramid(nn.Module):
    """Layers of a trunk on one grid, pooled to 384 channels; as published, 2 and 3.

    Its variables are `pyramid_variables`; batch norm is part of its convolutions.

    Attributes:
        architecture: of the trunk, a key of `resnet.ARCHITECTURES`.
        dtype: computation type of the trunk.
        layers: a key of `LAYERS`.
    """

    architecture: str
    dtype: DTypeLike = jnp.float32
    layers: str = "layer2+layer3"

    def setup(self):
        """Makes the trunk."""
        self.trunk = ResNet(self.architecture, self.dtype, folded=True)

    def __call__(
        self, image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
    ) -> Float[Array, "b h/8 w/8 384"]:
        """Returns features in float32, not standardised."""
        layer2, layer3 = self.trunk(normalize_image(image))
        layer3 = resize(layer3.astype(jnp.float32), layer2.shape[1:3])
        outputs = layer2.astype(jnp.float32), layer3
        chosen = [outputs[i] for i in LAYERS[self.layers]]
        return pool_channels(jnp.concatenate(chosen, axis=-1), FEATURE_CHANNELS)


def pool_channels(x: Float[Array, "b h w c"], bins: int) -> Float[Array, "b h w bins"]:
    """Averages neighbouring channels (PyTorch's `adaptive_avg_pool1d` over them).

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
