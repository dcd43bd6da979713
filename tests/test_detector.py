from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ulsad_jax
from tests import formats, runs
from ulsad_jax.data.resize import resize_map
from ulsad_jax.runtime.errors import UserError

SCORES = ("score", "normalized_score", "local_score", "global_score")


@pytest.fixture(scope="module")
def detector(finished):
    return ulsad_jax.Detector.load(finished.workdir)


@pytest.fixture(scope="module")
def rows(finished):
    return runs.read_scores(finished.workdir)


def draw(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def assert_same(found, expected):
    for name in SCORES:
        ours, theirs = found.row()[name], expected.row()[name]
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert found.mask_area == expected.mask_area
    np.testing.assert_array_equal(found.mask, expected.mask)


@pytest.mark.parametrize("open_as", [str, Path, Image.open, "array"])
def test_scores_are_those_of_the_evaluation(detector, rows, open_as):
    for row in rows:
        path = row["image"]
        if open_as == "array":
            result = detector(np.asarray(Image.open(path)))
        else:
            result = detector(open_as(path))
        for name in SCORES:
            assert result.row()[name] == pytest.approx(
                float(row[name]), rel=1e-4, abs=1e-5
            )
        assert str(result.is_anomalous) == row["is_anomalous"]
        assert isinstance(result, ulsad_jax.Result)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9])
def test_list_in_list_out(detector, count):
    images = [draw(32, 40, 3) // (i + 1) for i in range(count)]
    found = detector(images)
    assert isinstance(found, list)
    assert len(found) == count
    for one, image in zip(found, images, strict=True):
        assert_same(one, detector(image))
    if count:
        for one, same in zip(detector(np.stack(images)), found, strict=True):
            assert_same(one, same)


def test_compiles_once(finished):
    detector = ulsad_jax.Detector.load(finished.workdir, batch_size=2)
    detector(draw(20, 30, 3))
    before = detector._predict._cache_size()  # shared by detectors of one architecture
    for images in ([draw(20, 30, 3)] * 3, draw(500, 30, 3), [draw(7, 9)] * 4):
        detector(images)
    assert detector._predict._cache_size() == before


def test_map_and_mask_have_the_size_of_the_input(detector):
    image = draw(96, 150, 3)
    result = detector(image)
    assert result.anomaly_map.shape == result.mask.shape == (96, 150)
    assert result.anomaly_map.dtype == np.float32
    threshold = detector.decisions.thresholds.pixel
    np.testing.assert_array_equal(result.mask, result.anomaly_map > threshold)
    assert result.mask_area == result.mask.sum()
    assert result.mask_share == result.mask.mean()
    same = detector(np.asarray(Image.fromarray(image).resize((64, 64))))
    assert same.anomaly_map.max() == same.score  # model resolution: the map itself


def test_own_resolution_is_the_map_resized(detector, rows):
    image = draw(64, 64, 3)
    large = image.repeat(3, axis=0)  # sampling its rows gives the image back
    expected = resize_map(detector(image).anomaly_map, (192, 64))
    np.testing.assert_allclose(detector(large).anomaly_map, expected, atol=1e-4)


def test_every_kind_of_image_is_its_rgb(detector):
    grey = draw(32, 40)
    expected = detector(np.repeat(grey[..., None], 3, axis=2))
    for image in (
        grey,
        grey[..., None],
        grey.astype(np.uint16) * 257,
        Image.fromarray(grey),
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey).convert("LA"),
    ):
        assert_same(detector(image), expected)
    color = draw(32, 40, 4)
    deep = color.astype(np.uint16) * 257
    expected = detector(color[..., :3])
    assert_same(detector(color), expected)
    assert_same(detector(deep), expected)
    assert_same(detector(deep[..., :3]), expected)
    assert_same(detector(Image.fromarray(color, "RGBA")), expected)
    palette = Image.fromarray(color[..., :3]).quantize(8)
    assert_same(detector(palette), detector(np.asarray(palette.convert("RGB"))))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 3), (3, 2, 3), (2000, 3, 3)])
@pytest.mark.parametrize("value", [0, 255])
def test_odd_images_have_a_result(detector, shape, value):
    result = detector(np.full(shape, value, np.uint8))
    assert np.isfinite(result.score)
    assert result.mask.shape == shape[:2]


@pytest.mark.parametrize(
    "wrong",
    [
        draw(8, 8, 3) > 0,
        draw(8, 8, 2),
        draw(8, 8, 2) / 255,
        draw(0, 8, 3),
        draw(8),
        pytest.param(Image.new("RGB", (0, 3)), id="empty"),
        None,
        3,
    ],
    ids=str,
)
def test_what_is_no_image_is_refused(detector, wrong):
    with pytest.raises(ValueError, match="Expected an image as uint8"):
        detector(wrong)


def load(path):
    image = Image.open(path.open("rb"))
    image.load()
    return image


