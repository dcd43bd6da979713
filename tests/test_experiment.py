from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import runs, trees
from ulsad_jax.methods.ulsad.networks import Networks
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import loop as trainer
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import saved, setup, steps, validation
from ulsad_jax.runtime.errors import Interrupted, UserError, reported
from ulsad_jax.trunks import weights as pretrained
from ulsad_jax.trunks.pyramid import FeaturePyramid

# train.py itself, with a pause before every step: time to stop it somewhere.
SLOWLY = """
import runpy, sys, time
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import loop as trainer

def slow_progress(steps, *arguments, **options):
    for step in steps:
        time.sleep(0.2)
        yield step

trainer.progress = slow_progress
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""
needs_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="bits are promised on CPUs alone"
)


def start_slowly(config, workdir: Path) -> subprocess.Popen:
    """Starts train.py with the fields that differ from its config file."""
    fields = {name: config[name] for name in ("image_size",)}
    for group in ("dataset", "trunk", "model", "train", "evaluation"):
        fields |= {f"{group}.{k}": v for k, v in config[group].items()}
    flags = [
        f"--config.{name}={value}"
        for name, value in fields.items()
        if name in runs.FIELDS or name in ("dataset.root", "dataset.cache_dir")
    ]
    command = [sys.executable, "-c", SLOWLY, "--config=configs/mvtec_ad.py:bottle"]
    return subprocess.Popen(
        [*command, *flags, f"--workdir={workdir}"],
        cwd=runs.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    """Returns as soon as the condition holds."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def interrupt_at(monkeypatch, signum: int, epoch: int, step: int) -> None:
    """Has the process signal itself before a step of an epoch, both from 0."""
    plain = trainer.progress

    def progress(steps, title, **options):
        for i in plain(steps, title, **options):
            if f"epoch {epoch + 1}/" in title and i == step:
                os.kill(os.getpid(), signum)
            yield i

    monkeypatch.setattr(trainer, "progress", progress)


