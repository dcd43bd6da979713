"""Exact masks of synthetic anomalies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from ulsad_jax.data.synthetic.anomalies import Region
from ulsad_jax.data.synthetic.drawing import Mark
from ulsad_jax.data.synthetic.scenes import Scene, view
from ulsad_jax.data.synthetic.shapes import coverage

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32

VISIBLE = 8 / 255  # difference of display values that is visible despite the noise


def logical_mask(
    scene: Scene, region: Region, size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels of a region of an anomalous scene."""
    seen = view(scene, size)
    mask = np.zeros(size, bool)
    for part in region.parts:
        mask |= coverage(seen, part)
    return mask


def structural_mask(
    damaged: Scene,
    photo: Float32[np.ndarray, "h w 3"],
    twin: Float32[np.ndarray, "h w 3"],
) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels where a damaged scene visibly differs from its sound twin.

    Gaps where both look alike by chance are filled: small gaps, holes, and the bottom
    of a dent. Only the slopes of a dent towards the lamp and away from it look
    different.

    Args:
        damaged: damaged scene.
        photo: photograph of the damaged scene without noise, float32 [h, w, 3].
        twin: photograph of the sound twin without noise, float32 [h, w, 3].
    """
    size = photo.shape[:2]
    differs = np.abs(np.clip(photo, 0, 1) - np.clip(twin, 0, 1)).max(-1) > VISIBLE
    for mark in damaged.marks:
        if mark.kind == "dent":
            differs |= _foot(mark, damaged, size)
    closed = ndimage.binary_closing(np.pad(differs, 2), np.ones((3, 3)))
    return ndimage.binary_fill_holes(closed)[2:-2, 2:-2]


def _foot(mark: Mark, scene: Scene, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels where a dent is deep and no part hides it."""
    seen = view(scene, size)
    foot = np.zeros(size, bool)
    window, u, v = seen.window(
        mark.x, mark.y, mark.angle, mark.length / 2, mark.width / 2
    )
    foot[window] = np.hypot(2 * u / mark.length, 2 * v / mark.width) < 0.75
    for part in scene.parts:
        foot &= ~coverage(seen, part)
    return foot
