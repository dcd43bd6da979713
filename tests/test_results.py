from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from tests import runs
from ulsad_jax.data.records import Record
from ulsad_jax.metrics.values import finite, mean_row
from ulsad_jax.report import figures, pictures, tables
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs import results
from ulsad_jax.runtime import files
from ulsad_jax.runtime.writer import Writer
from ulsad_jax.scoring.prediction import Prediction

NAN = math.nan
ABOUT = {"selection": "last", "selected_on_test": False}
ROWS = {
    "bottle": {"image_auroc": 0.5, "aupro": NAN, "image_auroc/cut": 0.25},
    "cable": {"image_auroc": 1.0, "aupro": NAN, "test_images": 3},
}


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def read_json(path: Path):
    return json.loads(path.read_text(), parse_constant=refuse_constant)


def test_mean_leaves_undefined_metrics_out():
    rows = {"a": {"x": 1.0, "y": NAN}, "b": {"x": NAN, "y": NAN}, "c": {"x": 2.0}}
    mean = mean_row(rows)
    assert mean["x"] == 1.5
    assert math.isnan(mean["y"])


def test_undefined_metric_is_null(tmp_path):
    results.write(tmp_path, ROWS, ABOUT)
    document = read_json(tmp_path / "results.json")
    assert document["categories"]["bottle"]["aupro"] is None
    assert document["mean"]["aupro"] is None
    assert document["mean"]["image_auroc"] == 0.75
    assert document["selected_on_test"] is False


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_json_has_finite_numbers_alone(value):
    text = json.dumps(finite({"x": value, "n": 3}))
    assert json.loads(text, parse_constant=refuse_constant) == {"x": None, "n": 3}


def test_csv(tmp_path):
    results.write(tmp_path, ROWS, ABOUT | {"selected_on_test": True})
    rows = runs.read_table(tmp_path / "results.csv")
    assert [row["category"] for row in rows] == ["bottle", "cable", "mean"]
    assert {row["selected_on_test"] for row in rows} == {"True"}
    assert [row["image_auroc"] for row in rows] == ["0.5", "1.0", "0.75"]
    assert rows[1]["image_auroc/cut"] == "nan"


def test_table():
    lines = tables.table(ROWS, ABOUT).splitlines()
    assert lines[0].split() == ["category", "image", "AUROC", "AUPRO"]
    assert [line.split() for line in lines[1:4]] == [
        ["bottle", "50.00", "-"],
        ["cable", "100.00", "-"],
        ["mean", "75.00", "-"],
    ]
    assert lines[4] == "bottle, image AUROC by type: cut 25.00"
    assert len({len(line) for line in lines[:4]}) == 1


def test_table_of_au_spro_is_its_headline_alone():
    row = {"image_auroc": 0.5, "au_spro_0.01": 0.125, "au_spro_0.05": 0.25}
    row |= {"au_spro_0.01/a": 0.0, "au_spro_0.05/a": 0.75, "au_spro_0.05/b": NAN}
    lines = tables.table({"pushpins": row}, ABOUT).splitlines()
    assert lines[0].endswith("image AUROC  AU-sPRO 0.05")
    assert lines[1].split() == ["pushpins", "50.00", "25.00"]
    assert lines[2:] == ["pushpins, AU-sPRO 0.05 by type: a 75.00, b -"]


def test_table_has_what_is_measured_at_original_size_beside_the_rest():
    row = {"pixel_auroc": 0.5, "pixel_f1_max": 0.5, "aupro": 0.25}
    assert "original" not in tables.table({"bottle": row}, ABOUT)
    original = {"pixel_auroc_original": 0.75, "aupro_original": 0.125}
    lines = tables.table({"bottle": row | original}, ABOUT).splitlines()
    assert lines[0].split("  ") == [
        *("category", "pixel AUROC", "pixel AUROC (original size)", "pixel F1"),
        *("AUPRO", "AUPRO (original size)"),
    ]
    assert lines[1].split() == ["bottle", "50.00", "75.00", "50.00", "25.00", "12.50"]


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        ({}, "config.evaluation.original_resolution=True"),
        ({"aupro_original": 0.5}, "see the metrics at original size"),
    ],
)
def test_table_says_how_many_masks_are_lost(more, advice):
    row = {"test_anomalous": 9, "pixel_images_left_out": 1, "aupro": 0.99} | more
    assert "no pixel left" not in tables.table({"a": row | {"masks_lost": 0}}, ABOUT)
    text = tables.table({"a": row | {"masks_lost": 7}}, ABOUT)
    assert "a, 7 of 8 masks have no pixel left at model resolution" in text
    assert advice in text and "config.image_size" in text


