"""Layers with PyTorch's conventions, on which the published networks rely.

Kernels are stored in XLA's order, [kh, kw, in, out]. Kernels of transposed convolutions
are stored flipped, so that both kinds are correlations (`ulsad_jax.trunks.torch_names`
converts them). Activations are NHWC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from ulsad_jax.nn.convolution import convolve, convolve_transposed

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Weight of a new batch in the running statistics.
MOMENTUM = 0.1

Initializer = Callable[..., jax.Array]
# nn.init.xavier_uniform_ with the gain of a leaky ReLU of slope 0.01.
xavier_uniform = nn.initializers.variance_scaling(
    2.0 / (1.0 + 0.01**2), "fan_avg", "uniform"
)
# PyTorch's default for convolutions: uniform within +-1 / sqrt(fan_in).
torch_uniform = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def normalize_image(
    image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"],
) -> Float[Array, "b h w 3"]:
    """Standardises RGB images by ImageNet's mean and standard deviation.

    Args:
        image: RGB images [b, h, w, 3], uint8 in 0..255 or float in 0..1.

    Returns:
        Standardised images, float32 [b, h, w, 3].
    """
    if image.dtype == jnp.uint8:
        image = image.astype(jnp.float32) / 255.0
    mean = jnp.asarray(IMAGENET_MEAN, jnp.float32)
    return (image.astype(jnp.float32) - mean) / jnp.asarray(IMAGENET_STD, jnp.float32)


def resize_matrix(
    n_in: int, n_out: int, *, aligned: bool = False
) -> Float[np.ndarray, "n_out n_in"]:
    """Returns the matrix of bilinear resampling along one axis, in float64.

    Sampling points are half-pixel centres, clamped at the edges, without antialiasing.
    This equals PyTorch's `interpolate(mode="bilinear", align_corners=False)`.

    Args:
        n_in: size of the input.
        n_out: size of the output.
        aligned: True to sample from the first to the last centre of the input, as with
            `align_corners=True`.
    """
    position = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    position = np.clip(position, 0, n_in - 1)
    if aligned:
        position = np.linspace(0, n_in - 1, n_out)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, n_in - 1)
    matrix = np.zeros((n_out, n_in))
    rows = np.arange(n_out)
    matrix[rows, low] += 1 - (position - low)
    matrix[rows, high] += position - low
    return matrix


def resize(
    x: Float[Array, "b h w c"], size: tuple[int, int], *, aligned: bool = False
) -> Float[Array, "b height width c"]:
    """Resizes to (height, width) bilinearly; see `resize_matrix`."""
    for axis, n_out in zip((1, 2), size, strict=True):
        n_in = x.shape[axis]
        if n_in != n_out:
            x = multiply(resize_matrix(n_in, n_out, aligned=aligned), x, axis)
    return x


def multiply(
    matrix: Float[np.ndarray, "n_out n_in"], x: Float[Array, "..."], axis: int
) -> Float[Array, "..."]:
    """Multiplies the vectors along an axis by a matrix."""
    product = jnp.tensordot(
        jnp.asarray(matrix, x.dtype), x, (1, axis), precision="highest"
    )
    return jnp.moveaxis(product, 0, axis)


class Conv(nn.Module):
    """A 2-D convolution.

    Attributes:
        features: number of output channels.
        kernel_size: (height, width) of the kernel.
        stride: stride on both axes.
        padding: number of zeros on each side of both axes.
        use_bias: True to add a bias, initialised with PyTorch's default.
        kernel_init: initialiser of the kernel.
        dtype: type of the computation; parameters are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    padding: int = 0
    use_bias: bool = True
    kernel_init: Initializer = torch_uniform
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow features"]:
        """Computes the convolution of `x`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
        )
        if self.use_bias:
            y = y + _bias(self, math.prod(shape[:3])).astype(self.dtype)
        return y


class Linear(nn.Module):
    """An affine function of vectors, with PyTorch's default initialisation.

    Attributes:
        features: number of outputs.
        dtype: type of the computation; parameters are float32.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n features"]:
        """Computes the function of the vectors along the last axis."""
        kernel = self.param("kernel", torch_uniform, (x.shape[-1], self.features))
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + _bias(self, x.shape[-1]).astype(self.dtype)


