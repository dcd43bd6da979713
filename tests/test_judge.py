import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import judge_data
import judge_nn
import photo_defects
import surface_defects

COUNTS = judge_data.Counts(train=2, validation=1, good=2, anomalous=1, tiles=0)


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


def test_the_score_is_the_largest_distance_to_the_nearest_patch():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(50, 6)).astype(np.float32)
    test = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    expected = [
        cdist(image.reshape(-1, 6), bank, "sqeuclidean").min(1).max() for image in test
    ]
    found = np.asarray(judge_nn._scores(bank, test))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_kept_categories_come_back_as_they_were(tmp_path):
    drawn = list(judge_data.open_drawn(photo_defects, 5, 64, COUNTS))
    first = judge_data.keep(iter(drawn), tmp_path, ["photos"])
    second = judge_data.keep(iter([]), tmp_path, ["photos"])
    assert len(second) == len(drawn) == len(first)
    for before, after in zip(drawn, second, strict=True):
        assert (before.name, before.types) == (after.name, after.types)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
