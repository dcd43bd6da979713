"""Tests for a process with eight devices; `tests/test_parallel.py` starts it."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import runs
from tests.conftest import data  # noqa: F401
from ulsad_jax.methods import patchcore
from ulsad_jax.methods.base import IMAGES, LEVELS, Method, State
from ulsad_jax.methods.descent import make_optimizer
from ulsad_jax.methods.draem.method import Draem
from ulsad_jax.methods.efficientad.method import EfficientAd
from ulsad_jax.methods.flows import Cflow, FastFlow
from ulsad_jax.methods.padim import Padim
from ulsad_jax.methods.patchcore import Patchcore
from ulsad_jax.methods.pca import Pca
from ulsad_jax.methods.ulsad.local import LocalReconstructor
from ulsad_jax.nn.convolution import MANY_IMAGES, convolve
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import steps
from ulsad_jax.runtime import devices as parallel
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.sweep import wave
from ulsad_jax.sweep.costs import count_program_bytes
from ulsad_jax.trunks import sources

BATCH, EPOCHS = 8, 10  # an epoch is one step
TOLERANCE = 1e-5
SHARDED = "sharded"  # a way of training: jit, the state split over the devices


class Small(nn.Module):
    """What compiles quickly and has everything that devices have to agree on."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, features, image, *, train):
        network = LocalReconstructor(32, axis_name=self.axis_name)
        local, _ = network(features, train=train)
        return {"features": features, "local": local[..., : features.shape[-1]]}


@dataclasses.dataclass(frozen=True)
class Squares(Method):
    """Trains that network, as any method is trained."""

    @property
    def network(self):
        return Small(self.axis_name)

    @property
    def optimizer(self):
        return make_optimizer(
            learning_rate=2e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=2e-5
        )

    def init(self, key, spec):
        inputs = jnp.zeros(spec.batch.features.shape), spec.batch.image
        model = self.network.init(key, *inputs, train=True)
        training = self.optimizer.init(model["params"])
        return State(jnp.zeros((), jnp.int32), dict(model), training)

    def update(self, state, batch, key):
        def loss(params):
            outputs, updated = self.network.apply(
                state.model | {"params": params},
                batch.features,
                batch.image,
                train=True,
                mutable=["batch_stats"],
            )
            square = jnp.square(outputs["features"] - outputs["local"]).mean()
            return square, updated

        params = state.model["params"]
        (total, updated), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        if self.axis_name is not None:
            total, gradients = jax.lax.pmean((total, gradients), self.axis_name)
        changes, training = self.optimizer.update(gradients, state.training, params)
        model = {"params": optax.apply_updates(params, changes), **updated}
        return State(state.step + 1, model, training), {"total": total}


def make_kept(count):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(count, 8, 8, 6)).astype(np.float32)
    return sources.Kept(rng.integers(0, 256, (count, 64, 64, 3), np.uint8), features)


@functools.cache
def take_steps(count, backend="jit", batch=BATCH, *, shards=False):
    """Losses of ten steps, and states after the first and the last of them."""
    devices, kept, method = (
        parallel.find_devices(count, shards_state=shards),
        make_kept(5 * batch),
        Squares(),
    )
    spec, key = (
        steps.make_spec(batch, (64, 64), runs.features(8, 8, 6)),
        jax.random.key(0),
    )
    state = devices.place_state(steps.make_init(method, spec)(key))
    step = steps.make_train_step(method, devices, backend)
    losses, states = [], []
    for i in range(10):
        rows = np.arange(i * batch, (i + 1) * batch) % len(kept)
        state, new = step(state, sources.load(kept, rows, batch, devices), key)
        losses.append({name: float(value) for name, value in new.items()})
        if i in (0, 9):
            states.append(jax.tree.map(jnp.copy, state))
    return losses, *states


@pytest.mark.parametrize(("backend", "used"), [("jit", 0), ("pmap", 1)])
def test_pmap_where_it_is_asked_for(backend, used, monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "pmap", lambda *args, **options: calls.append(args))
    steps.make_train_step.__wrapped__(Squares(), parallel.find_devices(), backend)
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
        *jax.device_get([s.model["batch_stats"] for s in (first, alone[1])]),
    )
    assert int(last.step) == 10
    for leaf in jax.tree.leaves(last):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == way[0]


def test_a_state_that_is_split_takes_the_same_steps():
    """And stays split, so that a device holds about an eighth of it."""
    losses, _, last = take_steps(8, shards=True)
    for a, b in zip(losses, take_steps(8)[0], strict=True):
        assert a == pytest.approx(b, rel=TOLERANCE)
    leaves = jax.tree.leaves(last)
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert on_one < sum(leaf.nbytes for leaf in leaves) / 7