def test_table_of_one_category_has_no_mean():
    assert "mean" not in tables.table({"bottle": ROWS["bottle"]}, ABOUT)


def test_table_of_nothing_measured():
    text = tables.table({"mine": {"test_images": 0, "test_anomalous": 0}}, ABOUT)
    assert "mine" in text


def test_table_says_what_it_rests_on():
    rows = {"bottle": {"image_auroc": 1.0, "pixel_images_left_out": 4}}
    assert "leave out 4 anomalous images" in tables.table(rows, ABOUT)
    marked = tables.table(rows, ABOUT | {"selected_on_test": True})
    assert "SELECTED ON THE TEST SET" in marked
    assert "SELECTED" not in tables.table(rows, ABOUT)


@pytest.mark.parametrize(
    "name",
    ["..", "../..", "/", "", ".", "/etc/passwd", "a/b", "a\\b", "\0", "~", "é ü"],
)
def test_file_name_stays_in_its_folder(name, tmp_path):
    path = tmp_path / files.safe_name(name)
    path.mkdir()
    assert path.resolve().parent == tmp_path.resolve()


@pytest.mark.parametrize("name", ["bottle", "metal_nut", "01", "my-box.2"])
def test_file_name_of_a_plain_name_is_the_name(name):
    assert files.safe_name(name) == name


LONG = {"ascii": "x" * 300, "han": "漢" * 100, "spaces": "x y" * 100, "two": "é" * 200}


@pytest.mark.parametrize("name", LONG.values(), ids=LONG)
@pytest.mark.parametrize("ending", ["", ".png", ".tiff"])
def test_file_name_is_never_too_long(name, ending, tmp_path):
    found = set()
    for length in range(60, len(name)):
        file = files.safe_name(name[:length], ending)
        assert len(file.encode()) <= 255 and file.endswith(ending)
        (tmp_path / file).touch()
        found.add(file)
    assert len(found) == len(range(60, len(name)))
    assert files.safe_name("x" * 240, ".png") == f"{'x' * 240}.png"


def test_long_names_that_begin_alike_are_two_files():
    names = [f"{'x' * 250}{i}" for i in range(9)]
    assert len({files.safe_name(name, ".png") for name in names}) == 9
    odd = b"\xff".decode(errors="surrogateescape") * 255  # as a path has it
    assert len(os.fsencode(files.fit_name(odd, ".png"))) == 255


def test_file_names_differ_as_names_do():
    names = ["a b", "a_b", "a/b", "a", ".a", "..a", "", "_", "/", ".", "é", "è"]
    assert len({files.safe_name(name) for name in names}) == len(names)


TAKEN = ("config.json", "maps", "results.csv.tmp", "diverged.txt", "sweep.json")


@pytest.mark.parametrize("name", TAKEN)
def test_folder_of_a_category_is_called_unlike_a_file_of_the_run(name):
    assert re.fullmatch(re.escape(name) + "-[0-9a-f]{8}", files_of.folder_name(name))
    assert files.safe_name(name) == name  # where the run has no files of its own


@pytest.mark.parametrize("name", ["bottle", "01", "a b", ".lock", "config", "Maps"])
def test_folder_of_another_category_is_called_as_any_file(name):
    assert files_of.folder_name(name) == files.safe_name(name) != ".lock"


def test_category_named_as_the_mean_has_a_line_of_its_own():
    rows = {"mean": {"image_auroc": 0.25}, "b": {"image_auroc": 0.75}}
    lines = tables.table(rows, ABOUT).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["mean", "25.00"],
        ["b", "75.00"],
        ["mean", "50.00"],
    ]


