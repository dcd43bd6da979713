import collections
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ulsad_jax.data.layouts import mvtec_loco
from ulsad_jax.data.records import read_image, read_mask
from ulsad_jax.data.synthetic import categories as synthetic
from ulsad_jax.data.synthetic.anomalies import LOGICAL, STRUCTURAL
from ulsad_jax.data.synthetic.categories import PANEL, TRAY
from ulsad_jax.data.synthetic.design import draw_design
from ulsad_jax.data.synthetic.masks import VISIBLE
from ulsad_jax.data.synthetic.parts import View
from ulsad_jax.data.synthetic.scenes import (
    contents,
    draw_scene,
    photograph,
    view,
    violations,
)
from ulsad_jax.data.synthetic.shapes import coverage
from ulsad_jax.runtime.errors import UserError

SIZE = (96, 96)
TYPES = ("good", "logical_anomalies", "structural_anomalies")
SMALL = {"train": 3, "validation": 2, "good": 2, "per_kind": 1}
PRODUCTS = {"tray": TRAY, "panel": PANEL}
LOGICAL_KINDS = [(name, k) for name, p in PRODUCTS.items() for k in p.logical]
IN_PLACE = ("missing_part", "surplus_part", "reversed_part")
STRUCTURAL_KINDS = [(name, k) for name, p in PRODUCTS.items() for k in p.structural]


def _sample(design, type_, i, *, seed=0, split="test", size=SIZE, product=TRAY):
    place = {"split": split, "type": type_, "i": i}
    return synthetic.draw_sample(design, size, seed=seed, **place, product=product)


def _sample_of_kind(name, type_, kind):
    """Returns an image of a kind of anomaly; photographs of it and of its twin."""
    product, size = PRODUCTS[name], (128, 128)
    design = product.draw_design(1, size=size)
    i = list(product.logical if type_ == TYPES[1] else product.structural).index(kind)
    sample = _sample(design, type_, i, seed=1, size=size, product=product)
    photos = [photograph(design, s, size) for s in (sample.scene, sample.twin)]
    return sample, photos


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic")
    for name in PRODUCTS:
        synthetic.write_category(path, category=name, seed=0, image_size=96, **SMALL)
    return path


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("name", "product"), PRODUCTS.items(), ids=PRODUCTS)
def test_layout_is_read_by_the_loco_loader(root, name, product):
    assert mvtec_loco.categories(root) == sorted(PRODUCTS)
    records = mvtec_loco.records(root, name)
    counts = collections.Counter((r.split, r.type) for r in records)
    assert counts == {
        ("train", "good"): 3,
        ("validation", "good"): 2,
        ("test", "good"): 2,
        ("test", "logical_anomalies"): len(product.logical),
        ("test", "structural_anomalies"): len(product.structural),
    }
    for record in records:
        assert read_image(record.image).shape == (*SIZE, 3)
        assert bool(record.masks) == (record.type != "good")
        for channel in record.masks:
            mask, saturation = read_mask(channel, size=SIZE)
            assert mask.sum() >= 4
            assert mask.mean() < 0.3
            if not saturation.relative:
                assert 0 < saturation.threshold <= mask.sum()


@pytest.mark.parametrize(("name", "product"), PRODUCTS.items(), ids=PRODUCTS)
def test_every_mask_has_one_listed_value(root, name, product):
    config = json.loads((root / name / "defects_config.json").read_text())
    values = {entry["pixel_value"]: entry["defect_name"] for entry in config}
    assert len(values) == len(config)
    seen = set()
    for path in (root / name / "ground_truth").rglob("*.png"):
        found = set(np.unique(np.asarray(Image.open(path)))) - {0}
        assert len(found) == 1
        seen.add(values[found.pop()])
    for kind in (*product.logical, *product.structural):
        assert any(defect.startswith(kind) for defect in seen)


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_number_of_kinds(product):
    assert len(product.logical) >= 6
    assert len(product.structural) >= 4


def test_same_parameters_again_write_nothing(root):
    path = root / "tray" / "train" / "good" / "000.png"
    before = path.stat().st_mtime_ns
    synthetic.write_category(
        root, category="tray", seed=0, image_size=(96, 96), **SMALL
    )
    assert path.stat().st_mtime_ns == before
    assert {p.name for p in root.iterdir()} == set(PRODUCTS)  # no scratch folder stays


