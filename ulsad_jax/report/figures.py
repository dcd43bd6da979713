"""Draws heatmap pictures at one fixed scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8

COLORMAP = "inferno"
OVERLAY = 0.6  # share of the heatmap in the overlay
CONTOUR = (0, 255, 0)
UNKNOWN = 128  # grey value of the panel if the ground truth is unknown
GAP = 4  # white pixels between the panels


def heatmap(
    anomaly_map: Float[np.ndarray, "h w"], low: float, high: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Colours a map: `low` and below are coldest, `high` and above are hottest."""
    scaled = np.clip((anomaly_map - low) / (high - low), 0, 1)
    colors = (matplotlib.colormaps[COLORMAP](np.arange(256))[:, :3] * 255).astype(
        np.uint8
    )
    return colors[np.minimum(scaled * 256, 255).astype(np.uint8)]


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    anomaly_map: Float[np.ndarray, "h w"],
    *,
    low: float,
    high: float,
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws the heatmap over the image, and the outline of the predicted mask.

    Args:
        image: image of any size.
        mask: predicted mask, at the size of the image.
        anomaly_map: anomaly map, at the size of the image.
        low: map value that is drawn coldest.
        high: map value that is drawn hottest.
    """
    hot = Image.fromarray(heatmap(anomaly_map, low, high))
    drawn = np.array(Image.blend(Image.fromarray(image), hot, OVERLAY))
    drawn[ndimage.binary_dilation(mask, iterations=2) & ~mask] = CONTOUR
    return drawn


def picture(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"] | None,
    anomaly_map: Float[np.ndarray, "h w"],
    *,
    low: float,
    high: float,
    threshold: float,
) -> UInt8[np.ndarray, "h 3*w+8 3"]:
    """Draws image, ground truth and overlay side by side.

    Args:
        image: image at model resolution.
        mask: ground truth, drawn as an outline; None for a grey panel.
        anomaly_map: anomaly map at model resolution.
        low: map value that is drawn coldest.
        high: map value that is drawn hottest.
        threshold: pixel threshold; the mask above it is outlined in the overlay.
    """
    if mask is None:
        outlined = np.full_like(image, UNKNOWN)
    else:
        outlined = image.copy()
        outlined[ndimage.binary_dilation(mask, iterations=2) & ~mask] = CONTOUR
    hot = overlay(image, anomaly_map > threshold, anomaly_map, low=low, high=high)
    gap = np.full((image.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([image, gap, outlined, gap, hot], axis=1)