def test_scores(tmp_path):
    records = [Record(Path("/d/good/0.png"), "test")]
    records += [Record(Path("/d/cut/a,b.png"), "test", "cut")]
    maps = np.zeros((2, 4, 4), np.float32)
    prediction = Prediction(
        anomaly_map=maps,
        score=np.float32([0.1, 0.7]),
        scores={"global": np.float32([3, 4]), "local": np.float32([1, 2])},
        normalized_score=np.float32([0.25, 5]),
        is_anomalous=np.array([False, True]),
        mask_area=np.int32([0, 4]),
        maps={},
    )
    results.write_scores(tmp_path / "scores.csv", records, prediction)
    first, second = runs.read_table(tmp_path / "scores.csv")
    assert first["image"] == "/d/good/0.png"
    assert (second["name"], second["type"], second["label"]) == ("cut/a,b", "cut", "1")
    assert np.float32(first["score"]) == np.float32(0.1)  # every digit
    assert (second["local_score"], second["global_score"]) == ("2.0", "4.0")
    assert (first["is_anomalous"], second["is_anomalous"]) == ("False", "True")
    assert (second["normalized_score"], second["mask_area"]) == ("5.0", "4")
    assert (first["mask_share"], second["mask_share"]) == ("0.0", "0.25")


def draw_picture(anomaly_map, *, mask=None, low=0.0, high=1.0):
    shape = anomaly_map.shape
    mask = np.zeros(shape, bool) if mask is None else mask
    image = np.full((*shape, 3), 100, np.uint8)
    return figures.picture(image, mask, anomaly_map, low=low, high=high, threshold=9)


def test_picture_has_three_panels():
    drawn = draw_picture(np.zeros((64, 96), np.float32))
    assert drawn.shape == (64, 3 * 96 + 8, 3)
    assert drawn.dtype == np.uint8
    assert (drawn[:, :96] == 100).all()
    assert (drawn[:, 100:196] == 100).all()


def test_pictures_have_one_scale():
    """Equal values have equal colours, whatever else is in their maps."""
    a, b = np.zeros((2, 64, 64), np.float32)
    a[:32], b[:32], b[32:] = 0.5, 0.5, 0.9
    first, second = draw_picture(a), draw_picture(b)
    np.testing.assert_array_equal(first[:32], second[:32])
    assert (first[40, -1] != second[40, -1]).any()


def test_scale_ends_at_its_limits():
    cold, hot = (figures.heatmap(np.full((1, 1), v), 2.0, 4.0) for v in (2.0, 4.0))
    assert cold.sum() < hot.sum()
    below, above = (figures.heatmap(np.full((1, 1), v), 2.0, 4.0) for v in (-9, 99))
    np.testing.assert_array_equal(below, cold)
    np.testing.assert_array_equal(above, hot)


def test_ground_truth_is_outlined_not_covered():
    mask = np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True
    drawn = draw_picture(np.zeros((64, 64), np.float32), mask=mask)
    panel = drawn[:, 68:132]
    assert (panel[mask] == 100).all()
    assert (panel[19, 25] == figures.CONTOUR).all()
    assert (panel[10, 10] == 100).all()


def test_unknown_ground_truth_is_a_grey_panel():
    image, anomaly_map = np.full((64, 64, 3), 100, np.uint8), np.zeros((64, 64))
    drawn = figures.picture(image, None, anomaly_map, low=0, high=1, threshold=9)
    assert (drawn[:, :64] == 100).all()
    assert (drawn[:, 68:132] == figures.UNKNOWN).all()


def read_lines(folder: Path):
    return [read_json_line(x) for x in (folder / "metrics.jsonl").read_text().split()]


def read_json_line(line: str):
    return json.loads(line)


def write_epochs(folder: Path, epochs) -> None:
    with Writer(folder, "bottle") as writer:
        for epoch in epochs:
            record = {"loss/local": 1.0, "loss/total": 2.0 / epoch}
            writer.epoch(epoch, 9, 10 * epoch, record, 0.5)


