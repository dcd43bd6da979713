"""Convolutions of stride 1 with fewer multiplications (Winograd's minimal filtering).

For each pair of channels, m x m outputs of a k x k kernel take m k x m k
multiplications. As a product of polynomials, m outputs and k weights along one axis
need n = m + k - 1 multiplications. Tiles of n x n inputs and the kernel are
transformed, multiplied elementwise and transformed back (S. Winograd, Arithmetic
Complexity of Computations, 1980; A. Lavin and S. Gray, Fast Algorithms for
Convolutional Neural Networks, CVPR 2016). Over all tiles and channels, the elementwise
products are n * n matrix products. Sums are taken in another order than in a direct
convolution, and over larger terms: float32 results differ by up to 1e-5 of their norm.
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

    Grid = Sequence[Sequence[Array]] | Array

# Points at which polynomials are evaluated, besides infinity. They are small to keep
# errors small.
POINTS = (0, 1, -1, 2, -2, 0.5, -0.5)
# Number of matrix elements from which a transform is one product. XLA would otherwise
# recompute the sums along one axis for every sum along the other.
LARGE_TRANSFORM = 24


class Transforms(NamedTuple):
    """The transforms of one axis: y = output.T @ ((input @ x) * (kernel @ w)).

    Attributes:
        input: transform of n inputs, [n, n].
        kernel: transform of k weights, [n, k].
        output: matrix whose transpose gives the m outputs, [n, m].
    """

    input: Float[np.ndarray, "n n"]
    kernel: Float[np.ndarray, "n k"]
    output: Float[np.ndarray, "n m"]


@functools.cache
def make_transforms(m: int, k: int) -> Transforms:
    """Returns the transforms for m outputs at a time and a kernel of size k."""
    points = POINTS[: m + k - 2]

    def evaluate(length):
        finite = [[point**power for power in range(length)] for point in points]
        return np.array([*finite, [0] * (length - 1) + [1]], np.float64)

    kernel, output = evaluate(k), evaluate(m)
    for i, point in enumerate(points):
        kernel[i] /= np.prod([point - other for other in points if other != point])
    # The outputs are right for every input if product (i, j) selects input i + j.
    products = (output[:, :, None] * kernel[:, None]).reshape(m + k - 1, m * k)
    picked = np.add.outer(np.arange(m), np.arange(k)).reshape(-1)
    solved = np.linalg.lstsq(products.T, np.eye(m + k - 1)[picked], rcond=None)[0]
    return Transforms(np.round(solved, 9), kernel, output)  # makes zeros exact


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], padding: int, m: int
) -> Float[Array, "b oh ow o"]:
    """Computes a cross-correlation with zero padding, in tiles of m x m outputs.

    It can be differentiated in reverse mode only, once.

    Args:
        x: input, [b, h, w, i].
        kernel: square kernel, [k, k, i, o].
        padding: number of zeros on each side of both axes.
        m: height and width of a tile of outputs.

    Returns:
        Output, [b, oh, ow, o].
    """
    transforms = make_transforms(m, len(kernel))
    kernels = _transform(transforms.kernel, kernel)
    return _multiply(x, kernels, transforms, padding)


def _forward(x, kernel, padding, m):
    return convolve(x, kernel, padding, m), (x, kernel)


def _backward(padding, m, inputs, y):
    x, kernel = inputs
    k = len(kernel)
    transforms = make_transforms(m, k)
    # Gradient of the input: a convolution with the flipped kernel.
    turned = _transform(transforms.kernel[:, ::-1], kernel)
    turned = [[each.T for each in row] for row in turned]
    to_x = _multiply(y, turned, transforms, k - 1 - padding)
    # Gradient of the kernel: the products' gradients, then the transposed transforms.
    counts = [-(-size // m) for size in y.shape[1:3]]
    values = _transform_tiles(transforms.input, x, counts, m, padding)
    cotangents = _transform_tiles(transforms.output, y, counts, m, 0)
    products = [
        [_flat(a).T @ _flat(b) for a, b in zip(*rows, strict=True)]
        for rows in zip(values, cotangents, strict=True)
    ]
    to_kernel = _transform(transforms.kernel.T, products)
    return to_x, _stack(to_kernel)


convolve.defvjp(_forward, _backward)


def _multiply(
    x: Float[Array, "b h w i"], kernels: Grid, transforms: Transforms, padding: int
) -> Float[Array, "b oh ow o"]:
    """Convolves with a transformed kernel, given as n x n arrays [i, o]."""
    k, m = transforms.kernel.shape[1], transforms.output.shape[1]
    b = x.shape[0]  # a symbol in an exported function
    height, width = (size + 2 * padding - k + 1 for size in x.shape[1:3])
    rows, columns = counts = -(-height // m), -(-width // m)
    values = _transform_tiles(transforms.input, x, counts, m, padding)
    products = [
        [_flat(value) @ kernel for value, kernel in zip(*pair, strict=True)]
        for pair in zip(values, kernels, strict=True)
    ]
    y = _stack(_transform(transforms.output.T, products))
    y = y.reshape(m, m, b, rows, columns, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(b, rows * m, columns * m, -1)[:, :height, :width]


def _transform_tiles(
    matrix: Float[np.ndarray, "n t"],
    x: Float[Array, "b h w c"],
    counts: Sequence[int],
    m: int,
    padding: int,
) -> Grid:
    """Cuts an input into tiles of t x t and transforms them.

    Args:
        matrix: transform of both axes, [n, t].
        x: input, [b, h, w, c].
        counts: numbers of tiles along the height and the width.
        m: distance between the starts of neighbouring tiles.
        padding: number of zeros before the first row and column. As many zeros as
            needed are added after the last ones.

    Returns:
        n x n arrays [b, rows, columns, c], where rows and columns are `counts`.
    """
    ends = [(count - 1) * m + matrix.shape[1] for count in counts]
    after = [end - size - padding for end, size in zip(ends, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((padding, extra) for extra in after), (0, 0)))

    def along(axis: int, x: Array) -> list[Array]:
        length = (counts[axis - 1] - 1) * m + 1
        return _mix(
            matrix,
            [
                jax.lax.slice_in_dim(x, start, start + length, m, axis)
                for start in range(matrix.shape[1])
            ],
        )

    return [along(2, row) for row in along(1, x)]


def _transform(matrix: Float[np.ndarray, "a n"], grid: Grid) -> Grid:
    """Returns matrix @ grid @ matrix.T for a grid of n x n arrays."""
    if matrix.size >= LARGE_TRANSFORM:
        stacked, (a, n) = _stack(grid), matrix.shape
        both = jnp.asarray(np.kron(matrix, matrix), stacked.dtype)
        return (both @ stacked.reshape(n * n, -1)).reshape(a, a, *stacked.shape[2:])
    rows = [_mix(matrix, column) for column in zip(*grid, strict=True)]
    return [_mix(matrix, row) for row in zip(*rows, strict=True)]


def _stack(grid: Grid) -> Float[Array, "rows columns ..."]:
    """Stacks a grid of arrays into one array."""
    if isinstance(grid, jax.Array):
        return grid
    return jnp.stack([jnp.stack(row) for row in grid])


def _mix(matrix: Float[np.ndarray, "a n"], arrays: Sequence[Array]) -> list[Array]:
    """Returns the product of a matrix and a column of arrays."""
    return [
        functools.reduce(
            jnp.add,
            [
                array if factor == 1 else array * float(factor)
                for factor, array in zip(factors, arrays, strict=True)
                if factor
            ],
        )
        for factors in matrix
    ]


def _flat(x: Float[Array, "b h w c"]) -> Float[Array, "b*h*w c"]:
    return x.reshape(-1, x.shape[-1])
