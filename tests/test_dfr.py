"""DFR against PyTorch; `goldens/dfr.py` says what the golden holds."""

from __future__ import annotations

import functools
import pathlib
import re

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from tests import runs
from tests.goldens import dfr as golden
from ulsad_jax.methods.base import TOTAL, Batch, State
from ulsad_jax.methods.dfr import Dfr, count_components, describe_regions
from ulsad_jax.runs import steps
from ulsad_jax.trunks import torch_names

LATENT = Dfr(latent=golden.LATENT)
# A batch norm follows, in that of the code after another convolution.
CANCELLED = re.compile(r"conv[1-5]\.bias")


@pytest.fixture(scope="module")
def stored():
    with np.load(pathlib.Path(golden.__file__).with_suffix(".npz")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def batch():
    image = np.zeros((golden.BATCH, *golden.SIZE, 3), np.uint8)
    return Batch(image, golden.levels(), np.ones(golden.BATCH, bool))


@pytest.fixture(scope="module")
def state():
    features = {name: runs.features(*shape) for name, shape in golden.LEVELS.items()}
    spec = steps.make_spec(golden.BATCH, golden.SIZE, features)
    drawn = steps.make_init(LATENT, spec)(jax.random.key(0))
    model = torch_names.import_arrays(golden.arrays(), drawn.model, "the autoencoder")
    return State(drawn.step, model, drawn.training)


assert_near = functools.partial(runs.assert_near, bound=1e-5)


def test_maps_are_pytorchs(stored, batch, state):
    assert_near(describe_regions(batch), stored["regions"])
    assert_near(LATENT.maps(state.model, batch)["regions"], stored["map"])
    validation = LATENT.losses(state.model, batch, state.step)[TOTAL]
    assert_near(validation, stored["validation"])


def test_training_is_pytorchs(stored, batch, state):
    update, losses = jax.jit(LATENT.update), []
    for i in range(golden.STEPS):
        state, found = update(state, batch, jax.random.key(0))
        losses.append(found[TOTAL])
        if i == 0:
            moment, model = state.training[0].mu, state.model
    assert_near(losses, stored["losses"])
    for name, value in torch_names.export({"params": moment}).items():
        expected = stored[f"gradient/{name}"]
        value = value * 10  # Adam's first moment is a tenth of the gradient
        if CANCELLED.fullmatch(name):
            assert np.abs([value, expected]).max() < 1e-6
        else:
            assert_near(value, expected)
    statistics = {"batch_stats": model["batch_stats"]}
    for name, value in torch_names.export(statistics).items():
        assert_near(value, stored[name])


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_code_has_the_size_of_the_principal_components(batch, share):
    method, x = Dfr(variance=share), describe_regions(batch)
    expected = PCA(share).fit(np.reshape(x, (-1, golden.CHANNELS))).n_components_
    assert method.adapt(batch) == Dfr(variance=share, latent=expected)
    repeated = Batch(*(jax.tree.map(lambda x: x[[0, 1, 2, 0]], batch[:3])))
    repeated = repeated._replace(valid=np.array([True, True, True, False]))
    assert method.adapt(repeated) == method.adapt(batch)
    assert LATENT.adapt(batch) is LATENT


def test_one_component_where_nothing_varies():
    assert count_components(np.ones((9, 4)), 0.9) == 1
