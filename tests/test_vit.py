"""Narrow ViTs of both kinds; `goldens/vit.py` says what the golden holds."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens import vit as golden
from ulsad_jax.runtime import compilation
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import base, torch_names, vit
from ulsad_jax.trunks.pyramid import FeaturePyramid, pyramid_variables

KINDS = ("dinov2", "dinov3")
_describe = functools.partial(
    vit.describe, width=golden.WIDTH, heads=golden.HEADS, blocks=golden.BLOCKS
)
DINOV2, DINOV3 = _describe(vit.DINOV2), _describe(vit.DINOV3)
CASES = [
    (kind, size, dtype, tolerance)
    for kind in KINDS
    for size, dtype, tolerance in (
        (golden.SIZES[kind][0], jnp.float32, 1e-5),
        (golden.SIZES[kind][1], jnp.float32, 1e-5),
        (golden.SIZES[kind][0], jnp.bfloat16, 2e-2),
    )
]


def name(kind):
    return f"{__name__}:{kind.upper()}"


def run(kind, images, dtype, layers):
    trunk = torch_names.import_trunk(golden.arrays(kind), name(kind))
    pyramid = FeaturePyramid(name(kind), dtype, layers)
    apply = jax.jit(pyramid.apply, compiler_options=compilation.run_once())
    return apply(pyramid_variables(name(kind), trunk), images)


@pytest.mark.parametrize(("kind", "size", "dtype", "tolerance"), CASES)
def test_tokens_are_timms(kind, size, dtype, tolerance):
    found = run(kind, golden.images(size), dtype, "block1+block2")
    with np.load(pathlib.Path(golden.__file__).with_suffix(".npz")) as stored:
        prefix = f"{kind}/{size[0]}x{size[1]}"
        expected = np.concatenate(
            [stored[f"{prefix}/block{i}"] for i in (1, 2)], axis=-1
        )
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind):
    arrays = golden.arrays(kind)
    trained = {"mask_token": np.zeros((1, golden.WIDTH), np.float32)}
    variables = torch_names.import_trunk(arrays | trained, name(kind))
    found = torch_names.export(variables)
    assert found.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_another_kind():
    with pytest.raises(UserError, match=r"missing: blocks\.0\.gamma_1.*architecture"):
        torch_names.import_trunk(golden.arrays("dinov2"), name("dinov3"))


@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize(("kind", "patch"), [("dinov2", 14), ("dinov3", 16)])
def test_published_names(kind, patch, size):
    width = {"small": 384, "base": 768}[size]
    spec = golden.weights.vit_spec(kind, width=width, blocks=12)
    published = f"vit_{size}_patch{patch}_{kind}"
    _, shapes = base.shapes(published)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in spec.items()}
    torch_names.import_arrays(arrays, shapes, published)
