"""Normalizing flows: invertible functions of features, with their log-determinants.

A step is that of the library FrEIA (its "all in one" block), in one direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import Conv, Linear

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    # Normal variables, and the positions' parts in the log-determinant.
    Output = tuple[Float[Array, "... c"], Float[Array, "..."]]

FIXED = "fixed"  # variables that are drawn, and not trained


class Step(nn.Module):
    """One step of a flow: an affine coupling, a scale and offset, and a mixing.

    The first half of the channels says how the second one is scaled and shifted.

    Attributes:
        kernel: height and width of the kernels of both convolutions; with 1, every
            position is transformed by itself, and there may be any axes of positions.
        ratio: number of hidden channels, in channels of the input of the first one.
        clamp: bound of the logarithms by which the second half is scaled.
        rotate: True to mix the channels by an orthogonal matrix, False by permutation.
            Either is drawn once.
        dtype: computation type of the convolutions.
    """

    kernel: int
    ratio: float
    clamp: float
    rotate: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "... c"],
        condition: Float[Array, "... d"] | None = None,
    ) -> Output:
        """Returns the variables, and the positions' parts in the log-determinant."""
        channels = x.shape[-1]
        first, second = jnp.split(x, [channels - channels // 2], axis=-1)
        known = first
        if condition is not None:
            known = jnp.concatenate([first, condition], axis=-1)
        answer = 0.1 * self._ask(known, 2 * second.shape[-1])
        log_scale, shift = jnp.split(answer, 2, axis=-1)
        log_scale = self.clamp * jnp.tanh(log_scale)
        second = second * jnp.exp(log_scale) + shift

        initial = nn.initializers.constant(2 * math.log(math.expm1(5)))  # a scale of 1
        scale = 0.2 * nn.softplus(self.param("global_scale", initial, channels) / 2)
        offset = self.param("global_offset", nn.initializers.zeros, channels)
        x = jnp.concatenate([first, second], axis=-1) * scale + offset
        log_determinant = log_scale.sum(-1) + jnp.log(scale).sum()
        return self._mix(x), log_determinant

    def _ask(self, x: Float[Array, "... i"], outputs: int) -> Float[Array, "... o"]:
        """Returns the answer of two layers."""
        hidden = max(int(self.ratio * x.shape[-1]), 1)
        x = nn.relu(self._make_layer(hidden, "subnet_0")(x))
        return self._make_layer(outputs, "subnet_2")(x).astype(jnp.float32)

    def _make_layer(self, features: int, name: str) -> Conv | Linear:
        size = self.kernel
        # In a loop on CPUs, convolutions took ten times as long as matrix products.
        if size == 1:
            return Linear(features, self.dtype, name=name)
        padding = size // 2
        return Conv(
            features, (size, size), padding=padding, dtype=self.dtype, name=name
        )

    def _mix(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Rotates or permutes the channels."""
        name = "rotation" if self.rotate else "order"
        draw = jax.random.orthogonal if self.rotate else jax.random.permutation
        drawn = self.variable(
            FIXED, name, lambda: draw(self.make_rng("params"), x.shape[-1])
        )
        if self.rotate:
            return jnp.matmul(x, drawn.value.T, precision="highest")
        return x[..., drawn.value]


class Flow(nn.Module):
    """Steps of a flow, one after another.

    Attributes:
        kernels: the steps' kernels, see `Step`.
        make_step: makes a step, given its kernel and its name.
    """

    kernels: tuple[int, ...]
    make_step: Callable[..., Step]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "... c"],
        condition: Float[Array, "... d"] | None = None,
    ) -> Output:
        """Returns the normal variables, and the log-determinant of the Jacobian.

        The latter is the sum of the positions' parts, which are returned. They are
        float32 for every `dtype`.
        """
        total = jnp.zeros(x.shape[:-1])
        for i, kernel in enumerate(self.kernels):
            step = self.make_step(kernel, name=f"steps_{i}")
            x, log_determinant = step(x, condition)
            total += log_determinant
        return x, total


def encode_positions(
    height: int, width: int, channels: int
) -> Float[np.ndarray, "height width channels"]:
    """Returns sines and cosines of column (first half of the channels) and row.

    Their periods are from 2 pi positions to almost 1e4 times as many.
    """
    half = channels // 2
    rates = 1e4 ** (-np.arange(0, half, 2) / half)
    codes = np.empty((height, width, channels), np.float32)
    columns, rows = np.arange(width)[None, :], np.arange(height)[:, None]
    for first, numbers in ((0, columns), (half, rows)):
        angles = numbers[..., None] * rates
        codes[..., first : first + half : 2] = np.sin(angles)
        codes[..., first + 1 : first + half : 2] = np.cos(angles)
    return codes
