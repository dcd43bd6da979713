from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import runs
from ulsad_jax.methods.ulsad.losses import make_loss_fn
from ulsad_jax.runs import loop as trainer
from ulsad_jax.runs import training
from ulsad_jax.runtime import devices as parallel
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.scoring import thresholds as decisions
from ulsad_jax.trunks import features

BATCH, SIZE, CHANNELS = 4, 64, 384
RATES = {"image_fpr": 0.25, "pixel_fpr": 0.01}


def make_kept(count, seed=0):
    rng = np.random.default_rng(seed)
    return features.Kept(
        rng.normal(size=(count, SIZE // 8, SIZE // 8, CHANNELS)).astype(np.float32),
        rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8),
    )


@pytest.fixture(scope="module")
def config():
    return runs.make_config(Path("data"))


@pytest.fixture(scope="module")
def parts(config):
    """Model, loss function and optimizer of the smallest system."""
    return (
        training.make_model(config),
        make_loss_fn(config.losses),
        training.make_optimizer(**config.optimizer),
    )


def make_validate(model, loss_fn, kept, *, method):
    """In batches of three, on all devices."""
    return trainer.make_validate(
        model,
        loss_fn,
        kept,
        devices=parallel.find_devices(),
        batch_size=3,
        method=method,
        **RATES,
    )


def init(parts, seed=0):
    model, _, optimizer = parts
    kept = make_kept(BATCH)
    state = training.init_state(
        model,
        optimizer,
        jax.random.key(seed),
        features=jax.ShapeDtypeStruct(kept.features.shape, jnp.float32),
        image=jax.ShapeDtypeStruct(kept.images.shape, jnp.uint8),
    )
    return jax.device_put(state, jax.devices()[0])  # a program that is compiled once


def step_adam_by_hand(params, gradients, *, lr, b1, b2, eps, decay):
    """PyTorch's documented Adam, in float64, one list of gradients a step."""
    m = v = np.zeros_like(params)
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient + decay * params
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        params = params - lr * m_hat / (np.sqrt(v_hat) + eps)
    return params


@pytest.mark.parametrize("decay", [0.0, 2e-5, 0.3])
def test_optimizer_is_adam_with_l2(decay):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=7), rng.normal(size=(3, 7))
    gradients[:, 0] = 0  # decay alone
    options = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}
    optimizer = training.make_optimizer(
        learning_rate=1e-2, weight_decay=decay, **options
    )
    params = jnp.float32(start)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.float32(gradient), state, params)
        params = optax.apply_updates(params, updates)
    expected = step_adam_by_hand(start, gradients, lr=1e-2, decay=decay, **options)
    np.testing.assert_allclose(params, expected, rtol=2e-5, atol=1e-6)


def test_step(parts):
    """Losses fall on one batch; everything stays float32; the step is counted."""
    step = training.make_train_step(*parts)
    state, kept = init(parts), make_kept(BATCH)
    before = jax.device_get(state.batch_stats)
    totals = []
    for _ in range(8):
        state, losses = step(state, kept.features, kept.images)
        totals.append(float(losses.pop("total")))
        assert losses.keys() == {"local", "attention", "consistency"}
        assert totals[-1] == pytest.approx(sum(map(float, losses.values())), rel=1e-6)
    assert totals == sorted(totals, reverse=True)
    assert int(state.step) == 8
    assert {str(x.dtype) for x in jax.tree.leaves(state.variables)} == {"float32"}
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, state.batch_stats)
    assert all(jax.tree.leaves(changed))


def test_initial_weights_follow_the_key(parts):
    first, again, other = (init(parts, seed) for seed in (0, 0, 1))
    runs.assert_same_arrays(first, again)
    kernels = (s.params["local"]["conv1"]["kernel"] for s in (first, other))
    assert not np.array_equal(*kernels)


def test_categories_have_seeds_of_their_own():
    names = ["bottle", "cable", "Bottle", "", "é", "a" * 300]
    seeds = [training.category_seed(name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert training.category_seed("bottle") == seeds[0]


def test_order_is_a_function_of_seed_category_and_epoch():
    def order(**changed):
        place = {"seed": 0, "category": "bottle", "epoch": 0} | changed
        return training.epoch_order(50, **place).tolist()

    orders = [order(), order(seed=1), order(category="cable"), order(epoch=1)]
    assert order() == orders[0]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


def test_steps_per_epoch():
    assert training.steps_per_epoch(8, 4) == 2
    assert training.steps_per_epoch(11, 4) == 2
    with pytest.raises(UserError, match=r"batch_size to 3 or less"):
        training.steps_per_epoch(3, 4)
    with pytest.raises(UserError, match=r"found 0.*Add images"):
        training.steps_per_epoch(0, 4)


@pytest.mark.parametrize("count", [1, 5])
def test_validation_averages_over_the_images(parts, count):
    """Batches that wrap around at the end count every image once."""
    model, loss_fn, _ = parts
    kept, variables = make_kept(count), init(parts).variables
    outputs = model.apply(variables, kept.features, kept.images, train=False)
    total, terms = loss_fn(outputs)
    maps = scoring.raw_maps(outputs, (SIZE, SIZE))
    expected = scoring.calibrate(*map(np.asarray, maps), method="quantile")
    validate = make_validate(model, loss_fn, kept, method="quantile")
    found = validate(variables, 0)
    assert found.losses == pytest.approx(
        {"total": float(total)} | {k: float(v) for k, v in terms.items()}, rel=1e-5
    )
    for name, value in vars(expected).items():
        assert getattr(found.calibration, name) == pytest.approx(value, rel=1e-3), name
    new = scoring.fuse_as_new(*map(np.asarray, maps), method="quantile")
    chosen = decisions.choose(new, **RATES)
    scores = chosen.basis.validation_scores
    assert len(scores) == count
    assert found.decisions.basis.validation_scores == pytest.approx(scores, rel=1e-3)
    for name, value in vars(chosen.thresholds).items():
        threshold = getattr(found.decisions.thresholds, name)
        assert threshold == pytest.approx(value, rel=1e-3), name


def test_validation_without_calibration(parts):
    model, loss_fn, _ = parts
    validate = make_validate(model, loss_fn, make_kept(2), method="none")
    calibration = validate(init(parts).variables, 0).calibration
    assert (calibration.local_offset, calibration.local_scale) == (0, 1)
    assert calibration.display_low < calibration.display_high


def test_terms_are_told_the_updates_so_far(parts):
    model, _, optimizer = parts
    loss_fn = make_loss_fn(
        {"count": {"term": "tests.test_training:count_updates", "weight": 1.0}}
    )
    step = training.make_train_step(model, loss_fn, optimizer)
    state, kept, counts = init(parts), make_kept(BATCH), []
    for _ in range(3):
        state, losses = step(state, kept.features, kept.images)
        counts.append(float(losses["count"]))
    assert counts == [0, 1, 2]
    validate = make_validate(model, loss_fn, kept, method="none")
    assert validate(state.variables, 3).losses["count"] == 3


def count_updates(outputs, *, step):
    return step + 0 * outputs["local"].mean((1, 2, 3))
