from __future__ import annotations

import itertools
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from configs import mvtec_ad, mvtec_loco, quickstart
from tests import runs, trees
from tests.test_metrics import draw_scores
from ulsad_jax.data.batches import open_category
from ulsad_jax.data.resize import resize_map
from ulsad_jax.metrics import base, pixel, spro
from ulsad_jax.metrics.image import UndefinedMetricWarning
from ulsad_jax.runs import evaluation, full_resolution
from ulsad_jax.runs import run as experiment
from ulsad_jax.runtime.errors import UserError

MAPS = (16, 24)  # model resolution here
LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"


def measure(examples, maps, *, loco):
    stream = full_resolution.stream_pixels(examples, maps, loco=loco, title="")
    return base.measure(base.find(()), base.PIXEL, stream, base.ORIGINAL)


def open_test(name, root, category, tmp_path):
    return open_category(
        name,
        root=root,
        category=category,
        image_size=MAPS,
        cache_dir=tmp_path / "cache",
        validation_fraction=0.2,
        seed=0,
    ).test


def draw_maps(examples, levels=8):
    rng = np.random.default_rng(0)
    defective = np.zeros((len(examples), *MAPS), bool)
    defective[examples.labels == 1, 2:8, 4:10] = True
    return draw_scores(rng, defective, levels=levels)


@pytest.fixture(scope="module")
def loco(tmp_path_factory):
    """4 images of each type; half the anomalous ones have overlapping channels."""
    folder = tmp_path_factory.mktemp("loco")
    root = trees.write_mvtec_loco(folder / "loco", good=4, per_type=4)
    return open_test("mvtec_loco", root, "pushpins", folder)


def areas_by_definition(masks, saturations):
    return [
        int(s.threshold * mask.sum()) if s.relative else min(s.threshold, mask.sum())
        for mask, s in zip(masks, saturations, strict=True)
    ]


def test_loco(loco):
    maps = draw_maps(loco)
    metrics = measure(loco, maps, loco=True)
    images = [loco.original(i) for i in range(len(loco))]
    large = [
        resize_map(one, image.image.shape[:2])
        for one, image in zip(maps, images, strict=True)
    ]
    by_type = {}
    for name in (LOGICAL, STRUCTURAL):
        rows = [i for i, kind in enumerate(loco.types) if kind in ("good", name)]
        by_type[name] = spro.au_spro(
            [large[i] for i in rows],
            [images[i].masks for i in rows],
            [areas_by_definition(images[i].masks, images[i].saturations) for i in rows],
        )
        assert len({len(images[i].masks) for i in rows}) == 3  # 0, 1 and 2 channels
    for limit in spro.LIMITS:
        found = [metrics[f"au_spro_{limit:g}/{n}"] for n in (LOGICAL, STRUCTURAL)]
        expected = [by_type[name][limit] for name in (LOGICAL, STRUCTURAL)]
        assert found == pytest.approx(expected, abs=1e-4)
        assert metrics[f"au_spro_{limit:g}"] == pytest.approx(np.mean(found))
    masks = np.stack([image.masks.any(0) for image in images])
    aupro = pixel.aupro(masks, np.stack(large))
    auroc = sklearn_metrics.roc_auc_score(masks.ravel(), np.stack(large).ravel())
    assert metrics["aupro_original"] == pytest.approx(aupro, abs=1e-4)
    assert metrics["pixel_auroc_original"] == pytest.approx(auroc, abs=1e-4)
    assert len(metrics) == 2 + 3 * len(spro.LIMITS)


def test_loco_without_one_type(tmp_path):
    root = trees.write_mvtec_loco(tmp_path / "loco", good=2, per_type=2)
    for folder in ("test", "ground_truth"):
        shutil.rmtree(root / "pushpins" / folder / LOGICAL)
    examples = open_test("mvtec_loco", root, "pushpins", tmp_path)
    with pytest.warns(UndefinedMetricWarning, match=LOGICAL) as caught:
        metrics = measure(examples, draw_maps(examples), loco=True)
    assert len(caught) == 1
    assert {name for name, value in metrics.items() if math.isnan(value)} == {
        name
        for limit in spro.LIMITS
        for name in (f"au_spro_{limit:g}", f"au_spro_{limit:g}/{LOGICAL}")
    }


