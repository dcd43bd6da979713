from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.goldens import weights
from ulsad_jax.methods.ulsad import torch_names as ulsad_names
from ulsad_jax.methods.ulsad.local import LocalReconstructor
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import torch_names as torch_import
from ulsad_jax.trunks.resnet import TRUNKS


def trunk_arrays(architecture="resnet18"):
    spec = weights.resnet_spec(architecture)
    return weights.fill(spec, prefix="backbone", seed=0)


def global_arrays():
    return weights.fill(weights.global_spec(), prefix="global", seed=0)


def local_arrays():
    """A narrow network's, whose kernels have no two equal axes of channels."""
    rng = np.random.default_rng(0)
    x = jax.ShapeDtypeStruct((1, 8, 8, 6), np.float32)
    shapes = jax.eval_shape(
        lambda x: LocalReconstructor(16).init(jax.random.key(0), x, train=False), x
    )
    variables = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
    )
    return torch_import.export(variables)


def import_narrow(arrays):
    return ulsad_names.import_local(arrays, channels=6, width=16)


def import_global(arrays, image_size=(256, 256)):
    return ulsad_names.import_global(arrays, channels=384, image_size=image_size)


def import_resnet18(arrays):
    return torch_import.import_trunk(arrays, "resnet18")


def assert_same_arrays(ours, expected):
    assert ours.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("make_arrays", "import_arrays"),
    [
        (trunk_arrays, import_resnet18),
        (local_arrays, import_narrow),
        (global_arrays, import_global),
    ],
    ids=["trunk", "local", "global"],
)
def test_round_trip(make_arrays, import_arrays):
    arrays = make_arrays()
    variables = import_arrays(arrays)
    assert_same_arrays(torch_import.export(variables), arrays)
    again = import_arrays(torch_import.export(variables))
    assert_same_arrays(
        traverse_util.flatten_dict(again), traverse_util.flatten_dict(variables)
    )


def test_layouts():
    arrays = local_arrays()
    params = import_narrow(arrays)["params"]
    conv, deconv = arrays["conv1.weight"], arrays["deconv3.weight"]
    assert conv.shape == (8, 6, 3, 3)  # (out, in, kh, kw)
    assert deconv.shape == (4, 12, 5, 5)  # (in, out, kh, kw)
    assert params["conv1"]["kernel"][0, 2, 4, 5] == conv[5, 4, 0, 2]
    kernel = params["deconv3"]["transposed_kernel"]
    assert kernel[0, 1, 2, 3] == deconv[2, 3, 4, 3]  # flipped


def test_export_of_joined_networks():
    local, global_ = local_arrays(), global_arrays()
    joined = ulsad_names.join_networks(import_narrow(local), import_global(global_))
    expected = {f"local.{name}": value for name, value in local.items()}
    expected |= {f"global.{name}": value for name, value in global_.items()}
    assert_same_arrays(torch_import.export(joined), expected)
    params = torch_import.export({"params": joined["params"]})
    assert "local.bn1.weight" in params
    assert "local.bn1.running_mean" not in params


@pytest.mark.parametrize("architecture", sorted(TRUNKS))
def test_every_trunk_takes_the_published_names(architecture):
    arrays = {
        name: np.zeros(shape, np.float32)
        for name, shape in weights.resnet_spec(architecture).items()
    }
    variables = torch_import.import_trunk(arrays, architecture)
    size = sum(value.size for value in arrays.values())
    assert sum(value.size for value in jax.tree.leaves(variables)) == size


def test_global_takes_any_image_size():
    arrays = global_arrays()
    arrays["enconv6.weight"] = np.ones((64, 64, 2, 3), np.float32)
    variables = import_global(arrays, image_size=(64, 96))
    assert variables["params"]["enconv6"]["kernel"].shape == (2, 3, 64, 64)


def test_what_the_pyramid_does_not_use_is_ignored():
    arrays = trunk_arrays()
    unused = {
        "fc.weight": np.zeros((1000, 512)),
        "fc.bias": np.zeros(1000),
        "layer4.0.conv1.weight": np.zeros((512, 256, 3, 3)),
        "bn1.num_batches_tracked": np.array(7),
        "layer1.0.bn1.num_batches_tracked": np.array(7),
    }
    variables = import_resnet18(arrays | unused)
    assert_same_arrays(torch_import.export(variables), arrays)


def test_missing_array():
    arrays = trunk_arrays()
    del arrays["layer2.0.downsample.1.running_var"]
    with pytest.raises(UserError, match=r"missing: layer2\.0\.downsample\.1\.run"):
        import_resnet18(arrays)


def test_unknown_array():
    arrays = global_arrays() | {"enconv7.weight": np.zeros((64, 64, 4, 4))}
    with pytest.raises(UserError, match=r"not known: enconv7\.weight"):
        import_global(arrays)


@pytest.mark.parametrize("shape", [(64, 3, 5, 5), (64, 3), (3, 64, 7, 7)])
def test_misshapen_array(shape):
    arrays = trunk_arrays() | {"conv1.weight": np.zeros(shape)}
    with pytest.raises(UserError, match=r"'conv1\.weight' to have shape"):
        import_resnet18(arrays)


@pytest.mark.parametrize(
    ("stored", "architecture"),
    [("resnet18", "resnet34"), ("resnet34", "resnet18"), ("resnet50", "resnet34")],
)
def test_another_architecture(stored, architecture):
    with pytest.raises(UserError, match=f"a {architecture} trunk.*architecture is"):
        torch_import.import_trunk(trunk_arrays(stored), architecture)


def test_a_wider_trunk_of_the_same_names():
    arrays = {
        name: np.zeros(shape, np.float32)
        for name, shape in weights.resnet_spec("resnet50").items()
    }
    with pytest.raises(UserError, match=r"to have shape \(128,\).*found \(64,\)"):
        torch_import.import_trunk(arrays, "wide_resnet50_2")
