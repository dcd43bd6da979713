"""A trunk that sees larger images than the method's networks do."""

from __future__ import annotations

import json
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from tests import runs
from ulsad_jax import Detector, artifact, export
from ulsad_jax.data.resize import resize_bilinear
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import data as data_lib
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import setup
from ulsad_jax.runtime.devices import find_devices
from ulsad_jax.sweep.shared import Source
from ulsad_jax.trunks import features, sources

LARGE, SMALL = (128, 128), (64, 64)
FIELDS = {
    "trunk.architecture": "tests.toy_trunk:COARSE",
    "trunk.image_size": LARGE,
}
# One that takes features, and one that takes the images beside them.
METHODS = {"method": "padim+tests.test_methods:Pixels", "methods.padim.channels": 8}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("large") / "run"
    config = runs.make_config(data, FIELDS | METHODS)
    return runs.Run(workdir, config, runs.train(config, workdir))


def test_run_is_evaluated_again(run, tmp_path):
    again = runs.copy(run, tmp_path)
    experiment.evaluate(again.workdir)
    assert runs.read_scores(again.workdir) == runs.read_scores(run.workdir)
    assert "image size of the trunk" in (run.workdir / "report.html").read_text("utf-8")


def test_detector_and_export_take_the_larger_images(run, tmp_path):
    path = tmp_path / "large.zip"
    export.main([f"--workdir={run.workdir}", f"--output={path}", "--platforms=cpu"])
    with zipfile.ZipFile(path) as file:
        about = json.loads(file.read(artifact.METADATA))
        detect = jax.export.deserialize(bytearray(file.read(artifact.MODEL))).call
    assert (about["image_size"], about["map_size"]) == ([*LARGE], [*SMALL])
    detector = Detector.load(run.workdir)
    assert detector.image_size == LARGE
    for row in runs.read_scores(run.workdir)[:3]:
        score = pytest.approx(float(row["score"]), rel=1e-4, abs=1e-4)
        photo = np.asarray(Image.open(row["image"]).convert("RGB"))
        assert detector(photo).score == score
        found = detect(resize_bilinear(photo, LARGE)[None])
        assert float(found["score"][0]) == score
        assert found["anomaly_map"].shape == (1, *SMALL)


def test_networks_get_small_images_however_they_are_read(data):
    config = config_lib.resolve(runs.make_config(data, FIELDS))
    made, category = setup.make(config), data_lib.open_data(config, "bottle")
    trunk = setup.load_trunk(config)
    splits = category.train, category.validation
    whole = {"whiten": False, "devices": find_devices()}

    def read():
        batches = [split.batches(4) for split in splits]
        return made.pyramid, trunk.variables, batches, [len(split) for split in splits]

    kept = sources.keep(*read(), **whole).train
    streamed = sources.stream(*read(), image_size=LARGE, **whole).train
    extractor = features.make_extractor(made.pyramid, trunk.variables)
    shared = Source(category, extractor, batch_size=4, title="")
    rows = np.array([3, 0, 1])
    images, expected = kept.batch(rows)
    assert expected.shape[1:] == made.features.shape[1:] == (8, 8, 16)
    for i, row in enumerate(rows):
        large = resize_bilinear(category.train.original(row).image, LARGE)
        np.testing.assert_array_equal(images[i], resize_bilinear(large, SMALL))
    for source in (streamed, shared.part(category, whiten=False).train):
        same, found = source.batch(rows)
        np.testing.assert_array_equal(same, images)
        np.testing.assert_allclose(found, expected, atol=2e-5)
    told = sources.count_bytes(len(kept), made.image_size, made.features)
    assert told == kept.images.nbytes + kept.features.nbytes


def test_masks_have_the_size_of_maps(data):
    own, plain = (
        next(data_lib.open_data(config, "bottle").test.batches(7))
        for config in (runs.make_config(data, FIELDS), runs.make_config(data))
    )
    assert own["image"].shape == (7, *LARGE, 3)
    np.testing.assert_array_equal(own["gt_mask"], plain["gt_mask"])
    assert own["gt_mask"].any()


def test_methods_of_images_have_no_trunk_to_see_larger_ones(data):
    fields = FIELDS | {"method": "tests.test_methods:Pixels"}
    config = runs.make_config(data, fields, image_size=LARGE)
    config.trunk.image_size = (256, 256)
    assert config_lib.input_size(config) == setup.make(config).input_size == LARGE
