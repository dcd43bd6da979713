from __future__ import annotations

import functools
import json
import math
import shutil
from operator import getitem
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import ulsad_jax
from tests import runs, trees
from tests.goldens import weights
from tests.test_config import ADDED
from ulsad_jax.data.batches import Examples
from ulsad_jax.metrics import base
from ulsad_jax.metrics.image import UndefinedMetricWarning
from ulsad_jax.metrics.pixel import Pixels
from ulsad_jax.report import figures
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import validation
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import prediction as inference
from ulsad_jax.scoring.split import predict_split
from ulsad_jax.trunks import weights as pretrained

SIZE = (4, 6)


def predict(image):
    """A map that is the image's first channel, and scores that follow from it."""
    anomaly_map = jnp.float32(image[..., 0])
    score = anomaly_map.max((1, 2))
    return inference.Prediction(
        anomaly_map=anomaly_map,
        score=score,
        normalized_score=score / 2,
        is_anomalous=score > 3,
        scores={"global": score + 2, "local": score + 1},
        mask_area=(anomaly_map > 2).sum((1, 2), dtype=np.int32),
        maps={},
    )


SHAPES = jax.eval_shape(predict, jax.ShapeDtypeStruct((1, *SIZE, 3), np.uint8))


def make_batches(count, size):
    """Images i of value i + 1, in reverse, in batches filled up with bright rows."""
    order = list(range(count))[::-1]
    for start in range(0, count, size):
        index = order[start : start + size]
        rows = np.array(index + [0] * (size - len(index)))
        valid = np.arange(size) < len(index)
        value = np.where(valid, rows + 1, 255).astype(np.uint8)
        ones = np.ones((size, *SIZE), np.uint8)
        yield {
            "image": value[:, None, None, None] * ones[..., None].repeat(3, axis=-1),
            "label": np.int32(rows % 2),
            "gt_mask": (value[:, None, None] * ones) > 2,
            "has_mask": rows != 1,
            "mask_lost": rows == 3,
            "index": rows,
            "valid": valid,
        }


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_image_is_predicted_once(size):
    seen = []

    def counting(image):
        seen.extend(np.asarray(image)[:, 0, 0, 0])
        return predict(image)

    types = ["good", "cut", "good", "dent", "good"]
    prediction, truth = predict_split(
        counting, make_batches(5, size), types=types, shapes=SHAPES
    )
    assert sorted(value for value in seen if value != 255) == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(prediction.score, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(prediction.scores["local"], [2, 3, 4, 5, 6])
    np.testing.assert_array_equal(prediction.scores["global"], [3, 4, 5, 6, 7])
    np.testing.assert_array_equal(prediction.normalized_score, [0.5, 1, 1.5, 2, 2.5])
    np.testing.assert_array_equal(prediction.is_anomalous, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(prediction.mask_area, [0, 0, 24, 24, 24])
    np.testing.assert_array_equal(prediction.anomaly_map[:, 3, 5], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(truth.images[:, 0, 0, 2], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(truth.labels, [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(truth.has_mask, [1, 0, 1, 1, 1])
    np.testing.assert_array_equal(truth.mask_lost, [0, 0, 0, 1, 0])
    np.testing.assert_array_equal(truth.masks[:, 0, 0], [0, 0, 1, 1, 1])
    assert truth.types == types


def test_split_of_no_image():
    prediction, truth = predict_split(predict, iter(()), types=[], shapes=SHAPES)
    assert prediction.anomaly_map.shape == (0, *SIZE)
    assert truth.labels.shape == prediction.score.shape == (0,)


def test_image_level():
    images = base.Images(
        np.array([0, 0, 1, 1]),
        ["good", "good", "logical_anomalies", "structural_anomalies"],
        np.array([0.1, 0.3, 0.2, 0.4]),
        has_saturation=True,
    )
    metrics = base.measure(base.find(()), base.IMAGE, images)
    assert metrics["image_auroc"] == 0.75
    assert metrics["image_auroc/logical_anomalies"] == 0.5
    assert metrics["image_auroc/structural_anomalies"] == 1.0
    assert metrics["image_auroc_mean_of_types"] == 0.75
    assert metrics["image_f1_max_threshold"] == 0.2


@pytest.mark.parametrize("label", [0, 1])
def test_image_level_of_one_kind_of_image(label):
    types = ["cut" if label else "good"] * 3
    with pytest.warns(UndefinedMetricWarning, match="needs anomalous and normal"):
        metrics = base.measure(
            base.find(()),
            base.IMAGE,
            base.Images(np.full(3, label), types, np.array([0.1, 0.2, 0.3]), False),
        )
    assert all(math.isnan(value) for value in metrics.values())


def test_pixel_level_without_any_defect():
    maps = np.random.default_rng(0).uniform(size=(3, 8, 8)).astype(np.float32)
    with pytest.warns(UndefinedMetricWarning):
        pixels = Pixels(np.zeros((3, 8, 8), bool), maps)
        metrics = base.measure(base.find(()), base.PIXEL, pixels)
    assert {"pixel_auroc", "pixel_f1_max", "aupro"} <= metrics.keys()
    assert all(math.isnan(value) for value in metrics.values())


def read_columns(workdir):
    rows = runs.read_scores(workdir)
    names = [row["name"] for row in rows]
    columns = ("score", "local_score", "global_score")
    return names, np.array([[float(row[c]) for c in columns] for row in rows])


def test_every_test_image_is_scored_once(finished, data):
    names, scores = read_columns(finished.workdir)
    expected = {
        f"{path.parent.name}/{path.stem}"
        for path in (data / "bottle" / "test").glob("*/*.png")
    }
    assert len(names) == len(expected) == 7  # not a multiple of the batch
    assert set(names) == expected
    assert len(np.unique(scores[:, 0])) == 7
    assert runs.read_results(finished.workdir, "bottle")["metrics"]["test_images"] == 7


def test_evaluation_repeats_training(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    for name in ("results.json", "results.csv", "bottle/results.json"):
        (run.workdir / name).unlink()
    printed = experiment.evaluate(run.workdir)
    for name in ("results.json", "results.csv", "bottle/results.json"):
        expected = (finished.workdir / name).read_text()
        assert (run.workdir / name).read_text() == expected
    runs.assert_same_category(run.workdir, finished.workdir)
    assert printed == run.printed.replace(str(finished.workdir), str(run.workdir))


def test_evaluation_of_data_that_moved(finished, data, tmp_path):
    run = runs.copy(finished, tmp_path)
    root = shutil.copytree(data, tmp_path / "moved" / "here")
    experiment.evaluate(run.workdir, root=str(root))
    expected = runs.read_results(finished.workdir, "bottle")["metrics"]
    assert runs.read_results(run.workdir, "bottle")["metrics"] == expected
    assert runs.read_scores(run.workdir)[0]["image"].startswith(str(root))


@pytest.mark.parametrize("size", [1, 3, 16])
def test_scores_do_not_depend_on_the_batch_size(finished, tmp_path, size):
    run = runs.copy(finished, tmp_path)
    config = finished.config.copy_and_resolve_references()
    config.evaluation.batch_size = size
    config_lib.save(config, run.workdir / "config.json")
    experiment.evaluate(run.workdir)
    names, scores = read_columns(run.workdir)
    expected_names, expected = read_columns(finished.workdir)
    assert names == expected_names
    np.testing.assert_allclose(scores, expected, atol=1e-5 * np.abs(expected).max())


def test_a_batch_is_no_larger_than_its_split(finished, tmp_path, monkeypatch):
    """Its rows take memory, whether they are filled or not."""
    sizes, batches = [], Examples.batches

    def note(examples, size, *args):
        sizes.append((len(examples), size))
        return batches(examples, size, *args)

    monkeypatch.setattr(Examples, "batches", note)
    made = validation.make_validate

    def make_validate(method, source, *, batch_size, **options):
        sizes.append((len(source), batch_size))
        return made(method, source, batch_size=batch_size, **options)

    monkeypatch.setattr(validation, "make_validate", make_validate)
    config = finished.config.copy_and_resolve_references()
    config.evaluation.batch_size = 10**9
    config.train.num_epochs = 1
    runs.train(config, tmp_path / "run")
    assert len(sizes) == 4  # features of two splits, validation, test
    assert all(size == count for count, size in sizes)


def remove_later(fields, names):
    """Removes fields that earlier versions did not know, in place."""
    for name in names:
        *groups, field = name.split(".")
        del functools.reduce(getitem, groups, fields)[field]


def test_folder_of_an_earlier_version_is_read(finished, tmp_path):
    """One that knew neither methods nor digests; training goes on there, too."""
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "config.json"
    fields = json.loads(path.read_text())
    remove_later(fields, ["format", "methods", *ADDED])
    path.write_text(json.dumps(fields))
    (run.workdir / "bottle" / "data.json").unlink()
    for digests in run.workdir.glob("bottle/checkpoints/*/digest"):
        shutil.rmtree(digests)
    for name in ("results.json", "bottle/results.json", "bottle/scores.csv"):
        (run.workdir / name).unlink()
    experiment.evaluate(run.workdir)
    runs.assert_same_category(run.workdir, finished.workdir)
    result = ulsad_jax.Detector.load(run.workdir)(
        runs.read_scores(run.workdir)[0]["image"]
    )
    score = float(runs.read_scores(finished.workdir)[0]["score"])
    assert result.score == pytest.approx(score, rel=1e-4)
    assert runs.train(run.config, run.workdir).startswith("category")
    runs.assert_same_category(run.workdir, finished.workdir)


@pytest.mark.parametrize("command", ["train", "evaluate", "detect"])
def test_folder_of_a_later_version_is_refused(finished, tmp_path, command):
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"format": fields["format"] + 1}))
    before = path.read_text()
    with pytest.raises(UserError, match="another version wrote it"):
        if command == "train":
            runs.train(run.config, run.workdir)
        elif command == "evaluate":
            experiment.evaluate(run.workdir)
        else:
            ulsad_jax.Detector.load(run.workdir)
    assert path.read_text() == before
    runs.assert_same_category(run.workdir, finished.workdir)


def save_other_trunk(path, *, seed=0, architecture="resnet18", tmp_path):
    stored = tmp_path / "other.safetensors"
    spec = weights.resnet_spec(architecture)
    save_file(weights.fill(spec, prefix="trunk", seed=seed), stored)
    trunk = pretrained.load_trunk(
        architecture=architecture, source="file", repository="", path=stored, seed=0
    )
    pretrained.save_trunk(trunk, path)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34"])
def test_another_trunk_is_refused(finished, tmp_path, architecture):
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "trunk.safetensors"
    save_other_trunk(path, architecture=architecture, tmp_path=tmp_path)
    found = rf"found {architecture} from file:other.*train anew"
    with pytest.raises(UserError, match=rf"resnet18 from random:0.*{found}"):
        experiment.evaluate(run.workdir)


def test_tampered_trunk_is_refused(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "trunk.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(UserError, match="Expected the trunk that"):
        experiment.evaluate(run.workdir)


def evaluate_on(finished, tmp_path, **tree):
    """Evaluates the finished run on its training images and other test images."""
    run = runs.copy(finished, tmp_path)
    root = trees.write_mvtec_ad(tmp_path / "other", "bottle", train=0, **tree)
    train = Path(finished.config.dataset.root, "bottle", "train")
    shutil.copytree(train, root / "bottle" / "train")
    printed = experiment.evaluate(run.workdir, root=str(root))
    return run._replace(printed=printed)


def test_no_test_images(finished, tmp_path):
    run = evaluate_on(finished, tmp_path, good=0, defects=())
    metrics = runs.read_results(run.workdir, "bottle")["metrics"]
    assert metrics == {"test_images": 0, "test_anomalous": 0}
    assert runs.read_scores(run.workdir) == []
    assert not list((run.workdir / "bottle" / "pictures").glob("**/*.png"))


def test_no_normal_test_images(finished, tmp_path, capsys):
    run = evaluate_on(finished, tmp_path, good=0)
    assert "AUROC is undefined and set to NaN: it needs" in capsys.readouterr().out
    metrics = runs.read_results(run.workdir, "bottle")["metrics"]
    assert metrics["image_auroc"] is None
    assert metrics["image_auroc/broken"] is None
    assert metrics["pixel_auroc"] is not None  # normal pixels there are
    assert len(runs.read_scores(run.workdir)) == 4


def test_no_anomalous_test_images(finished, tmp_path, capsys):
    run = evaluate_on(finished, tmp_path, good=2, defects=())
    assert "anomalous and normal images, found 0 and 2" in capsys.readouterr().out
    metrics = runs.read_results(run.workdir, "bottle")["metrics"]
    assert metrics["image_auroc"] is metrics["pixel_auroc"] is None


def test_no_masks(finished, data, tmp_path):
    run = runs.copy(finished, tmp_path)
    root = shutil.copytree(data, tmp_path / "other")
    shutil.rmtree(root / "bottle" / "ground_truth")
    printed = experiment.evaluate(run.workdir, root=str(root))
    metrics = runs.read_results(run.workdir, "bottle")["metrics"]
    expected = runs.read_results(finished.workdir, "bottle")["metrics"]
    assert metrics["pixel_images_left_out"] == 4
    for name in ("pixel_auroc", "pixel_average_precision", "aupro"):
        assert metrics[name] is None
    for name in ("image_auroc", "image_average_precision", "image_f1_max"):
        assert metrics[name] == expected[name] is not None
    assert "leave out 4 anomalous images" in printed


def evaluate_masks(finished, data, folder, write):
    """Evaluates the finished run with masks that `write(mask, path)` saved anew."""
    run = runs.copy(finished, folder)
    root = shutil.copytree(data, folder / "other")
    for path in (root / "bottle" / "ground_truth").rglob("*.png"):
        with Image.open(path) as mask:
            mask.load()
        path.unlink()
        write(mask, path)
    printed = experiment.evaluate(run.workdir, root=str(root))
    return run._replace(printed=printed), root


@pytest.mark.parametrize(
    ("ending", "quality"), [(".jpg", 50), (".jpg", 95), (".webp", 80)]
)
def test_masks_with_loss(finished, data, tmp_path, ending, quality):
    def write(mask, path):
        mask.save(path.with_suffix(ending), quality=quality)

    run, _ = evaluate_masks(finished, data, tmp_path, write)
    metrics = runs.read_results(run.workdir, "bottle")["metrics"]
    assert metrics == runs.read_results(finished.workdir, "bottle")["metrics"]


def test_empty_masks_are_left_out_and_said_in_every_run(
    finished, data, tmp_path, capsys
):
    """Whether a mask is empty or is not there, metrics are the same."""

    def empty(mask, path):
        broken = path.match("broken/*")
        (Image.new("L", mask.size) if broken else mask).save(path)

    def leave_out(mask, path):
        if not path.match("broken/*"):
            mask.save(path)

    run, root = evaluate_masks(finished, data, tmp_path / "empty", empty)
    said = [capsys.readouterr().out]
    again = experiment.evaluate(run.workdir, root=str(root))
    said.append(capsys.readouterr().out)
    remark = "[bottle] 2 files have a mask without any defective pixel"
    first = root / "bottle" / "test" / "broken" / "000.png"
    for text in said:
        assert text.count(remark) == text.count(f": {first}, ") == 1
    for table in (run.printed, again):
        assert "leave out 2 anomalous images without a mask or with an" in table
    missing, _ = evaluate_masks(finished, data, tmp_path / "missing", leave_out)
    metrics, expected = (
        runs.read_results(r.workdir, "bottle")["metrics"] for r in (run, missing)
    )
    assert metrics == expected
    assert metrics["pixel_images_left_out"] == 2
    pictures = run.workdir / "bottle" / "pictures"
    for kind, known in (("broken", False), ("scratch", True)):
        (path,) = (pictures / kind).glob("*.png")
        panel = np.asarray(Image.open(path))[:, 68:132]
        assert (panel == figures.UNKNOWN).all() != known


def test_folder_without_test_images(tmp_path):
    """Normal images are enough to train a model."""
    root = trees.write_folder(tmp_path / "mine", train=10)
    config = runs.make_config(root, {"train.num_epochs": 1}, category="all")
    config.dataset.name = "folder"
    runs.train(config, tmp_path / "run")
    assert runs.read_results(tmp_path / "run", "mine")["metrics"]["test_images"] == 0
    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / "mine")
    experiment.evaluate(tmp_path / "run", root=str(moved))
    renamed = moved.rename(tmp_path / "yours")
    with pytest.raises(UserError, match=r"category 'yours'.*the name it had"):
        experiment.evaluate(tmp_path / "run", root=str(renamed))


def test_one_test_image_of_each_kind(finished, tmp_path):
    run = evaluate_on(finished, tmp_path, good=1, defects=["a"], per_defect=1)
    assert len(runs.read_scores(run.workdir)) == 2
    metrics = runs.read_results(run.workdir, "bottle")["metrics"]
    assert metrics["image_auroc"] in (0.0, 1.0)
