"""Layers against PyTorch's definitions, written out in NumPy."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulsad_jax.nn import convolution, layers
from ulsad_jax.trunks import resnet
from ulsad_jax.trunks import torch_names as torch_import
from ulsad_jax.trunks.pyramid import pool_channels


def correlate(x, weight, bias=0, *, stride, padding):
    """Conv2d, output pixel by output pixel: x NHWC, weight (out, in, kh, kw)."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    kh, kw = weight.shape[2:]
    height = (x.shape[1] - kh) // stride + 1
    width = (x.shape[2] - kw) // stride + 1
    y = np.zeros((x.shape[0], height, width, weight.shape[0]))
    for i, j in np.ndindex(height, width):
        window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
        y[:, i, j] = np.einsum("bhwi,oihw->bo", window, weight) + bias
    return y


def scatter(x, weight, bias=0, *, stride, padding):
    """ConvTranspose2d: every input pixel adds its kernel to the output.

    weight is (in, out, kh, kw).
    """
    b, height, width, _ = x.shape
    _, out, kh, kw = weight.shape
    y = np.zeros((b, (height - 1) * stride + kh, (width - 1) * stride + kw, out))
    for i, j in np.ndindex(height, width):
        rows = slice(i * stride, i * stride + kh)
        columns = slice(j * stride, j * stride + kw)
        y[:, rows, columns] += np.einsum("bi,iohw->bhwo", x[:, i, j], weight)
    end = (slice(padding, -padding or None),) * 2
    return y[:, *end] + bias


def sample_axis(x, n_out):
    """Bilinear sampling of the last axis at half-pixel centres, point by point."""
    n_in = x.shape[-1]
    columns = []
    for i in range(n_out):
        position = min(max((i + 0.5) * n_in / n_out - 0.5, 0), n_in - 1)
        low = int(position)
        high = min(low + 1, n_in - 1)
        fraction = position - low
        columns.append((1 - fraction) * x[..., low] + fraction * x[..., high])
    return np.stack(columns, axis=-1)


def random_parameters(layer, x):
    """Parameters as the layer holds them, and as PyTorch does."""
    params = layer.init(jax.random.key(0), x)
    arrays = torch_import.export(params)
    return params, arrays["weight"], arrays.get("bias", 0)


def assert_gradients(layer, params, x, oracle):
    """Derivatives along one random direction; `oracle(x, weight)` is bilinear."""
    rng = np.random.default_rng(9)
    dx = rng.normal(size=x.shape).astype(np.float32)
    (name,) = params["params"].keys() - {"bias"}
    kernel = params["params"][name]
    dkernel = rng.normal(size=kernel.shape).astype(np.float32)
    cotangent = rng.normal(size=layer.apply(params, x).shape).astype(np.float32)

    def loss(x, kernel):
        changed = {"params": params["params"] | {name: kernel}}
        return (layer.apply(changed, x) * cotangent).sum()

    along_x, along_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)
    weight, dweight = (
        torch_import.export({"params": {name: value}})["weight"]
        for value in (kernel, dkernel)
    )
    for ours, expected in (
        ((along_x * dx).sum(), oracle(dx, weight)),
        ((along_kernel * dkernel).sum(), oracle(x, dweight)),
    ):
        terms = expected * cotangent
        assert abs(ours - terms.sum()) < 1e-5 * np.abs(terms).sum()


@pytest.mark.parametrize(
    ("n_in", "n_out"),
    [(16, 32), (32, 256), (64, 32), (1, 3), (3, 8), (9, 15), (7, 7), (64, 8), (5, 3)],
)
def test_resize_samples_at_half_pixel_centres(n_in, n_out):
    x = np.random.default_rng(0).normal(size=(4, n_in))
    ours = x @ layers.resize_matrix(n_in, n_out).T
    np.testing.assert_allclose(ours, sample_axis(x, n_out), atol=1e-12)


def test_resize_does_not_antialias():
    # Halving samples between two pixels: their average, and no other pixel's part.
    matrix = layers.resize_matrix(64, 32)
    expected = np.zeros((32, 64))
    expected[np.arange(32), 2 * np.arange(32)] = 0.5
    expected[np.arange(32), 2 * np.arange(32) + 1] = 0.5
    np.testing.assert_array_equal(matrix, expected)
    # Shrinking eightfold still looks at two of the eight.
    assert ((layers.resize_matrix(64, 8) > 0).sum(1) == 2).all()


