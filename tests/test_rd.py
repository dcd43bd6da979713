"""Reverse distillation against anomalib; `goldens/rd.py` says what the golden holds."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from tests.goldens import rd as golden
from ulsad_jax.methods.base import TOTAL, Batch
from ulsad_jax.methods.rd import Kind, ReverseDistillation, read_kind
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import setup, steps
from ulsad_jax.trunks import torch_names


@pytest.fixture(scope="module", params=golden.CASES)
def case(request):
    """The method, a state with the golden's weights, its batch and its numbers."""
    method = ReverseDistillation(kind=Kind(*golden.CASES[request.param]))
    levels = golden.levels(request.param)
    features = {f"layer{i}": x for i, x in enumerate(levels, start=1)}
    image = np.zeros((golden.BATCH, golden.SIZE, golden.SIZE, 3), np.uint8)
    batch = Batch(image, features, np.ones(golden.BATCH, bool))
    shapes = {name: runs.features(*x.shape[1:]) for name, x in features.items()}
    spec = steps.make_spec(golden.BATCH, image.shape[1:3], shapes)
    shapes = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    arrays = {
        name: golden.fill(name, x.shape)
        for name, x in torch_names.export(state.model).items()
    }
    model = torch_names.import_arrays(arrays, shapes.model, "the student")
    with np.load(pathlib.Path(golden.__file__).with_suffix(".npz")) as file:
        stored = {
            name.removeprefix(f"{request.param}/"): file[name]
            for name in file.files
            if name.startswith(request.param)
        }
    return method, state.replace(model=model), batch, stored


assert_near = functools.partial(runs.assert_near, bound=1e-4)


def test_maps_are_anomalibs(case):
    method, state, batch, stored = case
    n = golden.STRIDE
    levels, maps = jax.jit(
        lambda model: (method.decode(model, batch)[1], method.maps(model, batch))
    )(state.model)
    for i, x in enumerate(levels, start=1):
        assert_near(x[:, ::n, ::n, :: 8 * n], stored[f"level{i}"])
    assert_near(maps["student"][:, ::n, ::n], stored["map"])


@pytest.mark.parametrize("case", ["basic"], indirect=True)
def test_gradient_is_anomalibs(case):
    method, state, batch, stored = case
    state, losses = jax.jit(method.update)(state, batch, jax.random.key(0))
    assert_near(losses[TOTAL], stored["loss"])
    moments = torch_names.export({"params": state.training[0].mu})
    assert moments.keys() == {*stored["names"]}
    for name, norm in zip(stored["names"], stored["norms"], strict=True):
        found = np.linalg.norm(moments[name]) / (1 - method.b1)
        assert found == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize(
    "architecture",
    ["resnet34", "wide_resnet50_2", "resnet50", "tf_efficientnet_lite0"],
)
def test_a_model_says_of_which_kind_it_is(architecture):
    """Members of a sweep over trunks share one method, whose own kind is another's."""
    config = config_lib.resolve(
        runs.make_config(
            pathlib.Path("data"), {"method": "rd", "trunk.architecture": architecture}
        )
    )
    made = setup.make(config)
    init = functools.partial(made.method.init, spec=made.spec(2))
    model = jax.eval_shape(init, jax.random.key(0)).model
    assert read_kind(model) == made.method.kind
    other = ReverseDistillation(kind=Kind(blocks=(1, 1, 1)))
    batch = made.spec(2).batch
    ours, theirs = (jax.eval_shape(m.maps, model, batch) for m in (made.method, other))
    assert ours == theirs