def stop_training(monkeypatch, config, workdir, epoch, step, told=None) -> None:
    """Trains until a signal before a step of an epoch, both from 0."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, signal.SIGTERM, epoch, step)
        with pytest.raises(Interrupted, match=told):
            runs.train(config, workdir)


@needs_cpu
@pytest.mark.parametrize(
    ("signum", "epoch", "step", "steps"),
    [
        (signal.SIGTERM, 0, 1, 2),  # before there is any checkpoint
        (signal.SIGTERM, 2, 0, 7),  # within an epoch, after a checkpoint
        (signal.SIGINT, 2, 2, 9),  # in an epoch's last step
    ],
    ids=["first epoch", "third epoch", "end of epoch"],
)
def test_interrupted_and_resumed_is_uninterrupted(
    finished, tmp_path, monkeypatch, signum, epoch, step, steps
):
    handler = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        interrupt_at(patch, signum, epoch, step)
        with pytest.raises(Interrupted, match=f"after step {steps}") as stopped:
            runs.train(finished.config, tmp_path / "run")
    assert stopped.value.signum == signum
    assert signal.getsignal(signum) is handler
    assert runs.read_steps(tmp_path / "run")[-1] == steps
    runs.train(finished.config, tmp_path / "run")
    runs.assert_same_category(tmp_path / "run", finished.workdir)


@needs_cpu
def test_more_epochs_later_is_more_epochs_at_once(finished, data, tmp_path):
    runs.train(runs.make_config(data, {"train.num_epochs": 2}), tmp_path)
    assert runs.read_steps(tmp_path) == [6]
    runs.train(finished.config, tmp_path)
    runs.assert_same_category(tmp_path, finished.workdir)


@pytest.mark.parametrize(
    ("epoch", "step", "fewer"), [(None, None, 3), (2, 1, 2), (2, 2, 3)]
)
def test_fewer_epochs_later_are_refused(
    finished, tmp_path, monkeypatch, epoch, step, fewer
):
    """After the last one, within a later one, and after one that was not validated."""
    if epoch is None:
        workdir = runs.copy(finished, tmp_path).workdir
    else:
        workdir = tmp_path / "run"
        stop_training(monkeypatch, finished.config, workdir, epoch, step)
    config = finished.config.copy_and_resolve_references()
    config.train.num_epochs = fewer
    with pytest.raises(UserError, match=rf"num_epochs.*found {fewer},.*Raise it"):
        runs.train(config, workdir)
    if epoch is not None:
        runs.train(finished.config, workdir)
        runs.assert_same_category(workdir, finished.workdir)


@needs_cpu
def test_signal_to_the_program(finished, tmp_path):
    """Stopped by SIGTERM, killed while training, killed while saving: all one."""
    workdir = tmp_path / "run"
    metrics = workdir / "bottle" / "metrics.jsonl"
    checkpoints = workdir / "bottle" / "checkpoints"

    process = start_slowly(finished.config, workdir)
    wait_for(lambda: count_lines(metrics) == 1, process)
    at_work = f"found process {process.pid} on "
    with pytest.raises(UserError, match=at_work):
        runs.train(finished.config, workdir)
    with pytest.raises(UserError, match=at_work):
        experiment.evaluate(workdir)
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in output
    step = runs.read_steps(workdir)[-1]
    assert 3 <= step < 6
    assert f"Stopped by SIGTERM after step {step}" in output
    assert "same command" in output

    process = start_slowly(finished.config, workdir)
    wait_for(lambda: list(checkpoints.glob("6*")), process)
    process.kill()  # while it is saving the checkpoint of step 6
    process.communicate()

    process = start_slowly(finished.config, workdir)
    wait_for(lambda: count_lines(metrics) == 3, process)
    process.kill()
    process.communicate()

    runs.train(finished.config, workdir)
    runs.assert_same_category(workdir, finished.workdir)


@needs_cpu
def test_killed_before_the_first_checkpoint(finished, tmp_path):
    """What it had reported happens again, and is reported once."""
    workdir = tmp_path / "run"
    process = start_slowly(finished.config, workdir)
    wait_for(lambda: count_lines(workdir / "bottle" / "metrics.jsonl") == 1, process)
    process.kill()
    process.communicate()
    assert runs.read_steps(workdir) == []
    runs.train(finished.config, workdir)
    runs.assert_same_category(workdir, finished.workdir)


def test_finished_run_is_left_alone(finished, tmp_path, monkeypatch):
    run = runs.copy(finished, tmp_path)
    monkeypatch.setattr(trainer, "Trainer", None)
    scores = run.workdir / "bottle" / "scores.csv"
    before = scores.stat()
    assert (
        runs.train(run.config, run.workdir).splitlines()[:2]
        == (run.printed.splitlines()[:2])
    )
    assert scores.stat().st_mtime_ns == before.st_mtime_ns


def test_evaluation_is_made_up_for(finished, tmp_path, monkeypatch):
    """A run that was killed between training and evaluation."""
    run = runs.copy(finished, tmp_path)
    for name in ("results.json", "scores.csv"):
        (run.workdir / "bottle" / name).unlink()
    monkeypatch.setattr(trainer, "Trainer", None)
    runs.train(run.config, run.workdir)
    runs.assert_same_category(run.workdir, finished.workdir)


def test_changed_test_images_are_evaluated_again(finished, data, tmp_path):
    run = runs.copy(finished, tmp_path)
    root = shutil.copytree(data, tmp_path / "data")
    (root / "bottle" / "test" / "good" / "000.png").unlink()
    config = runs.make_config(root)
    runs.train(config, run.workdir)
    assert len(runs.read_scores(run.workdir)) == 6
    assert runs.read_results(run.workdir)["categories"]["bottle"]["test_images"] == 6


def test_free_fields_may_change(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    config = run.config.copy_and_resolve_references()
    config.evaluation.batch_size = 3
    config.train.checkpoint_every = 7
    runs.train(config, run.workdir)
    saved = json.loads((run.workdir / "config.json").read_text())
    assert saved["evaluation"]["batch_size"] == 3
    runs.assert_same_category(run.workdir, finished.workdir)


def test_run_keeps_what_auto_became_and_its_format(finished):
    saved = json.loads((finished.workdir / "config.json").read_text())
    assert saved["format"] == config_lib.FORMAT
    assert saved["trunk"]["layers"] == "layer2+layer3"
    assert saved["trunk"]["whiten"] == "never"
    assert finished.config.trunk.layers == finished.config.trunk.whiten == "auto"


@pytest.mark.parametrize("left_out", [False, True])
def test_folder_of_an_earlier_version(finished, data, tmp_path, left_out):
    """It has no format, and says auto or lacks the fields that came later."""
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "config.json"
    fields = json.loads(path.read_text())
    del fields["format"]
    fields["trunk"] |= {"layers": "auto", "whiten": "auto"}
    if left_out:
        del fields["trunk"]["layers"], fields["trunk"]["whiten"]
        del fields["evaluation"]["write_maps"], fields["parallel"]
    path.write_text(json.dumps(fields))
    assert saved.load_run(run.workdir).config.trunk.layers == "layer2+layer3"
    before = runs.read_scores(run.workdir)
    experiment.evaluate(run.workdir)
    assert runs.read_scores(run.workdir) == before
    explicit = runs.make_config(data, {"trunk.layers": "layer2+layer3"})
    runs.train(explicit, run.workdir)
    runs.assert_same_category(run.workdir, finished.workdir)
    assert json.loads(path.read_text())["format"] == config_lib.FORMAT
    with pytest.raises(UserError, match=r"trunk\.whiten: the run has 'never', this"):
        runs.train(runs.make_config(data, {"trunk.whiten": "always"}), run.workdir)


def test_folder_of_a_later_version(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "config.json"
    text = json.dumps(json.loads(path.read_text()) | {"format": 3})
    path.write_text(text)
    for command in (
        lambda: runs.train(run.config, run.workdir),
        lambda: experiment.evaluate(run.workdir),
        lambda: saved.load_run(run.workdir),
    ):
        with pytest.raises(UserError, match=r"format 2 or.*found format 3: another"):
            command()
    assert path.read_text() == text


def test_another_config_is_refused(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    before = (run.workdir / "config.json").read_text()
    config = run.config.copy_and_resolve_references()
    config.seed = 3
    config.optimizer.learning_rate = 1e-3
    config.train.num_epochs = 9
    with pytest.raises(UserError) as refused:
        runs.train(config, run.workdir)
    message = str(refused.value)
    assert "config.seed: the run has 0, this command 3" in message
    assert "config.optimizer.learning_rate: the run has 0.0002" in message
    assert "num_epochs" not in message
    assert (run.workdir / "config.json").read_text() == before


@pytest.fixture
def moved(finished, data, tmp_path):
    """A finished run on a copy of the data, whose mtimes and folder are others."""
    root = shutil.copytree(data, tmp_path / "data", copy_function=shutil.copyfile)
    run = runs.copy(finished, tmp_path)
    return run._replace(config=runs.make_config(root))


def find_images(run: runs.Run, folder: str) -> list[Path]:
    return sorted(Path(run.config.dataset.root, "bottle", folder).iterdir())


def add_image(run):
    image = find_images(run, "train/good")[0]
    trees.write_image(image.with_name("new.png"))
    return r"1 added \(train/good/new\)$"


def remove_image(run):
    image = find_images(run, "train/good")[3]
    image.unlink()
    return rf"1 removed \(train/good/{image.stem}\)$"


def replace_images(run):
    for image in find_images(run, "train/good"):
        status = image.stat()
        pixels = np.array(Image.open(image))
        Image.fromarray(255 - pixels).save(image)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    return r"14 with other content \(train/good/000, .* and 11 more\)$"


@pytest.mark.parametrize("change", [add_image, remove_image, replace_images])
@pytest.mark.parametrize("command", ["again", "longer", "evaluate"])
def test_other_training_images_are_refused(moved, change, command):
    """A finished run, a resumed one and an evaluation say alike what changed."""
    before = {p: p.read_bytes() for p in moved.workdir.rglob("*.json")}
    root = Path(moved.config.dataset.root)
    changes = change(moved).removesuffix("$")
    with pytest.raises(UserError, match=rf"trained with, found others: {changes}\."):
        if command == "evaluate":
            experiment.evaluate(moved.workdir, root=str(root))
        else:
            moved.config.train.num_epochs += command == "longer"
            runs.train(moved.config, moved.workdir)
    assert before.keys() == {p for p in moved.workdir.rglob("*.json")}
    for path, content in before.items():
        assert path.name == "config.json" or path.read_bytes() == content


@needs_cpu
def test_data_that_moved_are_the_same_data(moved, finished):
    runs.train(moved.config, moved.workdir)
    runs.assert_same_category(moved.workdir, finished.workdir)


def test_other_test_images_are_evaluated_anew(moved, finished):
    for image in find_images(moved, "test/broken"):
        trees.write_image(image, size=(48, 48))
        mask = image.parents[2] / "ground_truth/broken" / f"{image.stem}_mask.png"
        trees.write_mask(mask, size=(48, 48))
    runs.train(moved.config, moved.workdir)
    scores = runs.read_scores(moved.workdir), runs.read_scores(finished.workdir)
    for row, old in zip(*scores, strict=True):
        changed = row["score"] != old["score"]
        assert changed == (row["type"] == "broken")


def test_evaluation_needs_no_training_images(moved, finished, capsys):
    root = Path(moved.config.dataset.root)
    shutil.rmtree(root / "bottle" / "train")
    experiment.evaluate(moved.workdir, root=str(root))
    assert "no training images" in capsys.readouterr().out
    scores = runs.read_scores(moved.workdir), runs.read_scores(finished.workdir)
    for row, old in zip(*scores, strict=True):
        assert row["score"] == old["score"]


def test_a_run_without_digests_goes_on(moved, finished):
    """Versions before kept none."""
    (moved.workdir / "bottle" / "data.json").unlink()
    moved.config.train.num_epochs += 1
    runs.train(moved.config, moved.workdir)
    kept = moved.workdir / "bottle" / "data.json"
    assert kept.read_text() == (finished.workdir / "bottle/data.json").read_text()


def test_another_trunk_is_refused(finished, tmp_path):
    """Training goes on with the features that it began with, or not at all."""
    run = runs.copy(finished, tmp_path)
    trunk = pretrained.load_trunk(
        architecture="resnet18", source="random", repository="", path="", seed=9
    )
    pretrained.save_trunk(trunk, run.workdir / "trunk.safetensors")
    config = run.config.copy_and_resolve_references()
    config.train.num_epochs += 1
    with pytest.raises(UserError, match=r"random:0.*found resnet18 from random:9"):
        runs.train(config, run.workdir)


def test_config_may_change_until_something_is_trained(data, tmp_path):
    """The advice of an error can be followed in the folder that it left."""
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"train\.batch_size to 12 or less"):
        runs.train(runs.make_config(data, {"train.batch_size": 13}), workdir)
    fields = {"trunk.source": "file", "trunk.path": str(tmp_path / "none.safetensors")}
    with pytest.raises(UserError, match="found nothing at"):
        runs.train(runs.make_config(data, fields), workdir)
    with pytest.raises(UserError, match="bottel"):
        runs.train(runs.make_config(data, category="bottel"), workdir)
    config = runs.make_config(data, {"train.num_epochs": 1}, seed=1)
    runs.train(config, workdir)
    assert runs.read_results(workdir)["trunk"]["source"] == "random:1"


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    """Two categories in the order cable, bottle."""
    workdir = tmp_path_factory.mktemp("both") / "run"
    config = runs.make_config(data, category="cable,bottle")
    return runs.Run(workdir, config, runs.train(config, workdir))


@needs_cpu
def test_categories_get_what_they_get_alone(both, finished, data, tmp_path):
    runs.assert_same_category(both.workdir, finished.workdir, "bottle")
    config = runs.make_config(data, category="all")
    shutil.copytree(finished.workdir / "bottle", tmp_path / "bottle")
    (tmp_path / "trunk.safetensors").write_bytes(
        (finished.workdir / "trunk.safetensors").read_bytes()
    )
    config_lib.save(config, tmp_path / "config.json")
    runs.train(config, tmp_path)  # bottle is finished: cable alone is trained
    runs.assert_same_category(both.workdir, tmp_path, "cable")
    categories = runs.read_results(tmp_path)["categories"]
    assert list(categories) == ["bottle", "cable"]
    assert categories == runs.read_results(both.workdir)["categories"]


def test_categories_differ(both):
    bottle, cable = (
        runs.read_checkpoint(both.workdir, name) for name in ("bottle", "cable")
    )
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        bottle["model"]["variables"]["params"]["global"]["enconv1"],
        cable["model"]["variables"]["params"]["global"]["enconv1"],
    )
    assert not any(jax.tree.leaves(same))


def test_mean_row(both):
    document = runs.read_results(both.workdir)
    aurocs = [row["image_auroc"] for row in document["categories"].values()]
    assert document["mean"]["image_auroc"] == pytest.approx(sum(aurocs) / 2)
    rows = runs.read_table(both.workdir / "results.csv")
    assert [row["category"] for row in rows] == ["cable", "bottle", "mean"]
    assert float(rows[2]["image_auroc"]) == document["mean"]["image_auroc"]
    assert {row["selected_on_test"] for row in rows} == {"False"}
    assert "\nmean " in both.printed


def test_what_a_run_leaves(finished):
    folder = finished.workdir / "bottle"
    assert {path.name for path in finished.workdir.iterdir()} == {
        *("config.json", "trunk.safetensors", "results.json", "results.csv", "bottle"),
        "report.html",
    }
    assert len(runs.read_metrics(finished.workdir)) == runs.EPOCHS
    assert runs.read_steps(finished.workdir)[-1] == 3 * runs.EPOCHS
    pictures = sorted(folder.glob("pictures/*/*.png"))
    assert [p.parent.name for p in pictures] == ["broken", "good", "scratch"]
    assert list(folder.glob("tensorboard/events*"))
    assert "random weights" in finished.printed
    assert str(finished.workdir / "results.json") in finished.printed


def test_loss_goes_down(finished):
    lines = runs.read_metrics(finished.workdir)
    losses = [line["loss/total"] for line in lines]
    assert losses == sorted(losses, reverse=True)
    for line in lines:
        terms = sum(line[f"loss/{t}"] for t in ("local", "attention", "consistency"))
        assert line["loss/total"] == pytest.approx(terms, rel=1e-6)
    assert [line["epoch"] for line in lines if "validation/total" in line] == [2, 4]


@pytest.fixture(scope="module")
def selected_on_test(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("selected") / "run"
    fields = {"train.checkpoint_every": 1}
    config = runs.make_config(data, fields, selection="best_test_auroc")
    return runs.Run(workdir, config, runs.train(config, workdir))


def test_selection_on_the_test_set_is_marked(selected_on_test):
    workdir = selected_on_test.workdir
    assert runs.read_results(workdir)["selected_on_test"] is True
    rows = runs.read_table(workdir / "results.csv")
    assert {row["selected_on_test"] for row in rows} == {"True"}
    assert "SELECTED ON THE TEST SET" in selected_on_test.printed


def test_selection_on_the_test_set_takes_the_best(selected_on_test, finished):
    aurocs = {
        line["step"]: line["test/image_auroc"]
        for line in runs.read_metrics(selected_on_test.workdir)
    }
    document = runs.read_results(selected_on_test.workdir, "bottle")
    assert document["metrics"]["image_auroc"] == max(aurocs.values())
    assert aurocs[document["step"]] == max(aurocs.values())
    assert runs.read_results(finished.workdir)["selected_on_test"] is False
    assert "SELECTED" not in finished.printed


def test_selection_on_the_test_set_needs_one(tmp_path):
    root = trees.write_folder(tmp_path / "mine", train=8)
    config = runs.make_config(root, category="all", selection="best_test_auroc")
    config.dataset.name = "folder"
    with pytest.raises(UserError, match="best_test_auroc"):
        runs.train(config, tmp_path / "run")


def test_best_validation_loss(data, tmp_path, monkeypatch):
    """Where the last checkpoint is not the best one."""
    plain = validation.make_validate

    def make_validate(*args, **options):
        validate = plain(*args, **options)

        def growing(variables, updates):
            found = validate(variables, updates)
            return found._replace(losses=found.losses | {"total": float(updates)})

        return growing

    monkeypatch.setattr(validation, "make_validate", make_validate)
    runs.train(runs.make_config(data), tmp_path)
    assert runs.read_steps(tmp_path) == [6, 12]
    assert runs.read_results(tmp_path, "bottle")["step"] == 12
    best = "best_validation_loss"
    experiment.evaluate(tmp_path, selection=best)
    document = runs.read_results(tmp_path, "bottle")
    assert (document["step"], document["selection"]) == (6, best)
    assert saved.load_run(tmp_path).step == 12
    assert saved.load_run(tmp_path, selection=best).step == 6
    with pytest.raises(UserError, match="Expected a checkpoint with test_image_auroc"):
        experiment.evaluate(tmp_path, selection="best_test_auroc")


def test_divergence_stops_with_step_and_term(data, tmp_path):
    fields = {"optimizer.learning_rate": 1e30, "train.checkpoint_every": 1}
    config = runs.make_config(data, fields)
    with pytest.raises(UserError, match=r"found nan in 'consistency'.* at step 2 of"):
        runs.train(config, tmp_path)
    assert runs.read_steps(tmp_path) == []


def test_checkpoints_before_a_divergence_stay(finished, tmp_path, monkeypatch):
    """The seventh update, and all after it, give a term that is not finite."""
    plain = steps.make_train_step

    def make_train_step(*args, **options):
        step = plain(*args, **options)

        def diverging(state, batch, key):
            state, losses = step(state, batch, key)
            return state, losses | {"local": losses["local"] / (state.step < 7)}

        return diverging

    monkeypatch.setattr(steps, "make_train_step", make_train_step)
    with pytest.raises(UserError, match="found inf in 'local' at step 7 of 'bottle'"):
        runs.train(finished.config, tmp_path)
    assert runs.read_steps(tmp_path) == [6]
    monkeypatch.undo()
    runs.train(finished.config, tmp_path)
    runs.assert_same_category(tmp_path, finished.workdir)


def test_weights_that_diverged_are_not_saved(data, tmp_path, monkeypatch):
    """The loss of an epoch's last step does not show what its update did."""
    plain = steps.make_train_step

    def make_train_step(*args, **options):
        step = plain(*args, **options)

        def diverging(state, batch, key):
            state, losses = step(state, batch, key)
            if int(state.step) == 6:
                params = state.model["params"]
                params = jax.tree.map(lambda x: x * jax.numpy.nan, params)
                state = state.replace(model=state.model | {"params": params})
            return state, losses

        return diverging

    monkeypatch.setattr(steps, "make_train_step", make_train_step)
    config = runs.make_config(data, {"train.checkpoint_every": 1})
    with pytest.raises(UserError, match=r"found nan in .*validation after step 6"):
        runs.train(config, tmp_path)
    assert runs.read_steps(tmp_path) == [3]