def test_other_data_has_no_spro_and_leaves_unknown_masks_out(tmp_path):
    root = trees.write_mvtec_ad(tmp_path / "ad", good=2, per_defect=2)
    examples = open_test("mvtec_ad", root, "bottle", tmp_path)
    maps = draw_maps(examples)
    metrics = measure(examples, maps, loco=False)
    assert list(metrics) == ["pixel_auroc_original", "aupro_original"]
    (root / "bottle/ground_truth/broken/000_mask.png").unlink()
    lacking = open_test("mvtec_ad", root, "bottle", tmp_path)
    (row,) = [i for i, name in enumerate(lacking.names) if name == "broken/000"]
    maps[row] = 1e6  # would change everything
    known = measure(lacking, maps, loco=False)
    rest = [i for i in range(len(examples)) if i != row]
    masks = np.stack([examples.original(i).masks.any(0) for i in rest])
    large = np.stack([resize_map(maps[i], trees.SIZE) for i in rest])
    assert known["aupro_original"] == pytest.approx(pixel.aupro(masks, large), abs=1e-4)


def test_maps_are_enlarged_about_half_pixel_centres():
    small = np.float32([[0, 4], [8, 12]])
    large = resize_map(small, (4, 8))
    np.testing.assert_allclose(large[0], [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4])
    np.testing.assert_allclose(large[:, 0], [0, 2, 6, 8])
    rng = np.random.default_rng(0)
    ramp = rng.normal(size=(5, 7)).astype(np.float32)
    # The pixel i of n samples the map at (i + 0.5) * scale - 0.5, edges repeated.
    rows, columns = ((np.arange(n) + 0.5) * k / n - 0.5 for n, k in ((13, 5), (4, 7)))
    grid = np.meshgrid(rows, columns, indexing="ij")
    expected = ndimage.map_coordinates(ramp, grid, order=1, mode="nearest")
    np.testing.assert_allclose(resize_map(ramp, (13, 4)), expected, atol=1e-6)
    constant = resize_map(np.full((3, 3), 0.1, np.float32), (31, 17))
    assert (constant == np.float32(0.1)).all()


def read_map(path):
    with Image.open(path) as image:
        assert image.mode == "F"  # float32
        return np.asarray(image)


def test_maps_on_disk_are_the_maps(loco, tmp_path):
    maps = draw_maps(loco, levels=None)
    full_resolution.write_maps(loco, maps, tmp_path / "pushpins", title="")
    written = sorted(tmp_path.glob("pushpins/test/*/*.tiff"))
    assert len(written) == len(loco) == 12
    for i, record in enumerate(loco.records):
        name = f"{record.type}/{record.image.stem}.tiff"
        found = read_map(tmp_path / "pushpins" / "test" / name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, resize_map(maps[i], trees.SIZE))


def test_long_names_and_tiny_defects_in_a_run(finished, tmp_path):
    """Names of 255 bytes, and masks of which nothing is left at 64 x 64."""
    root = tmp_path / ("r" * 255)
    trees.write_mvtec_ad(root, train=8, good=2, per_defect=0, defects=[])
    names = ["n" * 251, "x y" * 83, "漢" * 83, "tiny"]
    for kind, name in itertools.product(["cut", "d t" * 82], names):
        trees.write_image(root / "bottle/test" / kind / f"{name}.png", size=(256, 256))
        mask = root / "bottle/ground_truth" / kind / "tiny_mask.png"
        trees.write_mask(mask, size=(256, 256), box=(80, 80, 81, 81))
    fields = {"train.num_epochs": 1, "evaluation.write_maps": True}
    fields |= {"evaluation.original_resolution": True}
    fields |= {"evaluation.pictures_per_type": -1}
    config = runs.make_config(root, fields)
    config.dataset.cache_dir = str(tmp_path / "cache")
    printed = runs.train(config, tmp_path / "run")
    metrics = runs.read_results(tmp_path / "run", "bottle")["metrics"]
    assert (metrics["masks_lost"], metrics["pixel_images_left_out"]) == (2, 6)
    assert "2 of 2 masks have no pixel left at model resolution" in printed
    assert "AUPRO (original size)" in printed
    assert len(list((tmp_path / "run/maps/bottle/test").glob("*/*.tiff"))) == 10
    assert len(list((tmp_path / "run/bottle/pictures").glob("*/*.png"))) == 10
    assert (tmp_path / "run/report.html").read_text().count("<img") == 10


