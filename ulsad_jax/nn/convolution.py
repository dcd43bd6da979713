"""Convolutions with the fastest implementation on each platform.

On GPUs and TPUs, XLA's own convolutions are used, with one exception: on GPUs,
transposed convolutions of size 4, stride 2 and padding 1 are computed as four plain
convolutions in one, because XLA has no kernels for a dilated input. On CPUs, XLA
computes matrix products faster than some convolutions, and much faster than most
gradients of convolutions. There, these are matrix products over the kernel's taps,
which add the same terms in another order. Large float32 convolutions of stride 1 are
products of transformed tiles instead (`ulsad_jax.nn.winograd`). A convolution with an
implementation besides XLA's can be differentiated in reverse mode only. The limits
below were measured.

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

# Smaller convolutions use XLA's own: others would compile longer than they save.
MANY_MULTIPLICATIONS = 2**24
# Number of output channels from which a product is worth gathering the taps.
MANY_OUTPUTS = 768
# By kernel size, number of output positions from which tiles are worth transforming the
# kernel; and number of multiplications from which they are worth compiling.
TILED_POSITIONS = {2: 1024, 3: 256, 4: 1024, 5: 256}
TILED_MULTIPLICATIONS = 2**28
# Number of channels of input and output, and of pairs of them, from which tiles are
# worth the memory that they take. For an image's three they take ten times as long.
TILED_CHANNELS, TILED_PAIRS = 16, 512
LARGE_TILE_POSITIONS = 1024  # for 4 x 4 and 5 x 5: from here on, 4 x 4 tiles pay
MANY_IMAGES = 32  # from here on, batches are split for the kernel's gradient
CHUNK_ELEMENTS = 2**20  # number of tap elements held at once
LAYOUT = ("NHWC", "HWIO", "NHWC")
_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Makes code traced inside use XLA's own convolutions on every platform.

    Converters need this: they support convolutions, but no choice between platforms.
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
    """Computes a cross-correlation with zero padding.

    Args:
        x: input, [b, h, w, i].
        kernel: kernel, [kh, kw, i, o].
        stride: stride on both axes.
        padding: number of zeros on each side of both axes.

    Returns:
        Output, [b, oh, ow, o].
    """
    native = functools.partial(_convolve_natively, stride=stride, padding=padding)

    def taps(x, kernel):
        return _convolve_taps(_pad(x, padding), kernel, stride)

    if _is_small(x, kernel):
        return native(x, kernel)
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if stride == 1 and (tile := _tile(x, kernel)):

        def by_tiles(x, kernel):
            return winograd.convolve(x, kernel, padding, tile)

        return lower(native, forward=by_tiles, backward=by_tiles)(x, kernel)
    if size == 1 or outputs >= MANY_OUTPUTS:
        return lower(native, forward=taps, backward=taps)(x, kernel)
    if stride == 1 and size % 2 == 0:
        return lower(native, forward=native, backward=taps)(x, kernel)
    return _with_chunked_kernel_gradient(native, stride, padding)(x, kernel)


def convolve_transposed(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k k i o"],
    *,
    stride: int,
    padding: int,
) -> Float[Array, "b oh ow o"]:
    """Computes PyTorch's transposed convolution with a flipped kernel.

    It correlates the kernel with the input dilated by the stride. For n input rows, the
    output has (n - 1) * stride - 2 * padding + k rows, and likewise for columns.

    Args:
        x: input, [b, h, w, i].
        kernel: square kernel, [k, k, i, o].
        stride: stride on both axes.
        padding: number of rows and columns cut from each side of the output.

    Returns:
        Output, [b, oh, ow, o].
    """
    k = kernel.shape[0]
    if stride == 1:
        return convolve(x, kernel, stride=1, padding=k - 1 - padding)
    if stride == k and padding == 0:  # every output sees one input: a matrix product
        y = jnp.einsum("bhwi,klio->bhkwlo", x, kernel[::-1, ::-1])
        return y.reshape(x.shape[0], x.shape[1] * k, x.shape[2] * k, -1)

    native = functools.partial(
        _convolve_natively, padding=k - 1 - padding, dilation=stride
    )
    if (k, stride, padding) != (4, 2, 1) or _is_small(x, kernel):
        return native(x, kernel)
    forward = _double if _tile(x, kernel[::2, ::2]) else native
    return lower(native, forward=forward, backward=_double, gpu=_double_at_once)(
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
    """Computes XLA's own convolution, with `dilation` of the input."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=LAYOUT,
    )


def _is_small(x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]) -> bool:
    return _multiplications(x, kernel) < MANY_MULTIPLICATIONS


def _tile(x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]) -> int | None:
    """Returns the tile if `winograd.convolve` is the fastest on CPUs, else None."""
    (size, width, *channels), positions = kernel.shape, _positions(x)
    if size != width:
        return None
    if min(channels) < TILED_CHANNELS or math.prod(channels) < TILED_PAIRS:
        return None
    if x.dtype != jnp.float32 or positions < TILED_POSITIONS.get(size, math.inf):
        return None
    if _multiplications(x, kernel) < TILED_MULTIPLICATIONS:
        return None
    return 4 if size >= 4 and positions >= LARGE_TILE_POSITIONS else 2


