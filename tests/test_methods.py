"""Other methods than ULSAD, and one's own, through the commands' functions."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zipfile
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from ml_collections import ConfigDict
from PIL import Image

import ulsad_jax
from configs import sweep as sweep_config
from tests import runs
from tests.test_experiment import needs_cpu, stop_training
from ulsad_jax import export, predict
from ulsad_jax.data.resize import resize_bilinear
from ulsad_jax.methods import base
from ulsad_jax.methods.base import IMAGES, LEVELS, TOTAL, Method, State
from ulsad_jax.methods.padim import Padim
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import saved, steps
from ulsad_jax.runtime.devices import find_devices
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.sweep import run as sweep
from ulsad_jax.trunks import weights as trunk_weights

SIZE = {"train.batch_size": 5}
PADIM = SIZE | {
    "method": "padim+patchcore+pca+pooled",
    "methods.padim.channels": 12,
    "score.fusion": "scores",
    "score.weights": {"pooled": 0.5},
    "score.top_share": 0.01,
}
NOTHING = dict.fromkeys(("nearest", "patch", "patchcore", "pooled", "residual"), 0.0)
OUTPUTS = ("score", "normalized_score", "is_anomalous", "anomaly_map", "mask_area")


@dataclasses.dataclass(frozen=True)
class Pixels(Method):
    """How many deviations a pixel is from its mean, in closed form: no trunk at all."""

    takes = IMAGES
    num_epochs = 1
    sees_every_image = True

    floor: float = 4.0

    def init(self, key, spec):
        zeros = jnp.zeros(spec.batch.image.shape[1:])
        sums = {"count": jnp.zeros(()), "first": zeros, "second": zeros}
        return State(jnp.zeros((), jnp.int32), {}, sums)

    def update(self, state, batch, key):
        x = batch.image * batch.valid[:, None, None, None].astype(jnp.float32)
        new = {"count": batch.valid.sum(), "first": x.sum(0), "second": (x * x).sum(0)}
        training = jax.tree.map(jnp.add, state.training, new)
        return State(state.step + 1, state.model, training), {}

    def finish(self, state):
        sums = state.training
        mean = sums["first"] / sums["count"]
        variance = jnp.maximum(sums["second"] / sums["count"] - mean**2, 0.0)
        return State(state.step, {"mean": mean, "std": jnp.sqrt(variance)}, {})

    def maps(self, model, batch):
        differences = jnp.abs(batch.image - model["mean"])
        far = differences / (model["std"] + self.floor)
        return {"colour": differences.max(-1), "far": far.max(-1)}


@dataclasses.dataclass(frozen=True)
class Drift(Method):
    """A mean image that moves to each batch; it has a loss, and a number to sweep."""

    takes = IMAGES

    rate: float = 0.5

    def init(self, key, spec):
        mean = 255 * jax.random.uniform(key, spec.batch.image.shape[1:])
        return State(jnp.zeros((), jnp.int32), {"mean": mean}, {})

    def update(self, state, batch, key):
        mean = state.model["mean"]
        losses = self.losses(state.model, batch, state.step)
        mean += self.rate * (batch.image.mean(0) - mean)
        return State(state.step + 1, {"mean": mean}, state.training), losses

    def losses(self, model, batch, step):
        squares = ((batch.image - model["mean"]) / 255) ** 2
        mean = squares.mean((1, 2, 3), where=batch.valid[:, None, None, None])
        return {TOTAL: jnp.where(batch.valid, mean, 0).sum() / batch.valid.sum()}

    def maps(self, model, batch):
        return {"colour": jnp.abs(batch.image - model["mean"]).max(-1)}

    def trace(self, numbers):
        return dataclasses.replace(
            self, rate=numbers.get("methods.Drift.rate", self.rate)
        )

    @classmethod
    def traceable(cls, field, values):
        return field == "methods.Drift.rate"


@dataclasses.dataclass(frozen=True)
class Adapted(Drift):
    """The same with an array whose size depends on the images."""

    size: int = 0

    def adapt(self, batch):
        return dataclasses.replace(self, size=1 + int(batch.image.sum()) % 97)

    def init(self, key, spec):
        state = super().init(key, spec)
        return state.replace(training={"zeros": jnp.zeros(self.size)})


@dataclasses.dataclass(frozen=True)
class Bright(Method):
    """The distance of each level's mean to that of the first pass, as a score."""

    takes = LEVELS
    num_epochs = 1

    def init(self, key, spec):
        shapes = spec.batch.features
        sums = {name: jnp.zeros(x.shape[-1:]) for name, x in shapes.items()}
        training = {"sums": sums, "count": jnp.zeros(())}
        return State(jnp.zeros((), jnp.int32), {}, training)

    def update(self, state, batch, key):
        new = {k: x.mean((1, 2)).sum(0) for k, x in batch.features.items()}
        count = state.training["count"] + len(batch.image)
        sums = jax.tree.map(jnp.add, state.training["sums"], new)
        training = {"sums": sums, "count": count}
        return State(state.step + 1, state.model, training), {}

    def finish(self, state):
        count = state.training["count"]
        mean = jax.tree.map(lambda x: x / count, state.training["sums"])
        return State(state.step, {"mean": mean, "count": count}, {})

    def maps(self, model, batch):
        return {}

    def scores(self, model, batch):
        means = {k: x.mean((1, 2)) for k, x in batch.features.items()}
        return {k: jnp.abs(x - model["mean"][k]).sum(-1) for k, x in means.items()}


