"""PaDiM by its closed forms, from several batches of which the last is filled up."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from tests import runs
from ulsad_jax.methods.padim import Padim
from ulsad_jax.runs import steps
from ulsad_jax.runtime import devices as devices_lib
from ulsad_jax.scoring.calibration import enlarge_and_blur
from ulsad_jax.trunks import sources

GRID, SIZE = (3, 4, 6), (24, 32)
BATCH = 4


def make_kept(count, seed=0):
    """Features that are correlated, and differ by position."""
    rng = np.random.default_rng(seed)
    mix = np.tri(GRID[-1]) + np.diag(np.arange(GRID[-1]))
    features = rng.normal(size=(count, *GRID)) @ mix + 3 * rng.normal(size=GRID)
    images = rng.integers(0, 256, (count, *SIZE, 3), np.uint8)
    return sources.Kept(images, features.astype(np.float32))


def fit(kept, seed=0, method=None, **fields):
    """The finished state, and the method; PaDiM with these fields by default."""
    method, key = method or Padim(**fields), jax.random.key(seed)
    devices, count = devices_lib.find_devices(1), len(kept)
    spec = steps.make_spec(BATCH, SIZE, runs.features(*GRID), count)
    state = devices.replicate(steps.make_init(method, spec)(key))
    step = steps.make_train_step(method, devices, "jit")
    for start in range(0, count, BATCH):
        own = min(BATCH, count - start)
        rows = np.resize(np.arange(start, start + own), BATCH)
        state, losses = step(state, sources.load(kept, rows, own, devices), key)
        assert not losses
    assert int(state.step) == -(-count // BATCH)
    return jax.device_get(method.finish(state)), method


def read_covariance(model):
    """What the whitening matrices are made of, in float64."""
    inverse = np.linalg.inv(np.float64(model["factor"]))
    return inverse @ np.swapaxes(inverse, -1, -2)


@pytest.mark.parametrize("count", [8, 9, 11])
@pytest.mark.parametrize("channels", [3, 100])
def test_means_and_covariances_are_numpys(count, channels):
    kept = make_kept(count)
    state, _ = fit(kept, channels=channels, epsilon=0.5)
    model = state.model
    used = kept.features[..., model["channels"]].astype(np.float64)
    assert used.shape[-1] == min(channels, GRID[-1])
    np.testing.assert_allclose(model["mean"], used.mean(0), rtol=1e-5, atol=1e-5)
    found = read_covariance(model) - 0.5 * np.eye(used.shape[-1])
    for y, x in np.ndindex(GRID[:2]):
        expected = np.cov(used[:, y, x], rowvar=False)
        np.testing.assert_allclose(found[y, x], expected, rtol=1e-3, atol=1e-3)


def test_rows_that_fill_a_batch_do_not_count():
    """Whatever they hold."""
    kept, method, key = make_kept(BATCH), Padim(), jax.random.key(0)
    devices = devices_lib.find_devices(1)
    found = []
    for seed in (1, 2):
        features, other = kept.features.copy(), make_kept(BATCH, seed).features
        features[2:] = other[2:]
        state = steps.make_init(
            method, steps.make_spec(BATCH, SIZE, runs.features(*GRID))
        )(key)
        step = steps.make_train_step(method, devices, "jit")
        rows, filled = np.arange(BATCH), sources.Kept(kept.images, features)
        state, _ = step(state, sources.load(filled, rows, 2, devices), key)
        found.append(jax.device_get(method.finish(state)))
    runs.assert_same_arrays(*found)
    assert found[0].training["count"] == 2
    np.testing.assert_allclose(
        found[0].model["mean"], kept.features[:2].mean(0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("epsilon", [0.01, 1.0])
def test_the_map_is_the_mahalanobis_distance(epsilon):
    kept, new = make_kept(11), make_kept(2, seed=1)
    state, method = fit(kept, channels=4, epsilon=epsilon)
    batch = sources.load(new, np.arange(2), 2, devices_lib.find_devices(1))
    maps = method.maps(state.model, batch)
    assert maps.keys() == {"patch"}
    chosen = state.model["channels"]
    train, test = (k.features[..., chosen].astype(np.float64) for k in (kept, new))
    expected = np.empty(test.shape[:3])
    for i, y, x in np.ndindex(expected.shape):
        covariance = np.cov(train[:, y, x], rowvar=False) + epsilon * np.eye(4)
        expected[i, y, x] = mahalanobis(
            test[i, y, x], train[:, y, x].mean(0), np.linalg.inv(covariance)
        )
    expected = enlarge_and_blur(expected.astype(np.float32), SIZE)
    np.testing.assert_allclose(maps["patch"], expected, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_images_than_channels(count):
    kept = make_kept(count)
    state, method = fit(kept)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    batch = sources.load(kept, np.arange(count), count, devices_lib.find_devices(1))
    seen = method.maps(state.model, batch)["patch"]
    far = method.maps(state.model, batch._replace(features=batch.features + 10))
    assert np.isfinite(seen).all() and np.isfinite(far["patch"]).all()
    assert far["patch"].min() > seen.max()


def test_the_key_chooses_the_channels():
    spec = steps.make_spec(BATCH, SIZE, runs.features(3, 4, 384))

    def choose(seed, channels=100):
        init = steps.make_init(Padim(channels=channels), spec)
        return np.asarray(init(jax.random.key(seed)).model["channels"])

    chosen = choose(0)
    assert len(set(chosen.tolist())) == 100
    assert chosen.min() >= 0 and chosen.max() < 384
    np.testing.assert_array_equal(chosen, choose(0))
    assert not np.array_equal(chosen, choose(1))
    np.testing.assert_array_equal(choose(0, 1000), np.arange(384))


def test_a_run_counts_every_training_image_once(data, tmp_path):
    """Over all of them, standardised channels have mean 0 and variance 1."""
    fields = {"methods.padim.channels": 16, "train.batch_size": 5}
    runs.train(runs.make_config(data, fields, method="padim"), tmp_path / "run")
    (step,) = runs.read_steps(tmp_path / "run")  # a single pass
    assert step == 3
    checkpoint = runs.read_checkpoint(tmp_path / "run")
    count = checkpoint["optimizer"]["state"]["count"]
    assert count == 12  # two are held out for validation
    model = checkpoint["model"]["variables"]
    assert model["channels"].shape == (16,)
    np.testing.assert_allclose(model["mean"].mean((0, 1)), 0, atol=1e-4)
    variances = np.diagonal(read_covariance(model), axis1=-2, axis2=-1) - 0.01
    squares = variances * (count - 1) / count + np.square(model["mean"])
    alive = squares.mean((0, 1)) > 1e-3  # a channel that never changes is 0
    assert alive.sum() > 8
    np.testing.assert_allclose(squares.mean((0, 1))[alive], 1, rtol=1e-3)
    row = runs.read_scores(tmp_path / "run")[0]
    assert row["patch_score"] == row["score"]  # the only map
    assert "local_score" not in row
