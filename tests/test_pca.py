"""PCA by scikit-learn's, from several batches of which the last is filled up."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from tests.test_padim import BATCH, GRID, SIZE, fit, make_kept
from ulsad_jax.methods.pca import Pca
from ulsad_jax.runtime import devices as devices_lib
from ulsad_jax.scoring.calibration import enlarge_and_blur
from ulsad_jax.trunks import sources


def read_map(state, method, kept):
    count = len(kept)
    batch = sources.load(kept, np.arange(count), count, devices_lib.find_devices(1))
    maps = method.maps(state.model, batch)
    assert maps.keys() == {"residual"}
    return np.asarray(maps["residual"])


@pytest.mark.parametrize("count", [BATCH, 2 * BATCH + 3])
@pytest.mark.parametrize("variance", [0.3, 0.6, 0.9])
def test_the_map_is_scikit_learns_residual(count, variance):
    kept, new = make_kept(count), make_kept(2, seed=1)
    state, method = fit(kept, method=Pca(variance=variance))
    flat = kept.features.reshape(-1, GRID[-1]).astype(np.float64)
    expected = PCA(variance, svd_solver="full").fit(flat)
    assert state.training["count"] == len(flat)
    assert state.model["outside"].shape[1] == GRID[-1] - expected.n_components_
    x = new.features.reshape(-1, GRID[-1]).astype(np.float64)
    residual = x - expected.inverse_transform(expected.transform(x))
    squares = np.square(residual).sum(-1).reshape(2, *GRID[:2])
    np.testing.assert_allclose(
        read_map(state, method, new),
        enlarge_and_blur(squares.astype(np.float32), SIZE),
        rtol=1e-4,
    )


@pytest.mark.parametrize("count", [1, 5])
def test_features_that_never_change(count):
    kept = sources.Kept(make_kept(count).images, np.ones((count, *GRID), np.float32))
    state, method = fit(kept, method=Pca())
    far = sources.Kept(kept.images, kept.features + 2)
    np.testing.assert_allclose(read_map(state, method, kept), 0, atol=1e-6)
    np.testing.assert_allclose(read_map(state, method, far), 4 * GRID[-1], rtol=1e-5)


def test_one_direction_is_always_left_out():
    state, _ = fit(make_kept(5), method=Pca(variance=1 - 1e-9))
    assert state.model["outside"].shape == (GRID[-1], 1)
    assert np.isfinite(jax.tree.leaves(state.model)[0]).all()