def test_a_map_with_nan_is_refused(loco):
    maps = draw_maps(loco, levels=None)
    images = [record.image for record in loco.records]
    scores = {"one": maps[:, 0, 0], "other": maps[:, 0, 1].copy()}
    evaluation.check_finite(maps, scores, images)
    scores["other"][3] = np.nan
    with pytest.raises(UserError, match=f"in 1 of 12 scores 'other'.*{images[3]}"):
        evaluation.check_finite(maps, scores, images)
    maps[5, 3, 4], maps[7, 0, 0] = np.nan, np.inf
    with pytest.raises(UserError) as refused:
        evaluation.check_finite(maps, scores, images)
    assert "2 of 12" in str(refused.value)
    assert f"row 3, column 4 of the map of {images[5]}" in str(refused.value)


@pytest.mark.parametrize(
    ("config", "expected"), [(mvtec_ad, False), (mvtec_loco, True), (quickstart, True)]
)
def test_what_is_measured_by_default(config, expected):
    assert config.get_config().evaluation.original_resolution == expected
    assert not config.get_config().evaluation.write_maps


def test_maps_that_were_not_all_written_are_written_again(
    finished, tmp_path, monkeypatch
):
    run = runs.copy(finished, tmp_path)
    config = run.config.copy_and_resolve_references()
    config.evaluation.write_maps = True

    def stop_after_one(steps, title, **options):
        for i in steps:
            if "maps" in title and i:
                raise KeyboardInterrupt
            yield i

    with monkeypatch.context() as patch:
        patch.setattr(full_resolution, "progress", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config, run.workdir)
    maps = run.workdir / "maps/bottle/test"
    assert len(list(maps.glob("*/*.tiff"))) == 1
    runs.train(config, run.workdir)
    assert len(list(maps.glob("*/*.tiff"))) == len(runs.read_scores(run.workdir))
    before = {path: path.stat().st_mtime_ns for path in maps.glob("*/*.tiff")}
    runs.train(config, run.workdir)  # nothing is left to do
    config.evaluation.write_maps = False
    runs.train(config, run.workdir)
    assert before == {path: path.stat().st_mtime_ns for path in maps.glob("*/*.tiff")}


def test_a_run_is_measured_and_its_maps_written_later(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    before = runs.read_results(run.workdir, "bottle")["metrics"]
    assert "aupro_original" not in before
    config = run.config.copy_and_resolve_references()
    config.evaluation.original_resolution = True
    runs.train(config, run.workdir)  # trains nothing, measures again
    metrics = runs.read_results(run.workdir, "bottle")["metrics"]
    assert before.items() < metrics.items()
    assert 0 <= metrics["aupro_original"] <= 1
    assert not (run.workdir / "maps").exists()
    printed = experiment.evaluate(run.workdir, write_maps=True)
    assert f"Maps: {run.workdir}/maps/<category>" in printed
    written = sorted((run.workdir / "maps/bottle/test").glob("*/*.tiff"))
    names = [row["name"] for row in runs.read_scores(run.workdir)]
    assert sorted(f"{p.parent.name}/{p.stem}" for p in written) == sorted(names)
    assert all(read_map(path).shape == trees.SIZE for path in written)
    assert runs.read_results(run.workdir, "bottle")["metrics"] == metrics