def _multiplications(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]
) -> int:
    """Returns the number of products of every position with the whole kernel."""
    return _positions(x) * kernel.size


def _positions(x: Float[Array, "b h w i"]) -> int:
    batch, height, width, _ = x.shape
    # The batch size of an exported function is a symbol: it may be one image.
    return height * width * (batch if isinstance(batch, int) else 1)


def lower(
    native: Callable,
    *,
    forward: Callable,
    backward: Callable,
    gpu: Callable | None = None,
) -> Callable:
    """Returns `native`, replaced by equivalent functions on CPUs and GPUs.

    Args:
        native: function used on all platforms without another one.
        forward: function used on CPUs.
        backward: function whose gradients are used on CPUs.
        gpu: function used on GPUs, also for gradients; `native` if None.
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
    """Returns `native` with a faster kernel gradient of large batches on CPUs.

    There, the gradient with respect to the kernel is computed by matrix products.
    """

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
    """Returns the kernel gradient of an unpadded convolution.

    Each chunk of a few images is one matrix product. The taps of a few images fit into
    the cache; those of a large batch would not.
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
    """Computes a transposed convolution of size 4, stride 2 and padding 1.

    It is computed as four plain 2 x 2 convolutions. Output row 2m + r depends on the
    input rows m + r - 1 and m + r, through the kernel rows r and r + 2.
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
    """Computes `_double` as one convolution with 4 o output channels."""
    _, h, w, _ = x.shape
    phases = [(r, s) for r in (0, 1) for s in (0, 1)]
    kernels = jnp.concatenate([kernel[r::2, s::2] for r, s in phases], axis=-1)
    y = _convolve_natively(x, kernels, stride=1, padding=1)
    parts = jnp.split(y, 4, axis=-1)  # each is used from its own first row and column
    return _interleave(
        [
            part[:, r : r + h, s : s + w]
            for part, (r, s) in zip(parts, phases, strict=True)
        ]
    )


def _interleave(phases: list[Float[Array, "b h w o"]]) -> Float[Array, "b 2*h 2*w o"]:
    """Interleaves even and odd rows and columns: (0, 0), (0, 1), (1, 0), (1, 1)."""
    b, h, w, o = phases[0].shape
    y = jnp.stack(phases).reshape(2, 2, b, h, w, o)  # r s b m n o
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(b, 2 * h, 2 * w, o)


def _convolve_valid(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"]
) -> Float[Array, "b oh ow o"]:
    """Computes an unpadded convolution of stride 1 by products of tiles or of taps."""
    if tile := _tile(x, kernel):
        return winograd.convolve(x, kernel, 0, tile)
    return _convolve_taps(x, kernel, 1)


def _convolve_taps(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int
) -> Float[Array, "b oh ow o"]:
    """Computes an unpadded convolution as one matrix product over all taps."""
    outputs = kernel.shape[-1]
    product = _multiply(_gather_taps(x, kernel, stride), kernel.reshape(-1, outputs))
    return product.reshape(-1, *output_size(x, kernel, stride), outputs)


def _gather_taps(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int
) -> Float[Array, "b*oh*ow kh*kw*i"]:
    """Returns the inputs of an unpadded convolution's outputs, one row per output."""
    kh, kw, i, _ = kernel.shape
    ends = [stride * (n - 1) + 1 for n in output_size(x, kernel, stride)]
    taps = [
        x[:, r : r + ends[0] : stride, s : s + ends[1] : stride]
        for r in range(kh)
        for s in range(kw)
    ]
    return jnp.concatenate(taps, axis=-1).reshape(-1, kh * kw * i)


def output_size(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int
) -> list[int]:
    """Returns the numbers of rows and columns that an unpadded convolution gives."""
    sizes = zip(x.shape[1:3], kernel.shape[:2], strict=True)
    return [(n - k) // stride + 1 for n, k in sizes]


@jax.custom_vjp
def _multiply(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Multiplies two matrices, with gradients that are plain products, too.

    XLA's CPU kernels are fast for factors that are not transposed. Transposing the
    smaller ones beforehand costs little. The kernels use a CPU's bfloat16 matrix unit
    only if sums are in float32.
    """
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _multiply_backward(factors, y):
    a, b = factors
    b, transposed = jax.lax.optimization_barrier((b.T, y.T))
    return _multiply(y, b), _multiply(transposed, a).T


_multiply.defvjp(lambda a, b: (_multiply(a, b), (a, b)), _multiply_backward)


def _pad(x: Float[Array, "b h w c"], n: int) -> Float[Array, "b h+2n w+2n c"]:
    return jnp.pad(x, ((0, 0), (n, n), (n, n), (0, 0)))
