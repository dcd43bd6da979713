from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from skimage import measure
from sklearn import metrics as sklearn_metrics

from ulsad_jax.metrics import image, pixel

# No metric may warn unless a test says so.
pytestmark = pytest.mark.filterwarnings("error")

LEVELS = [2, 8, None]  # distinct scores; None: continuous, practically without ties


def draw_scores(rng, positive, *, levels, dtype=np.float32):
    scores = rng.normal(size=positive.shape) + positive
    if levels is not None:
        scores = np.digitize(scores, np.linspace(-1, 2, levels - 1)) / 7 - 0.5
    return scores.astype(dtype)


def draw_images(seed, *, levels, dtype=np.float32, n=60):
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 3 == 0).astype(int)
    rng.shuffle(labels)
    return labels, draw_scores(rng, labels, levels=levels, dtype=dtype)


def draw_maps(seed, *, levels, dtype=np.float32, shape=(4, 9, 11)):
    """Masks with single pixels, blocks, touching diagonals and a normal image."""
    rng = np.random.default_rng(seed)
    masks = rng.random(shape) < 0.15
    masks[1, 2:6, :] = True  # from edge to edge
    masks[0] = False
    return masks, draw_scores(rng, masks, levels=levels, dtype=dtype)


def find_regions(mask):
    """8-connected components by flood fill: a list of lists of (row, column)."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        region, front = [], [left.pop()]
        while front:
            y, x = front.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front.extend(near)
        regions.append(region)
    return regions


def integrate(points, limit):
    """Area under a polyline up to x = limit, in exact fractions."""
    area = Fraction(0)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area


def aupro_by_definition(masks, maps, limit):
    """Every threshold, every region, one at a time, in exact fractions."""
    regions = [(i, r) for i, mask in enumerate(masks) for r in find_regions(mask)]
    normals = maps[~masks].tolist()
    points = [(Fraction(0), Fraction(0))]
    for t in sorted(set(maps.ravel().tolist()), reverse=True):
        overlaps = [
            Fraction(sum(bool(maps[i, y, x] >= t) for y, x in region), len(region))
            for i, region in regions
        ]
        false_positives = sum(value >= t for value in normals)
        points.append(
            (Fraction(false_positives, len(normals)), sum(overlaps) / len(overlaps))
        )
    return float(integrate(points, limit) / limit)


def f1_max_by_definition(positive, scores):
    """(F1, the largest threshold that reaches it)."""
    return max(
        (float(sklearn_metrics.f1_score(positive, scores >= t)), float(t))
        for t in np.unique(scores)
    )


# Image level


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_image_metrics_equal_scikit_learn(seed, levels, dtype):
    labels, scores = draw_images(seed, levels=levels, dtype=dtype)
    assert image.auroc(labels, scores) == sklearn_metrics.roc_auc_score(labels, scores)
    assert image.average_precision(
        labels, scores
    ) == sklearn_metrics.average_precision_score(labels, scores)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_f1_max_is_the_best_over_all_thresholds(seed, levels, dtype):
    labels, scores = draw_images(seed, levels=levels, dtype=dtype)
    assert image.f1_max(labels, scores) == f1_max_by_definition(labels, scores)


def test_f1_max_takes_the_largest_of_several_best_thresholds():
    # At 3: TP 1, FP 0, FN 1. At 1: TP 2, FP 2, FN 0. Both F1 are 2 / 3.
    labels, scores = np.array([1, 0, 0, 1]), np.array([3.0, 2.0, 2.0, 1.0])
    assert image.f1_max(labels, scores) == (2 / 3, 3.0)


def test_constant_scores_carry_no_information():
    labels, scores = np.array([0, 1, 0, 1, 1]), np.full(5, 0.25)
    assert image.auroc(labels, scores) == 0.5
    assert image.average_precision(labels, scores) == pytest.approx(0.6)
    assert image.f1_max(labels, scores) == (0.75, 0.25)


def test_perfect_and_inverted_images():
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    assert image.auroc(labels, scores) == 1
    assert image.average_precision(labels, scores) == 1
    assert image.f1_max(labels, scores) == (1, 0.3)
    assert image.auroc(labels, -scores) == 0


@pytest.mark.parametrize("metric", [image.auroc, image.average_precision, image.f1_max])
@pytest.mark.parametrize("labels", [[], [0, 0], [1], [1, 1, 1]])
def test_one_class_of_images_is_nan_with_one_warning(metric, labels):
    labels = np.array(labels, int)
    with pytest.warns(image.UndefinedMetricWarning, match="images, found") as caught:
        value = metric(labels, np.arange(len(labels), dtype=float))
    assert np.all(np.isnan(value))
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("metric", [image.auroc, image.average_precision, image.f1_max])
def test_image_metrics_refuse_bad_input(metric):
    labels = np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"2 of 4 .* first at index 1\."):
        metric(labels, np.array([0, np.nan, 1, np.inf]))
    with pytest.raises(ValueError, match=r"\(4,\) and scores of shape \(3,\)"):
        metric(labels, np.zeros(3))
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        metric(labels[:, None], np.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"found 2 at index 3\."):
        metric(np.array([0, 1, 0, 2]), np.zeros(4))


def test_by_type_sets_all_normals_against_each_type():
    labels, scores = draw_images(0, levels=8)
    kinds = np.where(np.arange(len(labels)) % 2, "scratch", "dent")
    types = [str(k) if y else "good" for k, y in zip(kinds, labels, strict=True)]
    result = image.by_type(types, scores)
    assert list(result) == ["dent", "scratch"]
    for name, value in result.items():
        chosen = (labels == 0) | (kinds == name)
        assert value == image.auroc(labels[chosen], scores[chosen])


def test_by_type_without_one_of_the_classes():
    assert image.by_type(["good", "good"], np.arange(2.0)) == {}
    assert image.by_type([], np.zeros(0)) == {}
    with pytest.warns(image.UndefinedMetricWarning) as caught:
        result = image.by_type(["a", "b", "b"], np.arange(3.0))
    assert list(result) == ["a", "b"]
    assert all(math.isnan(v) for v in result.values())
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_by_type_refuses_bad_input():
    with pytest.raises(ValueError, match="shape"):
        image.by_type(["good", "a"], np.zeros(3))
    with pytest.raises(ValueError, match="1 of 2"):
        image.by_type(["good", "a"], np.array([0, np.nan]))


def test_loco_headline_is_the_mean_of_its_two_types():
    aurocs = {"logical_anomalies": 0.5, "structural_anomalies": 1.0}
    assert image.loco_headline(aurocs) == 0.75
    assert math.isnan(image.loco_headline({**aurocs, "logical_anomalies": math.nan}))
    with pytest.warns(image.UndefinedMetricWarning, match="logical") as caught:
        assert math.isnan(image.loco_headline({"logical_anomalies": 0.5}))
    assert len(caught) == 1


# Pixel level


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_pixel_metrics_equal_scikit_learn(seed, levels, dtype):
    masks, maps = draw_maps(seed, levels=levels, dtype=dtype)
    result = pixel.pixel_metrics(masks, maps)
    flat = masks.ravel(), maps.ravel()
    assert tuple(result) == pixel.NAMES
    assert result["auroc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(*flat), rel=1e-12
    )
    assert result["average_precision"] == pytest.approx(
        sklearn_metrics.average_precision_score(*flat), rel=1e-12
    )
    best = f1_max_by_definition(*flat)
    assert (result["f1_max"], result["f1_max_threshold"]) == best


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_aupro_equals_its_definition(seed, levels, dtype):
    masks, maps = draw_maps(seed, levels=levels, dtype=dtype)
    for limit in (Fraction(3, 10), Fraction(1, 20), Fraction(1)):
        value = pixel.aupro(masks, maps, fpr_limit=float(limit))
        expected = aupro_by_definition(masks, maps, limit)
        assert value == pytest.approx(expected, rel=1e-12)
        both = pixel.pixel_metrics(masks, maps, fpr_limit=float(limit))
        assert both["aupro"] == value


@pytest.mark.parametrize("levels", LEVELS)
def test_large_maps_equal_scikit_learn(levels):
    masks, maps = draw_maps(5, levels=levels, shape=(6, 96, 128))
    # PRO is a true positive rate in which every region weighs the same.
    weights = np.ones(masks.shape)
    for i, mask in enumerate(masks):
        regions = measure.label(mask, connectivity=2)
        for region in measure.regionprops(regions):
            weights[i][regions == region.label] = 1 / region.area
    fpr, pro, _ = sklearn_metrics.roc_curve(
        masks.ravel(),
        maps.ravel(),
        sample_weight=weights.ravel(),
        drop_intermediate=False,
    )
    inside = fpr <= 0.3
    end = np.interp(0.3, fpr, pro)
    area = sklearn_metrics.auc(np.append(fpr[inside], 0.3), np.append(pro[inside], end))
    result = pixel.pixel_metrics(masks, maps)
    assert result["aupro"] == pytest.approx(area / 0.3, rel=1e-9)
    assert result["auroc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(masks.ravel(), maps.ravel()), rel=1e-12
    )
    assert result["average_precision"] == pytest.approx(
        sklearn_metrics.average_precision_score(masks.ravel(), maps.ravel()), rel=1e-12
    )


def test_aupro_interpolates_at_the_limit():
    masks = np.zeros((1, 1, 12), bool)
    masks[0, 0, :2] = True  # one region of two pixels; ten normal pixels
    maps = np.zeros((1, 1, 12))
    maps[0, 0, 2] = 10
    maps[0, 0, 0] = 9
    maps[0, 0, [1, 3, 4, 5, 6]] = 8
    # The curve: (0, 0), (0.1, 0), (0.1, 0.5), (0.5, 1), (1, 1).
    assert pixel.aupro(masks, maps, fpr_limit=0.05) == 0
    assert pixel.aupro(masks, maps, fpr_limit=0.1) == 0
    assert pixel.aupro(masks, maps, fpr_limit=0.3) == pytest.approx(
        0.2 * (0.5 + 0.75) / 2 / 0.3
    )
    assert pixel.aupro(masks, maps, fpr_limit=1) == pytest.approx(0.4 * 0.75 + 0.5)


def test_aupro_of_constant_maps_is_half_the_limit():
    masks, maps = draw_maps(0, levels=8)
    result = pixel.pixel_metrics(masks, np.full_like(maps, 0.25), fpr_limit=0.3)
    assert result["aupro"] == pytest.approx(0.15)
    assert result["auroc"] == 0.5
    assert result["average_precision"] == pytest.approx(masks.mean())
    assert result["f1_max_threshold"] == 0.25


def test_regions_are_8_connected():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1:] = True  # they touch at a corner: one region
    maps = np.zeros((1, 4, 4))
    maps[0, 0, 0] = 2
    maps[0][~masks[0]] = 1
    # PRO is 1 / 4 until every normal pixel is a false positive.
    assert pixel.aupro(masks, maps) == pytest.approx(0.25)


def test_regions_end_with_their_image():
    masks = np.zeros((2, 3, 3), bool)
    masks[0, :, 0] = masks[1, 0, 0] = True  # two regions, of three pixels and of one
    maps = np.where(masks, 0.0, 1.0)
    maps[1, 0, 0] = 2
    assert pixel.aupro(masks, maps) == pytest.approx(0.5)


def test_regions_weigh_the_same_whatever_their_size():
    masks = np.zeros((1, 8, 8), bool)
    masks[0, :5] = True
    masks[0, 7, 7] = True
    maps = np.where(masks, 2.0, 1.0)
    maps[0, 7, 7] = 0
    assert pixel.aupro(masks, maps) == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_perfect_maps(dtype):
    masks, maps = draw_maps(1, levels=None, dtype=dtype)
    maps += 100 * masks
    result = pixel.pixel_metrics(masks, maps)
    assert result.pop("f1_max_threshold") == maps[masks].min()
    assert result == pytest.approx(dict.fromkeys(result, 1.0), abs=1e-12)


def test_one_image_suffices():
    masks, maps = draw_maps(2, levels=8)
    masks, maps = masks[1:2], maps[1:2]
    assert pixel.aupro(masks, maps) == pytest.approx(
        aupro_by_definition(masks, maps, Fraction(3, 10)), rel=1e-12
    )


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: 3 * x - 7,
        np.exp,
        lambda x: x.astype(np.float64),
        lambda x: np.unique(x, return_inverse=True)[1].reshape(x.shape),
        lambda x: np.unique(x, return_inverse=True)[1].reshape(x.shape).astype("u2"),
    ],
    ids=["affine", "exp", "float64", "ranks", "unsigned"],
)
def test_only_the_order_of_scores_counts(transform):
    masks, maps = draw_maps(3, levels=8)
    before = pixel.pixel_metrics(masks, maps)
    after = pixel.pixel_metrics(masks, transform(maps))
    assert after.pop("f1_max_threshold") == transform(maps)[
        maps == before.pop("f1_max_threshold")
    ].item(0)
    assert after == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_order_of_images_does_not_count(levels):
    masks, maps = draw_maps(4, levels=levels)
    order = np.random.default_rng(0).permutation(len(maps))
    assert pixel.pixel_metrics(masks[order], maps[order]) == pytest.approx(
        pixel.pixel_metrics(masks, maps), rel=1e-12
    )
    labels, scores = draw_images(4, levels=levels)
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = labels[order], scores[order]
    assert image.f1_max(*shuffled) == image.f1_max(labels, scores)
    assert image.auroc(*shuffled) == pytest.approx(image.auroc(labels, scores))


def test_zeros_of_both_signs_tie():
    masks = np.array([[[True, False]]])
    assert pixel.pixel_metrics(masks, np.array([[[0.0, -0.0]]]))["auroc"] == 0.5


def test_maps_are_left_as_they_were():
    masks, maps = draw_maps(0, levels=None)
    copies = masks.copy(), maps.copy()
    pixel.pixel_metrics(masks, maps)
    np.testing.assert_array_equal(masks, copies[0])
    np.testing.assert_array_equal(maps, copies[1])


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_one_class_of_pixels_is_nan_with_one_warning(n, value):
    masks, maps = np.full((n, 4, 5), value), np.zeros((n, 4, 5), np.float32)
    for metric in (pixel.pixel_metrics, pixel.aupro):
        with pytest.warns(image.UndefinedMetricWarning, match="pixels, found") as log:
            result = metric(masks, maps)
        values = result.values() if isinstance(result, dict) else [result]
        assert all(math.isnan(v) for v in values)
        assert len(log) == 1
        assert log[0].filename == __file__


@pytest.mark.parametrize("metric", [pixel.pixel_metrics, pixel.aupro])
def test_pixel_metrics_refuse_bad_input(metric):
    masks, maps = draw_maps(0, levels=None)
    with pytest.raises(ValueError, match=r"\(4, 9, 11\) and \(3, 9, 11\)"):
        metric(masks, maps[:3])
    with pytest.raises(ValueError, match=r"\(9, 11\)"):
        metric(masks[0], maps[0])
    with pytest.raises(ValueError, match="boolean masks, found uint8"):
        metric(masks.astype(np.uint8), maps)
    for limit in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="fpr_limit"):
            metric(masks, maps, fpr_limit=limit)
    maps[1, 2, 3] = np.nan
    maps[2, 0, 0] = -np.inf
    with pytest.raises(ValueError, match=r"2 of 396 .* index \(1, 2, 3\)"):
        metric(masks, maps)
