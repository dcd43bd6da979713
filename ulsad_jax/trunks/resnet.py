"""Defines ResNet trunks up to layer3 (He et al. 2016; Zagoruyko & Komodakis 2016).

Attribute names and the place of the stride (the 3 x 3 of a bottleneck) are those of
torchvision and timm, so that their weights fit.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import BatchNorm, Conv, fold_batch_norm, normalize_image
from ulsad_jax.trunks.base import Architecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8


class Block(nn.Module):
    """A residual block, basic or bottleneck.

    Attributes:
        width: number of channels of its 3 x 3 convolutions.
        features: number of output channels.
        stride: stride of the block.
        bottleneck: True for a bottleneck block, False for a basic one.
        dtype: computation type.
        folded: True if batch norm is part of the convolutions; see `ResNet`.
    """

    width: int
    features: int
    stride: int
    bottleneck: bool
    dtype: DTypeLike = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow features"]:
        """Adds the block's response to its input, or to a projection of it."""
        if self.bottleneck:
            plan = ((1, 1, self.width), (3, self.stride, self.width))
            plan += ((1, 1, self.features),)
        else:
            plan = ((3, self.stride, self.width), (3, 1, self.features))
        conv = functools.partial(_conv, dtype=self.dtype, folded=self.folded)
        y = x
        for i, (kernel, stride, features) in enumerate(plan, start=1):
            y = conv(y, features, kernel, stride, name=f"conv{i}")
            if i < len(plan):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = conv(x, self.features, 1, self.stride, name="downsample_0")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet trunk up to layer3.

    Attributes:
        bottleneck: True for blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions, False for
            blocks of two 3 x 3.
        blocks: numbers of blocks in layer1 to layer3.
        width: number of channels of layer1's 3 x 3 convolutions; each further layer
            doubles it.
        dtype: computation type.
        folded: True if batch norm is part of the convolutions; the variables are then
            those of `layers.fold_batch_norm`.
    """

    bottleneck: bool
    blocks: tuple[int, int, int]
    width: int
    dtype: DTypeLike = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
    ) -> dict[str, Float[Array, "b gh gw c"]]:
        """Returns `layer1` to `layer3`, at 1/4, 1/8 and 1/16 of the image's size.

        Args:
            image: uint8 in 0..255 or float in 0..1.
        """
        settings = {"dtype": self.dtype, "folded": self.folded}
        x = normalize_image(image)
        x = max_pool(nn.relu(_conv(x, 64, 7, 2, name="conv1", **settings)))
        outputs = {}
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                x = Block(
                    width=self.width * 2**stage,
                    features=64 * 2**stage * (4 if self.bottleneck else 1),
                    stride=2 if i == 0 and stage > 0 else 1,
                    bottleneck=self.bottleneck,
                    name=f"layer{stage + 1}_{i}",
                    **settings,
                )(x)
            outputs[f"layer{stage + 1}"] = x
        return outputs


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """Returns the maximum of 3 x 3 windows at stride 2, by rows and then by columns.

    The edge is repeated, which changes no maximum. ONNX has no padding for batches of
    any size.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        first, last = (jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, n - 1))
        padded = jnp.concatenate([first, x, last], axis)
        taps = [jax.lax.slice_in_dim(padded, i, i + n, 2, axis) for i in range(3)]
        x = functools.reduce(jnp.maximum, taps)
    return x


def _conv(
    x: Float[Array, "b h w c"],
    features: int,
    kernel: int,
    stride: int,
    *,
    name: str,
    dtype: DTypeLike,
    folded: bool,
) -> Float[Array, "b oh ow features"]:
    """Applies a convolution that keeps the size at stride 1, and its batch norm."""
    y = Conv(
        features,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        use_bias=folded,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        name=name,
    )(x)
    return y if folded else BatchNorm(name=_norm_of((name,)))(y, train=False)


def _norm_of(path: tuple[str, ...]) -> str:
    """Returns the name of a convolution's batch norm."""
    names = {"downsample_0": "downsample_1"}
    return names.get(path[-1], path[-1].replace("conv", "bn"))


def _describe(
    bottleneck: bool, blocks: tuple[int, int, int], width: int
) -> Architecture:
    """Returns the architecture that the method is published with.

    Its features have 384 channels, on layer2's grid.
    """
    return Architecture(
        functools.partial(ResNet, bottleneck, blocks, width),
        grid="layer2",
        layers="layer2+layer3",
        levels="layer1+layer2+layer3",
        channels=384,
        fold=functools.partial(fold_batch_norm, norm_of=_norm_of),
        unused=("layer4.", "fc.", "classifier.", "head."),
    )


TRUNKS = {
    "resnet18": _describe(False, (2, 2, 2), 64),
    "resnet34": _describe(False, (3, 4, 6), 64),
    "resnet50": _describe(True, (3, 4, 6), 64),
    "wide_resnet50_2": _describe(True, (3, 4, 6), 128),
    "wide_resnet101_2": _describe(True, (3, 4, 23), 128),
}
