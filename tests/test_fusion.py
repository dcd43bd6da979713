"""The fusion of image scores, and Gaussians of mean features and of word counts."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from ulsad_jax.methods.base import Batch, Spec
from ulsad_jax.methods.pooled import Pooled, Words
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import fusion

RNG = np.random.default_rng(0)


def test_fusion_is_the_weighted_sum_of_robust_z_scores():
    scores = {"a": RNG.normal(3, 2, 400), "b": RNG.normal(-1, 0.5, 400)}
    scores["a"][0] = 1e9  # an outlier among the normals
    found = fusion.measure(scores, {"a": 2.0, "b": 1.0})
    new = {"a": np.array([3.0, 5.0]), "b": np.array([-1.0, -1.5])}
    np.testing.assert_allclose(found(new), [0, 2 * 1 - 1], atol=0.3)
    terms = found.terms(new)
    np.testing.assert_allclose(sum(terms.values()), found(new))


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_no_branch_makes_a_fused_score_undefined(count):
    """Neither a constant one nor a single validation image; the other still counts."""
    scores = {"constant": np.full(count, 4.0), "b": RNG.normal(size=count)}
    weights = fusion.choose_weights(("constant", "b"), {})
    for values in (
        fusion.fuse_as_new(scores, weights),
        fusion.measure(scores, weights)(scores),
    ):
        assert np.isfinite(values).all()
    fused = fusion.measure(scores, weights)
    low, high = fused({"constant": np.full(2, 4.0), "b": np.array([0.0, 1e3])})
    assert high > low + 1


def test_fusion_as_new_leaves_each_image_out():
    scores = {"a": RNG.normal(size=7), "b": RNG.normal(size=7)}
    weights = {"a": 1.0, "b": 0.5}
    found = fusion.fuse_as_new(scores, weights)
    for i in range(7):
        others = {k: np.delete(v, i) for k, v in scores.items()}
        own = {k: v[i] for k, v in scores.items()}
        assert found[i] == pytest.approx(fusion.measure(others, weights)(own))


@pytest.mark.parametrize("given", [{"c": 1.0}, {"a": 0.0, "b": 0.0}])
def test_weights_that_will_not_do(given):
    with pytest.raises(UserError, match="weights of a, b"):
        fusion.choose_weights(("a", "b"), given)


def test_what_is_not_there_can_be_left_out():
    assert fusion.choose_weights(("a", "b"), {"a": 0.0, "c": 0.0}) == {"b": 1.0}


def test_scores_that_differ_by_rounding_do_not_drown_the_others():
    same = np.full(20, 0.5, np.float32)
    same[::3] += np.float32(6e-8)
    scores = {"same": same, "b": RNG.normal(size=20)}
    fused = fusion.measure(scores, {"same": 1.0, "b": 1.0})
    terms = fused.terms({"same": np.array([0.5001]), "b": np.array([5.0])})
    assert abs(terms["same"][0]) < 0.01 < terms["b"][0]


@pytest.mark.parametrize("share", [0.0, 0.014, 0.1, 1.0])
def test_image_score_is_the_mean_of_the_largest_values(share):
    maps = RNG.normal(size=(3, 10, 10)).astype(np.float32)
    count = max(1, math.ceil(share * 100))
    expected = np.sort(maps.reshape(3, -1))[:, -count:].mean(1)
    np.testing.assert_allclose(fusion.image_score(maps, share), expected, atol=1e-6)


def fit(x, batch=4):
    """Trains on mean features x, in batches of which the last one is filled up."""
    shape = Batch(np.zeros((batch, 8, 8, 3)), np.zeros((batch, 2, 3, x.shape[1])), None)
    method = Pooled()
    state = method.init(jax.random.key(0), Spec(shape, len(x)))
    for start in range(0, len(x), batch):
        rows = np.arange(start, start + batch) % len(x)
        valid = np.arange(start, start + batch) < len(x)
        features = np.broadcast_to(x[rows, None, None], (batch, 2, 3, x.shape[1]))
        own = Batch(shape.image, features, valid, rows.astype(np.int32))
        state, _ = method.update(state, own, None)
    return method, method.finish(state)


def test_pooled_is_the_distance_by_ledoit_and_wolf():
    x = RNG.normal(size=(11, 5)).astype(np.float32) @ RNG.normal(size=(5, 5))
    method, state = fit(x.astype(np.float32))
    expected = LedoitWolf().fit(x)
    new = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
    found = method.scores(state.model, Batch(None, new, None))["pooled"]
    precision = np.linalg.inv(expected.covariance_)
    for one, score in zip(new.mean((1, 2)), found, strict=True):
        distance = mahalanobis(one, expected.location_, precision)
        assert float(score) == pytest.approx(distance, rel=1e-3)


ALMOST = np.ones((6, 3)) + 1e-7 * np.tri(6, 3)


@pytest.mark.parametrize(
    "x", [np.ones((1, 3)), np.ones((6, 3)), ALMOST], ids=["one", "equal", "rounded"]
)
def test_pooled_without_a_covariance(x):
    method, state = fit(x.astype(np.float32))
    new = np.broadcast_to(np.array([1.0, 1.0, 3.0], np.float32), (1, 2, 2, 3))
    score = method.scores(state.model, Batch(None, new, None))["pooled"]
    assert float(score[0]) == pytest.approx(2.0, rel=1e-5)


def fit_words(features, key=0, **fields):
    """Trains in one batch on features [n, h, w, c]."""
    method, key = Words(**fields), jax.random.key(key)
    count = len(features)
    batch = Batch(None, features, np.ones(count, bool), np.arange(count))
    state = method.init(key, Spec(batch, count))
    state, losses = method.update(state, batch, key)
    assert not losses
    return method, method.finish(state)


def draw_words(counts, rng=RNG):
    """Features of 4 x 4 positions in groups far from each other, by their counts."""
    places = 10 * np.eye(4)
    rows = [rng.permutation(np.repeat(places, own, axis=0)) for own in counts]
    rows = np.stack(rows).reshape(-1, 4, 4, 4)
    return (rows + rng.normal(scale=0.1, size=rows.shape)).astype(np.float32)


def test_words_is_the_distance_of_log_counts_by_ledoit_and_wolf():
    counts = RNG.multinomial(16, [0.4, 0.3, 0.2, 0.1], 30)
    method, state = fit_words(draw_words(counts), count=4)
    # Which word stands for which group.
    order = np.abs(state.model["words"] - 10 * np.eye(4)[:, None]).sum(-1).argmin(-1)
    expected = LedoitWolf().fit(np.log1p(256 * counts[:, order] / 16))
    precision = np.linalg.inv(expected.covariance_)
    new = np.array([[16, 0, 0, 0], [4, 4, 4, 4], [7, 4, 3, 2]])
    found = method.scores(state.model, Batch(None, draw_words(new), None))["words"]
    for one, score in zip(np.log1p(256 * new / 16), found, strict=True):
        distance = mahalanobis(one[order], expected.location_, precision)
        assert float(score) == pytest.approx(distance, rel=1e-3)
    assert found[2] < min(found[:2])


def test_words_of_large_images_are_from_random_positions():
    """As many of each image, and the counts are those of 256 positions all the same."""
    features = np.repeat(draw_words([[8, 4, 2, 2]] * 6), 64, axis=1)  # 256 x 4
    method, state = fit_words(features, count=4)
    assert method.describe(features, jax.random.key(0)).shape == (6, 256, 4)
    counts = np.exp(state.model["mean"]) - 1
    np.testing.assert_allclose(np.sort(counts), [32, 32, 64, 128], rtol=0.3)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("features", [np.zeros, np.ones])
def test_words_of_features_that_are_all_the_same(count, features):
    same = features((count, 2, 2, 3), np.float32)
    method, state = fit_words(same)
    score = method.scores(state.model, Batch(None, same, None))["words"]
    np.testing.assert_allclose(score, 0, atol=1e-5)
