from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ulsad_jax.trunks import features, sources
from ulsad_jax.trunks import weights as pretrained
from ulsad_jax.trunks.pyramid import FeaturePyramid


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_batches(images, order, size):
    """Batches in any order, the last one filled up with rows that count for nothing."""
    for start in range(0, len(order), size):
        index = np.array(order[start : start + size])
        filled = np.resize(index, size)
        yield {
            "image": images[filled],
            "index": np.where(np.arange(size) < len(index), filled, 0),
            "valid": np.arange(size) < len(index),
        }


@pytest.mark.parametrize("shape", [(5, 4, 3, 7), (1, 1, 2, 1), (2, 8, 8, 384)])
def test_statistics_are_those_of_float64(shape):
    raw = 3 + 2 * draw(*shape)
    statistics = features.channel_statistics(raw)
    flat = raw.reshape(-1, shape[-1]).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, flat.std(0), rtol=1e-6)
    assert statistics.mean.dtype == statistics.std.dtype == np.float32


def test_statistics_far_from_zero():
    """Where sums in float32 would leave nothing of the deviation."""
    raw = 1000 + 0.1 * draw(50, 8, 8, 2)
    expected = raw.reshape(-1, 2).astype(np.float64).std(0)
    statistics = features.channel_statistics(raw)
    np.testing.assert_allclose(statistics.std, expected, rtol=1e-5)


def test_standardised_features():
    raw = 3 + 2 * draw(6, 4, 4, 5)
    flat = features.channel_statistics(raw).standardize(raw).reshape(-1, 5)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(flat.std(0), 1, rtol=1e-6)


@pytest.mark.parametrize("far", [0, 1000])
def test_whitened_features_are_uncorrelated(far):
    mix = np.diag([1, 2, 3, 4, 5]) + np.tri(5)
    raw = (far + draw(60, 4, 4, 5) @ mix).astype(np.float32)
    statistics = features.channel_statistics(raw, whiten=True)
    plain = features.channel_statistics(raw)
    np.testing.assert_array_equal(statistics.mean, plain.mean)
    np.testing.assert_array_equal(statistics.std, plain.std)
    np.testing.assert_allclose(statistics.whitening, statistics.whitening.T)
    flat = statistics.standardize(raw).reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(flat.T, bias=True), np.eye(5), atol=1e-3)


def test_whitening_of_uncorrelated_features_changes_nothing():
    half = draw(1, 1, 40, 1)
    raw = np.concatenate([half, half[:, :, ::-1]], -1)
    raw = np.concatenate([raw, raw * [1, -1], raw * [-1, 1], -raw]).astype(np.float32)
    found = features.channel_statistics(raw, whiten=True).standardize(raw)
    expected = features.channel_statistics(raw).standardize(raw)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_whitening_of_channels_that_say_the_same():
    """What never varies is raised by the bound, and no further."""
    raw = draw(3, 4, 4, 3)
    raw[..., 1] = 2 * raw[..., 0]
    raw[..., 2] = 7  # never changes
    statistics = features.channel_statistics(raw, whiten=True)
    standard = statistics.standardize(raw)
    np.testing.assert_allclose(standard[..., 0], standard[..., 1], atol=1e-5)
    np.testing.assert_allclose(standard[..., 2], 0, atol=1e-12)
    largest = np.linalg.eigvalsh(statistics.whitening).max()
    assert largest == pytest.approx(features.LEAST_VARIANCE**-0.5, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-20, 1e6])
def test_channel_that_never_changes_is_zero(value):
    raw = draw(3, 4, 4, 2)
    raw[..., 1] = value
    standard = features.channel_statistics(raw).standardize(raw)
    assert np.isfinite(standard).all()
    np.testing.assert_array_equal(standard[..., 1], 0)
    assert standard[..., 0].std() == pytest.approx(1, rel=1e-5)


def test_dead_channel_on_an_image_where_it_fires():
    raw = draw(3, 4, 4, 2)
    raw[..., 1] = 0
    statistics = features.channel_statistics(raw)
    seen = statistics.standardize(np.ones((1, 1, 1, 2), np.float32))
    assert seen[..., 1] == 1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_extraction_keeps_the_order(size):
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(3, axis=-1)
    kept, raw = sources.extract(
        lambda image: (image, jnp.float32(image) / 2),
        make_batches(images, [3, 0, 4, 1, 2], size),
        5,
    )
    np.testing.assert_array_equal(kept, images)
    np.testing.assert_array_equal(raw, images / 2)
    assert raw.dtype == np.float32


def test_images_alone_are_read_without_a_trunk():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(3, axis=-1)
    kept, raw = sources.extract(None, make_batches(images, [3, 0, 4, 1, 2], 2), 5)
    np.testing.assert_array_equal(kept, images)
    assert raw is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_features_of_an_image_do_not_depend_on_its_batch(dtype):
    trunk = pretrained.load_trunk(
        architecture="resnet18", source="random", repository="", path="", seed=0
    )
    extractor = features.make_extractor(
        FeaturePyramid("resnet18", dtype), trunk.variables
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    alone, together = (
        sources.extract(extractor, make_batches(images, range(3), size), 3)[1]
        for size in (1, 2)
    )
    assert alone.shape == (3, 8, 8, 384)
    assert alone.dtype == np.float32
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(together, alone, atol=tolerance * np.abs(alone).max())
