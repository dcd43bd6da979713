"""Convolutions of stride 1 with fewer multiplications (Winograd's minimal filtering).

m x m outputs of a k x k kernel are m k x m k multiplications for each pair of channels.
Seen as polynomials, an output row is a product of degree m + k - 2, which n = m + k - 1
values determine: transform tiles of n x n inputs and the kernel, multiply value by value,
transform back, and n x n multiplications remain (S. Winograd, Arithmetic Complexity of
Computations, 1980; A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural
Networks, CVPR 2016). The values of all tiles and channels make n x n matrix products.
Sums are taken in another order, and with larger terms, than a direct convolution's:
float32 results differ by some 1e-6 of their norm.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Grid = Sequence[Sequence[Array]]

# Where polynomials are evaluated, besides at infinity: small numbers, small errors.
POINTS = (0, 1, -1, 2, -2, 0.5, -0.5)


class Transforms(NamedTuple):
    """Of one axis: y_i = sum_u output[u, i] (input @ x)_u (kernel @ w)_u.

    Attributes:
        input: [n, n], of n inputs.
        kernel: [n, k], of the kernel.
        output: [n, m], whose transpose returns to the m outputs.
    """

    input: Float[np.ndarray, "n n"]
    kernel: Float[np.ndarray, "n k"]
    output: Float[np.ndarray, "n m"]


@functools.cache
def make_transforms(m: int, k: int) -> Transforms:
    """The transforms for m outputs at a time of a kernel of size k."""
    points = POINTS[: m + k - 2]

    def evaluate(length):
        finite = [[point**power for power in range(length)] for point in points]
        return np.array([*finite, [0] * (length - 1) + [1]], np.float64)

    kernel, output = evaluate(k), evaluate(m)
    for i, point in enumerate(points):
        kernel[i] /= np.prod([point - other for other in points if other != point])
    # The outputs are right for every input if, of this, each (i, j) picks input i + j.
    products = (output[:, :, None] * kernel[:, None]).reshape(m + k - 1, m * k)
    picked = np.add.outer(np.arange(m), np.arange(k)).reshape(-1)
    solved = np.linalg.lstsq(products.T, np.eye(m + k - 1)[picked], rcond=None)[0]
    # They are fractions of small powers of two and small primes: without rounding error.
    return Transforms(np.round(solved * 960) / 960, kernel, output)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], padding: int, m: int
) -> Float[Array, "b oh ow o"]:
    """Correlates with zeros around the input, in tiles of m x m outputs.

    It can be differentiated in reverse mode only, once.
    """
    transforms = make_transforms(m, len(kernel))
    values = _values(x, len(kernel), padding, m)
    kernels = _mix(transforms.kernel, kernel)
    return _outputs(values, kernels, x.shape, len(kernel), padding, m)


def _forward(x, kernel, padding, m):
    return convolve(x, kernel, padding, m), (x, kernel)


def _backward(padding, m, inputs, y):
    x, kernel = inputs
    k = len(kernel)
    transforms = make_transforms(m, k)
    # To the input: a convolution with the kernel turned around.
    turned = _mix(transforms.kernel[:, ::-1], kernel)
    turned = [[each.T for each in row] for row in turned]
    rest = k - 1 - padding
    to_x = _outputs(_values(y, k, rest, m), turned, y.shape, k, rest, m)
    # To the kernel: the products' gradients, and the transforms' transposes.
    grid = _tiles(y, m, m, [-(-n // m) for n in y.shape[1:3]], padding=0)
    cotangents = _mix(transforms.output, grid)
    values = _values(x, k, padding, m)
    products = [
        [_flat(a).T @ _flat(b) for a, b in zip(*rows, strict=True)]
        for rows in zip(values, cotangents, strict=True)
    ]
    to_kernel = _mix(transforms.kernel.T, products)
    return to_x, jnp.stack([jnp.stack(row) for row in to_kernel])


convolve.defvjp(_forward, _backward)


def _values(x: Float[Array, "b h w i"], k: int, padding: int, m: int) -> Grid:
    """The transformed input tiles, n x n arrays [b, rows, columns, i]."""
    counts = [-(-(n + 2 * padding - k + 1) // m) for n in x.shape[1:3]]
    tiles = _tiles(x, m + k - 1, m, counts, padding)
    return _mix(make_transforms(m, k).input, tiles)


def _outputs(
    values: Grid, kernels: Grid, shape: Sequence[int], k: int, padding: int, m: int
) -> Float[Array, "b oh ow o"]:
    """Multiplies values and kernels, and returns from them to the outputs."""
    products = [
        [(_flat(a) @ b).reshape(*a.shape[:-1], -1) for a, b in zip(*rows, strict=True)]
        for rows in zip(values, kernels, strict=True)
    ]
    grid = _mix(make_transforms(m, k).output.T, products)
    y = jnp.stack([jnp.stack(row, axis=3) for row in grid], axis=2)
    b, rows, _, columns, _, o = y.shape
    height, width = (n + 2 * padding - k + 1 for n in shape[1:3])
    return y.reshape(b, rows * m, columns * m, o)[:, :height, :width]


def _tiles(
    x: Float[Array, "b h w c"], n: int, m: int, counts: Sequence[int], padding: int
) -> Grid:
    """Position (p, q) of every n x n tile, m apart, as [b, rows, columns, c]."""
    after = (
        (count - 1) * m + n - size - padding
        for count, size in zip(counts, x.shape[1:3], strict=True)
    )
    x = jnp.pad(x, ((0, 0), *((padding, extra) for extra in after), (0, 0)))
    rows, columns = ((count - 1) * m + 1 for count in counts)
    return [
        [x[:, p : p + rows : m, q : q + columns : m] for q in range(n)]
        for p in range(n)
    ]


def _mix(matrix: Float[np.ndarray, "a n"], grid: Grid) -> Grid:
    """matrix @ grid @ matrix.T, of a grid of n x n arrays."""

    def mix(arrays):
        return [_sum(row, arrays) for row in matrix]

    mixed = [mix(column) for column in zip(*grid, strict=True)]
    return [mix(row) for row in zip(*mixed, strict=True)]


def _sum(factors: Float[np.ndarray, " n"], arrays: Sequence[Array]) -> Array:
    terms = [
        array if factor == 1 else array * float(factor)
        for factor, array in zip(factors, arrays, strict=True)
        if factor
    ]
    return functools.reduce(jnp.add, terms)


def _flat(x: Float[Array, "b h w c"]) -> Float[Array, "b*h*w c"]:
    return x.reshape(-1, x.shape[-1])
