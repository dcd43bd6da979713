"""Tests for a process with eight devices; `tests/test_parallel.py` starts it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from tests.conftest import data  # noqa: F401
from ulsad_jax.methods.ulsad.local import LocalReconstructor
from ulsad_jax.nn.convolution import MANY_IMAGES, convolve
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import training
from ulsad_jax.runtime import devices as parallel
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.sweep import wave
from ulsad_jax.trunks import features

BATCH, EPOCHS = 8, 10  # an epoch is one step
TOLERANCE = 1e-5


class Small(nn.Module):
    """What compiles quickly and has everything that devices have to agree on."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, features, image, *, train):
        network = LocalReconstructor(4, axis_name=self.axis_name)
        local, _ = network(features, train=train)
        return {"features": features, "local": local[..., : features.shape[-1]]}


def mean_square(outputs, step):
    total = jnp.square(outputs["features"] - outputs["local"]).mean()
    return total, {"square": total}


def make_kept(count):
    rng = np.random.default_rng(0)
    return features.Kept(
        rng.normal(size=(count, 8, 8, 6)).astype(np.float32),
        rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
    )


@functools.cache
def take_steps(count, backend="jit", batch=BATCH):
    """Losses of ten steps, and states after the first and the last of them."""
    devices, kept, model = parallel.find_devices(count), make_kept(5 * batch), Small()
    optimizer = training.make_optimizer(
        learning_rate=2e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=2e-5
    )
    state = training.init_state(
        model,
        optimizer,
        jax.random.key(0),
        features=jax.ShapeDtypeStruct(kept.features[:batch].shape, jnp.float32),
        image=jax.ShapeDtypeStruct(kept.images[:batch].shape, jnp.uint8),
    )
    state = devices.replicate(state)
    step = parallel.make_train_step(
        model, mean_square, optimizer, devices=devices, backend=backend
    )
    losses, states = [], []
    for i in range(10):
        rows = np.arange(i * batch, (i + 1) * batch) % len(kept)
        state, new = step(state, *devices.load(kept, rows))
        losses.append({name: float(value) for name, value in new.items()})
        if i in (0, 9):
            states.append(jax.tree.map(jnp.copy, state))
    return losses, *states


@pytest.mark.parametrize(("backend", "used"), [("jit", 0), ("pmap", 1)])
def test_pmap_where_it_is_asked_for(backend, used, monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "pmap", lambda *args, **options: calls.append(args))
    parallel.make_train_step(
        Small(),
        mean_square,
        training.make_optimizer(
            learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0
        ),
        devices=parallel.find_devices(),
        backend=backend,
    )
    assert len(calls) == used


def test_there_are_eight():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    "way", [(2,), (8,), (4, "pmap"), (8, "pmap"), (3, "jit", 36), (3, "pmap", 36)]
)
def test_steps_equal_those_of_one_device(way):
    losses, first, last = take_steps(*way)
    alone = take_steps(1, "jit", *way[2:])
    for a, b in zip(losses, alone[0], strict=True):
        assert a == pytest.approx(b, rel=TOLERANCE)
    # Among them the running variances, which are unbiased over the whole batch.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=1e-7),
        *jax.device_get((first.batch_stats, alone[1].batch_stats)),
    )
    assert int(last.step) == 10
    for leaf in jax.tree.leaves(last):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == way[0]


