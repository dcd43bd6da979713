"""How pictures are held and how deep they are stored, through the commands.

Two runs see the same pixels: one plain files, the other files of every kind.
"""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
from PIL import Image

import ulsad_jax
from configs import folder as folder_config
from tests import formats, runs
from ulsad_jax import predict
from ulsad_jax.runs import data as data_lib
from ulsad_jax.runs import run as experiment
from ulsad_jax.runtime.errors import UserError

SIZE = (48, 64)
LOSSLESS = ("png", "tif", "webp")


def draw(seed, *, defect=False):
    pixels = formats.draw_grey(seed, size=SIZE)
    if defect:
        pixels[30:42, 44:58] = 255
    return pixels


def write_plain(folder, stem, pixels, i):
    formats.save(folder / f"{stem}.png", pixels)


def write_odd(folder, stem, pixels, i):
    """Writes the same pixels, turned or deep."""
    i, is_deep = divmod(i, 2)
    if is_deep:
        name = list(formats.DEEP)[i % len(formats.DEEP)]
        path = formats.save_deep(folder, name, pixels, factor=16)
        path.rename(folder / f"{stem}{path.suffix}")
    else:
        path = folder / f"{stem}.{LOSSLESS[i % 3]}"
        formats.save(path, pixels, (3, 6, 8, 1, 5)[i % 5])


def write_data(root, write):
    number = itertools.count()
    for folder, count in (("train/good", 12), ("test/good", 6), ("test/dent", 6)):
        for stem in range(count):
            i = next(number)
            pixels = draw(i, defect=folder == "test/dent")
            write(root / folder, f"{stem:03}", pixels, i)
    for stem in range(6):
        mask = np.zeros(SIZE, np.uint8)
        mask[30:42, 44:58] = 255
        path = root / "ground_truth" / "dent" / f"{stem:03}_mask.png"
        formats.save(path, mask, 1 if write is write_plain else (1, 6)[stem % 2])
    return root


def make_config(root, **fields):
    config = folder_config.get_config(str(root))
    cache = {"dataset.cache_dir": str(root.parent / "cache")}
    config.update_from_flattened_dict(runs.FIELDS | cache | fields)
    return config


def train(folder, name, write, **fields):
    config = make_config(write_data(folder / name / "mine", write), **fields)
    runs.train(config, folder / name / "run")
    return folder / name


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders of the two runs: mine/ has the data, run/ the run."""
    folder = tmp_path_factory.mktemp("images")
    fields = {
        "train.num_epochs": 1,
        "evaluation.original_resolution": True,
        "evaluation.write_maps": True,
        "dataset.white_level": float(formats.WHITE),
    }
    return [
        train(folder, name, write, **fields)
        for name, write in (("plain", write_plain), ("odd", write_odd))
    ]


def read_scores(folder):
    """The rows of scores.csv by name, without the image's path."""
    rows = runs.read_scores(folder / "run", "mine")
    return {tuple(row["image"].split("/")[-2:]): row for row in rows}


def test_evaluation_is_that_of_plain_files(both):
    plain, odd = (runs.read_results(folder / "run", "mine") for folder in both)
    assert {"aupro", "aupro_original"} <= odd["metrics"].keys()
    assert odd["metrics"] == plain["metrics"]
    assert odd["decisions"] == plain["decisions"]
    plain, odd = map(read_scores, both)
    scores = [[row["score"] for row in rows.values()] for rows in (plain, odd)]
    assert scores[0] == scores[1]
    for _, row in odd.items():
        map_ = next(both[1].glob(f"run/maps/mine/{_map_name(row)}.tiff"))
        with Image.open(map_) as image:
            assert image.size == SIZE[::-1]


def _map_name(row):
    kind, name = row["image"].split("/")[-2:]
    return f"test/{kind}/{name.rsplit('.', 1)[0]}"


def test_predictions_are_those_of_the_evaluation(both, tmp_path):
    odd = both[1]
    flags = [f"--workdir={odd / 'run'}", f"--output={tmp_path / 'found'}"]
    kinds = ["--overlays", "--masks", "--maps"]
    assert predict.main([*flags, *kinds, str(odd / "mine" / "test")]) == 0
    expected = {row["image"]: row for row in read_scores(odd).values()}
    rows = runs.read_table(tmp_path / "found" / "scores.csv")
    assert {row["image"] for row in rows} == set(expected)
    detector = ulsad_jax.Detector.load(odd / "run")
    for row in rows:
        score = pytest.approx(float(expected[row["image"]]["score"]), rel=1e-5)
        assert float(row["score"]) == score
        assert (int(row["height"]), int(row["width"])) == SIZE
        for image in (row["image"], Image.open(row["image"])):
            assert detector(image).score == score
        for kind, ending in (("overlays", "png"), ("masks", "png"), ("maps", "tiff")):
            path = tmp_path / "found" / kind / f"{row['name']}.{ending}"
            with Image.open(path) as picture:
                assert picture.size == SIZE[::-1]


def test_what_needs_a_white_level_is_refused_by_name(tmp_path):
    root = write_data(tmp_path / "mine", write_plain)
    path = formats.save_deep(root / "train/good", "float.tif", draw(0), factor=1 / 255)
    with pytest.raises(UserError, match=rf"{path} .* --config.dataset.white_level=1,"):
        data_lib.open_data(make_config(root), "mine")


def test_dark_sets_are_named_in_every_run(tmp_path, capsys):
    root = tmp_path / "mine"
    for i in range(4):
        path = formats.save_deep(root / "train/good", "grey16.png", draw(i), factor=4)
        path.rename(path.with_name(f"{i}.png"))
    for _ in range(2):
        data_lib.open_data(make_config(root), "mine")
        printed = capsys.readouterr()
        assert "4 files have 16 bits a channel, but no value above 1023" in printed.out
        assert "set --config.dataset.white_level=1023" in printed.out
    assert "Building" not in printed.err


def test_another_white_level_is_another_run(both, tmp_path):
    shutil.copytree(both[0] / "run", tmp_path / "run")
    config = make_config(both[0] / "mine", **{"train.num_epochs": 1})
    with pytest.raises(UserError, match=r"dataset\.white_level: the run has 4080\.0"):
        experiment.train(config, tmp_path / "run")