def test_bfloat16(data, tmp_path):
    fields = {"train.dtype": "bfloat16", "train.num_epochs": 2}
    runs.train(runs.make_config(data, fields), tmp_path)
    metrics = runs.read_metrics(tmp_path)
    assert metrics[1]["loss/total"] < metrics[0]["loss/total"]
    checkpoint = runs.read_checkpoint(tmp_path)
    arrays = jax.tree.leaves((checkpoint["model"], checkpoint["optimizer"]))
    assert {str(a.dtype) for a in arrays} == {"float32", "int32"}
    assert all(float(row["score"]) < 1e6 for row in runs.read_scores(tmp_path))


def test_networks_are_what_the_config_says():
    fields = {"train.dtype": "bfloat16", "trunk.layers": "layer3"}
    fields |= {"model.local_width": 24, "model.output_activation": "identity"}
    config = runs.make_config(Path("data"), fields)
    made = setup.make(config_lib.resolve(config))
    assert made.method.networks == Networks(
        local_width=24, output_activation="identity", dtype=jnp.bfloat16
    )
    assert made.pyramid == FeaturePyramid(
        "resnet18", dtype=jnp.bfloat16, layers="layer3", image_size=(64, 64)
    )


@pytest.mark.parametrize(
    ("architecture", "layers", "expected"),
    [
        ("tf_efficientnet_lite0", "auto", "stage3+stage5"),
        ("resnet18", "auto", "layer2+layer3"),
        ("tf_efficientnet_lite0", "stage2+stage3", "stage2+stage3"),
        ("resnet18", "layer2", "layer2"),
    ],
)
def test_layers_follow_the_architecture(architecture, layers, expected):
    fields = {"trunk.architecture": architecture, "trunk.layers": layers}
    config = runs.make_config(Path("data"), fields)
    resolved = config_lib.resolve(config)
    assert setup.make(resolved).pyramid.layers == expected


