"""EfficientAD against anomalib; `goldens/efficientad.py` says what the golden holds."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ulsad_jax
from tests import runs
from tests.goldens import efficientad as golden
from tests.test_experiment import needs_cpu, stop_training
from ulsad_jax import export
from ulsad_jax.methods.base import TOTAL, Batch
from ulsad_jax.methods.efficientad import method as lib
from ulsad_jax.methods.efficientad.method import EfficientAd
from ulsad_jax.nn.convolution import plain
from ulsad_jax.runs import steps
from ulsad_jax.runtime.devices import find_devices
from ulsad_jax.trunks import torch_names

LEARNING = ("student", "autoencoder", "student_autoencoder")


@pytest.fixture(scope="module")
def stored():
    with np.load(pathlib.Path(golden.__file__).with_suffix(".npz")) as file:
        return dict(file)


@pytest.fixture(scope="module", params=golden.SIZES)
def case(request, stored):
    """The method, a model with the golden's weights, and its numbers."""
    method = EfficientAd(size=request.param)
    size = golden.SIZE, golden.SIZE
    spec = steps.make_spec(1, size, runs.features(32, 32, golden.CHANNELS))
    shapes = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0)).model
    networks = {"teacher": shapes["teacher"]["params"]} | shapes["learners"]["params"]
    names = torch_names.export(
        {"params": jax.tree.map(lambda x: np.zeros(x.shape, np.float32), networks)}
    )
    arrays = {name: golden.fill(name, x.shape) for name, x in names.items()}
    found = torch_names.import_arrays(arrays, {"params": networks}, "EfficientAD")
    mean, std = golden.moments()
    model = {
        "teacher": {"params": found["params"].pop("teacher")},
        "learners": found,
        "mean": mean,
        "square": std**2 + mean**2,
    }
    prefix = f"{request.param}/"
    own = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    return method, model, own


def make_batch(image, features=None):
    if features is None:
        features = np.zeros((len(image), 32, 32, golden.CHANNELS), np.float32)
    return Batch(image, features, np.ones(len(image), bool))


assert_near = functools.partial(runs.assert_near, bound=1e-4)


def test_maps_are_anomalibs(case):
    method, model, stored = case
    batch, n = make_batch(golden.images()[:1]), golden.STRIDE

    def run(model):
        return method.describe(model, batch), method.maps(model, batch)

    (raw, imitation, prediction, decoded), maps = jax.jit(run)(model)
    student = jnp.concatenate([imitation, prediction], -1)
    found = {"teacher": raw, "student": student, "autoencoder": decoded}
    for name, x in found.items():
        assert_near(x[:, ::n, ::n], stored[name])
    for name, x in maps.items():
        assert_near(x[:, ::n, ::n], stored[f"{name}_map"])


def test_colours_are_torchvisions(stored):
    kinds, factors = jnp.array(golden.KINDS), jnp.array(golden.FACTORS)
    changed = lib.adjust(golden.images() / np.float32(255), kinds, factors)
    n = 5 * golden.STRIDE
    assert_near(changed[:, ::n, ::n], stored["colours"], bound=1e-5)


@pytest.mark.parametrize("case", ["small"], indirect=True)
def test_gradient_is_anomalibs(case):
    method, model, stored = case
    image = golden.images() / np.float32(255)
    kinds, factors = jnp.array(golden.KINDS), jnp.array(golden.FACTORS)
    changed = lib.adjust(image, kinds, factors)[golden.CHANGE :]
    image = image[golden.CHANGE :]
    teacher = method._make_teacher(golden.CHANNELS)
    learners = method._make_learners(golden.CHANNELS)
    targets = [
        lib.standardize(model, teacher.apply(model["teacher"], x))
        for x in (image, changed)
    ]

    def loss(params):
        outputs = learners.apply({"params": params}, image, changed, train=False)
        terms = lib.measure(*targets, *outputs)
        return sum(terms.values()).mean(), terms

    params = model["learners"]["params"]
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, terms), gradients = run(params)
    found = [*(terms[name][0] for name in LEARNING), total]
    np.testing.assert_allclose(found, stored["losses"], rtol=1e-4)
    norms = torch_names.export({"params": gradients})
    assert norms.keys() == {*stored["names"]}
    for name, norm in zip(stored["names"], stored["norms"], strict=True):
        assert np.linalg.norm(norms[name]) == pytest.approx(norm, rel=1e-3), name


def test_hardest_are_those_from_the_quantile_on():
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 40)).astype(np.float32)
    found = lib.take_hardest(jnp.array(x))
    for values, mean in zip(x, found, strict=True):
        chosen = values[values >= np.quantile(values, lib.HARD_QUANTILE)]
        assert mean == pytest.approx(chosen.mean(), rel=1e-6)


METHOD = EfficientAd(distill_share=0.4)
UPDATES, BATCH = 5, 2


@pytest.fixture(scope="module")
def drawn():
    """Batches with features, the update, and the state before each and after all."""
    rng, shape = np.random.default_rng(0), (BATCH, 64, 64, 3)
    spec = steps.make_spec(BATCH, shape[1:3], runs.features(8, 8, 6), 10, UPDATES)
    batches = [
        make_batch(
            rng.integers(0, 256, shape, np.uint8),
            rng.standard_normal((BATCH, 8, 8, 6), np.float32),
        )
        for _ in range(UPDATES)
    ]

    @jax.jit
    def update(*args):
        with plain():  # tiles take long to compile; the golden's gradient has them
            return METHOD.update(*args)

    states, losses = [steps.make_init(METHOD, spec)(jax.random.key(0))], []
    for i, batch in enumerate(batches):
        state, found = update(states[-1], batch, jax.random.key(i))
        states.append(state)
        losses.append(jax.device_get(found))
    return batches, update, jax.device_get(states), losses


