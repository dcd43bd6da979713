from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from configs import pretrain as recipe
from tests import runs
from ulsad_jax import pretrain, pretrained
from ulsad_jax.errors import UserError
from ulsad_jax.models.resnet import ResNet

FIELDS = {
    "view_size": 32,
    "pool.formulas": 4,
    "pool.instances": 3,
    "pool.size": 40,
    "train.batch_size": 4,
    "train.num_steps": 4,
    "train.checkpoint_every": 2,
    "optimizer.warmup_steps": 1,
}


def make_config(folder):
    config = recipe.get_config()
    config.update_from_flattened_dict(FIELDS | {"pool_dir": str(folder / "pool")})
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    config = make_config(folder)
    return config, folder / "run", pretrain.pretrain(config, folder / "run")


def load(path):
    return pretrained.load_trunk(
        architecture="resnet18", source="file", repository="", path=str(path), seed=0
    )


def test_the_trunk_is_trained_and_says_where_it_comes_from(finished):
    config, _, path = finished
    trunk = load(path)
    drawn = pretrain.init_state(config)
    change = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()),
        trunk.variables,
        {"params": drawn.params["trunk"], "batch_stats": drawn.batch_stats["trunk"]},
    )
    assert min(jax.tree.leaves(change)) > 0
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        assert file.get_tensor("conv1.weight").dtype == np.float16
    assert metadata["sha256"] == trunk.identity.sha256
    assert json.loads(metadata["config"])["pool"] == config.pool.to_dict()
    assert {"commit", "seed", "trained_on", "architecture"} < metadata.keys()


def test_a_resumed_run_ends_as_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    config, _, path = finished
    report = pretrain._report

    def stop(step, *args):
        if step == 4:
            raise KeyboardInterrupt
        return report(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_report", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config, tmp_path / "run")
    resumed = load(pretrain.pretrain(config, tmp_path / "run"))
    runs.assert_same_arrays(resumed.variables, load(path).variables)


def test_another_config_is_refused(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    other.optimizer.learning_rate = 1.0
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        pretrain.pretrain(other, workdir)


def test_training_moves_the_running_statistics_and_use_does_not():
    model = ResNet("resnet18")
    image = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = model.init(jax.random.key(1), image)
    _, same = model.apply(variables, image, mutable=["batch_stats"])
    _, moved = model.apply(variables, image, train=True, mutable=["batch_stats"])
    runs.assert_same_arrays(same["batch_stats"], variables["batch_stats"])
    mean = moved["batch_stats"]["bn1"]["mean"]
    assert float(jnp.abs(mean).max()) > 0