def test_resize_takes_both_axes_apart():
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 3)).astype(np.float32)
    expected = sample_axis(np.moveaxis(x, 1, -1), 9)  # [b, w, c, height]
    expected = sample_axis(np.moveaxis(expected, 1, -1), 3)  # [b, c, height, width]
    ours = layers.resize(jnp.asarray(x), (9, 3))
    np.testing.assert_allclose(ours, np.moveaxis(expected, 1, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "use_bias"),
    [
        ((3, 3), 1, 1, True),
        ((3, 3), 2, 1, True),
        ((4, 4), 2, 1, True),
        ((4, 4), 1, 2, True),
        ((8, 9), 1, 0, True),
        ((2, 5), 1, 1, True),
        ((1, 1), 1, 0, False),
        ((7, 7), 2, 3, False),
    ],
)
def test_conv(kernel, stride, padding, use_bias):
    x = np.random.default_rng(2).normal(size=(2, 8, 9, 3)).astype(np.float32)
    layer = layers.Conv(5, kernel, stride, padding, use_bias)
    params, weight, bias = random_parameters(layer, x)
    assert weight.shape == (5, 3, *kernel)
    oracle = functools.partial(correlate, stride=stride, padding=padding)
    np.testing.assert_allclose(
        layer.apply(params, x), oracle(x, weight, bias), atol=1e-5
    )
    assert_gradients(layer, params, x, oracle)


@pytest.mark.parametrize(
    ("kind", "size", "stride", "padding"),
    [
        ("conv", 1, 1, 0),  # the trunk's
        ("conv", 1, 2, 0),
        ("conv", 3, 1, 1),  # the local reconstructor's
        ("conv", 3, 2, 1),
        ("transposed", 5, 1, 2),
        ("transposed", 4, 2, 1),
        ("conv", 4, 2, 1),  # the global autoencoder's
        ("conv", 4, 1, 2),
        ("conv", 8, 1, 0),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowerings_agree(kind, size, stride, padding, dtype, monkeypatch):
    """Matrix products, where this platform has them, and XLA's convolution."""
    monkeypatch.setattr(convolution, "MANY_OUTPUTS", 1)
    monkeypatch.setattr(convolution, "MANY_MULTIPLICATIONS", 0)
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(2, 9, 10, 4)), dtype)
    kernel = jnp.asarray(rng.normal(size=(size, size, 4, 5)), dtype)
    transposed = kind == "transposed"
    lowered = convolution.convolve_transposed if transposed else convolution.convolve

    def run(function):
        @jax.jit
        def both(x, kernel):
            y, backward = jax.vjp(function, x, kernel)
            return y, *backward(jnp.sin(y))

        return both(x, kernel)

    function = functools.partial(lowered, stride=stride, padding=padding)
    products = run(function)
    with convolution.plain():
        native = run(function)  # traced anew
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for ours, expected in zip(products, native, strict=True):
        assert ours.dtype == expected.dtype == dtype
        ours, expected = (np.asarray(a, np.float64) for a in (ours, expected))
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < tolerance


def test_transposed_conv_on_gpus(monkeypatch):
    """Four plain convolutions at once, so that no input is spread out."""
    monkeypatch.setattr(convolution, "MANY_MULTIPLICATIONS", 0)
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2, 9, 10, 4)).astype(np.float32)
    kernel = rng.normal(size=(4, 4, 4, 5)).astype(np.float32)

    def run(function):
        def losses(x, kernel):
            y, backward = jax.vjp(function, x, kernel)
            return y, *backward(jnp.sin(y))

        return jax.jit(losses)

    double = functools.partial(convolution.convolve_transposed, stride=2, padding=1)
    lowered = run(double).trace(x, kernel).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("stablehlo.convolution") == 3
    assert "lhs_dilate = [2, 2]" not in text
    with convolution.plain():
        native = run(functools.partial(double))  # traced anew
        expected = native(x, kernel)
        assert "lhs_dilate = [2, 2]" in native.lower(x, kernel).as_text()
    for a, b in zip(run(convolution._double_at_once)(x, kernel), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [((3, 3), 1, 1), ((3, 3), 2, 1), ((5, 5), 1, 2), ((7, 8), 1, 0), ((5, 3), 2, 1)],
)
@pytest.mark.parametrize("chunk", [1, 2**12, 2**30])
def test_kernel_gradient_of_a_large_batch(size, stride, padding, chunk, monkeypatch):
    """Whatever number of images is taken at once."""
    monkeypatch.setattr(convolution, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(convolution, "MANY_MULTIPLICATIONS", 0)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(36, 7, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(*size, 3, 5)).astype(np.float32)

    def loss(x, kernel, images):
        parts = x.reshape(-1, images, *x.shape[1:])
        convolve = functools.partial(
            convolution.convolve, stride=stride, padding=padding
        )
        return sum(jnp.sin(convolve(part, kernel)).sum() for part in parts)

    large = jax.grad(loss, (0, 1))(x, kernel, 36)
    small = jax.grad(loss, (0, 1))(x, kernel, 4)  # as XLA does it
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), large, small)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_max_pool(size):
    x = np.random.default_rng(5).normal(size=(2, *size, 3)).astype(np.float32)
    around = ((1, 1), (1, 1))

    def oracle(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=around)

    np.testing.assert_array_equal(resnet.max_pool(x), oracle(x))
    gradients = [
        jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())(x)
        for f in (resnet.max_pool, oracle)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(4, 2, 1), (5, 1, 2), (3, 2, 0), (2, 3, 1)]
)
def test_transposed_conv(kernel, stride, padding):
    x = np.random.default_rng(3).normal(size=(2, 4, 5, 3)).astype(np.float32)
    layer = layers.ConvTranspose(6, kernel, stride, padding)
    params, weight, bias = random_parameters(layer, x)
    assert weight.shape == (3, 6, kernel, kernel)
    oracle = functools.partial(scatter, stride=stride, padding=padding)
    np.testing.assert_allclose(
        layer.apply(params, x), oracle(x, weight, bias), atol=1e-5
    )
    assert_gradients(layer, params, x, oracle)


