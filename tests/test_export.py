from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

import ulsad_jax
from tests import formats, runs
from ulsad_jax import artifact, export, export_onnx
from ulsad_jax.data.resize import resize_bilinear
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs import saved
from ulsad_jax.runtime.errors import UserError

SCORES = ("score", "normalized_score", "local_score", "global_score")
# A machine with what the docs say, and nothing of this project.
ALONE = """
import sys
from importlib import metadata

allowed = {"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy"}
allowed |= {"PIL", "defusedxml"}  # which Pillow looks for
refused = {"ulsad_jax", *metadata.packages_distributions()} - allowed


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in refused:
            raise ModuleNotFoundError(f"{name} is not there", name=name)


sys.meta_path.insert(0, Refuse())
"""
# After the docs' example, which opens bottle.zip and photo.png.
BATCHES = """
from pathlib import Path

images = np.load("images.npy")
assert list(images.shape[1:3]) == about["image_size"]
found = {f"{name}/photo": value for name, value in found.items()}
for path in (path for path in Path("formats").rglob("*") if path.is_file()):
    image = resize(load(path, about["white_level"]), about["image_size"])
    found[str(path)] = detect(image[None])["score"][0]
for count in (1, 3, 8):
    for name, value in jax.device_get(detect(images[:count])).items():
        found[f"{name}/{count}"] = value
np.savez("out.npz", **found)
assert not {"flax", "orbax", "ulsad_jax"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "bottle.zip"
    export.main([f"--workdir={finished.workdir}", f"--output={path}"])
    return path


@pytest.fixture(scope="module")
def images(finished):
    """Seven test images, and noise, at model resolution."""
    paths = [row["image"] for row in runs.read_scores(finished.workdir)]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return np.stack([*(resize_bilinear(photo, (64, 64)) for photo in photos), noise])


def read(path):
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        metadata = json.loads(file.read("metadata.json"))
        return metadata, jax_export.deserialize(bytearray(file.read("model.jax")))


def run_example(folder, program):
    """Runs what the documentation says, and then `program`, where JAX is alone."""
    page = (runs.REPOSITORY / "docs" / "predict_and_export.md").read_text()
    section = page.split("## Export\n")[1]
    example = section.split("```python\n")[1].split("```")[0]
    ran = subprocess.run(
        [sys.executable, "-c", ALONE + example + program],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert ran.returncode == 0, ran.stderr
    return np.load(folder / "out.npz")


def test_same_numbers_where_jax_is_alone(finished, exported, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    photo = np.random.default_rng(0).integers(0, 256, (50, 90, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    shutil.copy(exported, tmp_path / "bottle.zip")
    paths = formats.write_all(tmp_path / "formats")
    found = run_example(tmp_path, BATCHES)
    detector = ulsad_jax.Detector.load(finished.workdir)
    score = detector(tmp_path / "photo.png").score
    assert found["score/photo"] == pytest.approx(score, rel=1e-5, abs=1e-5)
    for path, result in zip(paths, detector(paths), strict=True):
        score = found[str(path.relative_to(tmp_path))]
        assert score == pytest.approx(result.score, rel=1e-5, abs=1e-5), path
    expected = detector(list(images))
    rows = runs.read_scores(finished.workdir)
    near = {"rtol": 1e-5, "atol": 1e-5}
    # The normalised score is the score in another, sometimes far smaller unit, with the
    # score's rounding.
    thresholds = detector.decisions.thresholds
    normalized = {"rtol": 1e-5, "atol": 0.5e-5 / (thresholds.half - thresholds.zero)}
    for count in (1, 3, 8):
        some = {n: found[f"{n}/{count}"] for n in (*SCORES, "mask_area")}
        for i, result in enumerate(expected[:count]):
            row = result.row()
            for name in SCORES:
                value = row[name]
                within = normalized if name == "normalized_score" else near
                np.testing.assert_allclose(some[name][i], value, **within)
            assert some["mask_area"][i] == result.mask_area
            assert found[f"is_anomalous/{count}"][i] == result.is_anomalous
            np.testing.assert_allclose(
                found[f"anomaly_map/{count}"][i],
                result.anomaly_map,
                **near,
            )
    for i, row in enumerate(rows):  # of the evaluation
        np.testing.assert_allclose(found["score/8"][i], float(row["score"]), **near)


def test_deep_images_where_jax_is_alone(finished, tmp_path):
    """A run's white level comes with the file."""
    run = runs.copy(finished, tmp_path)
    config = json.loads((run.workdir / "config.json").read_text())
    config["dataset"]["white_level"] = float(formats.WHITE)
    (run.workdir / "config.json").write_text(json.dumps(config))
    flags = [f"--workdir={run.workdir}", f"--output={tmp_path / 'bottle.zip'}"]
    export.main([*flags, "--platforms=cpu"])
    formats.save(tmp_path / "photo.png", formats.draw_grey())
    for name in formats.DEEP.keys() - {"la16.png"}:
        formats.save_deep(tmp_path / "deep", name, formats.draw_grey(), factor=16)
    program = """
from pathlib import Path

scores = {
    path.name: detect(resize(load(path, about["white_level"]), (64, 64))[None])["score"]
    for path in Path("deep").iterdir()
}
np.savez("out.npz", **scores, photo=found["score"])
"""
    found = run_example(tmp_path, program)
    expected = ulsad_jax.Detector.load(run.workdir)(tmp_path / "photo.png").score
    assert len(found) == len(formats.DEEP)
    for score in found.values():
        assert score[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_what_the_file_says(finished, exported, capsys):
    metadata, model = read(exported)
    assert model.platforms == ("cpu", "cuda", "tpu")
    (image,) = model.in_avals
    assert image.dtype == np.uint8
    assert (str(image.shape[0]), *image.shape[1:]) == ("b", 64, 64, 3)
    assert metadata["image_size"] == [64, 64]
    assert metadata["category"] == "bottle"
    assert metadata["platforms"] == ["cpu", "cuda", "tpu"]
    run = saved.load_run(finished.workdir)
    assert metadata["thresholds"] == run.decisions.to_json()["thresholds"]
    assert metadata["trunk"]["sha256"] == run.trunk.sha256
    assert metadata["checkpoint"]["step"] == runs.read_steps(finished.workdir)[-1]


def test_choices(finished, exported, images, tmp_path, capsys):
    run = runs.copy(finished, tmp_path)
    shutil.copytree(run.workdir / "bottle", run.workdir / "cable")
    path = tmp_path / "cable.zip"
    flags = ["--category=cable", "--platforms=cpu", "--image_threshold=1e9"]
    export.main([f"--workdir={run.workdir}", f"--output={path}", *flags])
    assert capsys.readouterr().out.startswith("cable, step")
    metadata, model = read(path)
    assert model.platforms == ("cpu",)
    assert metadata["category"] == "cable"
    assert metadata["thresholds"]["image"] == 1e9
    assert not np.asarray(model.call(images[:2])["is_anomalous"]).any()


def test_other_images_are_refused(exported, images):
    _, model = read(exported)
    for wrong in (images[0], images[:, :32], images / 255, images[..., :1]):
        with pytest.raises(ValueError):
            model.call(wrong)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=W", "--output=none/file"], "no such folder at .*none"),
        (["--workdir=W", "--output=."], "a folder at"),
        (["--workdir=none", "--output=O"], "the folder of a run"),
        (["--workdir=W", "--output=O"], r"\(bottle, cable\), found no choice"),
        (["--workdir=W", "--output=O", "--category=nut"], "found 'nut'"),
        (["--workdir=W", "--output=O", "--platforms=cpu,gpu"], "found 'cpu,gpu'"),
        (["--workdir=W", "--output=O", "--platforms="], "found ''"),
        (
            ["--workdir=W", "--output=O", "--category=cable", "--image_threshold=nan"],
            "finite number",
        ),
    ],
    ids=str,
)
def test_bad_input(finished, tmp_path, monkeypatch, flags, message):
    run = runs.copy(finished, tmp_path)
    shutil.copytree(run.workdir / "bottle", run.workdir / "cable")
    run.workdir.rename(tmp_path / "W")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        export.main(flags)
    assert not (tmp_path / "O").exists()