def make_run(data, workdir, fields):
    config = runs.make_config(data, fields)
    return runs.Run(workdir, config, runs.train(config, workdir))


@pytest.fixture(scope="module")
def padim(data, tmp_path_factory):
    """A finished run; read-only."""
    return make_run(data, tmp_path_factory.mktemp("padim") / "run", PADIM)


@pytest.fixture(scope="module")
def own(data, tmp_path_factory):
    """The same of a method outside of the package."""
    fields = SIZE | {"method": "tests.test_methods:Pixels"}
    return make_run(data, tmp_path_factory.mktemp("own") / "run", fields)


@pytest.fixture(params=["padim", "own"])
def run(request):
    return request.getfixturevalue(request.param)


def names_of(run):
    ours = run.config.method == PADIM["method"]
    return ["nearest", "patch", "residual"] if ours else ["colour", "far"]


def scores_of(run):
    own = ["patchcore", "pooled"] * (run.config.method == PADIM["method"])
    return sorted(names_of(run) + own)


def test_what_a_run_leaves(run):
    folder = run.workdir / "bottle"
    document = runs.read_results(run.workdir)
    assert document["method"] == run.config.method
    assert (document["trunk"] is None) == (run.config.method != PADIM["method"])
    (epoch,) = runs.read_metrics(run.workdir)  # whatever config.train.num_epochs is
    assert epoch == {"epoch": 1, "step": 3}  # twelve images in batches of five
    assert runs.read_steps(run.workdir) == [epoch["step"]]
    metrics = document["categories"]["bottle"]
    assert 0 <= metrics["image_auroc"] <= 1 and 0 <= metrics["aupro"] <= 1
    columns = {f"{name}_score" for name in scores_of(run)}
    (row, *_) = runs.read_scores(run.workdir)
    assert columns == {c for c in row if c.endswith("_score")} - {"normalized_score"}
    page = (run.workdir / "report.html").read_text()
    assert run.config.method in page and "Scores" in page and "Losses" not in page
    assert list(folder.glob("pictures/*/*.png"))


