from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from tests.test_metrics import draw_maps, draw_scores, integrate
from ulsad_jax.metrics import curves, pixel, regions, spro, stream
from ulsad_jax.metrics.curves import UndefinedMetricWarning
from ulsad_jax.metrics.histogram import PAGES, ScoreHistogram

# No metric may warn unless a test says so.
pytestmark = pytest.mark.filterwarnings("error")

LEVELS = [2, 8, None]  # distinct scores; None: continuous, practically without ties


def draw_loco(seed, *, levels, sizes=((9, 11), (12, 7), (8, 8), (10, 10))):
    """Images of several sizes; channels overlap; the first image is normal."""
    rng = np.random.default_rng(seed)
    maps, channels, areas = [], [], []
    for i, size in enumerate(sizes):
        masks = rng.random((min(i, 3), *size)) < 0.2
        masks[:, 1, 2] = True  # in all of them
        maps.append(draw_scores(rng, masks.any(0), levels=levels))
        channels.append(masks)
        areas.append([int(rng.integers(1, mask.sum() + 1)) for mask in masks])
    return maps, channels, areas


def spro_by_definition(maps, channels, areas, limit):
    """Every threshold, every channel, one at a time, in exact fractions."""
    values = np.concatenate([m.ravel() for m in maps])
    unions = zip(maps, channels, strict=True)
    normals = np.concatenate([m[~c.any(0)] for m, c in unions])
    points = [(Fraction(0), Fraction(0))]
    for t in np.unique(values)[::-1]:
        found = [
            min(Fraction(int((m[mask] >= t).sum())) / Fraction(area), Fraction(1))
            for m, masks, of_image in zip(maps, channels, areas, strict=True)
            for mask, area in zip(masks, of_image, strict=True)
        ]
        fpr = Fraction(int((normals >= t).sum()), len(normals))
        points.append((fpr, sum(found) / len(found)))
    return float(integrate(points, limit) / limit)


def fill(images, *, max_bins=PAGES, groups=None):
    result = stream.PixelStream(max_bins=max_bins)
    for i, image in enumerate(zip(*images, strict=True)):
        result.add(*image, group=groups[i] if groups else "")
    return result


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_au_spro_equals_its_definition(seed, levels):
    images = draw_loco(seed, levels=levels)
    expected = {
        limit: spro_by_definition(*images, Fraction(str(limit)))
        for limit in spro.LIMITS
    }
    assert spro.au_spro(*images) == pytest.approx(expected, rel=1e-12)
    assert fill(images).au_spro() == pytest.approx(expected, rel=1e-12)


