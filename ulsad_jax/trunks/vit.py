"""Defines the vision transformers of DINOv2 and DINOv3 (Dosovitskiy et al. 2021).

DINOv2 is Oquab et al. 2023, DINOv3 is Siméoni et al. 2025. Names are timm's, so that
its weights fit; DINOv2's own file has the same.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import Conv, normalize_image
from ulsad_jax.trunks.base import Architecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8


class Kind(NamedTuple):
    """The properties in which DINOv2 and DINOv3 differ.

    Attributes:
        patch: height and width of a patch in pixels.
        rotary: True to rotate queries and keys by the position of their patch and to
            do without a bias before, False to add learned embeddings to the patches.
        registers: number of tokens besides the class token that stand for no patch.
        epsilon: small number added to the variance by layer norms.
        scales: names of the factors of a block's two responses.
    """

    patch: int
    rotary: bool
    registers: int
    epsilon: float
    scales: tuple[str, str]


DINOV2 = Kind(14, False, 0, 1e-6, ("ls1.gamma", "ls2.gamma"))
DINOV3 = Kind(16, True, 4, 1e-5, ("gamma_1", "gamma_2"))

_EMBEDDED = 37  # side of the grid, in patches, that DINOv2's embeddings are stored for
_TEMPERATURE = 100  # ratio of the longest period of DINOv3's rotations to the shortest


class Block(nn.Module):
    """A transformer block: attention, then a perceptron of one hidden layer.

    Attributes:
        kind: `DINOV2` or `DINOV3`.
        heads: number of heads of the attention.
        dtype: computation type.
    """

    kind: Kind
    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], angles: Float[np.ndarray, "n d"]
    ) -> Float[Array, "b n c"]:
        """Adds the scaled responses of both parts to the tokens.

        Args:
            x: tokens.
            angles: rotation of every token; see `rotary_angles`.
        """
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        y = _norm(self.kind, self.dtype, "norm1")(x)
        y = dense(3 * width, use_bias=not self.kind.rotary, name="attn.qkv")(y)
        heads = y.reshape(*x.shape[:2], 3, self.heads, width // self.heads)
        query, key, value = (heads[:, :, i] for i in range(3))
        if self.kind.rotary:
            query, key = rotate(query, angles), rotate(key, angles)
        y = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        x += self._scale(0, dense(width, name="attn.proj")(y))
        y = dense(4 * width, name="mlp.fc1")(_norm(self.kind, self.dtype, "norm2")(x))
        y = dense(width, name="mlp.fc2")(nn.gelu(y, approximate=False))
        return x + self._scale(1, y)

    def _scale(self, i: int, y: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        name, shape = self.kind.scales[i], y.shape[-1:]
        return y * self.param(name, nn.initializers.ones, shape).astype(y.dtype)


class ViT(nn.Module):
    """A vision transformer without its head.

    Attributes:
        kind: `DINOV2` or `DINOV3`.
        width: number of channels.
        heads: number of heads of the attention.
        blocks: number of blocks.
        dtype: computation type.
        folded: changes nothing: there is no batch norm.
    """

    kind: Kind
    width: int
    heads: int
    blocks: int = 12
    dtype: DTypeLike = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
    ) -> dict[str, Float[Array, "b gh gw width"]]:
        """Returns the patches' tokens after `block1`, `block2` and so on.

        The norm after the last block is applied to each, as timm's
        `get_intermediate_layers(norm=True)` does.

        Args:
            image: uint8 in 0..255 or float in 0..1.
        """
        patch = self.kind.patch
        embed = Conv(
            self.width, (patch, patch), patch, dtype=self.dtype, name="patch_embed.proj"
        )
        x = embed(normalize_image(image))
        batch, *grid, _ = x.shape
        x = self._add_other_tokens(x)
        first = 1 + self.kind.registers
        angles = np.zeros((first, self.width // self.heads // 2))
        angles = np.concatenate([angles, rotary_angles(*grid, angles.shape[1])])
        norm = _norm(self.kind, self.dtype, "norm")
        outputs = {}
        for i in range(self.blocks):
            x = Block(self.kind, self.heads, self.dtype, name=f"blocks_{i}")(x, angles)
            patches = norm(x[:, first:])
            outputs[f"block{i + 1}"] = patches.reshape(batch, *grid, self.width)
        return outputs

    def _add_other_tokens(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b n c"]:
        """Returns the class token, the registers and the patches, in this order.

        DINOv2's embeddings of positions are added. They are resized bicubically with
        antialiasing, as timm does.
        """
        batch, *grid, width = x.shape
        draw = nn.initializers.normal(0.02)
        first = self.param("cls_token", draw, (1, 1, width))
        if self.kind.registers:
            shape = (1, self.kind.registers, width)
            first = jnp.concatenate([first, self.param("reg_token", draw, shape)], 1)
        if not self.kind.rotary:
            known = self.param("pos_embed", draw, (1, 1 + _EMBEDDED**2, width))
            first += known[:, :1]
            known = known[:, 1:].reshape(1, _EMBEDDED, _EMBEDDED, width)
            x += jax.image.resize(known, (1, *grid, width), "cubic").astype(x.dtype)
        first = jnp.broadcast_to(first, (batch, *first.shape[1:])).astype(x.dtype)
        return jnp.concatenate([first, x.reshape(batch, -1, width)], 1)


def rotary_angles(height: int, width: int, count: int) -> Float[np.ndarray, "n count"]:
    """Returns the angles by which the channels of a grid's tokens are rotated.

    The centres of the patches are at -1 to 1 on both axes, whatever the grid's size.
    Half of the angles are of rows, half of columns, with periods from 1 up to nearly
    100, in geometric progression.

    Args:
        height: number of rows of the grid.
        width: number of columns of the grid.
        count: number of angles of a token, half of a head's channels.

    Returns:
        Angles in radians, row by row.
    """
    rows, columns = (2 * (np.arange(n) + 0.5) / n - 1 for n in (height, width))
    centres = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    periods = _TEMPERATURE ** (np.arange(count // 2) / (count // 2))
    return (2 * np.pi * centres[..., None] / periods).reshape(-1, count)


def rotate(
    x: Float[Array, "b n h c"], angles: Float[np.ndarray, "n c/2"]
) -> Float[Array, "b n h c"]:
    """Rotates pairs of channels, each of the first half with one of the second."""
    one, other = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = (jnp.asarray(f(angles)[:, None], jnp.float32) for f in (np.cos, np.sin))
    pair = (one * cos - other * sin, other * cos + one * sin)
    return jnp.concatenate(pair, -1).astype(x.dtype)


def _norm(kind: Kind, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(kind.epsilon, dtype, use_fast_variance=False, name=name)


def describe(kind: Kind, width: int, heads: int, blocks: int = 12) -> Architecture:
    """Returns the architecture whose features are the last block's."""
    last = f"block{blocks}"
    return Architecture(
        functools.partial(ViT, kind, width, heads, blocks),
        grid=last,
        layers=last,
        whiten=True,
        multiple=kind.patch,
        unused=("mask_token",),
    )


TRUNKS = {
    "vit_small_patch14_dinov2": describe(DINOV2, 384, 6),
    "vit_base_patch14_dinov2": describe(DINOV2, 768, 12),
    "vit_small_patch16_dinov3": describe(DINOV3, 384, 6),
    "vit_base_patch16_dinov3": describe(DINOV3, 768, 12),
}
