"""ResNet trunks up to layer3 (He et al. 2016; Zagoruyko & Komodakis 2016).

Attribute names and the place of the stride (the 3 x 3 of a bottleneck) are those of
torchvision and timm, so that their weights fit.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.models.layers import BatchNorm, Conv

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Architecture(NamedTuple):
    """What tells the trunks apart.

    Attributes:
        bottleneck: 1 x 1, 3 x 3, 1 x 1 blocks rather than two 3 x 3.
        blocks: how many, in layer1 to layer3.
        width: channels of layer1's 3 x 3; each further layer doubles them.
    """

    bottleneck: bool
    blocks: tuple[int, int, int]
    width: int


ARCHITECTURES = {
    "resnet18": Architecture(False, (2, 2, 2), 64),
    "resnet34": Architecture(False, (3, 4, 6), 64),
    "resnet50": Architecture(True, (3, 4, 6), 64),
    "wide_resnet50_2": Architecture(True, (3, 4, 6), 128),
    "wide_resnet101_2": Architecture(True, (3, 4, 23), 128),
}


class Block(nn.Module):
    """A residual block: basic, or bottleneck.

    Attributes:
        width: channels of its 3 x 3 convolutions.
        features: output channels.
        stride: of the block.
        bottleneck: which kind.
        dtype: computation type.
    """

    width: int
    features: int
    stride: int
    bottleneck: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b oh ow features"]:
        """Adds the block's response to its input, or to a projection of it."""
        if self.bottleneck:
            plan = ((1, 1, self.width), (3, self.stride, self.width))
            plan += ((1, 1, self.features),)
        else:
            plan = ((3, self.stride, self.width), (3, 1, self.features))
        y = x
        for i, (kernel, stride, features) in enumerate(plan, start=1):
            y = _conv(features, kernel, stride, self.dtype, f"conv{i}")(y)
            y = BatchNorm(name=f"bn{i}")(y, train=train)
            if i < len(plan):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = _conv(self.features, 1, self.stride, self.dtype, "downsample_0")(x)
            x = BatchNorm(name="downsample_1")(x, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A trunk up to layer3.

    Attributes:
        architecture: a key of `ARCHITECTURES`.
        dtype: computation type.
    """

    architecture: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], *, train: bool = False
    ) -> tuple[Float[Array, "b h/8 w/8 c2"], Float[Array, "b h/16 w/16 c3"]]:
        """Takes a normalised image; returns the outputs of layer2 and layer3.

        Args:
            x: see `layers.normalize_image`.
            train: batch norm by the batch, for pretraining alone; `batch_stats` must
                then be mutable.
        """
        bottleneck, blocks, width = ARCHITECTURES[self.architecture]
        x = _conv(64, 7, 2, self.dtype, "conv1")(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train=train))
        x = max_pool(x)
        outputs = []
        for stage, count in enumerate(blocks):
            for i in range(count):
                x = Block(
                    width=width * 2**stage,
                    features=64 * 2**stage * (4 if bottleneck else 1),
                    stride=2 if i == 0 and stage > 0 else 1,
                    bottleneck=bottleneck,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )(x, train=train)
            outputs.append(x)
        return outputs[1], outputs[2]


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """The maximum of 3 x 3 at stride 2, rows first: fast gradients on CPUs, too.

    The edge is repeated, which changes no maximum; ONNX has no padding for batches of
    any size.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        first, last = (jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, n - 1))
        padded = jnp.concatenate([first, x, last], axis)
        taps = [jax.lax.slice_in_dim(padded, i, i + n, 2, axis) for i in range(3)]
        x = functools.reduce(jnp.maximum, taps)
    return x


def _conv(features: int, kernel: int, stride: int, dtype: DTypeLike, name: str) -> Conv:
    """A convolution without bias that keeps the size at stride 1."""
    return Conv(
        features,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        name=name,
    )
