"""Tiles with fewer multiplications: transforms, convolutions, gradients."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from ulsad_jax.nn import convolution, winograd

# Of m outputs, for kernels of size k.
TILES = [(2, 2), (2, 3), (4, 3), (4, 4), (2, 5), (4, 5)]


@pytest.mark.parametrize(("m", "k"), TILES)
def test_transforms_are_a_convolution(m, k):
    """To float64's rounding, so that all error is the sums' in float32."""
    rng = np.random.default_rng(0)
    transforms = winograd.make_transforms(m, k)
    x, w = rng.normal(size=m + k - 1), rng.normal(size=k)
    y = transforms.output.T @ ((transforms.input @ x) * (transforms.kernel @ w))
    np.testing.assert_allclose(y, np.correlate(x, w, "valid"), atol=1e-13)


@pytest.mark.parametrize(("m", "k"), TILES)
@pytest.mark.parametrize(("shape", "padding"), [((9, 6), 1), ((5, 11), 0)])
def test_agrees_with_xla(m, k, shape, padding):
    """Outputs and both gradients, in tiles that fit and in those that stick out."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, *shape, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(k, k, 6, 7)), jnp.float32)

    def native(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=LAYOUT
        )

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, x, kernel):
        y, backward = jax.vjp(function, x, kernel)
        return y, *backward(jnp.ones_like(y).at[0, 0].set(-2))

    def tiled(x, kernel):
        return winograd.convolve(x, kernel, padding, m)

    for a, b in zip(run(tiled, x, kernel), run(native, x, kernel), strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 2e-5


def test_members_of_a_sweep_have_kernels_of_their_own():
    """`vmap` over inputs and kernels is each of them alone."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(3, 2, 6, 6, 4)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(3, 3, 3, 4, 5)), jnp.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(x, kernel):
        return jnp.sin(winograd.convolve(x, kernel, 1, 2)).sum()

    together = jax.jit(jax.vmap(gradient))(x, kernels)
    alone = [gradient(*pair) for pair in zip(x, kernels, strict=True)]
    for a, b in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(a, jnp.stack(b), atol=1e-4)


# Of convolutions at the published size, batch 8, and at batch 1.
@pytest.mark.parametrize(
    ("x", "kernel", "stride", "expected"),
    [
        # Its kernel and its outputs are transformed by one product each.
        ((8, 32, 32, 384), (5, 5, 384, 768), 1, 64 + 2),
        ((8, 63, 63, 64), (4, 4, 64, 64), 1, 49 + 2),
        ((8, 15, 15, 64), (4, 4, 64, 64), 1, 0),
        ((8, 16, 16, 512), (3, 3, 512, 512), 1, 16),
        ((1, 16, 16, 512), (3, 3, 512, 512), 1, 16),
        ((1, 8, 8, 1536), (3, 3, 1536, 1536), 1, 0),  # the kernel is most of it
        ((8, 64, 64, 256), (3, 3, 256, 256), 2, 0),
        ((1, 256, 256, 3), (4, 4, 3, 128), 1, 0),  # of so few channels, little but sums
        ((8, 128, 128, 16), (3, 3, 16, 16), 1, 0),
        ((8, 128, 128, 16), (3, 3, 16, 32), 1, 16),
        ((2, 8, 8, 32), (3, 3, 32, 32), 1, 0),  # over before it is compiled
        ((1, 64, 64, 64), (1, 1, 64, 64), 1, 1),  # the trunk's, as one product
        ((1, 32, 32, 64), (1, 1, 64, 64), 1, 0),
    ],
)
def test_tiles_where_they_pay(x, kernel, stride, expected):
    """One matrix product for each value of a tile, on CPUs alone."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, kernel)]
    convolve = functools.partial(
        convolution.convolve, stride=stride, padding=kernel[0] // 2
    )
    lowered = jax.jit(convolve).trace(*shapes)
    for platform, count in {"cpu": expected, "cuda": 0}.items():
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        products = text.count("stablehlo.dot_general")
        assert products == count or (count == 0 and products <= 1)
    half = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x, kernel)]
    assert jax.jit(convolve).lower(*half).as_text().count("stablehlo.dot_general") <= 1


def test_a_batch_of_any_size_can_be_exported():
    """A function of a symbolic batch has tiles, too."""
    rng = np.random.default_rng(3)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 256, 256)), jnp.float32)

    @jax.jit
    def convolve(x):
        return convolution.convolve(x, kernel, stride=1, padding=1)

    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(convolve)(
        jax.ShapeDtypeStruct((batch, 32, 32, 256), jnp.float32)
    )
    x = jnp.asarray(rng.normal(size=(2, 32, 32, 256)), jnp.float32)
    assert exported.mlir_module().count("stablehlo.dot_general") >= 16
    assert relative_error(exported.call(x), convolve(x)) < 1e-6


LAYOUT = ("NHWC", "HWIO", "NHWC")


def relative_error(a, b) -> float:
    """||a - b|| / ||b||."""
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
