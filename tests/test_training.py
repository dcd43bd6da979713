from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import runs
from ulsad_jax.methods.descent import make_optimizer
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import setup, steps, validation
from ulsad_jax.runtime import devices as devices_lib
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.scoring import thresholds
from ulsad_jax.trunks import sources

BATCH, SIZE, CHANNELS = 4, 64, 384
RATES = {"image_fpr": 0.25, "pixel_fpr": 0.01}


def make_kept(count, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, SIZE // 8, SIZE // 8, CHANNELS)
    features = rng.normal(size=shape).astype(np.float32)
    images = rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    return sources.Kept(images, features)


def load(kept):
    """All of it as one batch."""
    devices = devices_lib.find_devices()
    return sources.load(kept, np.arange(len(kept)), len(kept), devices)


def make_method(**terms):
    """The smallest system, with the published terms or with those of this file."""
    config = runs.make_config(Path("data"))
    if terms:
        config.losses = {
            name: {"term": f"{__name__}:{term}", "weight": 1.0}
            for name, term in terms.items()
        }
    return setup.make(config_lib.resolve(config)).method


@pytest.fixture(scope="module")
def method():
    return make_method()


def make_validate(method, kept, *, calibrate):
    """In batches of three, on all devices."""
    return validation.make_validate(
        method,
        kept,
        devices=devices_lib.find_devices(),
        batch_size=3,
        calibrate=calibrate,
        score={"fusion": "map", "weights": {}, "top_share": 0.0},
        threshold=RATES,
    )


def init(method, seed=0):
    spec = steps.make_spec(
        BATCH, (SIZE, SIZE), runs.features(SIZE // 8, SIZE // 8, CHANNELS)
    )
    state = steps.make_init(method, spec)(jax.random.key(seed))
    return devices_lib.find_devices().replicate(state)


def make_step(method):
    return steps.make_train_step(method, devices_lib.find_devices(), "jit")


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
    optimizer = make_optimizer(learning_rate=1e-2, weight_decay=decay, **options)
    params = jnp.float32(start)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.float32(gradient), state, params)
        params = optax.apply_updates(params, updates)
    expected = step_adam_by_hand(start, gradients, lr=1e-2, decay=decay, **options)
    np.testing.assert_allclose(params, expected, rtol=2e-5, atol=1e-6)


def test_step(method):
    """Losses fall on one batch; everything stays float32; the step is counted."""
    step, key = make_step(method), jax.random.key(0)
    state, batch = init(method), load(make_kept(BATCH))
    before = jax.device_get(state.model["batch_stats"])
    totals = []
    for _ in range(8):
        state, losses = step(state, batch, key)
        totals.append(float(losses.pop("total")))
        assert losses.keys() == {"local", "attention", "consistency"}
        assert totals[-1] == pytest.approx(sum(map(float, losses.values())), rel=1e-6)
    assert totals == sorted(totals, reverse=True)
    assert int(state.step) == 8
    assert {str(x.dtype) for x in jax.tree.leaves(state.model)} == {"float32"}
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), before, state.model["batch_stats"]
    )
    assert all(jax.tree.leaves(changed))


def test_initial_weights_follow_the_key(method):
    first, again, other = (init(method, seed) for seed in (0, 0, 1))
    runs.assert_same_arrays(first, again)
    kernels = (s.model["params"]["local"]["conv1"]["kernel"] for s in (first, other))
    assert not np.array_equal(*kernels)