def test_places_of_a_state():
    """Along the largest axis of those that eight divides, the first of equal ones."""
    shapes = {(): (), (7,): (), (8, 9): ("data",), (3, 16, 24): (None, None, "data")}
    shapes |= {(16, 16): ("data",), (0, 3): (), (100, 8): (None, "data")}
    tree = {shape: jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes}
    found = parallel.find_devices(shards_state=True).choose_places(tree)
    assert {shape: tuple(x.spec) for shape, x in found.items()} == shapes
    whole = parallel.find_devices().choose_places(tree)
    assert {tuple(x.spec) for x in whole.values()} == {()}


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
    monkeypatch.setattr(sources, "device_bytes", lambda: memory)
    devices, kept = parallel.find_devices(), make_kept(BATCH)
    placed = sources.place(sources.Normals(kept, kept, None), devices).train
    assert isinstance(placed.features, jax.Array) == bool(memory)
    rows = np.arange(BATCH)[::-1]
    batch = sources.load(placed, rows, BATCH - 1, devices)
    images, features = make_kept(BATCH).batch(rows)
    valid = np.arange(BATCH) < BATCH - 1
    for array, whole in zip(batch, (images, features, valid, rows), strict=True):
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {1}
        np.testing.assert_array_equal(array, whole)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_every_device_has_draws_of_its_own(backend):
    """Under pmap an update sees a share of the batch, and would draw alike."""
    devices, kept = parallel.find_devices(), make_kept(BATCH)
    step = steps.make_train_step(Draws(), devices, backend)
    state = devices.replicate(State(jnp.zeros((), jnp.int32), {}, {}))
    batch = sources.load(kept, np.arange(BATCH), BATCH, devices)
    _, losses = step(state, batch, jax.random.key(0))
    assert losses["distinct"] == BATCH


@dataclasses.dataclass(frozen=True)
class Draws(Method):
    """Counts how many of a batch's random numbers differ."""

    def update(self, state, batch, key):
        drawn = jax.random.uniform(key, batch.valid.shape)
        if self.axis_name is not None:
            drawn = jax.lax.all_gather(drawn, self.axis_name).ravel()
        distinct = 1 + (jnp.diff(jnp.sort(drawn)) > 0).sum()
        return state, {"distinct": distinct}


@pytest.mark.parametrize("method", [Padim(channels=4), Pca(), Patchcore()])
@pytest.mark.parametrize("way", [(8, "jit"), (8, "pmap"), (8, SHARDED), (2, SHARDED)])
def test_models_of_images_equal_those_of_one_device(way, method):
    """With a last batch that is filled up."""
    kept, key = make_kept(BATCH + 3), jax.random.key(0)
    spec = steps.make_spec(BATCH, (64, 64), runs.features(8, 8, 6), len(kept))
    batch = sources.load(kept, np.arange(3), 3, parallel.find_devices(1))
    found = []
    for count, backend in ((1, "jit"), way):
        devices = parallel.find_devices(count, shards_state=backend == SHARDED)
        state = devices.place_state(steps.make_init(method, spec)(key))
        step = steps.make_train_step(method, devices, backend)
        for rows, own in ((np.arange(BATCH), BATCH), (np.arange(BATCH) % 3 + 8, 3)):
            state, _ = step(state, sources.load(kept, rows, own, devices), key)
        state = state if method.splits_model else devices.replicate(state)
        model = jax.device_get(method.finish(state).model)
        found.append(method.maps(model, batch) | method.scores(model, batch))
    for name, expected in found[0].items():
        np.testing.assert_allclose(found[1][name], expected, rtol=1e-4, atol=1e-5)


def test_a_bank_that_is_split_is_whole_on_no_device():
    """Nor are the patches that it is chosen from."""
    devices, method = parallel.find_devices(shards_state=True), Patchcore()
    spec = steps.make_spec(BATCH, (64, 64), runs.features(16, 16, 32), 512)
    init, key = steps.make_init(method, spec, devices), jax.random.key(0)
    state = init(key)
    bank = np.zeros((8192, 32), np.float32)
    model = steps.place_model(method, devices, {"bank": bank})
    features = np.zeros((BATCH, 16, 16, 32), np.float32)
    kept = sources.Kept(np.zeros((BATCH, 64, 64, 3), np.uint8), features)
    batch = sources.load(kept, np.arange(BATCH), BATCH, devices)
    rows = state.training["rows"]
    patches = rows.reshape(-1, rows.shape[-1])
    step = steps.make_train_step(method, devices, "jit")
    choose = functools.partial(patchcore.choose.lower, count=64, dimensions=128)
    programs = {
        "init": (init.lower(key), rows),
        "update": (step.lower(state, batch, key), rows),
        "choose": (choose(key, patches), rows),
        "maps": (jax.jit(method.maps).lower(model, batch), bank),
        "scores": (jax.jit(method.scores).lower(model, batch), bank),
    }
    for name, (lowered, whole) in programs.items():
        assert count_program_bytes(lowered.compile()) < whole.nbytes, name