def test_validation_is_what_the_config_says(data, tmp_path):
    fields = {"train.num_epochs": 1, "calibration": "none"}
    fields |= {"threshold.image_fpr": 0.4, "threshold.pixel_fpr": 0.2}
    fields |= {"dataset.validation_fraction": 0.4}
    runs.train(runs.make_config(data, fields), tmp_path)
    checkpoint = runs.read_checkpoint(tmp_path)
    calibration, basis = checkpoint["calibration"], checkpoint["decisions"]["basis"]
    assert {calibration[f"{m}_offset"] for m in ("local", "global")} == {0.0}
    assert {calibration[f"{m}_scale"] for m in ("local", "global")} == {1.0}
    assert (basis["image_fpr"], basis["pixel_fpr"]) == (0.4, 0.2)
    images = len(list((data / "bottle" / "train").glob("*/*")))
    assert len(basis["validation_scores"]) == round(0.4 * images)


@pytest.mark.parametrize(
    "fields",
    [
        {"train.batch_size": 1},
        {"losses.local.term": "locla"},
        {"losses.local.term": "no_such_module:term"},
        {"dataset.root": ""},
        {"trunk.source": "file"},
        {"dataset.name": "imagenet"},
    ],
    ids=str,
)
def test_nothing_is_written_for_a_wrong_config(data, tmp_path, fields):
    config = runs.make_config(data)
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    with pytest.raises(UserError):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("run", ["train", "evaluate"])
def test_folder_that_is_no_run(data, tmp_path, run):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="folder"):
        if run == "train":
            runs.train(runs.make_config(data), tmp_path)
        else:
            experiment.evaluate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_workdir_that_cannot_be_a_folder(data, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"give a folder|Give another"), reported():
        runs.train(runs.make_config(data), tmp_path / place)


def test_evaluation_of_a_run_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--workdir"):
        experiment.evaluate(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_batch_larger_than_the_data(data, tmp_path):
    config = runs.make_config(data, {"train.batch_size": 13})
    with pytest.raises(UserError, match=r"batch of 13 training images.*found 12"):
        runs.train(config, tmp_path)
