from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import configs
from configs import default, mvtec_ad, quickstart
from tests import runs
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runtime.errors import UserError

NAMES = {m.name for m in pkgutil.iter_modules(configs.__path__)}
NAMES = sorted(NAMES - {"default"})
WRONG = {
    "seed": (-1, 0.5, 2**32),
    "image_size": ((256,), (64, 65), (32, 64), (64.0, 64), 64),
    "selection": ("best", ""),
    "calibration": ("quantiles",),
    "threshold.image_fpr": (0.0, 1.0, "few"),
    "threshold.pixel_fpr": (0, 1, float("nan")),
    "dataset.name": ("", "mvtec"),
    "dataset.validation_fraction": (1.0, -0.1),
    "dataset.white_level": (-1.0, float("inf"), float("nan"), "4095"),
    "trunk.architecture": ("resnet152",),
    "trunk.source": ("timm",),
    "trunk.layers": ("layer4", "layer2+layer2", "auto+layer2", ""),
    "trunk.whiten": (True, "zca"),
    "model.local_width": (0, 6, 8.0),
    "model.output_activation": ("gelu",),
    "optimizer.learning_rate": (0.0, -1e-3, float("nan"), float("inf"), "fast"),
    "optimizer.b1": (1.0, -0.1),
    "optimizer.b2": (1.0, -0.1),
    "optimizer.eps": (0.0, float("inf")),
    "optimizer.weight_decay": (-1e-5, float("inf"), float("nan")),
    "train.batch_size": (1, 8.0),
    "train.num_epochs": (-1, 1.5),
    "train.checkpoint_every": (0,),
    "train.dtype": ("float16",),
    "train.feature_memory": (-0.1, 1.5, "4 GiB"),
    "parallel.devices": (-1, 2.0),
    "parallel.backend": ("shard_map",),
    "parallel.shard_state": (1,),
    "evaluation.batch_size": (0,),
    "evaluation.pictures_per_type": (-2,),
    "evaluation.original_resolution": (1, "yes"),
    "evaluation.write_maps": (0, None),
}


def make_config(**fields):
    config = mvtec_ad.get_config("bottle")
    config.dataset.root = "data"
    return with_fields(config, fields)


def with_fields(config, fields):
    config = config.copy_and_resolve_references()
    with config.ignore_type(), config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_config_file_is_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.dataset.root = config.dataset.root or "data"
    config.dataset.name = config.dataset.name or "mvtec_ad"
    config_lib.validate(config)
    assert set(config.keys()) - {"sweep"} == set(default.get_config().keys())


def test_quickstart_needs_nothing():
    config_lib.validate(quickstart.get_config())


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in WRONG.items() for v in values]
)
def test_wrong_value(field, value):
    with pytest.raises(UserError) as refused:
        config_lib.validate(make_config(**{field: value}))
    message = str(refused.value)
    assert f"config.{field} to be " in message
    assert f"found {value!r}" in message
    assert f"--config.{field}=" in message


def test_root_is_needed():
    with pytest.raises(UserError, match=r"--config\.dataset\.root="):
        config_lib.validate(make_config(**{"dataset.root": ""}))


def test_trunk_file_is_needed():
    with pytest.raises(UserError, match=r"--config\.trunk\.path="):
        config_lib.validate(make_config(**{"trunk.source": "file"}))


def test_round_trip(tmp_path):
    config = make_config(image_size=(64, 96))
    config.losses.mine = {"term": "a:b", "weight": 0.5, "epsilon": 1e-3}
    config = config_lib.resolve(config)
    config_lib.save(config, tmp_path / "config.json")
    loaded = config_lib.load(tmp_path / "config.json")
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.image_size, tuple)
    assert isinstance(loaded.trunk.image_size, tuple)
    config_lib.check_resumable(loaded, config, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"seed": 0}'])
def test_file_that_is_no_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json to be a config that train\.py"):
        config_lib.load(path)


def write_fields(path, without=(), **more):
    """A config.json whose writer did not know some fields."""
    fields = make_config().to_dict() | more
    for name in without:
        *groups, field = name.split(".")
        group = fields
        for part in groups:
            group = group[part]
        del group[field]
    fields = {name: value for name, value in fields.items() if value != {}}
    path.write_text(json.dumps(fields))
    return path


def test_file_that_lacks_a_field(tmp_path):
    """Of one that has been there from the beginning, nobody knows what it was."""
    path = write_fields(tmp_path / "config.json", ["train.dtype"])
    with pytest.raises(
        UserError, match=r"train\.py wrote, found: no config\.train\.dt"
    ):
        config_lib.load(path)


ADDED = {
    "dataset.white_level": 0.0,
    "method": "ulsad",
    "evaluation.original_resolution": False,
    "evaluation.write_maps": False,
    "parallel.backend": "jit",
    "parallel.shard_state": False,
    "parallel.devices": 0,
    "train.feature_memory": 0.5,
    "trunk.image_size": (),
    "trunk.layers": "layer2+layer3",
    "trunk.whiten": "never",
}


@pytest.mark.parametrize("about", [{}, {"format": 1}], ids=str)
@pytest.mark.parametrize("source", ["builtin", "hub"])
def test_field_that_was_added_later_means_what_runs_did_before(tmp_path, about, source):
    """Whatever the default has become, which for the built-in trunk it has."""
    trunk = make_config(**{"trunk.source": source}).trunk.to_dict()
    trunk["architecture"] = "resnet18"
    path = write_fields(
        tmp_path / "config.json", [*ADDED, "methods"], trunk=trunk, **about
    )
    loaded = config_lib.load(path)
    config_lib.validate(loaded)
    assert ADDED.items() <= dict(config_lib.flatten(loaded)).items()