def test_au_spro_in_closed_form():
    # A channel of 4 pixels, 2 suffice; 10 normal pixels.
    scores = np.array([[9, 8, 1, 1, 8.5, 7, 7, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    channels = np.zeros((1, 1, 14), bool)
    channels[0, 0, :4] = True
    # (0, 0), (0, 1/2), (0.1, 1/2), (0.1, 1), (1, 1).
    expected = {0.05: 0.5, 0.1: 0.5, 0.3: (0.05 + 0.2) / 0.3, 1.0: 0.95}
    for metric in (
        spro.au_spro([scores], [channels], [[2]], limits=tuple(expected)),
        fill([[scores], [channels], [[2]]]).au_spro(limits=tuple(expected)),
    ):
        assert metric == pytest.approx(expected)


def test_credit_for_more_than_the_saturation_area_is_not_given():
    images = draw_loco(1, levels=None)
    maps, channels, _ = images
    values = [
        spro.au_spro(maps, channels, [[k] * len(c) for c in channels])[1.0]
        for k in range(1, 6)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_a_fraction_of_a_pixel_saturates():
    images = draw_loco(2, levels=8)[:2]
    areas = [[1.5] * len(masks) for masks in images[1]]
    expected = spro_by_definition(*images, areas, Fraction(3, 10))
    assert spro.au_spro(*images, areas)[0.3] == pytest.approx(expected)
    streamed = fill([*images, areas]).au_spro()
    assert streamed[0.3] == pytest.approx(expected)


def test_without_saturation_spro_of_single_regions_is_pro():
    masks = np.zeros((3, 12, 12), bool)
    masks[1, 2:5, 3:9] = masks[2, 7:, 7:] = True
    rng = np.random.default_rng(0)
    maps = draw_scores(rng, masks, levels=8)
    areas = [[], [18], [25]]
    channels = [masks[i : i + 1] if areas[i] else masks[:0] for i in range(3)]
    for limit in (0.05, 0.3):
        value = spro.au_spro(maps, channels, areas, limits=[limit])[limit]
        assert value == pytest.approx(pixel.aupro(masks, maps, fpr_limit=limit))


@pytest.mark.parametrize(
    ("area", "threshold", "relative", "expected"),
    [
        (10, 0.7, True, 7),
        (10, 0.79, True, 7),
        (2, 0.3, True, 1),
        (10, 1.0, True, 10),
        (10, 60.0, False, 10),
        (100, 60.0, False, 60),
    ],
)
def test_saturation_area(area, threshold, relative, expected):
    assert regions.saturation_area(area, threshold, relative=relative) == expected


# The stream


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(2))
def test_streamed_auroc_and_aupro(seed, levels):
    masks, maps = draw_maps(seed, levels=levels, shape=(5, 96, 120))
    images = [maps, masks[:, None], [None] * len(maps)]
    result = fill(images)  # more scores than bins
    auroc = sklearn_metrics.roc_auc_score(masks.ravel(), maps.ravel())
    assert result.auroc() == pytest.approx(auroc, abs=1e-6)
    for limit in (0.05, 0.3, 1.0):
        expected = pixel.aupro(masks, maps, fpr_limit=limit)
        assert result.aupro(fpr_limit=limit) == pytest.approx(expected, abs=1e-4)


def draw_blobs(seed, transform, n=6, size=(120, 160)):
    """Smooth maps, enlarged, that are higher on their channels."""
    rng = np.random.default_rng(seed)
    maps, channels, areas = [], [], []
    for i in range(n):
        masks = np.zeros((i % 3, *size), bool)
        for mask in masks:
            y, x = rng.integers(0, 80, 2)
            mask[y : y + 30, x : x + 40] = True
        scores = rng.normal(size=size) + masks.any(0)
        maps.append(transform(scores).astype(np.float32))
        channels.append(masks)
        areas.append([int(mask.sum() * 0.6) for mask in masks])
    return maps, channels, areas


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x,
        lambda x: 1000 + 1e-2 * x,
        lambda x: np.maximum(x, 0),
        lambda x: 1e-30 * np.exp(3 * x),
        lambda x: np.where(x > 2.5, 1e9, x),
        lambda x: np.where(x > 1, 1000 + 1e-2 * x, x),
        lambda x: 1 / (1 + np.exp(-5 * x)),
    ],
    ids=[
        "around_0",
        "far",
        "half_0",
        "tiny",
        "outliers",
        "two_ranges",
        "overconfident",
    ],
)
def test_stream_equals_exact_whatever_the_range(transform):
    images = draw_blobs(0, transform)
    # Fewer bins than scores, by little and by much.
    exact, result = spro.au_spro(*images), fill(images, max_bins=1 << 17)
    assert result.au_spro() == pytest.approx(exact, abs=1e-4)
    coarse = fill(images, max_bins=PAGES)
    for one in (coarse, result):
        for limit, value in one.au_spro().items():
            bound = one.error_bound(stream.CHANNELS, fpr_limit=limit)
            assert abs(value - exact[limit]) <= bound + 1e-12


def test_bins_that_are_single_scores_lose_nothing():
    images = draw_blobs(3, lambda x: 1.5 + 1e-4 * x, n=16)  # two pages
    result = fill(images, max_bins=1 << 18)
    assert result.error_bound(stream.CHANNELS, fpr_limit=0.05) == 0
    assert result.au_spro() == pytest.approx(spro.au_spro(*images), rel=1e-9)


def test_error_bound_in_closed_form():
    # (0, 0), (0.25, 0.5), (1, 1): half of each rectangle, or all if it is cut.
    curve = curves.Curve(np.array([0, 0.25, 1]), np.array([0, 0.5, 1]))
    both, second = np.array([True, True]), np.array([False, True])
    bound = curves.error_bound
    assert bound(curve, both, 1) == pytest.approx((0.25 * 0.5 + 0.75 * 0.5) / 2)
    assert bound(curve, second, 1) == pytest.approx(0.75 * 0.5 / 2)
    assert bound(curve, both, 0.25) == pytest.approx(0.5 / 2)
    assert bound(curve, second, 0.5) == pytest.approx(0.25 * 0.5 / 0.5)


@pytest.mark.parametrize("max_bins", [PAGES, 1 << 17, 1 << 20])
def test_the_order_of_images_does_not_count(max_bins):
    images = draw_blobs(1, lambda x: x)
    backwards = [values[::-1] for values in images]
    a, b = (fill(one, max_bins=max_bins) for one in (images, backwards))
    # Bins follow the scores as they come; with enough room there are none.
    tolerance = 1e-12 if max_bins == 1 << 20 else 1e-4
    assert a.au_spro() == pytest.approx(b.au_spro(), abs=tolerance)
    assert a.aupro() == pytest.approx(b.aupro(), abs=tolerance)
    assert a.auroc() == pytest.approx(b.auroc(), abs=tolerance)


def test_groups_are_apart():
    images = draw_loco(0, levels=8)
    both = fill(images, groups=["good", "a", "b", "a"])
    for name, rows in {"a": [0, 1, 3], "b": [0, 2]}.items():
        alone = spro.au_spro(*[[values[i] for i in rows] for values in images])
        assert both.au_spro(["good", name]) == pytest.approx(alone, rel=1e-9)
    assert both.au_spro() == pytest.approx(spro.au_spro(*images), rel=1e-9)


def test_constant_maps():
    images = draw_loco(0, levels=8)
    images[0][:] = [np.full_like(m, 0.25) for m in images[0]]
    # A straight line from (0, 0) to (1, 1).
    expected = {limit: limit / 2 for limit in spro.LIMITS}
    assert spro.au_spro(*images) == pytest.approx(expected)
    result = fill(images)
    assert result.au_spro() == pytest.approx(expected)
    assert result.auroc() == 0.5
    assert result.aupro() == pytest.approx(0.15)


def test_perfect_maps():
    images = draw_loco(0, levels=8)
    images[0][:] = [
        m + 100 * c.any(0) for m, c in zip(images[0], images[1], strict=True)
    ]
    result = fill(images)
    assert result.au_spro() == pytest.approx(dict.fromkeys(spro.LIMITS, 1.0))
    assert result.aupro() == result.auroc() == pytest.approx(1)


def test_overlapping_channels_are_one_region():
    channels = np.zeros((2, 4, 6), bool)
    channels[0, :, :2] = channels[1, :, 1:3] = True
    scores = np.zeros((4, 6), np.float32)
    scores[:, :2] = 2  # the first channel whole, half of the second
    scores[:, 3:] = 1
    result = fill([[scores], [channels], [[8, 8]]])
    assert result.au_spro()[1.0] == pytest.approx((0.75 + 0.75) / 2)
    assert result.aupro(fpr_limit=1) == pytest.approx(2 / 3)


@pytest.mark.parametrize("rows", [[], [0], [0, 0]], ids=["none", "normal", "normals"])
def test_no_anomalies_is_nan_with_one_warning(rows):
    images = [[values[i] for i in rows] for values in draw_loco(0, levels=8)]
    result = fill(images)
    for metric in (lambda: spro.au_spro(*images), result.au_spro):
        with pytest.warns(UndefinedMetricWarning, match="channels, found") as caught:
            values = metric()
        assert list(values) == list(spro.LIMITS)
        assert all(math.isnan(value) for value in values.values())
        assert len(caught) == 1
        assert caught[0].filename == __file__
    for metric in (result.auroc, result.aupro):
        with pytest.warns(UndefinedMetricWarning) as caught:
            assert math.isnan(metric())
        assert len(caught) == 1
        assert caught[0].filename == __file__


def test_no_normal_pixels_is_nan():
    scores, channels = np.ones((3, 3), np.float32), np.ones((1, 3, 3), bool)
    images = [[scores], [channels], [[4]]]
    for metric in (lambda: spro.au_spro(*images), fill(images).au_spro):
        with pytest.warns(UndefinedMetricWarning):
            assert all(math.isnan(value) for value in metric().values())


def test_one_type_only_leaves_the_other_undefined():
    result = fill(draw_loco(0, levels=8), groups=["good", "a", "a", "a"])
    with pytest.warns(UndefinedMetricWarning, match="AU-sPRO of good, b is undefined"):
        assert math.isnan(result.au_spro(["good", "b"])[0.05])
    assert 0 <= result.au_spro(["good", "a"])[0.05] <= 1


def refused(image, **changes):
    image = image | changes
    names = ("anomaly_map", "channels", "saturation_areas")
    result = stream.PixelStream()
    with pytest.raises(ValueError) as exact:
        spro.au_spro(*[[image[name]] for name in names])
    with pytest.raises(ValueError) as streamed:
        result.add(*[image[name] for name in names])
    assert str(exact.value) == str(streamed.value)
    with pytest.warns(UndefinedMetricWarning):  # nothing was added
        assert math.isnan(result.auroc())
    return str(exact.value)


def test_bad_input_is_refused():
    maps, channels, areas = draw_loco(0, levels=8)
    image = {"anomaly_map": maps[2], "channels": channels[2]}
    image["saturation_areas"] = areas[2]
    broken = maps[2].copy()
    broken[3, 4] = np.nan
    assert "1 of 64 NaN or infinite, the first at index (3, 4)" in refused(
        image, anomaly_map=broken
    )
    assert "(8, 8) and (2, 7, 8)" in refused(image, channels=channels[2][:, 1:])
    assert "found uint8" in refused(image, channels=channels[2].astype(np.uint8))
    for wrong in ([1], [1, 0], [1, -1], [1, math.nan], [1, 65]):
        assert "saturation area" in refused(image, saturation_areas=wrong)
    for limit in (0, 1.01):
        with pytest.raises(ValueError, match="fpr_limit"):
            spro.au_spro(maps, channels, areas, limits=[limit])
        with pytest.raises(ValueError, match="fpr_limit"):
            fill([maps, channels, areas]).au_spro(limits=[limit])
    with pytest.raises(ValueError, match="max_bins"):
        stream.PixelStream(max_bins=PAGES - 1)


# The histogram


@pytest.mark.parametrize("full", [False, True])
def test_histogram_sorts_every_kind_of_number(full):
    scores = np.float32([-3e38, -1, -1e-39, -0.0, 0.0, 1e-39, 1e-30, 1, 1.01, 3e38])
    histogram = ScoreHistogram(max_bins=1 << 20)
    histogram.add("a", scores, np.arange(10.0) + 1)
    histogram.add("b", scores[:2])
    if full:  # of other scores, so that it has to use bins
        histogram.add("c", np.full(1 << 20, 0.5, np.float32))
    (sums, counts), _ = histogram.read([["a"], ["a", "b"]])
    np.testing.assert_array_equal(sums, [10, 9, 8, 7, 6, 4 + 5, 3, 2, 1])
    np.testing.assert_array_equal(counts - sums, [0, 0, 0, 0, 0, 0, 0, 1, 1])


def test_histogram_loses_order_alone():
    rng = np.random.default_rng(0)
    n = 100_000
    scores = rng.normal(size=n) * 10.0 ** rng.integers(-30, 30, n)
    histogram = ScoreHistogram(max_bins=PAGES)
    scores = scores.astype(np.float32)
    for part in np.split(scores, 10):
        histogram.add("a", part)
    (counts,), binned = histogram.read([["a"]])
    assert binned.all()
    assert counts.sum() == n
    edges = np.sort(scores)[::-1][np.cumsum(counts.astype(int)) - 1]
    assert (np.diff(edges) < 0).all()  # bins are ranges of scores


def test_metrics_of_streams_need_numpy_and_scipy_alone():
    program = (
        "import sys\n"
        "from ulsad_jax.metrics import spro, stream\n"
        "print({'jax', 'sklearn', 'PIL', 'tensorflow_datasets'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"
