"""DRAEM against anomalib and its authors; `goldens/draem.py` says how."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ulsad_jax
from tests import runs
from tests.goldens import draem as golden
from tests.test_experiment import needs_cpu, stop_training
from ulsad_jax import export
from ulsad_jax.methods.base import TOTAL, Batch, State
from ulsad_jax.methods.draem import defects
from ulsad_jax.methods.draem.method import Draem, measure
from ulsad_jax.runs import steps
from ulsad_jax.runtime.devices import find_devices
from ulsad_jax.trunks import torch_names

METHOD = Draem(repair_width=golden.WIDTHS[0], segment_width=golden.WIDTHS[1])
UPDATES = 10


@pytest.fixture(scope="module")
def stored():
    with np.load(pathlib.Path(golden.__file__).with_suffix(".npz")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def state():
    """The state with the golden's weights, before the first of ten updates."""
    size = golden.SIZE, golden.SIZE
    spec = steps.make_spec(golden.BATCH, size, None, 8, UPDATES)
    drawn = steps.make_init(METHOD, spec)(jax.random.key(0))
    names = torch_names.export(jax.device_get(drawn.model))
    arrays = {name: golden.fill(name, x.shape) for name, x in names.items()}
    model = torch_names.import_arrays(arrays, drawn.model, "DRAEM")
    return State(drawn.step, model, drawn.training)


@pytest.fixture(scope="module")
def learn():
    return jax.jit(METHOD.learn)


assert_near = functools.partial(runs.assert_near, bound=1e-4)


def make_batch(image):
    pixels = np.round(np.asarray(image) * 255).astype(np.uint8)
    count = len(pixels)
    return Batch(pixels, None, np.ones(count, bool), np.arange(count, dtype=np.int32))


def test_maps_are_anomalibs(stored, state):
    _, defective, _ = golden.images()
    n = golden.STRIDE
    run = jax.jit(lambda x: METHOD.network.apply(state.model, x, train=False))
    repaired, logits = run(defective)
    assert_near(repaired[:, ::n, ::n], stored["repaired"])
    assert_near(jax.nn.softmax(logits)[:, ::n, ::n, 1], stored["map"])
    pixels = make_batch(defective)
    _, logits = run(pixels.image / np.float32(255))
    found = METHOD.maps(state.model, pixels)
    assert_near(found["defect"], np.asarray(jax.nn.softmax(logits)[..., 1]))


def test_losses_are_the_authors(stored, state, learn):
    clean, defective, mask = golden.images()
    _, losses = learn(state, clean, defective, mask)
    names = ("square", "structure", "focal", TOTAL)
    found = [float(losses[name]) for name in names]
    np.testing.assert_allclose(found, stored["losses"], rtol=1e-4)

    def total(outputs):
        return sum(x.mean() for x in measure(clean, mask, *outputs).values())

    @jax.jit
    def differentiate(model):
        kept = ["batch_stats"]
        run = METHOD.network.apply(model, defective, train=True, mutable=kept)
        return jax.grad(total)(run[0])

    n = golden.STRIDE
    for name, x in zip(("repaired", "logits"), differentiate(state.model), strict=True):
        # The logits in training are rounded by as much, through eleven batch norms.
        assert_near(x[:, ::n, ::n], stored[f"{name}_gradient"], bound=1e-3)


def test_noise_is_anomalibs(stored):
    angles = 2 * np.pi * golden.angles()
    # Theirs ends where ours would begin again.
    around = np.zeros((16, 16), np.float32)
    around[: angles.shape[0], : angles.shape[1]] = angles
    positions = (np.arange(golden.SIZE) / golden.SIZE * n for n in golden.CELLS)
    places = np.meshgrid(*positions, indexing="ij")
    found = defects.perlin(jnp.array(around), *places)
    n = golden.STRIDE
    np.testing.assert_allclose(found[::n, ::n], stored["noise"], atol=1e-5)


