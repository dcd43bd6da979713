from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from ulsad_jax.data.resize import resize_bilinear, resize_nearest

SIZES = [
    ((33, 47), (16, 20)),
    ((16, 20), (33, 47)),
    ((64, 64), (16, 32)),
    ((5, 1), (7, 3)),
    ((40, 30), (40, 60)),
]


def draw(size):
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("size", "out"), SIZES)
def test_bilinear_samples_at_half_pixel_centres_and_clamps_at_edges(size, out):
    image = draw(size)
    grid = np.meshgrid(
        *((np.arange(o) + 0.5) * n / o - 0.5 for n, o in zip(size, out, strict=True)),
        indexing="ij",
    )
    expected = [
        map_coordinates(image[..., c].astype(float), grid, order=1, mode="nearest")
        for c in range(3)
    ]
    resized = resize_bilinear(image, out)
    assert resized.dtype == np.uint8
    # Rounded, and nothing else: half a grey level is all that may be lost.
    np.testing.assert_allclose(resized, np.stack(expected, -1), atol=0.5 + 1e-4)


def test_bilinear_does_not_smooth_beforehand():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    # 64 -> 8: the centres lie between columns 3 and 4, 11 and 12, ...
    resized = resize_bilinear(stripes, (64, 8))
    assert np.all(resized == 128)
    # 64 -> 16: between columns 1 and 2, 5 and 6, ..., which are black.
    assert np.all(resize_bilinear(stripes, (64, 16)) == 0)


def test_an_image_of_the_right_size_is_kept():
    image = draw((6, 7))
    np.testing.assert_array_equal(resize_bilinear(image, (6, 7)), image)


@pytest.mark.parametrize(("size", "out"), SIZES)
def test_nearest_takes_the_pixel_under_the_centre(size, out):
    mask = np.arange(size[0] * size[1]).reshape(size)
    resized = resize_nearest(mask, out)
    assert resized.shape == out
    for i in range(out[0]):
        for j in range(out[1]):
            row = int((i + 0.5) * size[0] / out[0])
            column = int((j + 0.5) * size[1] / out[1])
            assert resized[i, j] == mask[row, column]


def test_nearest_keeps_a_binary_mask_binary():
    mask = draw((33, 47))[..., 0] > 128
    assert resize_nearest(mask, (16, 20)).dtype == bool
