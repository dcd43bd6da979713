"""A layout and a metric of one's own, with an own trunk: one config line each."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from tests import runs, trees
from ulsad_jax import Detector
from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import TEST, TRAIN, Record
from ulsad_jax.metrics.base import IMAGE, PIXEL, Metric
from ulsad_jax.runs import run as run_lib
from ulsad_jax.runtime.errors import UserError


def find_records(root: Path, category: str) -> list[Record]:
    """Reads one flat folder: 000_train.png, 007_good.png, 009_dent.png."""
    records = []
    for path in sorted((root / category).glob("*.png")):
        kind = path.stem.split("_")[1]
        is_normal = kind in ("train", "good")
        split = TRAIN if kind == "train" else TEST
        records.append(Record(path, split, "good" if is_normal else kind))
    return records


LAYOUT = Layout(
    "Flat folders",
    categories=lambda root: sorted(p.name for p in root.iterdir() if p.is_dir()),
    records=find_records,
)
SPREAD = Metric("spread", IMAGE, lambda images: float(np.ptp(images.scores)))
AREA = Metric("area", PIXEL, lambda pixels: pixels.auroc())
NOTHING = 3
FIELDS = {
    "dataset.name": "tests.test_seams:LAYOUT",
    "trunk.architecture": "tests.toy_trunk:TOY",
    "method": "padim",
    "methods.padim.channels": 8,
    "evaluation.metrics": ("tests.test_seams:SPREAD", "tests.test_seams:AREA"),
    "evaluation.original_resolution": True,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("flat") / "shop"
    for i in range(12):
        kind = "train" if i < 7 else "good" if i < 9 else "dent"
        trees.write_image(root / "caps" / f"{i:03d}_{kind}.png")
    config = runs.make_config(root, FIELDS, category="caps")
    workdir = root.with_name("run")
    return runs.Run(workdir, config, runs.train(config, workdir))


def test_own_parts_make_a_run(run):
    metrics = runs.read_results(run.workdir, "caps")["metrics"]
    scores = [float(row["score"]) for row in runs.read_scores(run.workdir, "caps")]
    assert len(scores) == metrics["test_images"] == 5
    assert metrics["test_anomalous"] == 3
    assert metrics["SPREAD"] == pytest.approx(max(scores) - min(scores), rel=1e-5)
    for name in ("AREA", "AREA_original"):  # no mask is known
        assert metrics[name] is None


def test_own_metrics_have_their_columns(run):
    head = run.printed.splitlines()[0]
    assert "spread" in head and "area (original size)" in head
    report = (run.workdir / "report.html").read_text()
    assert "<th>spread</th>" in report
    with (run.workdir / "results.csv").open(newline="") as file:
        assert {"SPREAD", "AREA", "AREA_original"} <= set(next(csv.reader(file)))


def test_own_parts_are_found_again(run):
    assert run_lib.evaluate(run.workdir) == run.printed
    row = runs.read_scores(run.workdir, "caps")[0]
    found = Detector.load(run.workdir)(row["image"])
    assert found.score == pytest.approx(float(row["score"]), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset.name": "tests.test_seams:LAYUOT"}, "mean 'LAYOUT'"),
        ({"dataset.name": "foldr"}, r"one of btad, folder.*mean 'folder'"),
        ({"evaluation.metrics": ("tests.test_seams:NOTHING",)}, "hold a Metric"),
        ({"evaluation.metrics": ("aupor",)}, r"image_auroc.*mean 'aupro'"),
        ({"evaluation.metrics": "aupro"}, "a tuple of names"),
    ],
    ids=str,
)
def test_wrong_names_are_refused_before_anything_is_written(
    run, tmp_path, fields, message
):
    config = run.config.copy_and_resolve_references()
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
