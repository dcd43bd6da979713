"""Convolutions, lowered as the platform likes them.

On GPU and TPU everything is XLA's own. On CPUs XLA runs matrix products faster than most
convolutions, and much faster than their gradients. There, convolutions of many channels
and their gradients are products over the kernel's taps: the same sums in another order.
(Such a convolution can be differentiated in reverse mode only.)

Kernels are [kh, kw, in, out]; stride and padding are the same on both axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int,
    padding: int,
) -> Float[Array, "b oh ow o"]:
    """Correlates, with zeros around the input."""

    def native(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=[(padding, padding)] * 2,
            dimension_numbers=_LAYOUT,
        )

    def taps(x, kernel):
        return _convolve_taps(_pad(x, padding), kernel, stride)

    if kernel.shape[0] == 1:
        return native(x, kernel)
    return _lower(native, taps)(x, kernel)


def convolve_transposed(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k k i o"],
    *,
    stride: int,
    padding: int,
) -> Float[Array, "b oh ow o"]:
    """Correlates the input spread out by the stride: PyTorch's transposed convolution.

    The output has (n - 1) * stride - 2 * padding + k rows and columns.
    """
    k = kernel.shape[0]
    if stride == 1:
        return convolve(x, kernel, stride=1, padding=k - 1 - padding)

    def native(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1),
            padding=[(k - 1 - padding, k - 1 - padding)] * 2,
            lhs_dilation=(stride, stride),
            dimension_numbers=_LAYOUT,
        )

    if (k, stride, padding) == (4, 2, 1):
        return _lower(native, _double)(x, kernel)
    return native(x, kernel)


def _lower(native: Callable, taps: Callable) -> Callable:
    """`native`; on CPUs, the equal function `taps` and its gradient."""

    def forward(x, kernel):
        return jax.lax.platform_dependent(x, kernel, cpu=taps, default=native)

    def backward(inputs, cotangent):
        def through(function):
            return lambda x, kernel, y: jax.vjp(function, x, kernel)[1](y)

        return jax.lax.platform_dependent(
            *inputs, cotangent, cpu=through(taps), default=through(native)
        )

    function = jax.custom_vjp(forward)
    function.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), backward)
    return function


def _double(
    x: Float[Array, "b h w i"], kernel: Float[Array, "4 4 i o"]
) -> Float[Array, "b 2*h 2*w o"]:
    """The transposed convolution 4, stride 2, padding 1, as four plain 2 x 2 ones.

    An output row 2m + r sees the input rows m + r - 1 and m + r, through the kernel
    rows r and r + 2.
    """
    b, h, w, _ = x.shape
    x = _pad(x, 1)
    phases = [
        _convolve_taps(x[:, r : r + h + 1, s : s + w + 1], kernel[r::2, s::2], 1)
        for r in (0, 1)
        for s in (0, 1)
    ]
    y = jnp.stack(phases).reshape(2, 2, b, h, w, -1)  # r s b m n o
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(b, 2 * h, 2 * w, -1)


def _convolve_taps(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int
) -> Float[Array, "b oh ow o"]:
    """An unpadded convolution as one matrix product over all taps."""
    kh, kw, i, o = kernel.shape
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], (kh, kw)))
    ends = stride * (rows - 1) + 1, stride * (columns - 1) + 1
    taps = [
        x[:, r : r + ends[0] : stride, s : s + ends[1] : stride]
        for r in range(kh)
        for s in range(kw)
    ]
    product = _multiply(
        jnp.concatenate(taps, axis=-1).reshape(-1, kh * kw * i),
        kernel.reshape(kh * kw * i, o),
    )
    return product.reshape(-1, rows, columns, o)


@jax.custom_vjp
def _multiply(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """A matrix product whose gradients are plain products, too.

    XLA's CPU kernels want both factors as they lie in memory: transposing the smaller
    ones beforehand costs little. Only with sums in float32 do they use a CPU's bfloat16
    matrix unit.
    """
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _multiply_backward(factors, y):
    a, b = factors
    b, transposed = jax.lax.optimization_barrier((b.T, y.T))
    return _multiply(y, b), _multiply(transposed, a).T


_multiply.defvjp(lambda a, b: (_multiply(a, b), (a, b)), _multiply_backward)


def _pad(x: Float[Array, "b h w c"], n: int) -> Float[Array, "b h+2n w+2n c"]:
    return jnp.pad(x, ((0, 0), (n, n), (n, n), (0, 0)))