def test_categories_have_seeds_of_their_own():
    names = ["bottle", "cable", "Bottle", "", "é", "a" * 300]
    seeds = [steps.category_seed(name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert steps.category_seed("bottle") == seeds[0]


def test_order_is_a_function_of_seed_category_and_epoch():
    def order(**changed):
        place = {"seed": 0, "category": "bottle", "epoch": 0} | changed
        return steps.epoch_order(50, **place).tolist()

    orders = [order(), order(seed=1), order(category="cable"), order(epoch=1)]
    assert order() == orders[0]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


def test_steps_per_epoch():
    assert steps.steps_per_epoch(8, 4, whole_only=True) == 2
    assert steps.steps_per_epoch(11, 4, whole_only=True) == 2
    assert steps.steps_per_epoch(11, 4, whole_only=False) == 3
    assert steps.steps_per_epoch(3, 4, whole_only=False) == 1
    with pytest.raises(UserError, match=r"batch_size to 3 or less"):
        steps.steps_per_epoch(3, 4, whole_only=True)
    with pytest.raises(UserError, match=r"found 0.*Add images"):
        steps.steps_per_epoch(0, 4, whole_only=True)


@pytest.mark.parametrize("count", [1, 5])
def test_validation_averages_over_the_images(method, count):
    """Batches that wrap around at the end count every image once."""
    kept, model = make_kept(count), init(method).model
    batch = load(kept)
    outputs = method.networks.apply(model, kept.features, kept.images, train=False)
    total, terms = method.loss_fn(outputs)
    maps = jax.device_get(method.maps(model, batch))
    expected = scoring.calibrate(maps, method="quantile")
    validate = make_validate(method, kept, calibrate="quantile")
    found = validate(model, 0)
    assert found.losses == pytest.approx(
        {"total": float(total)} | {k: float(v) for k, v in terms.items()}, rel=1e-5
    )
    assert found.calibration.to_json() == pytest.approx(expected.to_json(), rel=1e-3)
    new = scoring.fuse_as_new(maps, method="quantile")
    chosen = thresholds.choose(new, new.max((1, 2)), **RATES)
    scores = chosen.basis.validation_scores
    assert len(scores) == count
    assert found.decisions.basis.validation_scores == pytest.approx(scores, rel=1e-3)
    for name, value in vars(chosen.thresholds).items():
        threshold = getattr(found.decisions.thresholds, name)
        assert threshold == pytest.approx(value, rel=1e-3), name


def test_validation_without_calibration(method):
    validate = make_validate(method, make_kept(2), calibrate="none")
    calibration = validate(init(method).model, 0).calibration
    # Maps stay as they are.
    assert calibration.offset == {"local": 0.0, "global": 0.0}
    assert calibration.scale == {"local": 1.0, "global": 1.0}
    assert calibration.display_low < calibration.display_high


def count_updates(outputs, *, step):
    return step + 0 * outputs["local"].mean((1, 2, 3))


def brightness(outputs, *, image):
    return image.mean((1, 2, 3)) + 0 * outputs["local"].mean((1, 2, 3))


def draw(outputs, *, key):
    drawn = jax.random.uniform(key, (len(outputs["local"]),))
    return drawn + 0 * outputs["local"].mean((1, 2, 3))


def denoise(outputs, *, image, key, share=0.5):
    """A term that needs both: what it trains depends on the key."""
    dropped = jax.random.bernoulli(key, share, outputs["local"].shape[:3])
    bright = (image / 255).mean((1, 2, 3))
    errors = jnp.square(outputs["features"] - outputs["local"]).mean(-1)
    return bright * (dropped * errors).mean((1, 2))


@pytest.fixture(scope="module")
def told():
    """A method with terms that ask for what a step has."""
    return make_method(count="count_updates", bright="brightness", a="draw", b="draw")


def test_terms_are_told_the_updates_so_far(told):
    step, key = make_step(told), jax.random.key(0)
    state, kept, counts = init(told), make_kept(BATCH), []
    for _ in range(3):
        state, losses = step(state, load(kept), key)
        counts.append(float(losses["count"]))
    assert counts == [0, 1, 2]
    validate = make_validate(told, kept, calibrate="none")
    assert validate(state.model, 3).losses["count"] == 3


def test_terms_are_given_the_images(told):
    """Of the batch, also where validation fills one up."""
    few, kept = make_kept(BATCH), make_kept(5)
    _, losses = make_step(told)(init(told), load(few), jax.random.key(0))
    assert float(losses["bright"]) == pytest.approx(few.images.mean(), rel=1e-5)
    validated = make_validate(told, kept, calibrate="none")(init(told).model, 0)
    assert validated.losses["bright"] == pytest.approx(kept.images.mean(), rel=1e-5)


def test_every_term_and_update_has_a_key_of_its_own(told):
    step, batch, drawn = make_step(told), load(make_kept(BATCH)), []
    for seed in (0, 0, 1):
        state, key = init(told), jax.random.key(seed)
        for _ in range(2):
            state, losses = step(state, batch, key)
            drawn.append((float(losses["a"]), float(losses["b"])))
    first, again, other = drawn[:2], drawn[2:4], drawn[4:]
    assert first == again
    assert len({number for pair in first + other for number in pair}) == 8
    validate = make_validate(told, make_kept(BATCH), calibrate="none")
    losses = [validate(state.model, updates).losses["a"] for updates in (0, 7)]
    assert losses[0] == losses[1]  # checkpoints are ranked by the same noise


def test_a_term_trains_by_images_and_key():
    method, batch = make_method(mine="denoise"), load(make_kept(BATCH))
    step, trained = make_step(method), []
    for seed in (0, 0, 1):
        state, key, losses = init(method), jax.random.key(seed), []
        for _ in range(25):
            state, own = step(state, batch, key)
            losses.append(float(own["mine"]))
        assert losses[-1] < 0.9 * losses[0]
        trained.append(state.model)
    runs.assert_same_arrays(*trained[:2])
    kernels = [m["params"]["local"]["conv1"]["kernel"] for m in trained]
    assert not np.array_equal(kernels[0], kernels[2])


def test_a_run_with_a_term_that_asks_for_images_and_a_key(data, tmp_path, capsys):
    config = runs.make_config(data, {"train.num_epochs": 1})
    config.losses.mine = {"term": f"{__name__}:denoise", "weight": 0.5, "share": 0.3}
    runs.train(config, tmp_path / "run")
    (epoch,) = runs.read_metrics(tmp_path / "run")
    assert epoch["loss/mine"] > 0 and epoch["validation/mine"] > 0
    assert "Loss term" not in capsys.readouterr().out  # nothing to warn of
