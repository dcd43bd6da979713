"""Convolutions, lowered as the platform likes them.

On GPU and TPU everything is XLA's own; on GPUs strided transposed convolutions are
plain ones, four at once, because XLA has no kernels for an input that is spread out. On
CPUs XLA runs matrix products faster than some convolutions, and much faster than most
gradients of convolutions. There, these are products over the kernel's taps, the same
sums in another order, or, for large float32 ones of stride 1, products of transformed
tiles (`ulsad_jax.nn.winograd`). (Such a convolution can be differentiated in
reverse mode only.) The limits below are measured.

Kernels are [kh, kw, in, out]; stride and padding are the same on both axes.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from ulsad_jax.nn import winograd

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# What is smaller stays XLA's own: the rest compiles longer than it saves.
MANY_MULTIPLICATIONS = 2**24
# From so many output channels on, a product pays for gathering the taps.
MANY_OUTPUTS = 768
# Tiles pay for transforming a kernel of size k from so many output positions on, and
# for compiling them from so many multiplications on.
TILED_POSITIONS = {2: 1024, 3: 256, 5: 256}
TILED_MULTIPLICATIONS = 2**29
LARGE_TILE_POSITIONS = 1024  # of a 5 x 5, from where on tiles of 4 x 4 beat 2 x 2
MANY_IMAGES = 32  # batches from here on are cut for the kernel's gradient
CHUNK_ELEMENTS = 2**20  # of the taps held at once
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Whatever is traced inside has XLA's own convolutions on every platform.

    For converters, which know convolutions and no choice between platforms.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int,
    padding: int,
) -> Float[Array, "b oh ow o"]:
    """Correlates, with zeros around the input."""
    native = functools.partial(_convolve_natively, stride=stride, padding=padding)

    def taps(x, kernel):
        return _convolve_taps(_pad(x, padding), kernel, stride)

    if _is_small(x, kernel):
        return native(x, kernel)
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if stride == 1 and (tile := _tile(x, kernel)):

        def by_tiles(x, kernel):
            return winograd.convolve(x, kernel, padding, tile)

        return _lower(native, forward=by_tiles, backward=by_tiles)(x, kernel)
    if size == 1 or outputs >= MANY_OUTPUTS:
        return _lower(native, forward=taps, backward=taps)(x, kernel)
    if stride == 1 and size % 2 == 0:
        return _lower(native, forward=native, backward=taps)(x, kernel)
    return _with_chunked_kernel_gradient(native, stride, padding)(x, kernel)


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

    native = functools.partial(
        _convolve_natively, padding=k - 1 - padding, dilation=stride
    )
    if (k, stride, padding) != (4, 2, 1) or _is_small(x, kernel):
        return native(x, kernel)
    forward = _double if _tile(x, kernel[::2, ::2]) else native
    return _lower(native, forward=forward, backward=_double, gpu=_double_at_once)(
        x, kernel
    )


def _convolve_natively(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: int,
    dilation: int = 1,
) -> Float[Array, "b oh ow o"]:
    """XLA's own; the dilation is the input's."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=_LAYOUT,
    )


def _is_small(x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]) -> bool:
    return _multiplications(x, kernel) < MANY_MULTIPLICATIONS


def _tile(x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]) -> int | None:
    """The tile of `winograd.convolve` that is the fastest on CPUs, if one is."""
    (size, width, *_), positions = kernel.shape, _positions(x)
    if size != width:
        return None
    if x.dtype != jnp.float32 or positions < TILED_POSITIONS.get(size, math.inf):
        return None
    if _multiplications(x, kernel) < TILED_MULTIPLICATIONS:
        return None
    return 4 if size == 5 and positions >= LARGE_TILE_POSITIONS else 2


def _multiplications(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]
) -> int:
    """Of every position with the whole kernel."""
    return _positions(x) * kernel.size


def _positions(x: Float[Array, "b h w i"]) -> int:
    batch, height, width, _ = x.shape
    # An exported function's batch is a symbol: it may be one image.
    return height * width * (batch if isinstance(batch, int) else 1)


def _lower(
    native: Callable,
    *,
    forward: Callable,
    backward: Callable,
    gpu: Callable | None = None,
) -> Callable:
    """`native`; on CPUs, equal functions instead of it and to take gradients of.

    Args:
        native: on all platforms that nothing else is for.
        forward: on CPUs.
        backward: on CPUs, what gradients are taken of.
        gpu: on GPUs, for both.
    """
    if _plain.get():
        return native
    others = {"default": native}
    if gpu is not None:
        others |= {"cuda": gpu, "rocm": gpu}

    def primal(x, kernel):
        if forward is native and gpu is None:
            return native(x, kernel)
        return jax.lax.platform_dependent(x, kernel, cpu=forward, **others)

    def gradients(inputs, cotangent):
        def through(function):
            return lambda x, kernel, y: jax.vjp(function, x, kernel)[1](y)

        ways = {name: through(function) for name, function in others.items()}
        return jax.lax.platform_dependent(
            *inputs, cotangent, cpu=through(backward), **ways
        )

    function = jax.custom_vjp(primal)
    function.defvjp(lambda x, kernel: (primal(x, kernel), (x, kernel)), gradients)
    return function


