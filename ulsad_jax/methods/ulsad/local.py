"""Defines the local reconstructor: deep feature reconstruction (DFR), twice as wide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import BatchNorm, Conv, ConvTranspose, xavier_uniform

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ACTIVATIONS = {"relu": nn.relu, "identity": lambda x: x}


class LocalReconstructor(nn.Module):
    """Network that reconstructs features and predicts the global autoencoder's output.

    Attributes:
        width: number of channels of the smallest grid, a quarter of the input's height
            and width; 1536 as published.
        output_activation: a key of `ACTIVATIONS`; "relu" as published, although it
            cannot produce the negative values of standardised features.
        dtype: computation type.
        axis_name: name of the `jax.pmap` axis, see `BatchNorm`.
    """

    width: int = 1536
    output_activation: str = "relu"
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, "b h w c"], *, train: bool
    ) -> tuple[Float[Array, "b h w 2*c"], Float[Array, "b h/4 w/4 width"]]:
        """Returns (output, code): output [..., :c] reconstructs, [..., c:] predicts."""
        width, channels = self.width, features.shape[-1]
        encoder = ((width // 2, 2), (width, 2), (width, 1))
        decoder = (
            (width // 2, 4, 2, 1),
            (width // 4, 4, 2, 1),
            (2 * channels, 5, 1, 2),
        )
        x = features
        for i, (out, stride) in enumerate(encoder, start=1):
            x = Conv(
                out,
                (3, 3),
                stride,
                padding=1,
                kernel_init=xavier_uniform,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = BatchNorm(name=f"bn{i}", axis_name=self.axis_name)(x, train=train)
            if i < len(encoder):
                x = nn.relu(x)
        code = x
        for i, (out, kernel, stride, padding) in enumerate(decoder, start=1):
            x = ConvTranspose(
                out, kernel, stride, padding, dtype=self.dtype, name=f"deconv{i}"
            )(x)
            x = BatchNorm(name=f"bn{i + 3}", axis_name=self.axis_name)(x, train=train)
            if i < len(decoder):
                x = nn.relu(x)
        x = ACTIVATIONS[self.output_activation](x)
        return x.astype(jnp.float32), code.astype(jnp.float32)