class ConvTranspose(nn.Module):
    """A 2-D transposed convolution (PyTorch's `ConvTranspose2d`).

    The output has (n - 1) * stride - 2 * padding + kernel_size rows and columns for n
    input rows and columns. The kernel is square.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the kernel.
        stride: stride on both axes.
        padding: number of rows and columns cut from each side of the output.
        use_bias: True to add a bias, initialised with PyTorch's default.
        kernel_init: initialiser of the kernel.
        dtype: type of the computation; parameters are float32.
    """

    features: int
    kernel_size: int
    stride: int
    padding: int
    use_bias: bool = True
    kernel_init: Initializer = xavier_uniform
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow features"]:
        """Computes the transposed convolution of `x`."""
        k = self.kernel_size
        # Named differently, because PyTorch stores these kernels in another order.
        kernel = self.param(
            "transposed_kernel", self.kernel_init, (k, k, x.shape[-1], self.features)
        )
        y = convolve_transposed(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
        )
        if self.use_bias:
            # PyTorch takes the fan-in from the second axis of its (in, out, kh, kw).
            y = y + _bias(self, self.features * k * k).astype(self.dtype)
        return y


def _bias(
    layer: Conv | Linear | ConvTranspose, fan_in: int
) -> Float[Array, " features"]:
    """Returns the bias of a layer, initialised uniformly in +-1 / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape):
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    return layer.param("bias", init, (layer.features,))


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running statistics.

    A batch is normalised by its biased variance. The running variance averages the
    unbiased one, which is larger by a factor of n / (n - 1); Flax's own layer averages
    the biased one. Statistics are float32 for every input type.

    Attributes:
        epsilon: small number added to the variance.
        affine: True to scale and shift by learned parameters.
        axis_name: name of the mapped axis (`jax.pmap`) over which the batch is
            distributed; None if it is not distributed.
    """

    epsilon: float = 1e-5
    affine: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        """Normalises `x` by the batch if `train`, else by the running statistics."""
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        y = x.astype(jnp.float32)
        if train:
            mean = self._mean(y)
            var = self._mean(jnp.square(y - mean))
            if not self.is_initializing():
                n = x.size // x.shape[-1] * self._shares()
                m = MOMENTUM
                # Not "+=", which writes into the caller's array where that is NumPy's.
                old_mean, old_var = running_mean.value, running_var.value
                running_mean.value = old_mean + m * (mean - old_mean)
                running_var.value = old_var + m * (var * (n / (n - 1)) - old_var)
        else:
            mean, var = running_mean.value, running_var.value
        scale = jax.lax.rsqrt(var + self.epsilon)
        shift = 0.0
        if self.affine:
            scale = scale * self.param("scale", nn.initializers.ones, channels)
            shift = self.param("bias", nn.initializers.zeros, channels)
        return ((y - mean) * scale + shift).astype(x.dtype)

    def _mean(self, y: Float[Array, "b h w c"]) -> Float[Array, " c"]:
        mean = y.mean((0, 1, 2))
        return mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)

    def _shares(self) -> int:
        """Returns the number of equal parts into which the batch is divided."""
        return 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)


def fold_batch_norm(
    variables: Mapping[str, Any],
    norm_of: Callable[[tuple[str, ...]], str],
    epsilon: float = BatchNorm.epsilon,
) -> dict[str, Any]:
    """Returns NumPy variables without batch norm, whose convolutions do its work.

    Batch norm by running statistics multiplies every channel by one number and adds
    another. The first is folded into the kernel, the second becomes a bias.

    Args:
        variables: variables of a module whose convolutions have no bias, and are each
            followed by a `BatchNorm` beside it.
        norm_of: function that maps a convolution's path to the name of its batch norm.
        epsilon: the batch norm's.
    """
    params, stats = (
        traverse_util.flatten_dict(variables[kind])
        for kind in ("params", "batch_stats")
    )
    folded = {}
    for path, kernel in params.items():
        *conv, leaf = path
        if leaf != "kernel":
            continue
        norm = (*conv[:-1], norm_of(tuple(conv)))
        var = np.asarray(stats[*norm, "var"], np.float64)
        scale = params[*norm, "scale"] / np.sqrt(var + epsilon)
        bias = params[*norm, "bias"] - stats[*norm, "mean"] * scale
        folded[path] = np.asarray(kernel * scale, np.float32)
        folded[*conv, "bias"] = np.asarray(bias, np.float32)
    return {"params": traverse_util.unflatten_dict(folded)}
