import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests import runs
from ulsad_jax.data import records
from ulsad_jax.data.layouts import folder, mvtec_ad

sys.path.insert(0, str(runs.REPOSITORY / "benchmarks"))

import photo_defects
import surface_defects

DRAWN = [
    (source, category, kind)
    for source in (photo_defects, surface_defects)
    for category in source.CATEGORIES
    for kind in source.TYPES
]


@pytest.mark.parametrize(("source", "category", "kind"), DRAWN)
def test_a_defect_is_small_and_depends_on_its_number_and_seed_alone(
    source, category, kind
):
    def draw(seed):
        return source.draw_sample(
            category, seed=seed, split="test", type=kind, i=3, size=64
        )

    sample, again = draw(0), draw(0)
    np.testing.assert_array_equal(sample.image, again.image)
    np.testing.assert_array_equal(sample.mask, again.mask)
    assert sample.image.shape == (64, 64, 3) and sample.image.dtype == np.uint8
    assert 0 < sample.mask.mean() < 0.08
    assert (draw(1).mask != sample.mask).any()


@pytest.mark.parametrize("category", surface_defects.CATEGORIES)
def test_pieces_of_a_material_are_alike_but_not_the_same(category):
    def draw(i):
        return surface_defects.draw_sample(
            category, seed=0, split="train", type="good", i=i, size=64
        ).image

    pieces = np.stack([draw(i) for i in range(4)]).astype(float)
    colors = pieces.mean((1, 2))
    assert (colors.std(0) < 0.35 * colors.mean(0)).all()  # light alone
    centered = (pieces - colors[:, None, None]).mean(-1).reshape(4, -1)
    assert np.abs(np.corrcoef(centered) - np.eye(4)).max() < 0.5  # another grain


@pytest.mark.parametrize("category", ["brick", "grass", "gravel"])
@pytest.mark.parametrize("seed", range(4))
def test_textures_train_and_test_on_different_pixels(category, seed, monkeypatch):
    shape = photo_defects._photo(category, 64).shape[:2]
    numbered = np.arange(np.prod(shape)).reshape(*shape, 1).repeat(3, 2)
    monkeypatch.setattr(photo_defects, "_photo", lambda *_: numbered)

    def pixels(split):
        rng = np.random.default_rng(0)
        tiles = [photo_defects._cut(category, seed, split, 64, rng) for _ in range(30)]
        return set(np.unique(tiles).tolist())

    assert pixels("train").isdisjoint(pixels("test"))


def run(source, output, *flags):
    return subprocess.run(
        [sys.executable, source.__file__, f"--output={output}", *flags],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("source", [photo_defects, surface_defects])
def test_the_program_writes_folders_that_can_be_trained_on(source, tmp_path):
    flags = ["--seed=3", "--size=64", "--train=2"]
    flags += ["--validation=1", "--good=1", "--anomalous=1"]
    written = run(source, tmp_path / "drawn", *flags)
    assert written.returncode == 0, written.stderr
    assert mvtec_ad.categories(tmp_path / "drawn") == sorted(source.CATEGORIES)
    assert (tmp_path / "drawn" / "sheet.png").is_file()
    expected = {("train", "good"): 2, ("validation", "good"): 1, ("test", "good"): 1}
    expected |= {("test", kind): 1 for kind in source.TYPES}
    for category in source.CATEGORIES:
        root = tmp_path / "drawn" / category
        found = records.check(folder.records(root, category), str(root))
        assert Counter((r.split, r.type) for r in found) == expected
        last = max(found, key=lambda r: (r.split == "test", r.type))
        image, mask = source.draw_sample(
            category, seed=3, split="test", type=last.type, i=0, size=64
        )
        np.testing.assert_array_equal(np.asarray(Image.open(last.image)), image)
        (path,) = (m.path for m in last.masks)
        np.testing.assert_array_equal(np.asarray(Image.open(path)) > 0, mask)


def test_the_program_does_not_write_among_other_images(tmp_path):
    refused = run(surface_defects, tmp_path)
    assert refused.returncode == 2
    assert f"found {tmp_path}. Remove it, or name another." in refused.stderr
    assert not list(tmp_path.iterdir())