def test_gradients_that_are_taken_in_chunks():
    """Of a convolution's kernel on CPUs, from 32 images on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(MANY_IMAGES, 12, 12, 64)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 64, 8)).astype(np.float32)

    @jax.jit
    def gradients(x, kernel):
        def loss(x, kernel):
            return jnp.square(convolve(x, kernel, stride=1, padding=1)).mean()

        return jax.grad(loss, (0, 1))(x, kernel)

    one, many = (
        gradients(devices.split(x), devices.replicate(kernel))
        for devices in map(parallel.find_devices, (1, 8))
    )
    for a, b in zip(many, one, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("memory", [0, 2**30], ids=["host", "device"])
def test_a_batch_is_split(memory, monkeypatch):
    monkeypatch.setattr(features, "device_bytes", lambda: memory)
    devices, kept = parallel.find_devices(), make_kept(BATCH)
    placed = features.place(features.Normals(kept, kept, None), devices).train
    assert isinstance(placed.features, jax.Array) == bool(memory)
    rows = np.arange(BATCH)[::-1]
    batch = devices.load(placed, rows)
    for array, whole in zip(batch, make_kept(BATCH).batch(rows), strict=True):
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {1}
        np.testing.assert_array_equal(array, whole)


@pytest.fixture(scope="module")
def config(data):  # noqa: F811
    fields = {
        "parallel.devices": 1,
        "train.batch_size": BATCH,
        "train.num_epochs": EPOCHS,
        "train.checkpoint_every": EPOCHS // 2,
    }
    return runs.make_config(data, fields)


@pytest.fixture(scope="module")
def run_alone(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    runs.train(config, workdir)
    return workdir


def assert_same_run(found, expected):
    """Features, losses, calibration and scores agree to rounding."""
    runs.assert_same_losses(found, expected)
    a, b = map(runs.read_checkpoint, (found, expected))
    for name, values in b["model"]["channels"].items():
        np.testing.assert_allclose(a["model"]["channels"][name], values, rtol=1e-5)
    assert a["calibration"] == pytest.approx(b["calibration"], rel=1e-2)
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
    for a, b in zip(runs.read_scores(found), runs.read_scores(expected), strict=True):
        assert a["image"] == b["image"]
        assert float(a["score"]) == pytest.approx(float(b["score"]), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("first", "then"), [((1, "jit"), (8, "jit")), ((8, "pmap"), (1, "jit"))]
)
def test_a_run_resumes_on_other_devices(config, run_alone, tmp_path, first, then):
    """Batches of evaluation, 4 in the config, are of 8 on 8 devices."""
    workdir = tmp_path / "run"
    config = config.copy_and_resolve_references()
    for way, epochs in ((first, EPOCHS // 2), (then, EPOCHS)):
        config.parallel.devices, config.parallel.backend = way
        config.train.num_epochs = epochs
        runs.train(config, workdir)
    assert_same_run(workdir, run_alone)
    experiment.evaluate(workdir)  # on all eight
    assert_same_run(workdir, run_alone)


@pytest.mark.parametrize(
    ("devices", "batch", "sizes", "fewer"),
    [(3, 4, "3 or 6", 2), (8, 12, "8 or 16", 6), (8, 4, "8", 4), (0, 7, "8", 7)],
)
def test_a_batch_that_cannot_be_split(config, tmp_path, devices, batch, sizes, fewer):
    config = config.copy_and_resolve_references()
    config.parallel.devices, config.train.batch_size = devices, batch
    with pytest.raises(UserError) as refused:
        runs.train(config, tmp_path / "run")
    message = str(refused.value)
    assert f"found {batch}. Set --config.train.batch_size to {sizes}, or" in message
    assert message.endswith(f"--config.parallel.devices to {fewer}.")
    assert not (tmp_path / "run").exists()


def test_more_devices_than_there_are():
    with pytest.raises(
        UserError, match=r"Expected 9 devices.* found 8 .* to 8 or less"
    ):
        parallel.find_devices(9)


@pytest.mark.parametrize("count", [3, 8, 11])
def test_members_of_a_sweep_are_split(count):
    """Also where they do not fill the devices, or some devices have two."""

    def update(numbers, state, features, image):
        state = state + numbers["rate"] * (features.mean() + image.mean())
        return state, {"total": state.sum()}

    rng = np.random.default_rng(0)
    states = list(rng.normal(size=(count, 5)).astype(np.float32))
    numbers = [{"rate": np.float32(i)} for i in range(count)]
    batches = [(rng.normal(size=(2, 3)), rng.normal(size=(2, 4))) for _ in states]
    at_once, in_turn = (
        kind(update, states, numbers) for kind in (wave.AtOnce, wave.InTurn)
    )
    for _ in range(2):
        found, expected = (program.step(batches) for program in (at_once, in_turn))
        np.testing.assert_allclose(found["total"][:count], expected["total"], rtol=1e-5)
    devices = {shard.device for shard in found["total"].addressable_shards}
    assert len(devices) == min(count, 8)
    for i in range(count):
        np.testing.assert_allclose(at_once.state(i), in_turn.state(i), rtol=1e-5)