def test_no_trunk_is_loaded_for_images_alone(data, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no method of images needs it")

    for name in ("load_trunk", "load_saved_trunk", "save_trunk"):
        monkeypatch.setattr(trunk_weights, name, refuse)
    fields = {"method": "tests.test_methods:Pixels", "trunk.source": "hub"}
    run = make_run(data, tmp_path / "run", fields)
    assert not (run.workdir / "trunk.safetensors").exists()
    assert "random weights" not in run.printed
    experiment.evaluate(run.workdir)
    ulsad_jax.Detector.load(run.workdir)


@needs_cpu
def test_stopped_within_the_pass_and_resumed(run, tmp_path, monkeypatch):
    stop_training(monkeypatch, run.config, tmp_path / "again", 0, 1, "after step 2")
    assert runs.read_steps(tmp_path / "again") == [2]
    runs.train(run.config, tmp_path / "again")
    runs.assert_same_category(tmp_path / "again", run.workdir)


LEVELED = {
    "method": "dfr+tests.test_methods:Bright",
    "score.fusion": "scores",
    "trunk.layers": "layer2+layer3",
    "train.num_epochs": 0,
    "train.num_updates": 7,  # three epochs of three
    "train.checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def leveled(data, tmp_path_factory):
    """A run of two branches, one of which has only one pass; read-only."""
    return make_run(data, tmp_path_factory.mktemp("leveled") / "run", LEVELED)


def test_branches_on_levels(leveled):
    (*_, epoch) = runs.read_metrics(leveled.workdir)
    assert epoch["step"] == 9 and epoch["validation/total"] > 0
    names = {"regions_score", "layer2_score", "layer3_score", "normalized_score"}
    (row, *_) = runs.read_scores(leveled.workdir)
    assert names == {name for name in row if name.endswith("_score")}
    model = saved.load_run(leveled.workdir).weights.model
    assert float(model["Bright"]["count"]) == 12  # the images of one pass
    assert {k: v.shape for k, v in model["Bright"]["mean"].items()} == {
        "layer2": (128,),
        "layer3": (256,),
    }


@needs_cpu
def test_branches_resumed(leveled, tmp_path, monkeypatch):
    """From a checkpoint, which holds what is finished, after the end of a branch."""
    stop_training(monkeypatch, leveled.config, tmp_path / "again", 1, 1, "after step 5")
    (tmp_path / "again/bottle/checkpoints/5").rename(tmp_path / "5")
    runs.train(leveled.config, tmp_path / "again")
    runs.assert_same_category(tmp_path / "again", leveled.workdir)


def test_finished_branches_go_on(leveled, tmp_path):
    """A longer training begins with the states before they were finished."""
    copy = runs.copy(leveled, tmp_path)
    config = leveled.config.copy_and_resolve_references()
    config.train.num_updates = 12
    runs.train(config, copy.workdir)
    runs.train(config, tmp_path / "at_once")
    assert runs.read_steps(copy.workdir)[-1] == 12
    assert runs.read_scores(copy.workdir) == runs.read_scores(tmp_path / "at_once")


def test_levels_without_memory(leveled, data, tmp_path):
    streamed = make_run(data, tmp_path / "run", LEVELED | {"train.feature_memory": 0.0})
    for row, expected in zip(
        runs.read_scores(streamed.workdir),
        runs.read_scores(leveled.workdir),
        strict=True,
    ):
        assert float(row["score"]) == pytest.approx(float(expected["score"]), rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "pooled"}, "at least one map, found only scores"),
        ({"method": "padim+padim"}, "each of its branches once"),
        ({"method": "padim+tests.test_methods:Bright"}, "take the same features"),
        ({"method": "padim+nothing"}, "one of .*padim, "),
        (PADIM | {"score.weights": {"patc": 1.0}}, "weights of nearest, patch, "),
        (PADIM | {"score.weights": {"patch": -1.0}}, "finite numbers from 0 up"),
        (PADIM | {"score.weights": NOTHING}, "not all of them"),
    ],
    ids=str,
)
def test_branches_that_will_not_do(data, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        runs.train(runs.make_config(data, fields), tmp_path / "run")


@pytest.mark.parametrize(
    "fields", [{"train.feature_memory": 0.0}, {"parallel.backend": "pmap"}], ids=str
)
def test_the_pass_is_the_same_however_it_is_taken(padim, data, tmp_path, fields):
    other = make_run(data, tmp_path / "run", PADIM | fields)
    for row, expected in zip(
        runs.read_scores(other.workdir), runs.read_scores(padim.workdir), strict=True
    ):
        score = float(expected["score"])
        assert float(row["score"]) == pytest.approx(score, rel=1e-3, abs=1e-4)


def test_finished_run_is_left_alone(run, tmp_path):
    """More epochs are none for a method that takes one pass."""
    copy = runs.copy(run, tmp_path)
    config = run.config.copy_and_resolve_references()
    config.train.num_epochs += 1
    before = (copy.workdir / "bottle" / "scores.csv").stat()
    printed = runs.train(config, copy.workdir)
    assert printed == run.printed.replace(str(run.workdir), str(copy.workdir))
    after = (copy.workdir / "bottle" / "scores.csv").stat()
    assert after.st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods.padim.epsilon": 0.5}, r"config\.methods\.padim\.epsilon"),
        ({"method": "ulsad"}, r"config\.method: the run has 'padim\+patchcore"),
    ],
    ids=str,
)
def test_another_method_is_refused(padim, tmp_path, fields, message):
    copy = runs.copy(padim, tmp_path)
    config = padim.config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        runs.train(config, copy.workdir)