@pytest.mark.parametrize("found", [3, 1.5, -1, "1", None, [1]])
def test_file_of_another_format(tmp_path, found):
    path = write_fields(tmp_path / "config.json", format=found)
    with pytest.raises(
        UserError, match=r"format 2 or an earlier one.*found format"
    ) as e:
        config_lib.load(path)
    assert f"found format {found}: another version wrote it" in str(e.value)


@pytest.mark.parametrize(
    ("architecture", "layers", "whiten"),
    [
        ("resnet18", "layer2+layer3", "never"),
        ("tf_efficientnet_lite0", "stage3+stage5", "always"),
    ],
)
def test_what_auto_became_is_kept(tmp_path, architecture, layers, whiten):
    """In a file, and in one of today's folders that says auto."""
    config = make_config(**{"trunk.architecture": architecture})
    resolved = config_lib.resolve(config)
    assert "auto" not in dict(config_lib.flatten(resolved)).values()
    assert config.trunk.layers == config.trunk.whiten == "auto"
    config_lib.save(resolved, tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["format"] == config_lib.FORMAT
    assert (written["trunk"]["layers"], written["trunk"]["whiten"]) == (layers, whiten)
    loaded = config_lib.load(tmp_path / "config.json")
    assert loaded.to_dict() == resolved.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert config_lib.load(tmp_path / "config.json").to_dict() == resolved.to_dict()


@pytest.mark.parametrize("about", [{}, {"format": 1}], ids=str)
def test_auto_of_the_weights_built_in_before(tmp_path, about):
    """They were a resnet18's, and whitened features of its layer2."""
    config = make_config(
        **{"trunk.source": "builtin", "trunk.architecture": "resnet18"}
    )
    path = write_fields(tmp_path / "config.json", trunk=config.trunk.to_dict(), **about)
    trunk = config_lib.load(path).trunk
    assert (trunk.layers, trunk.whiten) == ("layer2", "always")


def test_a_value_equals_auto_that_became_it():
    auto, explicit, other = (
        config_lib.resolve(make_config(**{"trunk.layers": layers}))
        for layers in ("auto", "layer2+layer3", "layer2")
    )
    config_lib.check_resumable(auto, explicit, Path("run"))
    with pytest.raises(UserError, match=r"the run has 'layer2\+layer3', this command"):
        config_lib.check_resumable(auto, other, Path("run"))


def test_file_with_a_wrong_value(tmp_path):
    config_lib.save(make_config(seed=-1), tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.seed"):
        config_lib.load(tmp_path / "config.json")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=f"found none in {tmp_path}.*--workdir"):
        config_lib.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"train.num_epochs": 999},
        {"train.checkpoint_every": 3, "train.feature_memory": 0.1},
        {"evaluation.batch_size": 1, "evaluation.pictures_per_type": -1},
        {"evaluation.original_resolution": True, "evaluation.write_maps": True},
        {"parallel.devices": 2, "parallel.backend": "pmap"},
        {"dataset.root": "elsewhere", "dataset.cache_dir": "elsewhere"},
    ],
    ids=str,
)
def test_free_fields(fields):
    config_lib.check_resumable(make_config(), make_config(**fields), Path("run"))


def test_differing_fields_are_listed():
    new = make_config(**{"seed": 1, "losses.local.weight": 2.0, "train.num_epochs": 9})
    new.losses.mine = {"term": "a:b", "weight": 0.5}
    with pytest.raises(UserError) as refused:
        config_lib.check_resumable(make_config(), new, Path("run"))
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("Expected the config of the run in run, found")
    assert lines[1:-1] == [
        "  config.losses.local.weight: the run has 1.0, this command 2.0",
        "  config.losses.mine.term: the run has 'no such field', this command 'a:b'",
        "  config.losses.mine.weight: the run has 'no such field', this command 0.5",
        "  config.seed: the run has 0, this command 1",
    ]
    assert "another --workdir" in lines[-1]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--config.train.num_epoch=3", "num_epochs"),
        ("--config.train.num_epochs=many", "many"),
        ("--config.losses.local.weight=nan", "config.losses.local.weight to be a fin"),
        ("--config=configs/no_such_file.py", "no_such_file"),
        ("bottle", "bottle"),
    ],
)
def test_command_line_that_does_not_fit(tmp_path, flag, expected):
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", flag]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=runs.REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert expected in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "flags", "together"),
    [
        ("mvtec_ad", ["image_size=(128, 128)"] * 2, "(128, 128, 128, 128)"),
        ("sweep", ["sweep.grid.seed=(3,)", "sweep.grid.seed=(4, 5)"], "(3, 4, 5)"),
    ],
)
def test_tuple_given_twice(tmp_path, config, flags, together):
    command = [sys.executable, "train.py", f"--config=configs/{config}.py"]
    command += [f"--config.{flag}" for flag in flags]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=runs.REPOSITORY,
        capture_output=True,
        text=True,
    )
    name = flags[0].partition("=")[0]
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"error: Expected --config.{name} once, found it 2 times, which together make "
        f"{together}. Give it once."
    )


@pytest.mark.parametrize(
    ("architecture", "source", "whiten", "expected"),
    [
        ("tf_efficientnet_lite0", "builtin", "auto", True),
        ("tf_efficientnet_lite0", "hub", "auto", True),
        ("resnet18", "hub", "auto", False),
        ("resnet18", "random", "always", True),
        ("tf_efficientnet_lite0", "builtin", "never", False),
    ],
)
def test_whitening_follows_the_architecture(architecture, source, whiten, expected):
    fields = {"trunk.architecture": architecture, "trunk.source": source}
    config = make_config(**fields, **{"trunk.whiten": whiten})
    assert config_lib.whitens(config) == expected