def test_more_images_keep_the_earlier_ones(root, tmp_path):
    more = {name: count + 1 for name, count in SMALL.items()}
    synthetic.write_category(tmp_path, category="tray", seed=0, image_size=96, **more)
    few, many = _files(root / "tray"), _files(tmp_path / "tray")
    few.pop(synthetic.PARAMETERS)
    assert len(few) < len(many)
    assert all(many[name] == content for name, content in few.items())


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"image_size": 128}, {"train": 4}, {"per_kind": 2}]
)
def test_other_parameters_are_refused(root, change):
    parameters = {"seed": 0, "image_size": 96, **SMALL, **change}
    with pytest.raises(UserError, match="Remove that folder"):
        synthetic.write_category(root, category="tray", **parameters)


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "tray").mkdir()
    with pytest.raises(UserError, match="found other files"):
        synthetic.write_category(tmp_path, category="tray", seed=0)
    assert list((tmp_path / "tray").iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"category": "a/b"},
        {"category": ".hidden"},
        {"image_size": 32},
        {"image_size": (64, 640)},
        {"seed": -1},
        {"train": 0},
        {"good": -1},
    ],
)
def test_senseless_parameters_are_refused(tmp_path, change):
    with pytest.raises(UserError):
        synthetic.write_category(tmp_path, **{"category": "a", "seed": 0, **change})
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **fields):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_save", fail)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write_category(tmp_path, category="a", seed=0, image_size=64, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_seed_decides_everything(product):
    designs = [product.draw_design(seed) for seed in (3, 3, 4)]
    first, again, other = (
        _sample(design, "good", 0, seed=seed, product=product)
        for design, seed in zip(designs, (3, 3, 4), strict=True)
    )
    assert np.array_equal(first.image, again.image)
    assert np.abs(first.image.astype(int) - other.image).mean() > 10
    assert designs[0] == designs[1] != designs[2]


def test_images_of_a_category_differ():
    design = draw_design(0)
    names = [("train", "good", 0), ("train", "good", 1), ("validation", "good", 0)]
    images = [_sample(design, t, i, split=s).image.astype(int) for s, t, i in names]
    for k in range(3):
        assert np.abs(images[k] - images[k - 1]).mean() > 3


@pytest.mark.parametrize("seed", range(4))
def test_normal_scenes_obey_the_rules(seed):
    design = draw_design(seed)
    for i in range(3):
        scene = _sample(design, "good", i, seed=seed, size=(64, 64)).scene
        found = collections.Counter((p.cell, p.type) for p in scene.parts)
        for cell, (kind, count) in design.bins.items():
            assert found[cell, kind.type] == count
        assert found["rack", "fuse"] == 4
        assert found["harness", "cable"] == 1
        assert violations(design, scene) == []


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("seed", range(2))
def test_only_logical_anomalies_break_rules(seed, product):
    design = product.draw_design(seed)
    fields = {"seed": seed, "size": (64, 64), "product": product}
    for i in range(2 * len(product.logical)):
        sample = _sample(design, TYPES[1], i, **fields)
        assert product.violations(design, sample.scene)
        assert product.violations(design, sample.twin) == []
    for i in range(len(product.structural)):
        sample = _sample(design, TYPES[2], i, **fields)
        assert product.violations(design, sample.scene) == []


@pytest.mark.parametrize(("name", "kind"), STRUCTURAL_KINDS)
def test_structural_mask_is_where_the_picture_differs(name, kind):
    sample, photos = _sample_of_kind(name, TYPES[2], kind)
    photo, twin = (np.clip(picture, 0, 1) for picture in photos)
    differs = np.abs(photo - twin).max(-1) > VISIBLE
    ((found, mask),) = sample.masks
    assert found == kind
    assert not (differs & ~mask).any()
    # Filling gaps adds little, and nothing far away.
    assert differs.sum() > 0.6 * mask.sum()
    assert not (mask & ~ndimage.binary_dilation(differs, iterations=4)).any()