@pytest.mark.parametrize(
    ("backend", "method"),
    [
        ("jit", FastFlow(steps=2)),
        ("pmap", FastFlow(steps=2)),
        ("jit", Cflow(steps=2, positions=10**4)),
        ("pmap", Cflow(steps=2, positions=10**4)),
        ("jit", EfficientAd()),
        ("jit", Draem(repair_width=2, segment_width=2)),
    ],
)
def test_networks_equal_those_of_one_device(backend, method):
    """Of CFLOW with all positions in one step: devices draw orders of their own.

    With pmap, devices draw colours and defects of their own, too.
    """
    kept, key, found = make_kept(BATCH), jax.random.key(0), []
    shapes = runs.features(8, 8, 6)
    if method.takes == LEVELS:
        kept = dataclasses.replace(kept, features={"layer1": kept.features})
        shapes = {"layer1": shapes}
    if method.takes == IMAGES:
        kept, shapes = dataclasses.replace(kept, features=None), None
    spec = steps.make_spec(BATCH, (64, 64), shapes, BATCH, 3)
    for count, way in ((1, "jit"), (8, backend)):
        devices = parallel.find_devices(count)
        batch = sources.load(kept, np.arange(BATCH), BATCH, devices)
        state = devices.replicate(steps.make_init(method, spec)(key))
        step = steps.make_train_step(method, devices, way)
        losses = []
        for _ in range(3):
            state, new = step(state, batch, key)
            losses.append(new["total"])
        model = jax.device_get(state.model)
        maps = jax.jit(method.maps)(model, sources.read(kept, np.arange(BATCH), BATCH))
        found.append(jax.device_get((losses, maps)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found
    )


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
    ("first", "then"),
    [
        *(((1, "jit"), (8, "jit")), ((8, "pmap"), (1, "jit"))),
        *(((8, SHARDED), (4, SHARDED)), ((8, SHARDED), (1, "jit"))),
        ((1, "jit"), (8, SHARDED)),
    ],
)
def test_a_run_resumes_on_other_devices(config, run_alone, tmp_path, first, then):
    """Batches of evaluation, 4 in the config, are of 8 on 8 devices."""
    workdir = tmp_path / "run"
    config = config.copy_and_resolve_references()
    for way, epochs in ((first, EPOCHS // 2), (then, EPOCHS)):
        config.parallel.devices, kind = way
        config.parallel.shard_state = kind == SHARDED
        config.parallel.backend = "jit" if kind == SHARDED else kind
        config.train.num_epochs = epochs
        runs.train(config, workdir)
    assert_same_run(workdir, run_alone)
    experiment.evaluate(workdir)  # on all eight
    assert_same_run(workdir, run_alone)


@pytest.mark.parametrize("method", ["padim", "patchcore"])
def test_a_model_of_sums_in_a_state_that_is_split(config, tmp_path, method):
    config = config.copy_and_resolve_references()
    config.method = method
    for devices in (1, 8):
        config.parallel.devices, config.parallel.shard_state = devices, devices > 1
        runs.train(config, tmp_path / str(devices))
    assert_same_run(tmp_path / "8", tmp_path / "1")


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


def test_pmap_of_a_state_that_is_split(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.parallel.shard_state, config.parallel.backend = True, "pmap"
    with pytest.raises(UserError, match="shard_state is set, found 'pmap'"):
        runs.train(config, tmp_path / "run")


def test_more_devices_than_there_are():
    with pytest.raises(
        UserError, match=r"Expected 9 devices.* found 8 .* to 8 or less"
    ):
        parallel.find_devices(9)


@pytest.mark.parametrize("count", [3, 8, 11])
def test_members_of_a_sweep_are_split(count):
    """Also where they do not fill the devices, or some devices have two."""

    def update(numbers, state, batch, key):
        drawn = jax.random.uniform(key)
        state = state + numbers["rate"] * (batch.features.mean() + drawn)
        return state, {"total": state.sum()}

    rng = np.random.default_rng(0)
    states = list(rng.normal(size=(count, 5)).astype(np.float32))
    numbers = [{"rate": np.float32(i)} for i in range(count)]
    keys = list(map(jax.random.key, range(count)))
    batches = [
        sources.Batch(
            rng.normal(size=(2, 4)), rng.normal(size=(2, 3)), np.ones(2, bool)
        )
        for _ in states
    ]
    at_once, in_turn = (
        kind(update, states, numbers, keys) for kind in (wave.AtOnce, wave.InTurn)
    )
    for _ in range(2):
        found, expected = (program.step(batches) for program in (at_once, in_turn))
        np.testing.assert_allclose(found["total"][:count], expected["total"], rtol=1e-5)
    devices = {shard.device for shard in found["total"].addressable_shards}
    assert len(devices) == min(count, 8)
    for i in range(count):
        np.testing.assert_allclose(at_once.state(i), in_turn.state(i), rtol=1e-5)