@pytest.mark.parametrize("shape", [(8, 1, 1, 4), (3, 5, 7, 4)])
def test_batch_norm_in_training(shape):
    x = np.random.default_rng(5).normal(3, 2, shape).astype(np.float32)
    scale, bias = np.array([1, 2, 3, -1.0]), np.array([0, 1, -1, 0.5])
    old = {"mean": np.array([0, 1, 2, 3.0]), "var": np.array([1, 2, 3, 4.0])}
    y, updates = layers.BatchNorm().apply(
        {"params": {"scale": scale, "bias": bias}, "batch_stats": old},
        x,
        train=True,
        mutable=["batch_stats"],
    )
    mean, biased = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(biased + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, atol=1e-4)
    new = updates["batch_stats"]
    unbiased = x.reshape(-1, 4).var(0, ddof=1)
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * unbiased, rtol=1e-5)
    np.testing.assert_array_equal(old["mean"], [0, 1, 2, 3])  # not written into


def test_batch_norm_in_evaluation():
    x = np.random.default_rng(6).normal(3, 2, (2, 3, 3, 2)).astype(np.float32)
    stats = {"mean": np.array([1, -1.0]), "var": np.array([4, 0.25])}
    norm = layers.BatchNorm(epsilon=1e-4, affine=False)
    y = norm.apply({"batch_stats": stats}, x, train=False)
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-4)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_starts_with_unit_statistics():
    x = jnp.full((2, 3, 3, 5), 7.0)
    variables = layers.BatchNorm().init(jax.random.key(0), x, train=True)
    for kind, name, value in (
        ("params", "scale", 1),
        ("params", "bias", 0),
        ("batch_stats", "mean", 0),
        ("batch_stats", "var", 1),
    ):
        np.testing.assert_array_equal(variables[kind][name], np.full(5, value))


GAIN = np.sqrt(2 / (1 + 0.01**2))


@pytest.mark.parametrize(
    ("layer", "kernel_bound", "bias_bound"),
    [
        # PyTorch's default for both, kernel and bias: 1 / sqrt(fan_in).
        (layers.Conv(64, (3, 3)), 1 / np.sqrt(32 * 9), 1 / np.sqrt(32 * 9)),
        (layers.Linear(64), 1 / np.sqrt(32), 1 / np.sqrt(32)),
        # Xavier: gain * sqrt(6 / (fan_in + fan_out)).
        (
            layers.Conv(64, (3, 3), kernel_init=layers.xavier_uniform),
            GAIN * np.sqrt(6 / (32 * 9 + 64 * 9)),
            1 / np.sqrt(32 * 9),
        ),
        # PyTorch counts a transposed convolution's outputs as its fan-in.
        (
            layers.ConvTranspose(64, 4, 2, 1),
            GAIN * np.sqrt(6 / (32 * 16 + 64 * 16)),
            1 / np.sqrt(64 * 16),
        ),
    ],
    ids=["conv", "linear", "conv-xavier", "transposed"],
)
def test_initial_parameters_fill_their_range(layer, kernel_bound, bias_bound):
    params = layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 32)))["params"]
    bias = np.asarray(params.pop("bias"))
    (kernel,) = (np.asarray(value) for value in params.values())
    for value, bound, reached in (
        (kernel, kernel_bound, 0.99),
        (bias, bias_bound, 0.8),
    ):
        assert np.abs(value).max() <= bound * (1 + 1e-6)
        assert value.max() > reached * bound
        assert value.min() < -reached * bound
    assert kernel.std() == pytest.approx(kernel_bound / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    ("channels", "bins"), [(8, 4), (6, 6), (7, 3), (10, 4), (3, 5)]
)
def test_pool_channels(channels, bins):
    x = np.random.default_rng(7).normal(size=(2, 3, 4, channels)).astype(np.float32)
    ours = pool_channels(jnp.asarray(x), bins)
    assert ours.shape == (2, 3, 4, bins)
    for i in range(bins):
        start = int(np.floor(i * channels / bins))
        end = int(np.ceil((i + 1) * channels / bins))
        np.testing.assert_allclose(ours[..., i], x[..., start:end].mean(-1), atol=1e-6)


def test_normalize_image():
    image = np.random.default_rng(8).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    ours = layers.normalize_image(jnp.asarray(image))
    as_float = layers.normalize_image(jnp.asarray(image / 255, jnp.float32))
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_allclose(ours, as_float, atol=1e-6)
