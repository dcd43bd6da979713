"""EfficientNet-Lite computes what timm does, and has weights built in."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests import runs
from tests.goldens import weights
from tests.goldens.timm_trunks import SIZES, STRIDE
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import base, torch_names
from ulsad_jax.trunks.pyramid import FeaturePyramid, feature_shapes
from ulsad_jax.trunks.weights import load_trunk

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "efficientnet_lite.npz"
LITE0, LITE2 = "tf_efficientnet_lite0", "tf_efficientnet_lite2"


def make_variables(architecture):
    """A trunk's variables on the goldens' weights, which depend on names and shapes."""
    _, shapes = base.shapes(architecture)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    spec = {name: a.shape for name, a in torch_names.export(zeros).items()}
    arrays = weights.fill(spec, prefix="trunk", seed=0)
    return torch_names.import_trunk(arrays, architecture)


def load(source, *, architecture=LITE0, path=""):
    return load_trunk(
        architecture=architecture, source=source, repository="", path=str(path), seed=0
    )


def assert_near(outputs, prefix, error):
    """By a share of the largest value."""
    with np.load(GOLDEN) as golden:
        for name, found in outputs.items():
            expected = golden[f"{prefix}/{name}"]
            atol = error * np.abs(expected).max()
            kept = found[0, ::STRIDE, ::STRIDE]
            np.testing.assert_allclose(kept, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def apply_lite0():
    return jax.jit(base.find(LITE0).make(folded=True).apply)


def test_outputs_are_timms(apply_lite0):
    variables = base.find(LITE0).fold(make_variables(LITE0))
    for height, width in SIZES[LITE0]:
        outputs = apply_lite0(variables, weights.levels(height, width))
        assert_near(outputs, f"{LITE0}/{height}x{width}", 1e-5)


def test_built_in_weights_are_the_published_ones(apply_lite0):
    """But for their rounding to float16; timm read them from the published file."""
    variables = {"params": load("builtin").variables["params"]["trunk"]}
    image = weights.levels(*SIZES[LITE0][0])
    assert_near(apply_lite0(variables, image), "published", 1e-2)


def test_unfolded_outputs_are_timms():
    ((height, width),) = SIZES[LITE2]
    image = np.float32(weights.levels(height, width) / 255)
    outputs = jax.jit(base.find(LITE2).make().apply)(make_variables(LITE2), image)
    assert_near(outputs, f"{LITE2}/{height}x{width}", 1e-5)


def test_bfloat16():
    trunk = base.find(LITE0).make(dtype=jnp.bfloat16, folded=True)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    outputs, variables = jax.eval_shape(
        trunk.init_with_output, jax.random.key(0), image
    )
    assert {value.dtype for value in outputs.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_features():
    for i, channels in enumerate((152, 152, 168)):
        pyramid = FeaturePyramid(f"tf_efficientnet_lite{i}")
        assert feature_shapes(pyramid, (224, 96)).shape == (1, 28, 12, channels)


def test_built_in_file_says_where_it_is_from():
    path = base.find(LITE0).builtin
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    assert about["architecture"] == LITE0
    assert about["license"] == "Apache-2.0"
    assert about["origin_sha256"].startswith("579344248a93e230")
    trunk, stored = load("builtin"), load_file(path)
    assert trunk.identity.source == f"builtin:{LITE0}"
    assert {a.dtype for a in stored.values()} == {np.dtype(np.float16)}
    runs.assert_same_arrays(
        trunk.arrays, {name: a.astype(np.float32) for name, a in stored.items()}
    )


def test_whole_published_file_is_the_same_trunk(tmp_path):
    """Later stages and the head are ignored."""
    path = tmp_path / "model.safetensors"
    rest = ("blocks.5.0.bn1.weight", "blocks.6.0.bn1.bias", "conv_head.weight")
    rest += ("bn2.running_var", "classifier.bias")
    arrays = load_file(base.find(LITE0).builtin)
    save_file(arrays | dict.fromkeys(rest, np.zeros(1)), path)
    assert load("file", path=path).identity.sha256 == load("builtin").identity.sha256


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("tf_efficientnet_lite1", r"lite1 trunk; missing: blocks\.1\.2"),
        ("tf_efficientnet_lite2", r"lite2 trunk; missing: blocks\.1\.2"),
        ("resnet18", r"resnet18 trunk; missing: conv1.*architecture is the file's"),
    ],
)
def test_file_of_another_architecture(architecture, message):
    with pytest.raises(UserError, match=message):
        load("file", architecture=architecture, path=base.find(LITE0).builtin)


def test_file_of_other_names(tmp_path):
    """For example the port's, from which the built-in weights were converted."""
    path = tmp_path / "port.safetensors"
    save_file({"_conv_stem.weight": np.zeros((32, 3, 3, 3), np.float32)}, path)
    with pytest.raises(UserError, match=r"missing: blocks.*not known: _conv_stem\.wei"):
        load("file", path=path)


def test_wrong_image_size(tmp_path):
    fields = {"trunk.architecture": LITE0, "image_size": (64, 72)}
    with pytest.raises(UserError, match=r"image_size to be .* a multiple of 32"):
        runs.train(runs.make_config(tmp_path, fields), tmp_path / "run")
