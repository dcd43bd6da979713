"""Flows against anomalib; `goldens/flows.py` says what the golden holds."""

from __future__ import annotations

import functools
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import export as jax_export

import ulsad_jax
from tests import runs
from tests.goldens import flows as golden
from tests.test_experiment import needs_cpu, stop_training
from ulsad_jax import export
from ulsad_jax.methods.base import TOTAL, Batch, State
from ulsad_jax.methods.flows import Cflow, FastFlow, list_levels
from ulsad_jax.nn.flow import Flow, Step, encode_positions
from ulsad_jax.nn.layers import Conv, Linear
from ulsad_jax.runs import steps
from ulsad_jax.runtime.errors import UserError

CLAMP = 2.0
PARTS = ("likelihoods", "losses", "highest")


@pytest.fixture(scope="module")
def stored():
    with np.load(pathlib.Path(golden.__file__).with_suffix(".npz")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def batch():
    image = np.zeros((golden.BATCH, *golden.SIZE, 3), np.uint8)
    return Batch(image, golden.levels(), np.ones(golden.BATCH, bool))


def make_spec(shapes=golden.LEVELS):
    features = {name: runs.features(*shape) for name, shape in shapes.items()}
    return steps.make_spec(golden.BATCH, golden.SIZE, features)


def fill(variables, prefix=""):
    """The golden's arrays in a tree of the same shapes."""
    flat = traverse_util.flatten_dict(variables, sep="/")
    names = {k: prefix + k.partition("/")[2] for k in flat}
    filled = {k: golden.fill(names[k], x.shape) for k, x in flat.items()}
    return traverse_util.unflatten_dict(filled, sep="/")


assert_near = functools.partial(runs.assert_near, bound=1e-5)


def test_fastflow_is_anomalibs(stored, batch):
    method = FastFlow(steps=golden.STEPS, weight_decay=golden.DECAY)
    state = steps.make_init(method, make_spec())(jax.random.key(0))
    state = state.replace(model=fill(state.model))
    outputs = method._network.apply(state.model, list_levels(batch))
    for i, (z, log_determinant) in enumerate(outputs):
        assert_near(z, stored[f"fastflow/variables{i}"])
        found = log_determinant.sum((1, 2))
        assert_near(found, stored[f"fastflow/determinants{i}"])
    assert_near(method.maps(state.model, batch)["flow"], stored["fastflow/map"])
    update, losses = jax.jit(method.update), []
    first = method.losses(state.model, batch, 0)[TOTAL]
    for i in range(golden.UPDATES):
        state, found = update(state, batch, jax.random.key(0))
        losses.append(found[TOTAL])
        if i == 0:
            moments = state.training[1][0].mu
    assert_near(losses, stored["fastflow/losses"])
    assert_near(first, stored["fastflow/losses"][0])
    moments = traverse_util.flatten_dict(moments, sep="/")
    assert moments.keys() == {*stored["fastflow/names"]}
    found = [np.linalg.norm(moments[name]) for name in stored["fastflow/names"]]
    np.testing.assert_allclose(found, stored["fastflow/moments"], rtol=1e-4)


def test_cflow_is_anomalibs(stored, batch):
    method = Cflow(
        steps=golden.STEPS,
        condition=golden.CONDITION,
        positions=golden.POSITIONS,
        learning_rate=1e-3,
    )
    state = steps.make_init(method, make_spec())(jax.random.key(0))
    flows = {k: fill(x, f"{k}/") for k, x in state.model["flows"].items()}
    likelihoods, moments = {}, {}
    for name, x in batch.features.items():
        own = {part: stored[f"cflow/{name}/{part}"] for part in PARTS}
        likelihoods[name] = own["likelihoods"]
        level = State(state.step, flows[name], state.training[name])
        level, found = jax.jit(method.take_steps)(level, x, golden.order(name))
        assert_near(found[TOTAL], own["losses"])
        assert_near(found["highest"], own["highest"])
        moments[name] = level.training[0].mu
    moments = traverse_util.flatten_dict(moments, sep="/")
    assert moments.keys() == {*stored["cflow/names"]}
    found = [np.linalg.norm(moments[name]) for name in stored["cflow/names"]]
    np.testing.assert_allclose(found, stored["cflow/moments"], rtol=1e-4)
    # The program's maps are relative to the largest ones of the images.
    highest = {name: x.max() for name, x in likelihoods.items()}
    model = {"flows": flows, "highest": highest}
    found = method.maps(model, batch)["conditional"]
    assert_near(found - found.min(), stored["cflow/map"])
    losses = [np.log1p(np.exp(-x)).ravel() for x in likelihoods.values()]
    validation = method.losses(model, batch, state.step)[TOTAL]
    assert_near(validation, np.concatenate(losses).mean())


def make_flow(shape, *, rotate=False, **fields):
    """A small flow, its variables, and its inputs."""
    make_step = functools.partial(Step, ratio=1.5, clamp=CLAMP, rotate=rotate, **fields)
    flow = Flow((3, 1, 3), make_step)
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((*shape[:-1], n), np.float32) for n in (shape[-1], 4)]
    inputs = inputs if rotate else inputs[:1]
    return flow, fill(flow.init(jax.random.key(0), *inputs)), *inputs


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("rotate", [False, True])
def test_log_determinant_is_that_of_the_jacobian(channels, rotate):
    shape = (1, 3, 2, channels)
    flow, variables, x, *condition = make_flow(shape, rotate=rotate)

    def run(flat):
        return flow.apply(variables, flat.reshape(shape), *condition)[0].ravel()

    sign, expected = np.linalg.slogdet(jax.jacobian(run)(x.ravel()))
    found = flow.apply(variables, x, *condition)[1].sum()
    assert abs(sign) == pytest.approx(1)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_rotations_are_drawn_once_and_keep_lengths():
    make_step = functools.partial(Step, ratio=2.0, clamp=CLAMP, rotate=True)
    flow = Flow((1, 1), make_step)
    x = np.ones((1, 6), np.float32)
    fixed = flow.init(jax.random.key(0), x)["fixed"]
    one, other = (fixed[f"steps_{i}"]["rotation"] for i in (0, 1))
    np.testing.assert_allclose(one @ one.T, np.eye(6), atol=1e-6)
    assert np.abs(one - other).max() > 0.1


