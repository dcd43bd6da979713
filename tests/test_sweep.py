from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import ablation, compare
from configs import sweep as sweep_config
from tests import runs
from ulsad_jax.methods.base import Batch, count_bytes
from ulsad_jax.methods.descent import COPIES
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import setup, steps
from ulsad_jax.runtime import registry
from ulsad_jax.runtime.devices import find_devices
from ulsad_jax.runtime.errors import Interrupted, UserError
from ulsad_jax.sweep import grid, memory, summary, wave
from ulsad_jax.sweep import run as sweep
from ulsad_jax.trunks import weights as pretrained

TRACED = [
    *("optimizer.learning_rate", "optimizer.weight_decay"),
    *("losses.local.cosine_weight", "losses.attention.weight"),
]
SHORT = {"train.num_epochs": 2, "train.checkpoint_every": 1}


def make_config(root, axes, *, variants=None, category="bottle,cable", **fields):
    """The smallest system with a grid over it."""
    config = runs.make_config(root, SHORT | fields, category=category)
    config = sweep_config.add_sweep(config)
    config.sweep.grid.seed = ()
    config.sweep.grid.update_from_flattened_dict(axes)
    config.sweep.variants = ConfigDict(variants or {})
    return config


@pytest.fixture(scope="module")
def swept(tmp_path_factory, data):
    """Two categories of unlike length, two seeds: four members."""
    workdir = tmp_path_factory.mktemp("swept") / "run"
    config = make_config(data, {"seed": (0, 1)})
    return runs.Run(workdir, config, sweep.train(config, workdir))


def member_folder(workdir, category, seed):
    return workdir / "members" / f"{category}-seed_{seed}"


def test_member_is_its_lone_run(swept, data, tmp_path):
    """The whole folder: losses, validation, checkpoints, metrics."""
    category, seed = "bottle", 1
    config = runs.make_config(data, SHORT | {"seed": seed}, category=category)
    runs.train(config, tmp_path / "lone")
    folder = member_folder(swept.workdir, category, seed)
    assert runs.read_steps(folder, category) == runs.read_steps(
        tmp_path / "lone", category
    )
    for found, expected in zip(
        runs.read_metrics(folder, category),
        runs.read_metrics(tmp_path / "lone", category),
        strict=True,
    ):
        assert found == pytest.approx(expected, rel=1e-4)
    found, expected = (
        runs.read_results(f)["categories"][category]
        for f in (folder, tmp_path / "lone")
    )
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert found[name] == pytest.approx(expected[name], abs=2e-3), name
    assert (folder / "report.html").exists()


