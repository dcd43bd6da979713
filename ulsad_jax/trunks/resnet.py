"""ResNet trunks up to layer3 (He et al. 2016; Zagoruyko & Komodakis 2016).

Attribute names and the place of the stride (the 3 x 3 of a bottleneck) are those of
torchvision and timm, so that their weights fit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import BatchNorm, Conv

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
        folded: see `ResNet`.
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
    """A trunk up to layer3.

    Attributes:
        architecture: a key of `ARCHITECTURES`.
        dtype: computation type.
        folded: whether batch norm is part of the convolutions; its variables are then
            `fold_batch_norm`'s.
    """

    architecture: str
    dtype: DTypeLike = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b h/8 w/8 c2"], Float[Array, "b h/16 w/16 c3"]]:
        """Takes a normalised image; returns the outputs of layer2 and layer3.

        Args:
            x: see `layers.normalize_image`.
        """
        bottleneck, blocks, width = ARCHITECTURES[self.architecture]
        settings = {"dtype": self.dtype, "folded": self.folded}
        x = max_pool(nn.relu(_conv(x, 64, 7, 2, name="conv1", **settings)))
        outputs = []
        for stage, count in enumerate(blocks):
            for i in range(count):
                x = Block(
                    width=width * 2**stage,
                    features=64 * 2**stage * (4 if bottleneck else 1),
                    stride=2 if i == 0 and stage > 0 else 1,
                    bottleneck=bottleneck,
                    name=f"layer{stage + 1}_{i}",
                    **settings,
                )(x)
            outputs.append(x)
        return outputs[1], outputs[2]


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """The maximum of 3 x 3 at stride 2, rows first.

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


def fold_batch_norm(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What a folded `ResNet` computes the same outputs from, as arrays of NumPy.

    Batch norm by running statistics multiplies every channel by a number and adds
    another: the kernel takes the one, a bias the other.

    Args:
        variables: of a `ResNet` that is not folded.
    """
    params, stats = (
        traverse_util.flatten_dict(variables[kind])
        for kind in ("params", "batch_stats")
    )
    folded = {}
    for path, kernel in params.items():
        *block, conv, leaf = path
        if leaf != "kernel":
            continue
        norm = (*block, _norm_of(conv))
        var = np.asarray(stats[*norm, "var"], np.float64)
        scale = params[*norm, "scale"] / np.sqrt(var + BatchNorm.epsilon)
        bias = params[*norm, "bias"] - stats[*norm, "mean"] * scale
        folded[path] = np.asarray(kernel * scale, np.float32)
        folded[*block, conv, "bias"] = np.asarray(bias, np.float32)
    return {"params": traverse_util.unflatten_dict(folded)}


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
    """A convolution that keeps the size at stride 1, and its batch norm."""
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
    return y if folded else BatchNorm(name=_norm_of(name))(y, train=False)


def _norm_of(conv: str) -> str:
    """The name of a convolution's batch norm."""
    names = {"downsample_0": "downsample_1"}
    return names.get(conv, conv.replace("conv", "bn"))
