from __future__ import annotations

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import runs
from tests.goldens import weights
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import weights as pretrained


def load(*, architecture="resnet18", source="file", repository="", path="", seed=0):
    return pretrained.load_trunk(
        architecture=architecture,
        source=source,
        repository=repository,
        path=str(path),
        seed=seed,
    )


def make_arrays(architecture="resnet18"):
    """A trunk in PyTorch's names, and what its file holds besides."""
    arrays = weights.fill(weights.resnet_spec(architecture), prefix="trunk", seed=0)
    return arrays | {"fc.bias": np.zeros(1000, np.float32)}


@pytest.fixture(scope="module")
def random_trunk():
    return load(source="random")


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "resnet18.safetensors"
    save_file(make_arrays(), path)
    return path


def test_random_trunk_depends_on_the_seed_alone(random_trunk):
    again, other = load(source="random"), load(source="random", seed=1)
    assert again.identity == random_trunk.identity
    jax.tree.map(np.testing.assert_array_equal, again.variables, random_trunk.variables)
    assert other.identity.sha256 != random_trunk.identity.sha256
    assert random_trunk.identity.source == "random:0"


def test_round_trip_keeps_identity_and_weights(random_trunk, tmp_path):
    path = tmp_path / "trunk.safetensors"
    pretrained.save_trunk(random_trunk, path)
    loaded = pretrained.load_saved_trunk(path)
    assert loaded.identity == random_trunk.identity
    jax.tree.map(
        np.testing.assert_array_equal, loaded.variables, random_trunk.variables
    )
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_file_in_pytorch_names(stored):
    trunk = load(path=stored)
    assert trunk.identity.source == "file:resnet18.safetensors"
    for name, value in make_arrays().items():
        if name in trunk.arrays:
            np.testing.assert_array_equal(trunk.arrays[name], value)
    assert trunk.arrays.keys() == make_arrays().keys() - {"fc.bias"}


def test_identity_is_of_the_weights_not_of_the_file(stored, tmp_path):
    """Another name, and layers that the pyramid does not use, change nothing."""
    other = tmp_path / "other.safetensors"
    arrays = make_arrays()
    del arrays["fc.bias"]
    save_file(arrays, other, metadata={"format": "pt"})
    assert load(path=other).identity.sha256 == load(path=stored).identity.sha256
    arrays["conv1.weight"][0, 0, 0, 0] += 1e-3
    save_file(arrays, other)
    assert load(path=other).identity.sha256 != load(path=stored).identity.sha256


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    path = tmp_path / "trunk.safetensors"
    save_file({k: v.astype(dtype) for k, v in make_arrays().items()}, path)
    trunk = load(path=path)
    assert {leaf.dtype for leaf in jax.tree.leaves(trunk.variables)} == {
        np.dtype(np.float32)
    }
    pretrained.save_trunk(trunk, path)
    assert pretrained.load_saved_trunk(path).identity == trunk.identity


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing at .*none\.safetensors.*trunk\.path"):
        load(path=tmp_path / "none.safetensors")


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_file(stored, size):
    stored.write_bytes(stored.read_bytes()[:size])
    with pytest.raises(UserError, match=r"resnet18\.safetensors: .*Download it again"):
        load(path=stored)


def test_web_page_instead_of_a_file(stored):
    stored.write_text("<!DOCTYPE html><html>Log in</html>" * 100)
    with pytest.raises(UserError, match="Download it again"):
        load(path=stored)


def test_wrong_architecture(stored):
    with pytest.raises(UserError, match=r"resnet34 trunk.*missing: layer1\.2"):
        load(path=stored, architecture="resnet34")


def test_not_finite_weights(tmp_path):
    path = tmp_path / "trunk.safetensors"
    arrays = make_arrays()
    arrays["bn1.running_var"][3] = np.nan
    save_file(arrays, path)
    with pytest.raises(UserError, match=r"bn1\.running_var"):
        load(path=path)


def test_hub_without_a_connection(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert constants.is_offline_mode()
    with pytest.raises(UserError) as refused:
        load(source="hub", repository="timm/resnet18.a1_in1k")
    message = str(refused.value)
    assert "'timm/resnet18.a1_in1k'" in message
    assert "resolve/main/model.safetensors" in message
    assert "--config.trunk.source=file --config.trunk.path=" in message


@pytest.mark.parametrize("repository", ["", "a/b/c", "no spaces"])
def test_repository_that_cannot_be(repository, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="Hugging Face repository"):
        load(source="hub", repository=repository)


def test_pth_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "resnet18.pth"
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match="Install torch, or convert"):
        load(path=path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"model": {"conv1.weight": 0}, "epoch": 3}, "a dict named 'model'"),
        ({"state_dict": [1, 2]}, "a list"),
        ("text", "a str"),
    ],
)
def test_pth_that_holds_more_than_weights(content, found, tmp_path, monkeypatch):
    path = write_pth(tmp_path, content, monkeypatch)
    with pytest.raises(UserError, match=f"found: {found}. Save the model's state_dict"):
        load(path=path)


class Tensor(np.ndarray):
    def float(self):
        return self.astype(np.float32)

    def numpy(self):
        return np.asarray(self)


def write_pth(folder, content, monkeypatch):
    """PyTorch is not among the requirements: what it would have read is given."""

    def read(path, *, map_location, weights_only):
        assert weights_only and map_location == "cpu"
        return content

    torch = types.SimpleNamespace(Tensor=Tensor, load=read)
    monkeypatch.setitem(sys.modules, "torch", torch)
    path = folder / "resnet18.pth"
    path.write_bytes(b"PK")
    return path


@pytest.mark.parametrize("wrapped", [False, True])
def test_pth(wrapped, tmp_path, monkeypatch):
    arrays = make_arrays()
    tensors = {name: a.astype(np.float64).view(Tensor) for name, a in arrays.items()}
    content = {"state_dict": tensors, "epoch": 3} if wrapped else tensors
    trunk = load(path=write_pth(tmp_path, content, monkeypatch))
    plain = tmp_path / "resnet18.safetensors"
    save_file(arrays, plain)
    runs.assert_same_arrays(trunk.arrays, load(path=plain).arrays)


def test_another_trunk_in_the_place_of_a_saved_one(random_trunk, tmp_path):
    """Bytes that changed, or an identity that is another's."""
    path = tmp_path / "trunk.safetensors"
    pretrained.save_trunk(random_trunk, path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(UserError, match="Expected the trunk that"):
        pretrained.load_saved_trunk(path)


def test_saved_trunk_without_its_identity(random_trunk, tmp_path):
    path = tmp_path / "trunk.safetensors"
    pretrained.save_trunk(random_trunk, path)
    save_file(load_file(path), path)
    with pytest.raises(UserError, match="with its identity"):
        pretrained.load_saved_trunk(path)


def test_same_weights_from_elsewhere_are_the_same(random_trunk, tmp_path):
    moved = dataclasses.replace(random_trunk.identity, source="file:x.safetensors")
    pretrained.check_same(random_trunk.identity, moved, tmp_path)
    other = dataclasses.replace(moved, sha256="0" * 64)
    with pytest.raises(UserError, match=r"random:0.*file:x"):
        pretrained.check_same(random_trunk.identity, other, tmp_path)