def test_writer_reports_an_epoch(tmp_path, capsys):
    write_epochs(tmp_path, [1, 2])
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(text[1]) == {
        **{"epoch": 2, "step": 20, "loss/local": 1.0, "loss/total": 1.0},
        "seconds": 0.5,
    }
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "[bottle] epoch 1/9: loss 2.0000 (local 1.0000), 0.5 s"
    assert read_events(tmp_path)["loss/total"] == [(10, 2.0), (20, 1.0)]


@pytest.mark.parametrize("cut", ["", '{"epoch": 4, "st', "\n"])
def test_writer_drops_what_happens_again(tmp_path, cut):
    write_epochs(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join(before) + "\n" + cut)
    with Writer(tmp_path, "bottle") as writer:
        writer.rewind(20)
    assert path.read_text().splitlines() == before[:2]
    with Writer(tmp_path, "bottle") as writer:
        writer.rewind(0)
    assert path.read_text() == ""


def test_writer_has_nothing_to_drop(tmp_path):
    with Writer(tmp_path, "bottle") as writer:
        writer.rewind(0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_writer_takes_pictures(tmp_path):
    with Writer(tmp_path, "bottle") as writer:
        writer.pictures(3, [("test/good", np.zeros((8, 9, 3), np.uint8))])
        writer.scalars(3, {"test/image_auroc": 0.5})
    events = read_events(tmp_path)
    assert events["test/image_auroc"] == [(3, 0.5)]
    ((step, image),) = events["test/good"]
    assert (step, image.height, image.width) == (3, 8, 9)


def read_events(folder):
    """TensorBoard's files: for each tag, (step, number or image)."""
    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[start : start + 8], "little")
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + size])
            start += 12 + size + 4
            for value in event.summary.value:
                given = value.image if value.HasField("image") else value.simple_value
                found.setdefault(value.tag, []).append((event.step, given))
    return found


def test_a_run_is_in_tensorboard(finished):
    events = read_events(finished.workdir / "bottle")
    metrics = runs.read_metrics(finished.workdir)
    for name in ("loss/total", "validation/total"):
        expected = [(line["step"], line[name]) for line in metrics if name in line]
        assert events[name] == [(step, pytest.approx(v)) for step, v in expected]
    auroc = runs.read_results(finished.workdir)["mean"]["image_auroc"]
    assert events["test/image_auroc"] == [(metrics[-1]["step"], pytest.approx(auroc))]
    assert {"test/good", "test/broken"} <= events.keys()


def test_pictures_of_a_run_have_three_panels(finished):
    path = next((finished.workdir / "bottle" / "pictures" / "good").iterdir())
    with Image.open(path) as picture:
        assert picture.size == (3 * 64 + 8, 64)


def test_pictures_of_a_run_have_one_scale(tmp_path):
    """A map is not stretched from its own lowest to its own highest value."""
    image = np.full((32, 32, 3), 128, np.uint8)
    maps = np.zeros((2, 32, 32), np.float32)
    maps[0, :, 16:], maps[1, :, 16:] = 0.5, 2.0  # 0 is in both
    maps[:, 16:, 16:] = 0.5
    pictures.write(
        tmp_path,
        SimpleNamespace(score=maps.max((1, 2)), anomaly_map=maps),
        SimpleNamespace(
            types=["good", "good"],
            labels=np.zeros(2, int),
            images=np.stack([image, image]),
            masks=np.zeros(maps.shape, bool),
            has_mask=np.ones(2, bool),
        ),
        ["low", "high"],
        SimpleNamespace(
            calibration=SimpleNamespace(display_low=0.0, display_high=1.0),
            thresholds=SimpleNamespace(pixel=9.0),
        ),
        limit=-1,
    )
    low, high = (
        np.asarray(Image.open(tmp_path / "good" / f"{name}.png"))[:, -32:]
        for name in ("low", "high")
    )
    assert low.shape == (32, 32, 3)
    np.testing.assert_array_equal(low[:, :16], high[:, :16])
    np.testing.assert_array_equal(low[16:], high[16:])
    assert (low[:16, 16:] != high[:16, 16:]).any(-1).all()