def test_evaluation_repeats_training(run, tmp_path):
    copy = runs.copy(run, tmp_path)
    names = ("results.json", "bottle/results.json", "bottle/scores.csv", "report.html")
    for name in names:
        (copy.workdir / name).unlink()
    experiment.evaluate(copy.workdir)
    for name in names[:-1]:
        expected = (run.workdir / name).read_text()
        assert (copy.workdir / name).read_text() == expected
    assert (copy.workdir / "report.html").exists()


def test_scores_are_those_of_the_evaluation(run):
    detector = ulsad_jax.Detector.load(run.workdir)
    assert list(detector.names) == scores_of(run)
    for row in runs.read_scores(run.workdir):
        result = detector(row["image"])
        for name, value in result.row().items():
            if name.endswith("score"):
                assert value == pytest.approx(float(row[name]), rel=1e-4, abs=1e-5)
        assert str(result.is_anomalous) == row["is_anomalous"]
        assert list(result.maps) == names_of(run)
        mean = np.mean(list(result.maps.values()), 0)
        np.testing.assert_allclose(mean, result.anomaly_map, rtol=1e-4, atol=1e-5)


def test_prediction_of_a_folder(run, data, tmp_path):
    flags = [f"--workdir={run.workdir}", f"--output={tmp_path / 'out'}", "--overlays"]
    assert predict.main([*flags, str(data / "bottle" / "test")]) == 0
    rows = {row["image"]: row for row in runs.read_table(tmp_path / "out/scores.csv")}
    expected = runs.read_scores(run.workdir)
    assert len(rows) == len(expected) == len(list(tmp_path.rglob("overlays/**/*.png")))
    for row in expected:
        for name in ("score", *(f"{n}_score" for n in scores_of(run))):
            found = float(rows[row["image"]][name])
            assert found == pytest.approx(float(row[name]), rel=1e-4, abs=1e-5)


def test_exported_file_says_what_the_detector_says(run, tmp_path):
    path = tmp_path / "bottle.zip"
    flags = [f"--workdir={run.workdir}", f"--output={path}", "--platforms=cpu"]
    export.main(flags)
    with zipfile.ZipFile(path) as file:
        metadata = json.loads(file.read("metadata.json"))
        model = jax_export.deserialize(bytearray(file.read("model.jax")))
    assert metadata["config"]["method"] == run.config.method
    paths = [row["image"] for row in runs.read_scores(run.workdir)]
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    images = np.stack([resize_bilinear(photo, (64, 64)) for photo in photos])
    found = jax.device_get(model.call(images))
    outputs = {f"{n}_map" for n in names_of(run)}
    outputs |= {f"{n}_score" for n in scores_of(run)}
    assert found.keys() == {*OUTPUTS, *outputs}
    near = {"rtol": 1e-4, "atol": 1e-5}
    detector = ulsad_jax.Detector.load(run.workdir)
    for i, result in enumerate(detector(list(images))):
        assert found["is_anomalous"][i] == result.is_anomalous
        assert found["mask_area"][i] == result.mask_area
        np.testing.assert_allclose(found["anomaly_map"][i], result.anomaly_map, **near)
        for name in names_of(run):
            np.testing.assert_allclose(
                found[f"{name}_map"][i], result.maps[name], **near
            )
        for name in scores_of(run):
            score = found[f"{name}_score"][i]
            np.testing.assert_allclose(score, result.scores[name], **near)


