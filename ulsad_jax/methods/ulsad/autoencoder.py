"""Defines the global autoencoder: from an image to features through a 64-d code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import BatchNorm, Conv, normalize_image, resize

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8


def decoder_sizes(extent: int) -> tuple[int, ...]:
    """Returns the grid size before each decoder convolution, along one side.

    For 256 pixels these are 3, 8, 15, 31, 63 and 32, as in the reference.

    Args:
        extent: height or width of the image in pixels.
    """
    first = max(1, extent // 64 - 1)
    middle = (extent // 32, extent // 16 - 1, extent // 8 - 1, extent // 4 - 1)
    return (first, *middle, extent // 8)


class GlobalAutoencoder(nn.Module):
    """Autoencoder that predicts the feature map of an image from a 64-d code.

    Attributes:
        channels: number of channels of the predicted features.
        dtype: computation type.
        axis_name: name of the `jax.pmap` axis, see `BatchNorm`.
    """

    channels: int
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b h/8 w/8 channels"], Float[Array, "b 64"]]:
        """Returns (features, code); h and w must be multiples of 32 and at least 64."""
        height, width = image.shape[1:3]

        def normalized(x, index):
            norm = BatchNorm(
                epsilon=1e-4,
                affine=False,
                axis_name=self.axis_name,
                name=f"bn2d{index}",
            )
            return nn.relu(norm(x, train=train))

        def conv(x, name, features, kernel, **kwargs):
            layer = Conv(features, kernel, dtype=self.dtype, name=name, **kwargs)
            return layer(x)

        x = normalize_image(image)
        for i, features in enumerate((32, 32, 64, 64, 64), start=1):
            x = conv(x, f"enconv{i}", features, (4, 4), stride=2, padding=1)
            x = normalized(x, i)
        x = normalized(conv(x, "enconv6", 64, x.shape[1:3]), 6)
        code = x[:, 0, 0]
        *sizes, last = zip(decoder_sizes(height), decoder_sizes(width), strict=True)
        for i, size in enumerate(sizes, start=1):
            x = conv(resize(x, size), f"deconv{i}", 64, (4, 4), padding=2)
            x = normalized(x, i + 6)
        x = conv(resize(x, last), "deconv7", 64, (3, 3), padding=1)
        x = conv(normalized(x, 12), "deconv8", self.channels, (3, 3), padding=1)
        return x.astype(jnp.float32), code.astype(jnp.float32)
