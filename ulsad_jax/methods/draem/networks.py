"""Defines DRAEM's networks: one repairs images, the other finds what it repaired.

The names of layers are those of anomalib, whose weights can be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import BatchNorm, Conv, resize

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Channels of an encoder's blocks, in units of its width; each block has half of the
# height and width of the one before.
BLOCKS = (1, 2, 4, 8, 8, 8)
# A decoder's stages: what follows "up" and "db" in their names, the channels after
# enlarging, and those of the two convolutions that follow; in units of its width.
REPAIR = (("1", 8, (8, 4)), ("2", 4, (4, 2)), ("3", 2, (2, 1)), ("4", 1, (1, 1)))
SEGMENT = (
    *(("_b", 8, (8, 8)), ("1", 4, (4, 4)), ("2", 2, (2, 2))),
    *(("3", 1, (1, 1)), ("4", 1, (1, 1))),
)

small_normal = nn.initializers.normal(0.02)  # as in the authors' program


class Encoder(nn.Module):
    """The first half of a network.

    Attributes:
        width: number of channels of the first block.
        depth: number of blocks.
        conv: see `_make_conv`.
    """

    width: int
    depth: int
    conv: Callable

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> list[Float[Array, "b block_h block_w block_c"]]:
        """Returns the outputs of the blocks."""
        outputs = []
        for i, factor in enumerate(BLOCKS[: self.depth], start=1):
            if outputs:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j in (0, 3):
                x = self.conv(x, factor * self.width, f"block{i}", j)
            outputs.append(x)
        return outputs


class Decoder(nn.Module):
    """The second half of a network.

    Attributes:
        width: number of channels of the last stage.
        features: number of output channels.
        stages: `REPAIR` or `SEGMENT`.
        conv: see `_make_conv`.
        dtype: computation type.
    """

    width: int
    features: int
    stages: Sequence[tuple[str, int, tuple[int, int]]]
    conv: Callable
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b block_h block_w block_c"],
        beside: Sequence[Float[Array, "b block_h block_w block_c"]] = (),
    ) -> Float[Array, "b h w features"]:
        """Decodes the output of the last block.

        Args:
            x: output of the last block.
            beside: outputs of the others, the last one first, which are put beside each
                stage's enlarged input; none by default.
        """
        for i, (stage, enlarged, factors) in enumerate(self.stages):
            size = 2 * x.shape[1], 2 * x.shape[2]
            x = resize(x, size, aligned=True)
            x = self.conv(x, enlarged * self.width, f"up{stage}", 1)
            if beside:
                x = jnp.concatenate([x, beside[i]], axis=-1)
            for j, factor in zip((0, 3), factors, strict=True):
                x = self.conv(x, factor * self.width, f"db{stage}", j)
        last = _plain_conv(self.features, dtype=self.dtype, name="fin_out_0")
        return last(x).astype(jnp.float32)


class Networks(nn.Module):
    """Both networks.

    Attributes:
        repair_width: width of the one that repairs.
        segment_width: width of the one that segments.
        dtype: computation type.
        axis_name: name of the `jax.pmap` axis, see `BatchNorm`.
    """

    repair_width: int
    segment_width: int
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"], *, train: bool
    ) -> tuple[Float[Array, "b h w 3"], Float[Array, "b h w 2"]]:
        """Repairs and segments images in 0..1.

        Returns:
            The repaired images, and for every pixel the logits of "normal" and
            "defective".
        """
        conv = _make_conv(train, self.dtype, self.axis_name)
        repair = Subnetwork(
            *(self.repair_width, 5, 3, REPAIR, conv, self.dtype),
            name="reconstructive_subnetwork",
        )
        segment = Subnetwork(
            *(self.segment_width, 6, 2, SEGMENT, conv, self.dtype),
            suffix="_segment",
            passes_blocks=True,
            name="discriminative_subnetwork",
        )
        repaired = repair(image)
        return repaired, segment(jnp.concatenate([image, repaired], axis=-1))


class Subnetwork(nn.Module):
    """An encoder and a decoder.

    Attributes:
        width: number of channels at the images' size.
        depth: see `Encoder`.
        features: number of output channels.
        stages: see `Decoder`.
        conv: see `_make_conv`.
        dtype: computation type.
        suffix: end of the names of both.
        passes_blocks: True to give the decoder all of the encoder's blocks, False for
            the last one alone.
    """

    width: int
    depth: int
    features: int
    stages: Sequence[tuple[str, int, tuple[int, int]]]
    conv: Callable
    dtype: DTypeLike
    suffix: str = ""
    passes_blocks: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w features"]:
        """Returns an output for every pixel."""
        encoder = Encoder(
            self.width, self.depth, self.conv, name=f"encoder{self.suffix}"
        )
        *blocks, code = encoder(x)
        decoder = Decoder(
            self.width,
            self.features,
            self.stages,
            self.conv,
            self.dtype,
            name=f"decoder{self.suffix}",
        )
        return decoder(code, blocks[::-1] if self.passes_blocks else ())


_plain_conv = functools.partial(
    Conv, kernel_size=(3, 3), padding=1, kernel_init=small_normal
)


def _make_conv(train: bool, dtype: DTypeLike, axis_name: str | None) -> Callable:
    """Returns a function that applies a convolution, its batch norm, and a ReLU.

    Its arguments are the input, the number of output channels, the name of the block,
    and the number of the convolution within it.
    """

    def conv(x, features, block, i):
        x = _plain_conv(features, dtype=dtype, name=f"{block}_{i}")(x)
        norm = BatchNorm(axis_name=axis_name, name=f"{block}_{i + 1}")
        return nn.relu(norm(x, train=train))

    return conv