def _with_chunked_kernel_gradient(
    native: Callable, stride: int, padding: int
) -> Callable:
    """`native`; on CPUs, a large batch's gradient to the kernel is products."""

    def by_chunks(x, kernel, y):
        return _kernel_gradient_by_chunks(_pad(x, padding), kernel, y, stride)

    def whole(x, kernel, y):
        return jax.vjp(lambda kernel: native(x, kernel), kernel)[1](y)[0]

    def backward(inputs, y):
        x, kernel = inputs
        to_input = jax.vjp(lambda x: native(x, kernel), x)[1](y)[0]
        if len(x) < MANY_IMAGES:
            return to_input, whole(x, kernel, y)
        to_kernel = jax.lax.platform_dependent(
            x, kernel, y, cpu=by_chunks, default=whole
        )
        return to_input, to_kernel

    function = jax.custom_vjp(native)
    function.defvjp(lambda x, kernel: (native(x, kernel), (x, kernel)), backward)
    return function


def _kernel_gradient_by_chunks(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    y: Float[Array, "b oh ow o"],
    stride: int,
) -> Float[Array, "kh kw i o"]:
    """An unpadded convolution's gradient to its kernel, a product for a few images.

    The taps of a few images stay in the cache; those of a large batch would not.
    """
    *window, o = kernel.shape
    share = CHUNK_ELEMENTS // (math.prod(y.shape[1:3]) * math.prod(window))
    per_chunk = next(
        n for n in range(max(1, min(share, len(x))), 0, -1) if len(x) % n == 0
    )

    def add(total, chunk):
        x, y = chunk
        taps = _gather_taps(x, kernel, stride)
        product = jnp.matmul(
            taps.T, y.reshape(-1, o), preferred_element_type=jnp.float32
        )
        return total + product, None

    split = [a.reshape(-1, per_chunk, *a.shape[1:]) for a in (x, y)]
    start = jnp.zeros((math.prod(window), o), jnp.float32)
    total, _ = jax.lax.scan(add, start, tuple(split))
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _double(
    x: Float[Array, "b h w i"], kernel: Float[Array, "4 4 i o"]
) -> Float[Array, "b 2*h 2*w o"]:
    """The transposed convolution 4, stride 2, padding 1, as four plain 2 x 2 ones.

    An output row 2m + r sees the input rows m + r - 1 and m + r, through the kernel
    rows r and r + 2.
    """
    _, h, w, _ = x.shape
    x = _pad(x, 1)
    return _interleave(
        [
            _convolve_valid(x[:, r : r + h + 1, s : s + w + 1], kernel[r::2, s::2])
            for r in (0, 1)
            for s in (0, 1)
        ]
    )


def _double_at_once(
    x: Float[Array, "b h w i"], kernel: Float[Array, "4 4 i o"]
) -> Float[Array, "b 2*h 2*w o"]:
    """As `_double`, but the four have one convolution, of 4 o outputs."""
    _, h, w, _ = x.shape
    phases = [(r, s) for r in (0, 1) for s in (0, 1)]
    kernels = jnp.concatenate([kernel[r::2, s::2] for r, s in phases], axis=-1)
    y = _convolve_natively(x, kernels, stride=1, padding=1)
    parts = jnp.split(y, 4, axis=-1)  # each is wanted from its own row and column on
    return _interleave(
        [
            part[:, r : r + h, s : s + w]
            for part, (r, s) in zip(parts, phases, strict=True)
        ]
    )


def _interleave(phases: list[Float[Array, "b h w o"]]) -> Float[Array, "b 2*h 2*w o"]:
    """Even and odd rows and columns: (0, 0), (0, 1), (1, 0), (1, 1)."""
    b, h, w, o = phases[0].shape
    y = jnp.stack(phases).reshape(2, 2, b, h, w, o)  # r s b m n o
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(b, 2 * h, 2 * w, o)


def _convolve_valid(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"]
) -> Float[Array, "b oh ow o"]:
    """An unpadded convolution of stride 1 as products, of tiles or of taps."""
    if tile := _tile(x, kernel):
        return winograd.convolve(x, kernel, 0, tile)
    return _convolve_taps(x, kernel, 1)


def _convolve_taps(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int
) -> Float[Array, "b oh ow o"]:
    """An unpadded convolution as one matrix product over all taps."""
    outputs = kernel.shape[-1]
    product = _multiply(_gather_taps(x, kernel, stride), kernel.reshape(-1, outputs))
    return product.reshape(-1, *_output_size(x, kernel, stride), outputs)


def _gather_taps(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int
) -> Float[Array, "b*oh*ow kh*kw*i"]:
    """What an unpadded convolution multiplies, a row for every position."""
    kh, kw, i, _ = kernel.shape
    ends = [stride * (n - 1) + 1 for n in _output_size(x, kernel, stride)]
    taps = [
        x[:, r : r + ends[0] : stride, s : s + ends[1] : stride]
        for r in range(kh)
        for s in range(kw)
    ]
    return jnp.concatenate(taps, axis=-1).reshape(-1, kh * kw * i)


def _output_size(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int
) -> list[int]:
    """Rows and columns of an unpadded convolution."""
    sizes = zip(x.shape[1:3], kernel.shape[:2], strict=True)
    return [(n - k) // stride + 1 for n, k in sizes]


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