def make_sweep(data, fields, axes=None, variants=None):
    config = runs.make_config(data, fields)
    config.methods.Drift = ConfigDict({"rate": 0.5})
    config = sweep_config.add_sweep(config)
    config.sweep.grid.seed = ()
    config.sweep.grid.update_from_flattened_dict(axes or {})
    config.sweep.variants = ConfigDict(variants or {})
    return config


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_member_of_a_sweep_is_its_lone_run(run, data, tmp_path, backend):
    fields = PADIM if run.config.method == PADIM["method"] else SIZE
    fields = fields | {"method": run.config.method}
    config = make_sweep(data, fields, {"seed": (0, 1)})
    config.sweep.fusions = True
    config.sweep.backend = backend
    printed = sweep.train(config, tmp_path)
    assert "AUROC, raw mean" in printed and "not compared" not in printed
    members = runs.read_table(tmp_path / "members.csv")
    assert [member["failure"] for member in members] == ["", ""]
    for name in scores_of(run):
        assert float(members[0][f"{name}: image_auroc"]) >= 0
    folder = tmp_path / "members" / "bottle-seed_0"
    for row, lone in zip(
        runs.read_scores(folder), runs.read_scores(run.workdir), strict=True
    ):
        assert float(row["score"]) == pytest.approx(float(lone["score"]), rel=1e-3)
    best = json.loads((tmp_path / "results.json").read_text())["best"]["bottle"]
    assert best.keys() == {"by_test_auroc"}  # there is no loss


def test_sweep_over_methods(data, tmp_path):
    variants = {
        "ulsad": {"train": {"num_epochs": 1}},
        "padim": {"method": "padim"},
        "few": {"method": "padim", "methods": {"padim": {"channels": 3}}},
        "dfr": {"method": "dfr", "train": {"num_epochs": 1}},
        "efficientad": {"method": "efficientad", "train": {"num_epochs": 1}},
        "own": {"method": "tests.test_methods:Pixels"},
        "drift": {"method": "tests.test_methods:Drift"},
    }
    config = make_sweep(data, {}, variants=variants)
    assert "losses are not compared" in sweep.train(config, tmp_path)
    rows = runs.read_table(tmp_path / "members.csv")
    assert [row["setting"] for row in rows] == sorted(variants)
    for row in rows:
        document = runs.read_results(tmp_path / "members" / row["member"])
        assert float(row["image_auroc"]) == document["mean"]["image_auroc"]
        assert row["failure"] == ""
    best = json.loads((tmp_path / "results.json").read_text())["best"]["bottle"]
    assert best.keys() == {"by_test_auroc"}  # losses of methods are not compared


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_numbers_of_one_s_own_are_traced(data, tmp_path, backend):
    fields = {"method": "tests.test_methods:Drift", "train.num_epochs": 2}
    config = make_sweep(data, fields, {"methods.Drift.rate": (0.25, 0.75)})
    config.sweep.backend = backend
    sweep.train(config, tmp_path / "swept")
    document = json.loads((tmp_path / "swept" / "results.json").read_text())
    assert document["traced"] == ["methods.Drift.rate"]
    for rate in (0.25, 0.75):
        lone = runs.make_config(data, fields)
        lone.methods.Drift = ConfigDict({"rate": rate})
        workdir = tmp_path / f"lone_{rate}"
        runs.train(lone, workdir)
        folder = tmp_path / "swept" / "members" / f"bottle-methods.Drift.rate_{rate:g}"
        (found,) = folder.parent.glob(f"{folder.name}*")
        for one, other in zip(
            runs.read_metrics(found), runs.read_metrics(workdir), strict=True
        ):
            assert one == pytest.approx(other, rel=1e-4)


def test_members_of_a_sweep_that_differ_in_their_shapes(data, tmp_path):
    fields = {"method": "tests.test_methods:Adapted", "train.num_epochs": 1}
    config = make_sweep(data, fields, {"seed": (0, 1)})
    config.sweep.backend = "vmap"
    sweep.train(config, tmp_path)
    sizes = set()
    for seed in (0, 1):
        folder = tmp_path / "members" / f"bottle-seed_{seed}"
        sizes.add(runs.read_checkpoint(folder)["optimizer"]["state"]["zeros"].size)
        assert runs.read_scores(folder)
    assert len(sizes) == 2