def is_same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_two_parts_of_the_updates(drawn):
    """The first trains the teacher, to the trunk's features; the second the others."""
    batches, _, states, losses = drawn
    for i in range(UPDATES):
        before, after, distills = states[i].model, states[i + 1].model, i < 2
        assert after.keys() == before.keys()
        assert is_same(before["teacher"], after["teacher"]) != distills
        assert is_same(before["learners"], after["learners"]) == distills
        own = {name for name, value in losses[i].items() if value and name != TOTAL}
        assert own == ({"distillation"} if distills else {*LEARNING})
        assert losses[i][TOTAL] == pytest.approx(sum(losses[i][n] for n in own))
    first = jax.device_get(METHOD.losses(states[0].model, batches[0], 0))
    assert losses[0]["distillation"] == pytest.approx(first["distillation"], rel=1e-5)
    assert first[TOTAL] == pytest.approx(sum(first[n] for n in LEARNING), rel=1e-5)


def test_moments_are_those_of_all_images(drawn):
    batches, _, states, _ = drawn
    images = np.concatenate([b.image for b in batches[2:]])
    raw = METHOD.describe(states[-1].model, make_batch(images))[0]
    flat = np.reshape(raw, (-1, 6))
    np.testing.assert_allclose(states[-1].model["mean"], flat.mean(0), atol=1e-5)
    square = (flat**2).mean(0)
    np.testing.assert_allclose(states[-1].model["square"], square, 1e-4, 1e-7)


def test_last_updates_are_smaller(drawn):
    """By a tenth, from 95 % of the second part on: the third update of three."""
    batches, update, states, _ = drawn
    state, raw = states[2], METHOD.describe(states[2].model, batches[2])[0]
    state = state.replace(model=state.model | lib.measure_moments(raw))

    def change(step):
        at = state.replace(step=jnp.asarray(step, jnp.int32))
        after, _ = update(at, batches[2], jax.random.key(0))
        params = after.model["learners"]["params"], at.model["learners"]["params"]
        return jax.tree.leaves(jax.tree.map(jnp.subtract, *params))

    for early, late in zip(change(4), change(5), strict=True):
        np.testing.assert_allclose(late, early / 10, atol=2e-7)


def test_losses_leave_out_rows_that_fill_up(drawn):
    batches, _, states, _ = drawn
    batch = batches[0]
    alone = METHOD.losses(states[-1].model, Batch(*(x[:1] for x in batch[:3])), 0)
    filled = batch._replace(valid=np.array([True, False]))
    found = METHOD.losses(states[-1].model, filled, 0)
    for name, value in alone.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5)


def test_features_lie_at_the_patches():
    """A description's middle is the features' middle: a ramp keeps its values there."""
    grid = np.broadcast_to(np.arange(16.0)[None, :, None, None], (1, 16, 16, 1))
    batch = make_batch(np.zeros((1, 128, 128, 3), np.uint8), jnp.array(grid))
    placed = lib.place_features(batch)[0, :, 0, 0]
    assert placed.shape == (24,)
    # A grid of 4 pixels is placed on cells of 8 pixels, without its border of 4 cells.
    np.testing.assert_allclose(placed, (np.arange(24) * 4 + 18) / 8 - 0.5, rtol=1e-6)


def test_update_of_pmap_is_that_of_jit(drawn):
    """The part without random choices: other devices draw other colours."""
    batches, _, states, losses = drawn
    step = plain()(steps.make_train_step(METHOD, find_devices(1), "pmap"))
    state, found = step(states[0], batches[0], jax.random.key(0))
    assert found["distillation"] == pytest.approx(losses[0]["distillation"], rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (state, states[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    state, found = step(jax.device_put(states[2]), batches[2], jax.random.key(0))
    for name in ("mean", "square"):
        np.testing.assert_allclose(state.model[name], states[3].model[name], atol=1e-5)
    assert all(np.isfinite(list(found.values())))


FIELDS = {
    "method": "efficientad",
    "train.num_epochs": 2,
    "train.checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run: an epoch for the teacher, and one for the others; read-only."""
    config = runs.make_config(data, FIELDS)
    workdir = tmp_path_factory.mktemp("efficientad") / "run"
    return runs.Run(workdir, config, runs.train(config, workdir))


def test_what_a_run_leaves(run):
    first, second = runs.read_metrics(run.workdir)
    assert first["loss/distillation"] > 0 and first["loss/student"] == 0
    assert second["loss/distillation"] == 0 and second["loss/student"] > 0
    # A student that has learned nothing is far from any teacher.
    assert min(first["validation/total"], second["validation/total"]) > 3
    model = runs.read_checkpoint(run.workdir)["model"]["variables"]
    assert model["mean"].shape == (384,) and model["mean"].any()
    detector = ulsad_jax.Detector.load(run.workdir)
    for row in runs.read_scores(run.workdir)[:2]:
        result = detector(row["image"])
        assert {*result.maps} == {"student", "autoencoder"}
        assert result.score == pytest.approx(float(row["score"]), rel=0.02)
    path = run.workdir / "bottle.zip"
    export.main([f"--workdir={run.workdir}", f"--output={path}", "--platforms=cpu"])
    assert path.exists()


@needs_cpu
def test_stopped_in_the_second_part_and_resumed(run, tmp_path, monkeypatch):
    stop_training(monkeypatch, run.config, tmp_path / "again", 1, 1, "after step 5")
    runs.train(run.config, tmp_path / "again")
    runs.assert_same_category(tmp_path / "again", run.workdir)
