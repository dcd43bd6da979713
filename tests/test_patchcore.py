"""PatchCore by anomalib's numbers (see `goldens/patches.py`) and by NumPy's."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from tests import runs
from tests.goldens import patches as golden
from ulsad_jax.methods import patchcore
from ulsad_jax.methods.base import Batch
from ulsad_jax.methods.padim import Padim
from ulsad_jax.methods.patchcore import Patchcore
from ulsad_jax.runs import steps
from ulsad_jax.scoring.calibration import enlarge_and_blur

BATCH = 16  # the last batch is filled up


@pytest.fixture(scope="module")
def expected():
    with np.load(pathlib.Path(golden.__file__).with_suffix(".npz")) as file:
        return dict(file)


def make_batch(features, rows=None, own=None):
    rows = np.arange(len(features)) if rows is None else rows
    image = np.zeros((len(rows), *golden.SIZE, 3), np.uint8)
    valid = np.arange(len(rows)) < (own or len(rows))
    return Batch(image, features[rows], valid, rows.astype(np.int32))


def fit(method, features, *, seed=0):
    """The finished state, from batches of which the last one is filled up."""
    count, key = len(features), jax.random.key(seed)
    shape = runs.features(*features.shape[1:])
    state = method.init(key, steps.make_spec(BATCH, golden.SIZE, shape, count))
    update = jax.jit(method.update)
    for start in range(0, count, BATCH):
        own = min(BATCH, count - start)
        rows = np.resize(np.arange(start, start + own), BATCH)
        batch = make_batch(features, rows, own)
        filled = np.where(batch.valid[:, None, None, None], batch.features, 99.0)
        state, _ = update(state, batch._replace(features=filled), key)
    return method.finish(state)


def choose_greedily(points, start, count):
    """As it is said: one row after the other."""
    chosen, nearest = [start], np.full(len(points), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.square(points - points[chosen[-1]]).sum(1))
        chosen.append(int(nearest.argmax()))
    return chosen


def test_the_coreset_is_anomalibs(expected):
    x = np.asarray(patchcore.average(golden.features()[0]))
    x = x.reshape(-1, golden.CHANNELS)
    count = int(golden.SHARE * len(x))
    found = patchcore.select_coreset(x @ golden.projection(), golden.START, count)
    np.testing.assert_array_equal(found, expected["coreset"])


def test_the_map_and_the_score_are_anomalibs(expected):
    """But for enlarging: there nearest, here and in the paper bilinear."""
    train, test = golden.features()
    x = np.asarray(patchcore.average(train)).reshape(-1, golden.CHANNELS)
    model = {"bank": x[expected["coreset"]]}
    method, batch = Patchcore(), make_batch(test)
    distances = patchcore.find_distances(patchcore.average(test), model["bank"])
    np.testing.assert_allclose(distances, expected["distances"], rtol=1e-4)
    found = method.maps(model, batch)["nearest"]
    enlarged = enlarge_and_blur(expected["distances"], golden.SIZE)
    np.testing.assert_allclose(found, enlarged, rtol=1e-4)
    score = method.scores(model, batch)["patchcore"]
    np.testing.assert_allclose(score, expected["scores"], rtol=1e-4)


def test_padims_map_is_anomalibs(expected):
    """Its epsilon, 0.01, is added with another 1e-5."""
    train, test = golden.features()
    method = Padim(channels=golden.CHANNELS, epsilon=0.01 + 1e-5)
    model = fit(method, train).model
    found = method.maps(model, make_batch(test))["patch"]
    found = found[:, :: golden.STRIDE, :: golden.STRIDE]
    np.testing.assert_allclose(found, expected["padim"], rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 300])
@pytest.mark.parametrize("size", [300, patchcore.CANDIDATES + 500])
def test_each_choice_is_the_farthest(size, count):
    """Whether all points are candidates or few are; some points are far clusters."""
    points = np.random.default_rng(0).normal(size=(size, 3))
    points[:: size // 20] *= 5
    points = points.astype(np.float32)
    found = patchcore.select_coreset(points, 7, count)
    assert found.tolist() == choose_greedily(points, 7, count)


def test_points_that_are_all_the_same():
    points = np.ones((patchcore.CANDIDATES + 100, 3), np.float32)
    found = patchcore.select_coreset(points, 7, 90)
    assert len(set(found.tolist())) == 90
    found = patchcore.select_coreset(points * np.nan, 7, 90)
    assert len(found) == 90


def test_projected_distances_are_the_same_on_average():
    x = np.random.default_rng(0).normal(size=(60, 400)).astype(np.float32)
    matrix = np.asarray(patchcore.draw_projection(jax.random.key(0), 400, 128))
    assert (matrix != 0).mean() == pytest.approx(1 / 20, rel=0.1)
    one, other = (
        np.square(y[:, None] - y).sum(-1)[np.triu_indices(60, 1)]
        for y in (x, x @ matrix)
    )
    assert (other / one).mean() == pytest.approx(1, abs=0.05)
    assert (other / one).std() < 0.25


@pytest.mark.parametrize("size", [3, patchcore.TILE, 2 * patchcore.TILE + 5])
def test_nearest_of_any_number_of_patches(size):
    rng = np.random.default_rng(0)
    bank, x = rng.normal(size=(size, 4)), rng.normal(size=(2, 3, 5, 4))
    found = patchcore.find_distances(*map(np.float32, (x, bank)))
    distances = np.linalg.norm(x[..., None, :] - bank, axis=-1).min(-1)
    np.testing.assert_allclose(found, distances, rtol=1e-3, atol=1e-3)


def test_a_bank_of_every_training_image():
    train, _ = golden.features()
    state = fit(Patchcore(share=1.0), train)
    bank = np.asarray(state.model["bank"])
    x = np.asarray(patchcore.average(train)).reshape(-1, golden.CHANNELS)
    np.testing.assert_array_equal(np.unique(bank, axis=0), np.unique(x, axis=0))
    assert not state.training  # checkpoints hold the coreset alone
    found = Patchcore().maps(state.model, make_batch(train))["nearest"]
    np.testing.assert_allclose(found, 0, atol=1e-2)


def test_few_patches():
    """A bank has as many patches as the score's reweighting needs, or all there are."""
    train, test = golden.features()
    state = fit(Patchcore(share=1e-9), train[:1])
    assert state.model["bank"].shape == (9, golden.CHANNELS)
    score = Patchcore(neighbors=100).scores(state.model, make_batch(test))["patchcore"]
    assert (score > 0).all() and np.isfinite(score).all()


def test_the_key_chooses_the_projection_and_the_first_patch():
    train, _ = golden.features()
    method = Patchcore(dimensions=4)
    one, same, other = (fit(method, train, seed=seed).model for seed in (0, 0, 1))
    runs.assert_same_arrays(one, same)
    assert not np.array_equal(one["bank"], other["bank"])


def test_images_that_were_not_seen_do_not_count():
    train, _ = golden.features()
    method, key = Patchcore(share=1.0), jax.random.key(0)
    shape = runs.features(*train.shape[1:])
    state = method.init(key, steps.make_spec(3, golden.SIZE, shape, len(train)))
    state, _ = method.update(state, make_batch(train, np.array([4, 9, 9]), 2), key)
    bank = method.finish(state).model["bank"]
    seen = np.asarray(patchcore.average(train[[4, 9]])).reshape(-1, golden.CHANNELS)
    np.testing.assert_array_equal(np.unique(bank, axis=0), np.unique(seen, axis=0))


def test_memory_grows_with_the_images():
    shape = runs.features(8, 8, 16)
    one, other = (
        Patchcore().estimate_bytes(steps.make_spec(4, (64, 64), shape, count))
        for count in (10, 1010)
    )
    assert other - one >= 1000 * 8 * 8 * 16 * 4