def test_padim_is_the_mahalanobis_distance_of_every_position():
    """As NumPy has it, whatever the batches are, and rows that fill up are ignored."""
    count, batch, shape = 10, 4, (3, 2, 5)
    x = np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)
    x[..., 1] += x[..., 0]
    method = Padim(channels=99, epsilon=0.1)
    state = method.init(
        jax.random.key(0), steps.make_spec(batch, (24, 16), runs.features(*shape))
    )
    step = steps.make_train_step(method, find_devices(1), "jit")
    for start in range(0, count, batch):
        rows = np.resize(np.arange(start, min(start + batch, count)), batch)
        valid = np.arange(batch) < count - start
        image = np.zeros((batch, 24, 16, 3), np.uint8)
        state, _ = step(state, base.Batch(image, x[rows], valid), jax.random.key(1))
    model = jax.device_get(method.finish(state).model)
    for i, j in np.ndindex(*shape[:2]):
        np.testing.assert_allclose(model["mean"][i, j], x[:, i, j].mean(0), atol=1e-5)
        covariance = np.cov(x[:, i, j].T) + 0.1 * np.eye(shape[2])
        factor = model["factor"][i, j]
        np.testing.assert_allclose(
            factor.T @ factor, np.linalg.inv(covariance), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "padm"}, "one of .*padim.*found 'padm'.*'padim'"),
        ({"method": "tests.test_methods:Pixel"}, "importable.*mean 'Pixels'"),
        ({"method": "no_such_module:Method"}, "importable.*PYTHONPATH"),
        ({"method": "math:pi"}, r"made from .*Method, found 3\.14"),
        ({"method": "json:JSONDecoder"}, "made from .*Method, found <class"),
        ({"method": ""}, "config.method to be some text"),
        ({"method": "rd", "trunk.layers": "layer1+layer3"}, "layer1 of 16 x 16"),
        ({"method": "padim", "methods.padim.channels": 0}, "channels to be an integer"),
        ({"method": "padim", "methods.padim.epsilon": 0.0}, "epsilon to be a finite"),
        ({"method": "pca", "methods.pca.variance": 1.0}, "variance to be a number"),
        ({"method": "fastflow", "methods.fastflow.ratio": 0.0}, "ratio to be a finite"),
        ({"method": "cflow", "methods.cflow.condition": 6}, "to be a multiple of 4"),
        ({"method": "draem", "methods.draem.repair_width": 0}, "an integer from 1 up"),
        ({"method": "efficientad", "methods.efficientad.size": "s"}, "small, medium"),
        (
            {"method": "patchcore", "methods.patchcore.share": 2.0},
            "number above 0, and",
        ),
        ({"method": "padim", "methods.padim": {"chanels": 3}}, "mean 'channels'"),
        ({"method": "tests.test_methods:Pixels", "methods.Pixels": {"x": 1}}, "'x'"),
        ({"method": "rd", "methods.rd": {"kind": "wide"}}, "found 'kind'"),
        ({"method": "rd", "methods.rd": {"dtype": "bfloat16"}}, "found 'dtype'"),
    ],
    ids=str,
)
def test_nothing_is_written_for_a_wrong_method(data, tmp_path, fields, message):
    config = runs.make_config(data)
    for name, value in fields.items():
        *groups, field = name.split(".")
        functools.reduce(getitem, groups, config)[field] = value
    with pytest.raises(UserError, match=message):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folder_says_which_method_it_is_of(padim):
    fields = json.loads((padim.workdir / "config.json").read_text())
    assert fields["methods"] == {
        "padim": {"channels": 12, "epsilon": 0.01},
        "patchcore": {"dimensions": 128, "neighbors": 9, "share": 0.1},
        "pca": {"variance": 0.97},
    }
    assert re.search(
        r"<span>method</span> padim", (padim.workdir / "report.html").read_text()
    )