def test_too_large(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"at most 0\.00 GB"):
        artifact.write(saved.load_run(finished.workdir), tmp_path / "x", ("cpu",))


@pytest.mark.parametrize("whiten", [False, True], ids=["scaled", "whitened"])
def test_weights_alone(finished, data, images, tmp_path, whiten):
    workdir, path = finished.workdir, tmp_path / "bottle.safetensors"
    if whiten:
        workdir = tmp_path / "whitened"
        runs.train(runs.make_config(data, {"trunk.whiten": "always"}), workdir)
    export.main([f"--workdir={workdir}", f"--output={path}", "--weights"])
    metadata, weights = artifact.read_weights(path)
    assert (weights.statistics.whitening is not None) == whiten
    run = saved.load_run(workdir)
    runs.assert_same_arrays(weights, artifact.as_arrays(run.weights))
    found = jax.jit(artifact.make_function(metadata, weights))(images)
    expected = [r.score for r in ulsad_jax.Detector.load(workdir)(list(images))]
    np.testing.assert_allclose(found["score"], expected, rtol=1e-5, atol=1e-5)
    scores = [float(row["score"]) for row in runs.read_scores(workdir)]
    np.testing.assert_allclose(expected[:-1], scores, rtol=1e-5, atol=1e-5)
    for wrong in (tmp_path / "none", finished.workdir / files_of.TRUNK):
        with pytest.raises(UserError, match="export --weights"):
            artifact.read_weights(wrong)


@pytest.mark.parametrize("error", [0.0, 1e-3, np.nan])
def test_onnx_is_compared_before_it_is_written(error, monkeypatch):
    """onnxruntime is not among the requirements: what it would compute is given."""

    class Session:
        def __init__(self, content, providers):
            assert content == b"model"

        def get_outputs(self):
            return [types.SimpleNamespace(name=name) for name in ("map", "score")]

        def run(self, names, inputs):
            (images,) = inputs.values()
            wrong = error if len(images) == 3 else 0.0  # of all batches the second
            found = function(images)
            return [found["map"], found["score"] * (1 + wrong)]

    def function(image):
        score = image.mean((1, 2, 3), dtype=np.float32)
        return {"score": score, "map": image[..., 0].astype(np.float32)}

    module = types.SimpleNamespace(InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    differences = export_onnx.compare(b"model", function, (32, 64))
    assert differences["map"] < 1e-6
    assert differences["score"] == pytest.approx(error, rel=0.5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("module", ["export", "export_onnx"])
def test_help_needs_no_jax(module):
    program = f"""
import sys
from ulsad_jax import {module}
try:
    {module}.main(["--help"])
except SystemExit as stopped:
    assert stopped.code == 0
assert not {{"jax", "numpy"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