@pytest.mark.parametrize(("name", "kind"), LOGICAL_KINDS)
def test_logical_mask_covers_what_changed(name, kind):
    sample, (photo, twin) = _sample_of_kind(name, TYPES[1], kind)
    differs = np.abs(photo - twin).max(-1) > 0.15
    mask = np.any([mask for _, mask in sample.masks], axis=0)
    assert (differs & mask).sum() > 0.02 * mask.sum()
    # Elsewhere a part leaves its old place, too.
    if (name == "panel" and kind != "wrong_connection") or kind in IN_PLACE:
        near = ndimage.binary_dilation(mask, iterations=3)  # shadows reach further
        assert not (differs & ~near).any()


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (128, 64)])
@pytest.mark.parametrize("seed", range(4))
def test_parts_have_places(seed, size):
    """The same in every image, within a compartment and apart from their neighbours."""
    design, rng = draw_design(seed, size=size), np.random.default_rng(0)
    scenes = [draw_scene(design, rng) for _ in range(4)]
    seen = View(*size)
    rows, columns = np.indices(size) + 0.5
    x, y = (columns - size[1] / 2) / seen.scale, (rows - size[0] / 2) / seen.scale
    for name, (_, count) in design.bins.items():
        cell = design.cells[name]
        outside = (abs(x - cell.x) > cell.half_u) | (abs(y - cell.y) > cell.half_v)
        found = [contents(scene, name) for scene in scenes]
        assert {len(parts) for parts in found} == {count}
        for parts in zip(*found, strict=True):
            assert np.ptp([(part.x, part.y) for part in parts], axis=0).max() <= 0.022
        for parts in found:
            masks = [coverage(seen, part) for part in parts]
            assert np.sum(masks, axis=0).max() == 1
            assert not (np.any(masks, axis=0) & outside).any()


def test_missing_part_is_missing_from_its_place():
    design = draw_design(0)
    for i in range(0, 8 * len(LOGICAL), len(LOGICAL)):
        sample = _sample(design, TYPES[1], i)
        ((name, mask),) = sample.masks
        (gone,) = set(sample.twin.parts) - set(sample.scene.parts)
        assert name == f"missing_part_{gone.type}"
        share = coverage(view(sample.scene, SIZE), gone).sum() / mask.sum()
        assert share == 1 if gone.type != "cable" else share < 1


@pytest.mark.parametrize("size", [(64, 128), (128, 64)])
def test_other_aspects(size):
    design = draw_design(0, size=size)
    for type_ in TYPES:
        sample = _sample(design, type_, 0, size=size)
        assert sample.image.shape == (*size, 3)
        assert all(mask.shape == size for _, mask in sample.masks)


def _auroc(normal, anomalous):
    normal, anomalous = np.asarray(normal), np.asarray(anomalous)[:, None]
    return (anomalous > normal).mean() + 0.5 * (anomalous == normal).mean()


def test_pixel_statistics_do_not_solve_it():
    # A detector that knows each pixel's mean and spread but nothing of objects.
    design, size = draw_design(2), (64, 64)

    def images(split, type_, count):
        found = [
            _sample(design, type_, i, seed=2, split=split, size=size).image
            for i in range(count)
        ]
        return np.stack(found).astype(np.float32) / 255

    train = images("train", "good", 60)
    tests = [images("test", TYPES[0], 40)]
    tests.append(images("test", TYPES[1], 4 * len(LOGICAL)))
    tests.append(images("test", TYPES[2], 4 * len(STRUCTURAL)))
    for sigma in (0, 1):  # a sixteenth of the side: 4 of 256 pixels
        blurred = [ndimage.gaussian_filter(x, (0, sigma, sigma, 0)) for x in tests]
        fitted = ndimage.gaussian_filter(train, (0, sigma, sigma, 0))
        mean, spread = fitted.mean(0), fitted.std(0) + 1e-3
        z = [np.abs(x - mean) / spread for x in blurred]
        for score in (np.max, np.mean):
            good, *anomalous = [score(x, axis=(1, 2, 3)) for x in z]
            for scores in anomalous:
                assert 0.3 < _auroc(good, scores) < 0.7


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ulsad_jax.data.synthetic",
        f"--output={tmp_path}",
    ]
    command += ["--category=tray", "--seed=5", "--image_size=64,80", "--train=1"]
    command += ["--validation=0", "--good=0", "--per_kind=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "tray")
    image = read_image(tmp_path / "tray" / "train" / "good" / "000.png")
    assert image.shape == (64, 80, 3)
    refused = subprocess.run([*command, "--train=2"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Remove that folder" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [("train=5", "flags alone, found 'train=5'"), ("--image_size=64x80", "'64x80'")],
)
def test_wrong_command_line(argument, message, tmp_path):
    flags = [f"--output={tmp_path}", "--category=tray", argument]
    command = [sys.executable, "-m", "ulsad_jax.data.synthetic", *flags]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert message in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr
    assert not any(tmp_path.iterdir())
