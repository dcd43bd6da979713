"""Programs work in whatever a caller's JAX is set to, and inside a caller's jit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tests import runs
from tests.test_loop import BATCH, Mean
from tests.test_training import init, load, make_kept, make_method
from ulsad_jax import Detector
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import steps
from ulsad_jax.runs.validation import make_validation_step
from ulsad_jax.runtime.devices import find_devices


def set_mesh(kind):
    return jax.set_mesh(jax.make_mesh((1,), ("theirs",), axis_types=(kind,)))


CONTEXTS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "explicit mesh": lambda: set_mesh(AxisType.Explicit),
}


def test_steps_have_no_nans_inside():
    method, batch, key = make_method(), load(make_kept(4)), jax.random.key(1)
    with jax.debug_nans(True):
        step = steps.make_train_step(method, find_devices(1), "jit")
        state, _ = step(init(method), batch, key)
        make_validation_step(method)(state.model, batch, 1, {})
        _, losses = step(state, batch, key)
    assert np.isfinite(losses["total"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_update(kind):
    """In a caller's mesh, and in a caller's jit there."""
    devices, batch = find_devices(1), load(make_kept(BATCH))
    step, key = steps.make_train_step(Mean(), devices, "jit"), jax.random.key(0)
    for function in (step, jax.jit(step)):
        state = devices.replicate(Mean().init(key, None))
        with set_mesh(kind):
            state, losses = function(state, batch, key)
        assert state.step == 1
        assert losses["total"] == np.mean(batch.image)


@pytest.mark.parametrize("context", CONTEXTS)
def test_training_and_evaluation(data, finished, tmp_path, context):
    """From Python, in the caller's context, which is there again afterwards."""
    config, workdir = runs.make_config(data), tmp_path / "run"
    with CONTEXTS[context]():
        before = jax.sharding.get_abstract_mesh()
        runs.train(config, workdir)
        experiment.evaluate(workdir)
        assert jax.sharding.get_abstract_mesh() == before
    assert runs.read_metrics(workdir) == runs.read_metrics(finished.workdir)
    assert runs.read_scores(workdir) == runs.read_scores(finished.workdir)


@pytest.mark.parametrize("context", CONTEXTS)
def test_detector(finished, context):
    image = make_kept(1).images[0]
    expected = Detector.load(finished.workdir)(image)
    with CONTEXTS[context]():
        found = Detector.load(finished.workdir)(image)
    assert found.score == expected.score
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
