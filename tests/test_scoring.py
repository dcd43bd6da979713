from __future__ import annotations

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from ulsad_jax.methods.base import Batch
from ulsad_jax.methods.ulsad.method import Ulsad
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.scoring.fusion import image_score


def draw(seed, shape):
    """Positive values with a long tail, like reconstruction errors."""
    return np.random.default_rng(seed).gamma(2, size=shape).astype(np.float32)


def enlarge(image, size):
    """Bilinear sampling at half-pixel centres, the edge pixel beyond the edge."""
    points = [
        (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
        for n_in, n_out in zip(image.shape, size, strict=True)
    ]
    grid = np.meshgrid(*points, indexing="ij")
    return ndimage.map_coordinates(image.astype(float), grid, order=1, mode="nearest")


@pytest.mark.parametrize(
    ("grid", "size"),
    [((8, 8), (64, 64)), ((8, 12), (64, 96)), ((16, 8), (128, 64)), ((9, 7), (50, 40))],
)
def test_enlarge_and_blur(grid, size):
    maps = draw(0, (3, *grid))
    ours = scoring.enlarge_and_blur(jnp.asarray(maps), size)
    assert ours.shape == (3, *size)
    for ours_one, image in zip(ours, maps, strict=True):
        expected = ndimage.gaussian_filter(
            enlarge(image, size), sigma=4, truncate=4, mode="mirror"
        )
        np.testing.assert_allclose(ours_one, expected, rtol=1e-5)


def test_ulsads_maps_compare_the_right_outputs(monkeypatch):
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(2, 8, 12, 6)).astype(np.float32) for _ in range(2))
    outputs = {"features": x, "local": x, "global_": g, "predicted_global": g}
    size = (64, 96)
    batch = Batch(np.zeros((2, *size, 3), np.uint8), x, np.ones(2, bool))

    def make_maps(changed):
        found = {k: jnp.asarray(v) for k, v in (outputs | changed).items()}
        networks = SimpleNamespace(apply=lambda *_, **__: found)
        monkeypatch.setattr(Ulsad, "networks", networks)
        return Ulsad().maps({}, batch)

    maps = make_maps({})
    assert maps.keys() == {"local", "global"}
    for values in maps.values():
        assert values.shape == (2, *size)
        assert np.abs(values).max() < 1e-5
    # A constant distance is neither enlarged nor blurred away.
    off = make_maps({"features": np.ones_like(x), "local": np.full_like(x, 4)})
    np.testing.assert_allclose(off["local"], 9, rtol=1e-5)
    off = make_maps({"local": 2 * x})
    doubled = scoring.enlarge_and_blur(np.square(x).mean(-1), size)
    np.testing.assert_allclose(off["local"], doubled, rtol=1e-5)
    np.testing.assert_allclose(off["global"], 0, atol=1e-5)
    off = make_maps({"predicted_global": -2 * g})
    flipped = scoring.enlarge_and_blur(9 * np.square(g).mean(-1) + 1, size)
    np.testing.assert_allclose(off["global"], flipped, rtol=1e-5)
    assert np.abs(off["local"]).max() < 1e-5


def make_maps(*values):
    """Maps by name, in that order."""
    return dict(zip(("local", "global", "third"), values, strict=False))


def test_quantile_calibration_sets_two_points():
    maps = make_maps(draw(2, (5, 32, 48)), 7 + 20 * draw(3, (5, 32, 48)))
    calibration = scoring.calibrate(maps, method="quantile")
    for values in scoring.calibrate_maps(maps, calibration).values():
        low, high = np.quantile(values, (0.9, 0.995))
        assert low == pytest.approx(0, abs=1e-6)
        assert high == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_calibration_averages_raw_maps(count):
    maps = make_maps(*(5**i * draw(i, (3, 16, 24)) for i in range(count)))
    calibration = scoring.calibrate(maps, method="none")
    expected = np.mean(list(maps.values()), axis=0)
    np.testing.assert_allclose(scoring.fuse(maps, calibration), expected, rtol=1e-6)


def test_fused_map_averages_calibrated_maps():
    maps = make_maps(draw(6, (2, 4, 6)), draw(7, (2, 4, 6)))
    calibration = scoring.Calibration(
        {"local": 1.0, "global": 3.0}, {"local": 2.0, "global": 4.0}
    )
    expected = 0.5 * (maps["local"] - 1) * 2 + 0.5 * (maps["global"] - 3) * 4
    np.testing.assert_allclose(scoring.fuse(maps, calibration), expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["quantile", "none"])
@pytest.mark.parametrize("names", [["patch"], ["local", "global"], ["a_b", "c_scale"]])
def test_calibration_is_kept_as_json(method, names):
    """With any names of maps, also those that look like a field's."""
    maps = {name: draw(i, (2, 8, 8)) for i, name in enumerate(names)}
    calibration = scoring.calibrate(maps, method=method)
    text = json.dumps(calibration.to_json(), allow_nan=False)
    assert scoring.Calibration.from_json(json.loads(text)) == calibration


@pytest.mark.parametrize("method", ["quantile", "none"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_stay_finite(method, value):
    constant = np.full((2, 8, 8), value, np.float32)
    varied = draw(8, (2, 8, 8))
    maps = make_maps(constant, varied)
    calibration = scoring.calibrate(maps, method=method)
    assert np.isfinite(list(calibration.to_json().values())).all()
    assert np.isfinite(scoring.fuse(maps, calibration)).all()
    calibration = scoring.calibrate(make_maps(constant, constant), method=method)
    assert np.isfinite(list(calibration.to_json().values())).all()
    assert calibration.display_low < calibration.display_high


@pytest.mark.parametrize("method", ["quantile", "none"])
def test_display_range_leaves_room_above_normal_images(method):
    maps = make_maps(draw(9, (4, 16, 16)), draw(10, (4, 16, 16)))
    calibration = scoring.calibrate(maps, method=method)
    fused = np.asarray(scoring.fuse(maps, calibration))
    assert calibration.display_low == pytest.approx(np.median(fused), abs=1e-6)
    middle = (calibration.display_low + calibration.display_high) / 2
    assert np.quantile(fused, 0.995) == pytest.approx(middle, rel=1e-5)


def test_image_score_is_the_maximum():
    anomaly_map = draw(11, (3, 8, 12)) - 5
    expected = [anomaly_map[i].max() for i in range(3)]
    np.testing.assert_array_equal(image_score(anomaly_map), expected)
