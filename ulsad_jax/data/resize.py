"""Resizing of images and masks, as OpenCV does by default.

Sampling points are half-pixel centres, there is no smoothing before sampling, and the
aspect ratio is not kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped, UInt8


def resize_bilinear(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int]
) -> UInt8[np.ndarray, "H W c"]:
    """Resizes an image bilinearly without antialiasing (OpenCV's INTER_LINEAR).

    Args:
        image: image, uint8 [h, w, c].
        size: (height, width) of the result in pixels.

    Returns:
        The resized image, uint8 [H, W, c], rounded to the nearest grey level.
    """
    if image.shape[:2] == tuple(size):
        return image
    top, bottom, down = _neighbours(image.shape[0], size[0])
    left, right, across = _neighbours(image.shape[1], size[1])
    pixels = image.reshape(-1, image.shape[2])  # h w c -> (h w) c
    across = across[None, :, None]

    def sample(rows: Int[np.ndarray, " H"]) -> Float[np.ndarray, "H W c"]:
        # Takes the few pixels that are needed before anything is made a float.
        start = image.shape[1] * rows[:, None]
        return _mix(
            np.take(pixels, start + left, 0), np.take(pixels, start + right, 0), across
        )

    mixed = _mix(sample(top), sample(bottom), down[:, None, None])
    return np.rint(mixed).astype(np.uint8)


def resize_map(
    anomaly_map: Float[np.ndarray, "h w"], size: tuple[int, int]
) -> Float[np.ndarray, "H W"]:
    """Resizes a map bilinearly without antialiasing, in float32.

    Args:
        anomaly_map: map, float [h, w].
        size: (height, width) of the result in pixels.
    """
    if anomaly_map.shape == tuple(size):
        return anomaly_map
    first, second, weight = _neighbours(anomaly_map.shape[0], size[0])
    rows = _mix(anomaly_map[first], anomaly_map[second], weight[:, None])
    first, second, weight = _neighbours(anomaly_map.shape[1], size[1])
    return _mix(np.take(rows, first, 1), np.take(rows, second, 1), weight)


def resize_nearest(
    mask: Shaped[np.ndarray, "h w"], size: tuple[int, int]
) -> Shaped[np.ndarray, "H W"]:
    """Resizes a mask by nearest-neighbour sampling.

    Output position i takes the input pixel floor((i + 0.5) * scale).

    Args:
        mask: mask, [h, w].
        size: (height, width) of the result in pixels.
    """
    # In integers: (i + 0.5) * n / out is often a whole number, and floats miss it.
    rows, columns = (
        (2 * np.arange(out) + 1) * n // (2 * out)
        for n, out in zip(mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns]


def _neighbours(
    n: int, out: int
) -> tuple[Int[np.ndarray, " out"], Int[np.ndarray, " out"], Float[np.ndarray, " out"]]:
    """Returns the two pixels around each sampling point and the second one's weight."""
    position = np.clip((np.arange(out) + 0.5) * (n / out) - 0.5, 0, n - 1)
    first = position.astype(np.int64)
    return first, np.minimum(first + 1, n - 1), (position - first).astype(np.float32)


def _mix(
    a: Shaped[np.ndarray, "*n"],
    b: Shaped[np.ndarray, "*n"],
    weight: Float[np.ndarray, "*n"],
) -> Float[np.ndarray, "*n"]:
    a = a.astype(np.float32)
    return a + weight * (b.astype(np.float32) - a)