def undo(params, order, kernel, y):
    """The input of a step: what its first half says is taken back from the second."""
    scale = 0.2 * np.logaddexp(0, params["global_scale"] / 2)
    x = (y[..., np.argsort(order)] - params["global_offset"]) / scale
    first, second = np.split(x, [-(x.shape[-1] // 2)], axis=-1)
    answer = first
    for i in (0, 2):
        weights = params[f"subnet_{i}"]
        count, size = weights["bias"].size, (kernel, kernel)
        layer = Conv(count, size, padding=1) if kernel == 3 else Linear(count)
        answer = np.maximum(answer, 0) if i else answer
        answer = layer.apply({"params": weights}, answer)
    log_scale, shift = np.split(0.1 * answer, 2, axis=-1)
    second = (second - shift) / np.exp(CLAMP * np.tanh(log_scale))
    return np.concatenate([first, second], axis=-1)


def test_flow_can_be_inverted():
    flow, variables, x = make_flow((2, 4, 3, 5))
    y = flow.apply(variables, x)[0]
    for i, kernel in reversed([*enumerate(flow.kernels)]):
        params, fixed = (variables[kind][f"steps_{i}"] for kind in ("params", "fixed"))
        y = undo(params, fixed["order"], kernel, y)
    np.testing.assert_allclose(y, x, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_determinants_are_float32(dtype):
    flow, variables, x = make_flow((2, 4, 4, 6), dtype=jnp.dtype(dtype))
    z, log_determinant = flow.apply(variables, x)
    assert z.dtype == log_determinant.dtype == jnp.float32
    expected = make_flow(x.shape)[0].apply(variables, x)[1]
    np.testing.assert_allclose(log_determinant, expected, atol=0.1)


def test_positions_have_codes_of_their_own():
    codes = encode_positions(64, 32, 128)
    assert codes.shape == (64, 32, 128) and codes.dtype == np.float32
    assert len(np.unique(codes.reshape(-1, 128).round(3), axis=0)) == 64 * 32
    np.testing.assert_array_equal(codes[3, :, :64], codes[60, :, :64])
    np.testing.assert_array_equal(codes[:, 3, 64:], codes[:, 30, 64:])


@pytest.mark.parametrize(("positions", "count"), [(48, 3), (999, 1)])
def test_a_step_of_cflow_takes_some_positions_or_all(batch, positions, count):
    method = Cflow(steps=2, condition=8, positions=positions)
    state = steps.make_init(method, make_spec())(jax.random.key(0))
    update = jax.jit(method.update)
    state, losses = update(state, batch, jax.random.key(1))
    assert int(state.step) == 1 and losses.keys() == {TOTAL}
    taken = {name: int(own[0].count) for name, own in state.training.items()}
    assert taken == {"layer1": count, "layer2": 1}
    for i in range(3):
        last, state = state, update(state, batch, jax.random.key(i))[0]
    highest, new = last.model["highest"], state.model["highest"]
    assert all(new[name] > highest[name] for name in golden.LEVELS)  # it has learnt
    found = method.maps(state.model, batch)["conditional"]
    assert found.shape == (golden.BATCH, *golden.SIZE)


SMALL = {
    "method": "fastflow+cflow",
    "methods.fastflow.steps": 1,
    "methods.cflow.steps": 1,
    "methods.cflow.condition": 8,
    "trunk.layers": "layer2+layer3",
    "train.num_epochs": 2,
    "train.checkpoint_every": 1,
}


@pytest.mark.parametrize("method", [FastFlow(steps=2), Cflow(steps=2)])
def test_losses_leave_out_rows_that_fill_up(batch, method):
    features = {k: x[: golden.BATCH] for k, x in batch.features.items()}
    model = steps.make_init(method, make_spec())(jax.random.key(0)).model
    first = {k: x[:1] for k, x in features.items()}
    alone = Batch(batch.image[:1], first, np.ones(1, bool))
    filled = batch._replace(valid=np.arange(golden.BATCH) < 1)
    found, expected = (method.losses(model, x, 0)[TOTAL] for x in (filled, alone))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@needs_cpu
def test_flows_are_resumed_and_exported(data, tmp_path, monkeypatch):
    """With what is drawn once and not trained."""
    config = runs.make_config(data, SMALL)
    runs.train(config, tmp_path / "run")
    stop_training(monkeypatch, config, tmp_path / "again", 1, 1, "after step 5")
    runs.train(config, tmp_path / "again")
    for read in (runs.read_metrics, runs.read_scores):
        assert read(tmp_path / "again") == read(tmp_path / "run")
    path = tmp_path / "bottle.zip"
    flags = [f"--workdir={tmp_path / 'run'}", f"--output={path}", "--platforms=cpu"]
    export.main(flags)
    with zipfile.ZipFile(path) as file:
        model = jax_export.deserialize(bytearray(file.read("model.jax")))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = model.call(image[None])
    result = ulsad_jax.Detector.load(tmp_path / "run")(image)
    assert result.maps.keys() == {"flow", "conditional"}
    for name, values in result.maps.items():
        np.testing.assert_allclose(
            found[f"{name}_map"][0], values, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("method", [FastFlow(), Cflow()])
def test_a_level_of_one_channel_cannot_be_split(method):
    assert method.check(make_spec()) == ""
    with pytest.raises(UserError, match="found one in layer2"):
        method.check(make_spec(golden.LEVELS | {"layer2": (4, 5, 1)}))
