"""A trunk is one file and its name, be it of the package or of the user's own."""

from __future__ import annotations

import json
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import runs
from ulsad_jax import Detector, artifact, export, predict
from ulsad_jax.runs import run as experiment
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import base
from ulsad_jax.trunks.pyramid import FeaturePyramid, feature_shapes

TOY = "tests.toy_trunk:TOY"
FIELDS = {"trunk.architecture": TOY, "train.num_epochs": 1}


@pytest.fixture(scope="module")
def toy(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("toy") / "run"
    config = runs.make_config(data, FIELDS)
    return runs.Run(workdir, config, runs.train(config, workdir))


def test_own_trunk_trains(toy):
    checkpoint = runs.read_checkpoint(toy.workdir)
    channels = checkpoint["model"]["channels"]
    assert channels["mean"].shape == (40,)  # 16 of its outputs "fine", 24 of "coarse"
    assert channels["whitening"].shape == (40, 40)
    assert checkpoint["progress"]["trunk"]["architecture"] == TOY
    assert runs.read_results(toy.workdir)["trunk"]["architecture"] == TOY


def test_own_trunk_is_evaluated_again(toy, tmp_path):
    run = runs.copy(toy, tmp_path)
    experiment.evaluate(run.workdir)
    assert runs.read_scores(run.workdir) == runs.read_scores(toy.workdir)


def test_own_trunk_predicts(toy, data, tmp_path):
    folder = data / "bottle" / "test" / "good"
    output = tmp_path / "predicted"
    flags = [f"--workdir={toy.workdir}", f"--output={output}"]
    predict.main([*flags, str(folder)])
    lines = (output / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    expected = {row["image"]: row["score"] for row in runs.read_scores(toy.workdir)}
    assert len(lines) == len(list(folder.iterdir()))
    for row in map(json.loads, lines):
        score = float(expected[str(folder / row["image"])])
        assert row["score"] == pytest.approx(score, rel=1e-4, abs=1e-4)


def test_own_trunk_is_exported(toy, tmp_path):
    path = tmp_path / "toy.zip"
    export.main([f"--workdir={toy.workdir}", f"--output={path}", "--platforms=cpu"])
    with zipfile.ZipFile(path) as file:
        about = json.loads(file.read(artifact.METADATA))
        detect = jax.export.deserialize(bytearray(file.read(artifact.MODEL))).call
    assert about["config"]["trunk"]["architecture"] == TOY
    assert about["config"]["trunk"]["layers"] == "fine+coarse"
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    expected = Detector.load(toy.workdir)(image).score
    found = float(detect(image[None])["score"][0])
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_own_trunk_from_a_file(toy, data, tmp_path):
    """A run's own copy is in PyTorch's names."""
    path = tmp_path / "toy.safetensors"
    path.write_bytes((toy.workdir / "trunk.safetensors").read_bytes())
    assert load_file(path)["coarse.weight"].shape == (24, 16, 5, 5)
    fields = FIELDS | {"trunk.source": "file", "trunk.path": str(path)}
    runs.train(runs.make_config(data, fields), tmp_path / "run")
    one, other = (
        runs.read_results(w)["trunk"] for w in (toy.workdir, tmp_path / "run")
    )
    assert other["sha256"] == one["sha256"]
    assert other["source"] == "file:toy.safetensors"
    runs.assert_same_arrays(
        runs.read_checkpoint(tmp_path / "run")["model"],
        runs.read_checkpoint(toy.workdir)["model"],
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trunk.layers": "half"}, r"outputs of tests.*TOY \(coarse, fine\).*'half'"),
        (
            {"trunk.source": "builtin"},
            r"built in \(tf_eff\w*\), found",
        ),
        ({"trunk.architecture": "tests.toy_trunk:TOYS"}, "Did you mean 'TOY'"),
        ({"trunk.architecture": "tests.toy_trunk:Toy"}, "to be an Architecture of"),
        ({"trunk.architecture": "tests.no_trunk:TOY"}, "importable, found: No module"),
        (
            {"trunk.architecture": "tests.toy_trunk:COARSE"},
            r"config.image_size to be multiples.*trunk.image_size='\(1024, 1024\)'",
        ),
        (
            {"trunk.architecture": "tests.toy_trunk:COARSE", "image_size": (128, 128)},
            r"an eighth of the image's grid, \(16, 16\).*found \(8, 8\).*"
            r"trunk\.image_size to 2 times the height and 2 times the width",
        ),
        (
            {
                "trunk.architecture": "tests.toy_trunk:COARSE",
                "trunk.image_size": (64, 128),
            },
            r"config\.trunk\.image_size to be multiples of 128, .*found \(64, 128\)",
        ),
        ({"trunk.image_size": (128,)}, r"trunk\.image_size to be \(height, width\), "),
    ],
)
def test_trunk_that_will_not_do(data, tmp_path, fields, message):
    config = runs.make_config(data, FIELDS | fields)
    with pytest.raises(UserError, match=message):
        runs.train(config, tmp_path / "run")


def test_every_trunk_gives_what_it_names():
    for name, architecture in base.collect().items():
        base.check_layers(name, architecture.layers)
        outputs, multiple = base.shapes(name)[0], architecture.multiple
        side = outputs[architecture.grid].shape[1]  # of a square of 2 multiples
        channels = sum(output.shape[-1] for output in outputs.values())
        pyramid = FeaturePyramid(name, layers="+".join(outputs))
        found = feature_shapes(pyramid, (2 * multiple, 3 * multiple)).shape
        assert found == (1, side, 3 * side // 2, architecture.channels or channels)
