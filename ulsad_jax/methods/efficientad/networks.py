"""Defines EfficientAD's networks: patch descriptions, and an autoencoder of images.

The names of layers are those of anomalib, whose weights can be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import Conv, normalize_image, resize

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

    Image = UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
    Description = Float[Array, "b h/4-8 w/4-8 c"]

# Rows and columns that a description lacks on each side of a grid of h / 4 x w / 4.
BORDER = 4
DROPOUT = 0.2


class Layer(NamedTuple):
    """A convolution of a patch description network.

    Attributes:
        width: number of output channels; 0 for that of the description.
        kernel: height and width of the kernel.
        pooled: True to average 2 x 2 outputs.
    """

    width: int
    kernel: int
    pooled: bool = False


SIZES = {
    "small": (Layer(128, 4, True), Layer(256, 4, True), Layer(256, 3), Layer(0, 4)),
    "medium": (
        *(Layer(256, 4, True), Layer(512, 4, True), Layer(512, 1)),
        *(Layer(512, 3), Layer(0, 4), Layer(0, 1)),
    ),
}


class Pdn(nn.Module):
    """Patch description network: describes patches of 33 x 33 pixels, 4 pixels apart.

    Attributes:
        features: number of channels of a description.
        size: key of `SIZES`.
        dtype: computation type.
    """

    features: int
    size: str = "small"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Image) -> Description:
        """Describes the patches that lie within an image."""
        x = normalize_image(image)
        layers = SIZES[self.size]
        for i, (width, kernel, pooled) in enumerate(layers, start=1):
            shape, name = (kernel, kernel), f"conv{i}"
            x = Conv(width or self.features, shape, dtype=self.dtype, name=name)(x)
            if i < len(layers):
                x = nn.relu(x)
            if pooled:
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return x.astype(jnp.float32)


class Encoder(nn.Module):
    """Encodes an image in 64 numbers.

    Attributes:
        dtype: computation type.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b 1 1 64"]:
        """Returns the code."""
        for i, features in enumerate((32, 32, 64, 64, 64), start=1):
            conv = Conv(features, (4, 4), 2, 1, dtype=self.dtype, name=f"enconv{i}")
            x = nn.relu(conv(x))
        return Conv(64, x.shape[1:3], dtype=self.dtype, name="enconv6")(x)


class Decoder(nn.Module):
    """Decodes the description of an image.

    Attributes:
        features: number of channels of the description.
        extent: (height, width) of the image in pixels.
        dtype: computation type.
    """

    features: int
    extent: tuple[int, int]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b 1 1 64"], *, train: bool) -> Description:
        """Returns the description."""
        sizes = list(zip(*map(decoder_sizes, self.extent), strict=True))
        for i, size in enumerate(sizes[:-1], start=1):
            conv = Conv(64, (4, 4), padding=2, dtype=self.dtype, name=f"deconv{i}")
            x = nn.relu(conv(resize(x, size)))
            x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        conv = Conv(64, (3, 3), padding=1, dtype=self.dtype, name="deconv7")
        x = nn.relu(conv(resize(x, sizes[-1])))
        return Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="deconv8")(
            x
        )


class Autoencoder(nn.Module):
    """Predicts the description of an image from a code of 64 numbers.

    Attributes:
        features: number of channels of the description.
        dtype: computation type.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> Description:
        """Returns the description; with `train`, it needs a key for the dropout."""
        code = Encoder(self.dtype, name="encoder")(normalize_image(image))
        extent = image.shape[1:3]
        decoder = Decoder(self.features, extent, self.dtype, name="decoder")
        return decoder(code, train=train).astype(jnp.float32)


class Learners(nn.Module):
    """The student and the autoencoder.

    Attributes:
        features: number of channels of the teacher's description.
        size: key of `SIZES`.
        dtype: computation type.
    """

    features: int
    size: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, image: Image, changed: Image | None = None, *, train: bool
    ) -> tuple[Description, Description, Description]:
        """Describes images.

        Args:
            image: images.
            changed: the same with other colours; None for those of `image`.
            train: True for the autoencoder's dropout.

        Returns:
            What the student takes for the teacher's description of `image`, what it
            takes for the autoencoder's of `changed`, and the autoencoder's description
            of `changed`.
        """
        c = self.features
        student = Pdn(2 * c, self.size, self.dtype, name="student")
        autoencoder = Autoencoder(c, self.dtype, name="ae")
        both = other = student(image)
        if changed is None:
            changed = image
        else:
            other = student(changed)
        return both[..., :c], other[..., c:], autoencoder(changed, train=train)


def decoder_sizes(extent: int) -> tuple[int, ...]:
    """Returns the size before each decoder convolution but the last, along one side.

    For 256 pixels these are 3, 8, 15, 32, 63, 127 and 56, as published.

    Args:
        extent: height or width of the image in pixels.
    """
    first = max(1, extent // 64 - 1)
    middle = extent // 32, extent // 16 - 1, extent // 8, extent // 4 - 1
    return (first, *middle, extent // 2 - 1, extent // 4 - 2 * BORDER)
