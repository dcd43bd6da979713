"""What members of a sweep cost, and loss terms that a method has no use for."""

from __future__ import annotations

import json

import jax
import pytest
from ml_collections import ConfigDict

from configs import default
from configs import sweep as sweep_config
from tests import runs
from ulsad_jax.methods.ulsad.losses import find_changed
from ulsad_jax.runs import saved
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.sweep import costs, grid
from ulsad_jax.sweep import run as sweep

EPOCHS = 2


@pytest.fixture(scope="module")
def swept(tmp_path_factory, data):
    """A method that takes one pass, and one that adapts and takes the config's."""
    config = sweep_config.add_sweep(runs.make_config(data, {"train.num_epochs": 2}))
    config.sweep.grid.seed, config.sweep.costs = (), True
    variants = {"padim": {"method": "padim"}, "dfr": {"method": "dfr"}}
    config.sweep.variants = ConfigDict(variants)
    workdir = tmp_path_factory.mktemp("costs")
    return runs.Run(workdir, config, sweep.train(config, workdir))


def folder(swept, method):
    return swept.workdir / "members" / f"bottle-{method}-seed_0"


def read(swept, method):
    return json.loads((folder(swept, method) / "bottle" / costs.COSTS).read_text())


@pytest.mark.parametrize("method", ["padim", "dfr"])
def test_costs_are_those_of_the_checkpoint(swept, method):
    found, weights = read(swept, method), saved.load_run(folder(swept, method)).weights
    leaves = jax.tree.leaves((weights.trunk, weights.statistics, weights.model))
    assert found["parameters"] == sum(leaf.size for leaf in leaves)
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(weights.model))
    assert found["model_bytes"] == model
    # It reads them, and its images and maps are there at the same time.
    images = 8 * 64 * 64 * (3 + 4)
    assert found["prediction_bytes"] > sum(leaf.nbytes for leaf in leaves) + images
    assert found["training_bytes"] > model
    stages = json.loads((folder(swept, method) / "bottle" / "stages.json").read_text())
    fit = stages["features"]["seconds"] + stages["training"]["seconds"]
    assert found["fit_seconds"] == pytest.approx(fit)
    assert 0 < found["image_seconds_8"] < fit and 0 < found["image_seconds_1"] < fit


def test_share_of_the_published_training(swept):
    """PaDiM's is one pass; DFR's are 700, of which whole batches count."""
    assert read(swept, "padim")["published_share"] == 1
    count = len(json.loads((folder(swept, "dfr") / "bottle" / "data.json").read_text()))
    done = read(swept, "dfr")["published_share"] * 700
    assert 0 < done <= EPOCHS < done * count


def test_table_and_resuming(swept):
    """Costs stand beside the metrics, and a finished sweep does not measure again."""
    for column in costs.COLUMNS.values():
        assert column.title in swept.printed
    before = read(swept, "dfr")
    assert sweep.train(swept.config, swept.workdir) == swept.printed
    assert read(swept, "dfr") == before
    for row in runs.read_table(swept.workdir / "members.csv"):
        method = row["setting"]
        for name in costs.COLUMNS:
            assert float(row[name]) == pytest.approx(read(swept, method)[name])


def test_published_terms_are_those_of_the_config():
    config = default.get_config()
    assert find_changed(config.losses) == []
    config.losses.local.weight = 2.0
    config.losses.mine = {"term": "local", "weight": 1.0}
    names = ["losses.local.weight", "losses.mine.term", "losses.mine.weight"]
    assert find_changed(config.losses) == names


@pytest.mark.parametrize("method", ["padim", "padim+words", "pca"])
def test_loss_terms_for_a_method_without_any(data, tmp_path, method):
    config = runs.make_config(data, {"method": method})
    config.losses.local.weight = 2.0
    with pytest.raises(UserError, match=r"no loss terms.*losses\.local\.weight"):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loss_terms_of_a_sweep_are_for_the_members_that_read_them(data):
    config = sweep_config.add_sweep(runs.make_config(data))
    config.losses.local.weight = 2.0
    variants = {name: {"method": name} for name in ("ulsad+padim", "padim")}
    config.sweep.variants = ConfigDict(variants)
    assert len(grid.list_members(config, ["bottle"])) == 6
    config.sweep.variants.padim.losses = {"local": {"weight": 3.0}}
    with pytest.raises(UserError, match=r"padim.*no loss terms.*losses\.local"):
        grid.list_members(config, ["bottle"])