def test_drawn_defects():
    """Half of the images, what is outside of the mask stays, and keys decide."""
    image = jnp.full((64, 64, 96, 3), 0.5)
    draw = jax.jit(lambda x, key: defects.draw_defects(x, jax.random.split(key, 64)))
    defective, mask = draw(image, jax.random.key(0))
    assert {*np.unique(mask)} == {0, 1}
    assert jnp.all(jnp.where(mask[..., None] == 0, defective == image, True))
    assert defective.min() >= 0 and defective.max() <= 1
    shares = mask.mean((1, 2))
    assert 0.25 < (shares > 0).mean() < 0.6  # some of the noise is nowhere high
    assert 0.005 < shares[shares > 0].mean() < 0.2
    changed = jnp.abs(defective - image).max(-1)
    assert (changed[mask > 0] > 0.02).mean() > 0.9
    again, other = draw(image, jax.random.key(0))[1], draw(image, jax.random.key(1))[1]
    assert jnp.all(again == mask) and jnp.any(other != mask)


def test_rate_falls_twice(state, learn):
    """The first step of Adam from the same state is as large as the rate."""

    def change(step):
        at = state.replace(step=jnp.asarray(step, jnp.int32))
        after, _ = learn(at, *golden.images())
        params = after.model["params"], state.model["params"]
        changes = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), *params)
        return max(jax.tree.leaves(changes))

    assert change(7) == pytest.approx(1e-4, rel=0.02)
    assert change(8) == pytest.approx(2e-5, rel=0.05)
    assert change(9) == pytest.approx(4e-6, rel=0.2)


def test_losses_leave_out_rows_that_fill_up(state):
    batch = make_batch(golden.images()[0])
    filled = batch._replace(valid=np.arange(len(batch.image)) < 1)
    other = filled._replace(image=np.stack([batch.image[0]] * len(batch.image)))
    run = jax.jit(METHOD.losses)
    found, same = (run(state.model, x, 0) for x in (filled, other))
    for name, value in found.items():
        assert float(same[name]) == pytest.approx(float(value), rel=1e-5)


def test_losses_are_those_of_each_image_in_any_batch(state):
    """An image's defect is its own: batches of another size have the same losses."""
    batch = make_batch(golden.images()[0])
    run = jax.jit(METHOD.losses)
    whole = run(state.model, batch, 0)
    arrays = batch.image, batch.valid, batch.index
    rows = [[x[i : i + 1] for x in arrays] for i in range(len(batch.image))]
    parts = [run(state.model, Batch(x, None, v, i), 0) for x, v, i in rows]
    for name, value in whole.items():
        mean = np.mean([part[name] for part in parts])
        assert float(value) == pytest.approx(mean, rel=1e-4)


def test_update_of_pmap_learns(state):
    step = steps.make_train_step(METHOD, find_devices(1), "pmap")
    batch = make_batch(golden.images()[0])
    state, found = step(jax.device_put(state), batch, jax.random.key(0))
    assert state.step == 1 and all(np.isfinite(list(found.values())))


FIELDS = {
    "method": "draem",
    "methods.draem.repair_width": 4,
    "methods.draem.segment_width": 4,
    "train.num_epochs": 2,
    "train.checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run; read-only."""
    config = runs.make_config(data, FIELDS)
    workdir = tmp_path_factory.mktemp("draem") / "run"
    return runs.Run(workdir, config, runs.train(config, workdir))


def test_what_a_run_leaves(run):
    assert not (run.workdir / "trunk.safetensors").exists()
    first, second = runs.read_metrics(run.workdir)
    assert {"loss/square", "loss/structure", "loss/focal"} <= first.keys()
    assert second["validation/total"] > 0
    detector = ulsad_jax.Detector.load(run.workdir)
    for row in runs.read_scores(run.workdir)[:2]:
        result = detector(row["image"])
        assert {*result.maps} == {"defect"}
        assert result.score == pytest.approx(float(row["score"]), rel=1e-3)
    path = run.workdir / "bottle.zip"
    export.main([f"--workdir={run.workdir}", f"--output={path}", "--platforms=cpu"])
    assert path.exists()


@needs_cpu
def test_stopped_and_resumed(run, tmp_path, monkeypatch):
    stop_training(monkeypatch, run.config, tmp_path / "again", 1, 1, "after step 5")
    runs.train(run.config, tmp_path / "again")
    runs.assert_same_category(tmp_path / "again", run.workdir)
