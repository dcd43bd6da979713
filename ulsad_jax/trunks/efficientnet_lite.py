"""Defines EfficientNet-Lite trunks up to the fifth stage of blocks.

They are EfficientNets (Tan & Le 2019) for devices without an accelerator (Liu 2020): no
squeeze-and-excitation, ReLU6, and stem and first stage of one size. The names are
timm's, so that its weights fit. The architectures are named after TensorFlow, whose
padding they have.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import BatchNorm, fold_batch_norm
from ulsad_jax.nn.same import convolve_same
from ulsad_jax.trunks.base import WEIGHTS, Architecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

EPSILON = 1e-3  # of batch norm
EXPANSION = 6  # channels inside a block of each at its input; 1 in the first stage
KERNELS, STRIDES = (3, 3, 5, 3, 5), (1, 2, 2, 2, 1)  # by stage of blocks
# Batch norms by the names of their convolutions; in the first stage, and elsewhere.
FIRST_NORMS = {"conv_dw": "bn1", "conv_pw": "bn2"}
NORMS = {"conv_stem": "bn1", "conv_pw": "bn1", "conv_dw": "bn2", "conv_pwl": "bn3"}


class Conv(nn.Module):
    """A convolution with TensorFlow's SAME padding.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the kernel.
        stride: stride on both axes.
        depthwise: True if each channel has its own kernel.
        use_bias: True to add a bias.
        dtype: type of the computation; parameters are float32.
    """

    features: int
    kernel_size: int
    stride: int
    depthwise: bool
    use_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow features"]:
        """Computes the convolution of `x`."""
        k, inputs = self.kernel_size, 1 if self.depthwise else x.shape[-1]
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (k, k, inputs, self.features))
        y = convolve_same(
            x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class Block(nn.Module):
    """A depthwise convolution between 1 x 1 ones, of which the first stage has one.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the depthwise kernel.
        stride: stride of the block.
        expand: True to multiply the channels by `EXPANSION` first.
        dtype: computation type.
        folded: True if batch norm is part of the convolutions.
    """

    features: int
    kernel_size: int
    stride: int
    expand: bool
    dtype: DTypeLike = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow features"]:
        """Adds the block's response to its input where that has the same shape."""
        conv = functools.partial(
            _conv,
            norms=NORMS if self.expand else FIRST_NORMS,
            dtype=self.dtype,
            folded=self.folded,
        )
        y, last = x, "conv_pw"
        if self.expand:
            y = nn.relu6(conv(x, EXPANSION * x.shape[-1], 1, name="conv_pw"))
            last = "conv_pwl"
        kernel = {"kernel_size": self.kernel_size, "stride": self.stride}
        y = nn.relu6(conv(y, y.shape[-1], **kernel, depthwise=True, name="conv_dw"))
        y = conv(y, self.features, 1, name=last)
        return x + y if x.shape == y.shape else y


class EfficientNetLite(nn.Module):
    """An EfficientNet-Lite trunk up to the fifth stage of blocks.

    Attributes:
        blocks: numbers of blocks by stage.
        channels: numbers of output channels by stage.
        dtype: computation type.
        folded: True if batch norm is part of the convolutions; the variables are then
            those of `layers.fold_batch_norm`.
    """

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    dtype: DTypeLike = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
    ) -> dict[str, Float[Array, "b gh gw c"]]:
        """Returns `stage1` to `stage5`, at 1/2, 1/4, 1/8, 1/16 and 1/16 of the size.

        Args:
            image: uint8 in 0..255 or float in 0..1.
        """
        settings = {"dtype": self.dtype, "folded": self.folded}
        levels = image if image.dtype == jnp.uint8 else image * 255
        x = (levels.astype(jnp.float32) - 127) / 128
        x = nn.relu6(_conv(x, 32, 3, 2, norms=NORMS, name="conv_stem", **settings))
        outputs = {}
        plan = zip(self.blocks, self.channels, KERNELS, STRIDES, strict=True)
        for stage, (count, features, kernel_size, stride) in enumerate(plan):
            for i in range(count):
                x = Block(
                    features,
                    kernel_size,
                    stride if i == 0 else 1,
                    expand=stage > 0,
                    name=f"blocks_{stage}_{i}",
                    **settings,
                )(x)
            outputs[f"stage{stage + 1}"] = x
        return outputs


def _conv(
    x: Float[Array, "b h w c"],
    features: int,
    kernel_size: int,
    stride: int = 1,
    *,
    depthwise: bool = False,
    name: str,
    norms: Mapping[str, str],
    dtype: DTypeLike,
    folded: bool,
) -> Float[Array, "b oh ow features"]:
    """Applies a convolution and its batch norm."""
    y = Conv(features, kernel_size, stride, depthwise, folded, dtype, name=name)(x)
    return y if folded else BatchNorm(EPSILON, name=norms[name])(y, train=False)


def _norm_of(path: tuple[str, ...]) -> str:
    """Returns the name of a convolution's batch norm."""
    return (FIRST_NORMS if path[0] == "blocks_0_0" else NORMS)[path[-1]]


def _describe(
    blocks: tuple[int, ...], channels: tuple[int, ...], builtin: Path | None = None
) -> Architecture:
    """Returns an architecture with the third and the fifth stage as features."""
    return Architecture(
        functools.partial(EfficientNetLite, blocks, channels),
        grid="stage3",
        layers="stage3+stage5",
        levels="stage2+stage3+stage5",
        whiten=True,
        fold=functools.partial(fold_batch_norm, norm_of=_norm_of, epsilon=EPSILON),
        unused=("blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier."),
        builtin=builtin,
    )


_LITE0 = WEIGHTS / "tf_efficientnet_lite0.safetensors"
TRUNKS = {
    "tf_efficientnet_lite0": _describe((1, 2, 2, 3, 3), (16, 24, 40, 80, 112), _LITE0),
    "tf_efficientnet_lite1": _describe((1, 3, 3, 4, 4), (16, 24, 40, 80, 112)),
    "tf_efficientnet_lite2": _describe((1, 3, 3, 4, 4), (16, 24, 48, 88, 120)),
}