def test_members_on_two_devices(swept, data, tmp_path):
    """As on one device. (CPUs train members in turn; see eight_devices.py.)"""
    flags = {
        "sweep.grid.seed": (0, 1, 2),
        "dataset.root": data,
        "dataset.cache_dir": data.parent / "cache",
        **(runs.FIELDS | SHORT),
    }
    command = [sys.executable, "train.py", "--config=configs/sweep.py:mvtec_ad:cable"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    two = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {two}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "each of 2 device(s)" in done.stdout
    assert "1 wave of up to 3" in done.stdout
    for seed in (0, 1):
        found = runs.read_metrics(
            tmp_path / "run" / "members" / f"cable-seed_{seed}", "cable"
        )
        alone = member_folder(swept.workdir, "cable", seed)
        for a, b in zip(found, runs.read_metrics(alone, "cable"), strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def make_parts():
    config = config_lib.resolve(runs.make_config(Path("data")))
    return config, setup.make(config)


@pytest.fixture(scope="module")
def alone():
    """Two unlike lone runs of ten steps: (numbers, state, key, batches, losses)."""
    config, made = make_parts()
    rng = np.random.default_rng(0)
    smooth = np.linspace(-1, 1, 8)[:, None, None] * np.sin(np.arange(384))
    found = []
    for i, fields in enumerate(
        (
            {"optimizer.learning_rate": 1e-4, "losses.local.cosine_weight": 0.0},
            {"optimizer.weight_decay": 0.1, "losses.attention.weight": 0.5},
        )
    ):
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict(fields)
        method, key = setup.make(own).method, jax.random.key(i)
        state = steps.make_init(method, made.spec(4))(key)
        start = jax.device_get(state)
        step = steps.make_train_step(method, find_devices(1), "jit")
        features = rng.normal(size=(10, 4, 8, 8, 384)) + smooth
        images = rng.integers(0, 256, (10, 4, 64, 64, 3), np.uint8)
        batches = [
            Batch(*of_step, valid=np.ones(4, bool))
            for of_step in zip(images, features.astype(np.float32), strict=True)
        ]
        losses = []
        for batch in batches:
            state, values = step(state, batch, key)
            losses.append({name: float(value) for name, value in values.items()})
        found.append((wave.take_numbers(own, TRACED), start, key, batches, losses))
    return found


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_ten_steps_are_those_of_lone_runs(alone, backend):
    """Numbers of all kinds are traced.

    `vmap` rounds its convolutions differently, and Adam's first steps make full steps
    of the rounding in gradients near zero: there the first two losses agree as well.
    """
    _, made = make_parts()
    numbers, states, keys, batches, expected = zip(*alone, strict=True)
    update = wave.make_update(made.method)
    program = wave.choose_backend(backend)(update, states, numbers, keys)
    for step in range(10):
        losses = program.step([own[step] for own in batches])
        for i, own in enumerate(expected):
            found = {name: float(value[i]) for name, value in losses.items()}
            tolerance = 1e-3 if backend == "vmap" and step > 1 else 1e-5
            assert found == pytest.approx(own[step], rel=tolerance)


def test_table(swept):
    """Mean and deviation over seeds; every number is a member's."""
    members = runs.read_table(swept.workdir / "members.csv")
    assert len(members) == 4
    for member in members:
        folder = swept.workdir / "members" / member["member"]
        document = runs.read_results(folder)["mean"]
        assert float(member["image_auroc"]) == document["image_auroc"]
        assert member["failure"] == ""
    rows = {
        (r["setting"], r["category"]): r
        for r in runs.read_table(swept.workdir / "results.csv")
    }
    assert len(rows) == 3  # bottle, cable and their mean
    for (setting, category), row in rows.items():
        by_seed = {}
        for member in members:
            if member["setting"] == setting and category in (
                member["category"],
                "mean",
            ):
                by_seed.setdefault(member["seed"], []).append(float(member["aupro"]))
        values = [statistics.mean(v) for v in by_seed.values()]
        assert int(row["seeds"]) == len(values) == 2
        assert float(row["aupro mean"]) == pytest.approx(statistics.mean(values))
        assert float(row["aupro std"]) == pytest.approx(statistics.stdev(values))
    document = json.loads((swept.workdir / "results.json").read_text())
    assert len(document["groups"]) == 3
    by_test = document["best"]["bottle"]["by_test_auroc"]
    assert by_test["selected_on_test"] is True
    assert by_test["value"] == max(
        float(m["image_auroc"]) for m in members if m["category"] == "bottle"
    )
    by_loss = document["best"]["bottle"]["by_validation_loss"]
    assert by_loss["selected_on_test"] is False
    assert "SELECTED ON THE TEST SET" in swept.printed
    assert (swept.workdir / "results.png").stat().st_size > 1000


def test_features_are_extracted_once_for_all_seeds(data, tmp_path, monkeypatch):
    """Seeds part the same normals differently; waves of one are as one wave."""
    config = make_config(data, {"seed": (0, 1)}, category="bottle")
    config.train.num_epochs = 1
    made, waves = [], []
    source, train = sweep.Source, wave.train
    monkeypatch.setattr(
        sweep, "Source", lambda *a, **how: made.append(1) or source(*a, **how)
    )
    monkeypatch.setattr(wave, "train", lambda *a: waves.append(len(a[0])) or train(*a))
    # A random one is another for each seed.
    config.trunk.update(source="builtin", architecture="tf_efficientnet_lite0")
    for name, allowed, expected in (("both", 0.0, [2]), ("apart", 1e-9, [1, 1])):
        made.clear(), waves.clear()
        config.sweep.device_memory = allowed
        sweep.train(config, tmp_path / name)
        assert (made, waves) == ([1], expected)
    for seed in (0, 1):
        found, expected = (
            runs.read_metrics(tmp_path / name / "members" / f"bottle-seed_{seed}")
            for name in ("apart", "both")
        )
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def interrupt_after(monkeypatch, count, action):
    """Acts when so many steps of a wave are taken; returns the list of steps."""
    step, taken = wave.InTurn.step, []

    def counting(program, batches):
        taken.append(1)
        if len(taken) == count:
            action()
        return step(program, batches)

    monkeypatch.setattr(wave.InTurn, "step", counting)
    return taken


def assert_same_sweep(found, expected):
    for row, other in zip(
        runs.read_table(found / "members.csv"),
        runs.read_table(expected / "members.csv"),
        strict=True,
    ):
        assert row["member"] == other["member"]
        for name, value in row.items():
            if name in ("member", "setting", "category", "failure") or not value:
                assert value == other[name]
            else:
                assert float(value) == pytest.approx(float(other[name]), abs=3e-3), name


def test_stopped_and_resumed(swept, tmp_path, monkeypatch):
    """cable has 4 steps, bottle 6: stopped at 5, the former is not trained again."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="after step 5"):
            sweep.train(swept.config, tmp_path / "run")
    cable = member_folder(tmp_path / "run", "cable", 0)
    assert runs.read_steps(cable, "cable") == [4]
    with monkeypatch.context() as patch:
        taken = interrupt_after(patch, 99, None)
        sweep.train(swept.config, tmp_path / "run")
    assert len(taken) == 1  # the sixth of bottle
    assert_same_sweep(tmp_path / "run", swept.workdir)


def test_killed_and_resumed(swept, tmp_path, monkeypatch):
    """Nothing is saved at the kill: bottle begins again at its last checkpoint."""

    def kill():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        interrupt_after(patch, 6, kill)
        with pytest.raises(KeyboardInterrupt):
            sweep.train(swept.config, tmp_path / "run")
    with monkeypatch.context() as patch:
        taken = interrupt_after(patch, 99, None)
        sweep.train(swept.config, tmp_path / "run")
    assert len(taken) == 3
    assert_same_sweep(tmp_path / "run", swept.workdir)


def test_more_members_later(swept, tmp_path, monkeypatch):
    """What was trained is left alone; a finished sweep trains nothing."""
    workdir = shutil.copytree(swept.workdir, tmp_path / "run")
    config = swept.config.copy_and_resolve_references()
    trained = []
    train = wave.train
    monkeypatch.setattr(
        wave, "train", lambda *a: trained.append(len(a[0])) or train(*a)
    )
    assert (
        sweep.train(config, workdir).splitlines()[:4]
        == (swept.printed.splitlines()[:4])
    )
    assert trained == []
    config.sweep.grid.seed = (0, 1, 2)
    config.dataset.category = "cable"
    sweep.train(config, workdir)
    assert trained == [1]
    rows = runs.read_table(workdir / "results.csv")
    assert [(r["category"], r["seeds"]) for r in rows] == [("cable", "3")]


def test_diverging_member_leaves_the_others_alone(swept, data, tmp_path):
    axes = {"optimizer.learning_rate": (2e-4, 1e38)}
    config = make_config(data, axes, category="cable")
    for _ in range(2):  # and is not tried again
        printed = sweep.train(config, tmp_path)
        assert "failed: Expected finite losses, found " in printed
    good, bad = runs.read_table(tmp_path / "members.csv")
    assert "finite" in bad["failure"]
    assert good["failure"] == "" and float(good["image_auroc"]) >= 0
    best = json.loads((tmp_path / "results.json").read_text())["best"]["cable"]
    assert best["by_validation_loss"]["member"] == good["member"]
    rows = runs.read_table(tmp_path / "results.csv")
    assert [row["seeds"] for row in rows] == ["1", "0"]
    for row in (rows[0]["image_auroc std"], rows[1]["image_auroc mean"], bad["aupro"]):
        assert row == ""  # undefined


def test_sweep_of_which_nothing_is_left_fails(data, tmp_path):
    axes = {"optimizer.learning_rate": (1e37, 1e38)}
    config = make_config(data, axes, category="cable")
    with pytest.raises(UserError, match=r"found none:\n(.*\n)*.*failed: Expected fin"):
        sweep.train(config, tmp_path)
    assert len(runs.read_table(tmp_path / "members.csv")) == 2


def test_seed_is_one_column(swept):
    header = (swept.workdir / "members.csv").read_text().splitlines()[0].split(",")
    assert len(set(header)) == len(header)
    assert "seed" in header


@pytest.mark.parametrize("field", ["device_memory", "host_memory"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_memory_that_cannot_be(data, field, value):
    config = make_config(data, {"seed": (0, 1)})
    config.sweep[field] = value
    with pytest.raises(UserError, match=rf"config\.sweep\.{field} to be gibibytes"):
        grid.list_members(config, ["bottle"])


def test_variants_of_other_programs_and_fusions(data, tmp_path):
    """Layers and trunks are features, activations programs; fusions are evaluated."""
    variants = {
        "full": {},
        "dfr": {"losses": {"attention": {"weight": 0.0}}},
        "layer2": {"trunk": {"layers": "layer2"}},
        "whitened": {"trunk": {"whiten": "always"}},
        "identity": {"model": {"output_activation": "identity"}},
    }
    config = make_config(data, {}, variants=variants, category="cable")
    config.train.num_epochs = 1
    config.sweep.fusions = True
    members = grid.list_members(config, ["cable"])
    traced = grid.traced_fields(members)
    assert traced == ["losses.attention.weight"]
    programs = {m.setting: grid.program(m, traced) for m in members}
    assert len({programs[n] for n in ("full", "dfr", "layer2", "whitened")}) == 1
    assert programs["full"] != programs["identity"]
    printed = sweep.train(config, tmp_path)
    assert "AUROC, local" in printed and "AUROC, raw mean" in printed
    for row in runs.read_table(tmp_path / "members.csv"):
        folder = tmp_path / "members" / row["member"]
        scores = runs.read_scores(folder, "cable")
        labels = np.array([int(s["label"]) for s in scores])
        for fusion in ("local", "global"):
            values = np.array([float(s[f"{fusion}_score"]) for s in scores])
            wins = values[labels == 1][:, None] - values[labels == 0]
            auroc = np.mean((wins > 0) + 0.5 * (wins == 0))
            found = float(row[f"{fusion}: image_auroc"])
            assert found == pytest.approx(auroc, abs=1e-6)


def test_whitened_member_is_its_lone_run(data, tmp_path, monkeypatch):
    """Beside a member that shares its images' features and does not whiten them."""
    loaded, load = [], pretrained.load_trunk
    monkeypatch.setattr(
        pretrained, "load_trunk", lambda **how: loaded.append(how) or load(**how)
    )
    variants = {"scaled": {}, "whitened": {"trunk": {"whiten": "always"}}}
    config = make_config(data, {}, variants=variants, category="bottle")
    config.train.num_epochs = 1
    sweep.train(config, tmp_path / "swept")
    assert len(loaded) == 1
    losses = {}
    for name, fields in variants.items():
        lone = runs.make_config(data, SHORT | {"train.num_epochs": 1})
        lone.update(fields)
        runs.train(lone, tmp_path / name)
        (found,) = (tmp_path / "swept" / "members").glob(f"*{name}*")
        expected = runs.read_metrics(tmp_path / name)
        losses[name] = expected[0]["loss/total"]
        for one, other in zip(runs.read_metrics(found), expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    assert losses["whitened"] != pytest.approx(losses["scaled"], rel=0.01)


@pytest.mark.parametrize(
    ("axes", "variants", "expected"),
    [
        ({}, {}, "Expected values in config.sweep.grid"),
        ({"seed": (0, 0)}, {}, "every value once"),
        ({"seed": (0, 0.5)}, {}, r"config\.seed"),
        ({"seed": (-1,)}, {}, r"Member bottle-seed_-1.*config\.seed"),
        ({"optimizer.learning_rate": ("fast",)}, {}, "finite numbers, found 'fast'"),
        ({"optimizer.learning_rate": (True,)}, {}, "finite numbers, found True"),
        ({"losses.local.weight": (math.nan,)}, {}, "finite numbers, found nan"),
        (
            {"optimizer.learning_rate": (0.0,)},
            {},
            r"learning_rate to be a finite number above",
        ),
        ({"model.output_activation": (1,)}, {}, "like 'relu', found 1"),
        ({"dataset.category": ("bottle",)}, {}, r"config\.dataset\.category"),
        ({}, {"a": {"optimizer": {"rate": 1.0}}}, "found 'optimizer.rate'"),
        ({}, {"a": {"local": {"weight": 1.0}}}, "mean 'losses.local.weight'"),
        ({}, {"a": 3}, "to map fields to values, found 3"),
        ({}, {"a": {}, "b": {}}, "a-seed_0 and bottle-b-seed_0 alike"),
        ({"seed": (0, 1)}, {"a": {"seed": 2}}, "found it in both"),
        ({"losses.local.weight": (0.1, 0.1 + 1e-12)}, {}, "names of their own"),
    ],
)
def test_bad_grid(tmp_path, axes, variants, expected):
    config = make_config(tmp_path, {}, variants=variants)
    with config.ignore_type():
        config.sweep.grid.update_from_flattened_dict(axes)
    with pytest.raises(UserError, match=expected):
        grid.list_members(config, ["bottle"])


def test_values_that_are_no_tuple(tmp_path):
    config = make_config(tmp_path, {})
    with config.ignore_type():
        config.sweep.grid.seed = 3
    with pytest.raises(UserError, match=r"Write \(3,\)"):
        grid.list_members(config, ["bottle"])


def test_unknown_field_of_the_sweep(tmp_path):
    config = make_config(tmp_path, {"seed": (0, 1)})
    config.sweep.memory = 3
    with pytest.raises(UserError, match="Look at memory"):
        grid.list_members(config, ["bottle"])


def test_folder_of_something_else(finished, swept, tmp_path):
    with pytest.raises(UserError, match="another --workdir"):
        sweep.train(swept.config, finished.workdir)
    assert not (finished.workdir / "members").exists()


@pytest.mark.parametrize(("base", "own"), [("quickstart", 1), ("mvtec_loco", 2)])
def test_every_variant_of_the_ablation_can_be_made(base, own):
    """Twelve everywhere, and others where the trunk is built in or from the hub."""
    config = ablation.get_config(base)
    config.dataset.root = config.dataset.root or "data"
    members = grid.list_members(config, ["a"])
    settings = {member.setting: member.config for member in members}
    assert len(settings) == 12 + own
    assert settings["full"].method == "ulsad"
    assert settings["full"].score.fusion == "map"
    assert len(members) == 3 * len(settings)
    for member in members:
        config_lib.validate(member.config)


@pytest.mark.parametrize("base", ["quickstart", "mvtec_ad:bottle"])
def test_every_method_with_a_map_is_compared(base):
    config = compare.get_config(base)
    config.dataset.root = config.dataset.root or "data"
    members = grid.list_members(config, ["a"])
    for member in members:
        config_lib.validate(member.config)
    found = {member.setting: member.config.method for member in members}
    known = registry.collect("ulsad_jax.methods", "METHODS").keys()
    assert {*found.values()} == known - {"pooled", "words"}
    assert {*found} == {*found.values()}
    assert len(members) == 3 * len(found)


def test_waves():
    budget = memory.Budget(device=100, host=10)
    options = {"item_bytes": 30, "devices": 2, "budget": budget}
    one = memory.cut_waves(list("aaaaaaa"), source=lambda s: (s, 4), **options)
    assert one == [list("aaaaaa"), ["a"]]
    many = memory.cut_waves(list("aabbccd"), source=lambda s: (s, 4), **options)
    assert many == [list("aabb"), list("ccd")]
    options["item_bytes"] = 1000
    alone = memory.cut_waves(list("ab"), source=lambda s: (s, 99), **options)
    assert alone == [["a"], ["b"]]


def test_a_wave_has_room_for_its_largest_member(tmp_path):
    """Students of reverse distillation on other trunks are members of one program."""

    def estimate(*architectures):
        jobs = []
        for name in architectures:
            changes = {"method": "rd", "trunk.architecture": name}
            config = config_lib.resolve(runs.make_config(tmp_path, changes))
            run = SimpleNamespace(
                setup=setup.make(config), data=SimpleNamespace(train=[0])
            )
            jobs.append(SimpleNamespace(run=run, member=SimpleNamespace(config=config)))
        return sweep._estimate_bytes(jobs)

    small, large = estimate("resnet18"), estimate("resnet50")
    assert small < large
    assert estimate("resnet18", "resnet50") == estimate("resnet50", "resnet18") == large


def test_estimate_grows_with_what_it_counts():
    config, made = make_parts()
    spec = made.spec(4)
    base = made.method.estimate_bytes(spec)
    state = jax.eval_shape(lambda key: made.method.init(key, spec), jax.random.key(0))
    assert base > COPIES * count_bytes(state.model["params"])
    config.model.local_width = 64
    wide = setup.make(config).method
    assert wide.estimate_bytes(spec) > base
    inputs = count_bytes((spec.batch.features, spec.batch.image))
    assert wide.estimate_bytes(made.spec(8)) >= wide.estimate_bytes(spec) + 2 * inputs


def test_losses_of_other_sums_are_not_compared():
    def entry(name, loss, auroc, fields):
        member = SimpleNamespace(category="a", name=name)
        metrics = {"image_auroc": auroc, "validation_loss": loss}
        return summary.Entry(member, "", 1, metrics, fields)

    same = [entry("x", 2.0, 0.9, "w=1"), entry("y", 1.0, math.nan, "w=1")]
    best = summary.find_best(same)["a"]
    assert best["by_validation_loss"]["member"] == "y"
    assert best["by_test_auroc"]["member"] == "x"
    other = [*same, entry("z", 0.1, 0.5, "w=0.1")]
    assert summary.find_best(other)["a"].keys() == {"by_test_auroc"}


def test_a_category_that_is_missing_for_a_seed_is_not_averaged():
    def entry(category, seed, value, failure=""):
        member = SimpleNamespace(
            setting="s", category=category, seed=seed, name=f"{category}{seed}"
        )
        metrics = {} if failure else {"image_auroc": value}
        return summary.Entry(member, failure, 1, metrics, "")

    groups = summary.group(
        [
            entry("a", 0, 0.5),
            entry("a", 1, 0.7),
            entry("b", 0, 0.9),
            entry("b", 1, 0.0, failure="diverged"),
        ]
    )
    found = {g.category: g for g in groups}
    assert found["a"].mean["image_auroc"] == pytest.approx(0.6)
    assert found["a"].std["image_auroc"] == pytest.approx(math.sqrt(0.02))
    assert found["b"].seeds == [0] and math.isnan(found["b"].std["image_auroc"])
    assert found["mean"].seeds == [0]
    assert found["mean"].mean["image_auroc"] == pytest.approx(0.7)
    table = summary.table(groups, {"image_auroc": "image AUROC"}).splitlines()
    assert table[1].split() == ["s", "a", "2", "60.0", "±", "14.1"]