@pytest.mark.parametrize(
    "open_as", [str, Image.open, load], ids=["path", "lazy", "load"]
)
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_one_scene_held_in_any_way(detector, tmp_path, ending, open_as):
    expected = detector(formats.draw())
    for orientation in formats.ORIENTATIONS:
        path = tmp_path / f"{orientation}.{ending}"
        formats.save(path, formats.draw(), orientation)
        result = detector(open_as(path))
        assert result.score == expected.score
        np.testing.assert_array_equal(result.anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize("white", [formats.WHITE, 0])
@pytest.mark.parametrize("name", formats.DEEP)
def test_deep_images_as_path_and_pil(finished, detector, tmp_path, name, white):
    pixels = formats.draw_grey()
    path = formats.save_deep(tmp_path, name, pixels, factor=16 if white else 257)
    if white:
        detector = load_with_white_level(finished, tmp_path, white)
    elif name in ("int32.tif", "float.tif"):
        for image in (path, Image.open(path)):
            with pytest.raises(UserError, match=r"config\.dataset\.white_level, found"):
                detector(image)
        return
    expected = detector(pixels)
    for image in (path, Image.open(path)):
        assert detector(image).score == expected.score


def load_with_white_level(finished, folder, white):
    """As if the run had been trained with one: its 8-bit images would be the same."""
    run = runs.copy(finished, folder)
    path = run.workdir / "config.json"
    fields = json.loads(path.read_text())
    fields["dataset"]["white_level"] = float(white)
    path.write_text(json.dumps(fields))
    return ulsad_jax.Detector.load(run.workdir)


def test_arrays_and_the_white_level(finished, detector, tmp_path):
    pixels = formats.draw()
    grey = pixels[..., 0]
    leveled = load_with_white_level(finished, tmp_path, 1020)
    for image, same in (
        (grey.astype(np.uint16) * 4, grey),
        (pixels.astype(np.uint16) * 4, pixels),
        (grey.astype(np.int32) * 4, grey),
        (pixels * 4.0, pixels),
        (pixels.astype(np.float32) * 4, pixels),
        (pixels, pixels),
    ):
        assert leveled(image).score == detector(same).score
    for image in (pixels / 255, grey.astype(np.int32)):
        with pytest.raises(UserError, match=rf"found an array of {image.dtype} with"):
            detector(image)
    with pytest.raises(UserError, match="finite values in an array of float64"):
        leveled(np.full((8, 8), np.nan))


def test_unreadable_file(detector, tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(UserError, match=r"readable image file.*a\.png"):
        detector(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b\.png"):
        detector([draw(8, 8, 3), tmp_path / "b.png"])


def test_thresholds_by_hand(finished, detector, rows):
    path = rows[0]["image"]
    before = detector(path)
    strict = ulsad_jax.Detector.load(
        finished.workdir, image_threshold=before.score - 1e-3, pixel_threshold=1e6
    )
    result = strict(path)
    assert result.is_anomalous
    assert (result.mask_area, result.mask_share) == (0, 0)
    assert result.score == before.score
    assert result.normalized_score == before.normalized_score


def test_nothing_but_the_folder_is_needed(finished, rows, tmp_path):
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "config.json"
    fields = json.loads(path.read_text())
    fields["dataset"] |= {"root": "/nowhere", "cache_dir": "/nowhere"}
    path.write_text(json.dumps(fields))
    for name in ("results.json", "results.csv", "bottle/scores.csv"):
        (run.workdir / name).unlink()
    result = ulsad_jax.Detector.load(run.workdir)(rows[0]["image"])
    assert result.score == pytest.approx(float(rows[0]["score"]), rel=1e-4)


def test_categories(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    for wrong in ("cable", "../copy", "."):
        with pytest.raises(UserError, match=rf"\(bottle\), found '{wrong}'"):
            ulsad_jax.Detector.load(run.workdir, wrong)
    shutil.copytree(run.workdir / "bottle", run.workdir / "cable")
    with pytest.raises(UserError, match=r"\(bottle, cable\), found no choice"):
        ulsad_jax.Detector.load(run.workdir)
    ulsad_jax.Detector.load(run.workdir, "cable")
    shutil.rmtree(run.workdir / "cable")
    shutil.rmtree(run.workdir / "bottle")
    with pytest.raises(UserError, match=r"found none\. Run the train\.py"):
        ulsad_jax.Detector.load(run.workdir)


def test_wrong_folder(tmp_path):
    with pytest.raises(UserError, match="the folder of a run"):
        ulsad_jax.Detector.load(tmp_path / "none")


def test_import_is_light():
    program = """
import sys, ulsad_jax
assert not {"jax", "numpy", "flax"} & sys.modules.keys()
assert ulsad_jax.Detector.__name__ == "Detector"
assert not hasattr(ulsad_jax, "Detectors")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
