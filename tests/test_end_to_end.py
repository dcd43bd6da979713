"""The commands, as a person types them, on photographs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageDraw

from tests import runs

TILE = 64
EPOCHS = 6
SPLITS = {"train/good": 40, "test/good": 12, "test/scratch": 12}
FLAGS = {
    "image_size": "(64, 64)",
    "trunk.source": "random",
    "trunk.architecture": "resnet18",
    "model.local_width": "8",
    "train.num_epochs": str(EPOCHS),
    "train.num_updates": "0",
    "train.checkpoint_every": "3",
    "train.batch_size": "4",
    "optimizer.learning_rate": "2e-3",
    "evaluation.pictures_per_type": "2",
}


def write_photographs(root: Path, name: str) -> Path:
    """Tiles of a photograph that scikit-image ships, some of them scratched."""
    photo = np.asarray(Image.open(Path(skimage.__file__).parent / "data" / name))
    rng = np.random.default_rng(0)
    corners = rng.permutation(
        [(y, x) for y in range(0, 512, TILE) for x in range(0, 512, TILE)]
    ).tolist()
    for folder, count in SPLITS.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            y, x = corners.pop()
            tile = Image.fromarray(photo[y : y + TILE, x : x + TILE])
            if folder == "test/scratch":
                scratch(tile, root / "ground_truth/scratch" / f"{i:03d}_mask.png", rng)
            tile.save(root / folder / f"{i:03d}.png")
    return root


def scratch(tile: Image.Image, mask_path: Path, rng: np.random.Generator) -> None:
    """Paints a bright line across the middle and writes its mask."""
    mask = Image.new("L", tile.size)
    line = [(10, int(rng.integers(10, 54))), (54, int(rng.integers(10, 54)))]
    for image in (tile, mask):
        ImageDraw.Draw(image).line(line, fill=255, width=4)
    mask_path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(mask_path)


def run(*command: str) -> str:
    """Runs a program of the repository; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=runs.REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work directory of a run and what its command printed."""
    folder = tmp_path_factory.mktemp("end_to_end")
    root = write_photographs(folder / "photographs", "brick.png")
    flags = {**FLAGS, "dataset.cache_dir": str(folder / "cache")}
    printed = run(
        "train.py",
        f"--config=configs/folder.py:{root}",
        *(f"--config.{field}={value}" for field, value in flags.items()),
        f"--workdir={folder / 'run'}",
    )
    return folder / "run", printed


def test_results(trained):
    workdir, printed = trained
    document = json.loads((workdir / "results.json").read_text())
    metrics = document["categories"]["photographs"]
    assert metrics["test_images"] == 24 and metrics["test_anomalous"] == 12
    assert metrics["pixel_images_left_out"] == 0
    # 1.0 and about 0.9 when this was written; 0.5 is chance.
    assert metrics["image_auroc"] > 0.85
    assert metrics["pixel_auroc"] > 0.75
    assert document["trunk"]["source"] == "random:0"
    assert not document["selected_on_test"]
    row, mean = runs.read_table(workdir / "results.csv")
    assert (row["category"], mean["category"]) == ("photographs", "mean")
    assert float(row["image_auroc"]) == metrics["image_auroc"]
    assert f"{100 * metrics['pixel_auroc']:.2f}" in printed
    assert str(workdir / "results.json") in printed


def test_scores(trained):
    rows = runs.read_scores(trained[0], "photographs")
    labels = [row["label"] for row in rows]
    assert labels == ["0"] * 12 + ["1"] * 12
    assert {row["type"] for row in rows} == {"good", "scratch"}
    assert all(Path(row["image"]).is_file() for row in rows)
    assert all(np.isfinite(float(row["score"])) for row in rows)


def test_pictures(trained):
    folder = trained[0] / "photographs" / "pictures"
    assert sorted(f.name for f in folder.iterdir()) == ["good", "scratch"]
    for kind in folder.iterdir():
        pictures = [np.asarray(Image.open(path)) for path in kind.glob("*.png")]
        assert len(pictures) == 2
        assert all(p.shape[0] >= TILE and p.shape[1] >= 3 * TILE for p in pictures)
        assert all(p.std() > 0 for p in pictures)


def test_metrics_of_the_epochs(trained):
    text = (trained[0] / "photographs" / "metrics.jsonl").read_text()
    epochs = [json.loads(line) for line in text.splitlines()]
    assert [entry["epoch"] for entry in epochs] == list(range(1, EPOCHS + 1))
    assert ["validation/total" in entry for entry in epochs] == [False, False, True] * 2
    assert epochs[-1]["loss/total"] < 0.7 * epochs[0]["loss/total"]
    assert epochs[-1]["validation/total"] < epochs[2]["validation/total"]


def test_evaluating_again_gives_the_same(trained):
    workdir, _ = trained
    paths = [workdir / "results.json", workdir / "photographs" / "scores.csv"]
    before = [path.read_text() for path in paths]
    for path in paths:
        path.unlink()
    printed = run("eval.py", f"--workdir={workdir}")
    assert [path.read_text() for path in paths] == before
    assert "photographs, image AUROC by type: scratch" in printed


def test_evaluating_in_another_way(trained, tmp_path):
    """Every flag arrives where it belongs."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    moved = shutil.copytree(
        trained[0].parent / "photographs", tmp_path / "moved" / "photographs"
    )
    flags = [f"--root={moved}", "--write_maps"]
    flags += ["--image_threshold=0.25", "--pixel_threshold=0.75"]
    run("eval.py", f"--workdir={workdir}", *flags, "--selection=best_validation_loss")
    document = json.loads((workdir / "photographs" / "results.json").read_text())
    assert (document["image_threshold"], document["pixel_threshold"]) == (0.25, 0.75)
    assert document["selection"] == "best_validation_loss"
    rows = runs.read_scores(workdir, "photographs")
    assert all(Path(row["image"]).is_relative_to(moved) for row in rows)
    assert len(list((workdir / "maps/photographs/test").glob("*/*.tiff"))) == 24
