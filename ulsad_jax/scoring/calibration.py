"""From the networks' outputs to anomaly maps and image scores."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.ulsad.losses import distance
from ulsad_jax.methods.ulsad.networks import Outputs
from ulsad_jax.nn.layers import resize_matrix

if TYPE_CHECKING:
    from jaxtyping import Array, Float

BLUR_SIGMA = 4.0
BLUR_RADIUS = 16
LOW_QUANTILE, HIGH_QUANTILE = 0.9, 0.995
COSINE_WEIGHT = 0.5  # lambda of the maps' distances, whatever the losses' are


class Maps(NamedTuple):
    """Anomaly maps at image size, [b, h, w] float32, larger is more anomalous.

    Attributes:
        local: how badly the features are reconstructed (structural anomalies).
        global_: where local prediction and global output disagree (logical ones).
    """

    local: jax.Array
    global_: jax.Array


@flax.struct.dataclass
class Calibration:
    """The affine maps that make local and global maps comparable.

    A calibrated map is (map - offset) * scale: 0 at the 0.9 quantile of validation
    normals, 0.1 at their 0.995 quantile.

    Attributes:
        local_offset: of the local map.
        local_scale: of the local map.
        global_offset: of the global map.
        global_scale: of the global map.
        display_low: the fused value drawn coldest, in every picture of a run.
        display_high: the fused value drawn hottest.
    """

    local_offset: float = 0.0
    local_scale: float = 1.0
    global_offset: float = 0.0
    global_scale: float = 1.0
    display_low: float = 0.0
    display_high: float = 1.0


def raw_maps(outputs: Outputs, image_size: tuple[int, int]) -> Maps:
    """Maps before calibration: d(x, r) and d(g, p), enlarged and blurred.

    Args:
        outputs: of the networks, not in training mode.
        image_size: (height, width) of the maps.
    """
    pairs = ("features", "local"), ("global_", "predicted_global")
    distances = [
        distance(outputs[a], outputs[b], cosine_weight=COSINE_WEIGHT) for a, b in pairs
    ]
    return Maps(*(enlarge_and_blur(d, image_size) for d in distances))


def enlarge_and_blur(
    maps: Float[Array, "b h w"], size: tuple[int, int]
) -> Float[Array, "b height width"]:
    """Bilinear resize to `size`, then a Gaussian blur (sigma 4, 33 x 33, reflected).

    Both act on each axis apart and are linear: together, one matrix an axis.
    """
    rows = _enlarge_and_blur_matrix(maps.shape[1], size[0])
    columns = _enlarge_and_blur_matrix(maps.shape[2], size[1])
    return jnp.einsum(
        "Hh,bhw,Ww->bHW", rows, maps, columns, precision="highest", optimize="optimal"
    )


def fuse(maps: Maps, calibration: Calibration) -> Float[Array, "b h w"]:
    """The anomaly map: half the calibrated local plus half the global map."""
    local, global_ = calibrate_maps(maps, calibration)
    return 0.5 * local + 0.5 * global_


def calibrate_maps(maps: Maps, calibration: Calibration) -> Maps:
    """Applies the calibration to both maps."""
    c = calibration
    return Maps(
        (maps.local - c.local_offset) * c.local_scale,
        (maps.global_ - c.global_offset) * c.global_scale,
    )


def image_score(anomaly_map: Float[Array, "b h w"]) -> Float[Array, " b"]:
    """An image's score: the maximum of its map."""
    return anomaly_map.max((1, 2))


def calibrate(
    local: Float[np.ndarray, "n h w"],
    global_: Float[np.ndarray, "n h w"],
    *,
    method: str,
) -> Calibration:
    """Measures the calibration on the raw maps of validation normals.

    Args:
        local: their raw local maps.
        global_: their raw global maps.
        method: "quantile", or "none" for the plain average of raw maps.

    Returns:
        The calibration. Its display range begins at the median of the normals' fused
        maps and ends twice as far up as their 0.995 quantile: normal images look cold.
    """
    affine = {}
    if method == "quantile":
        for name, values in (("local", local), ("global", global_)):
            low, high = np.quantile(values, (LOW_QUANTILE, HIGH_QUANTILE))
            affine[f"{name}_offset"] = float(low)
            # Maps that are one constant carry nothing to scale by.
            affine[f"{name}_scale"] = float(0.1 / (high - low)) if high > low else 1.0
    calibration = Calibration(**affine)
    fused = np.asarray(fuse(Maps(local, global_), calibration))
    low, high = (float(q) for q in np.quantile(fused, (0.5, HIGH_QUANTILE)))
    return calibration.replace(
        display_low=low, display_high=low + 2 * max(high - low, 1e-6)
    )


def fuse_as_new(
    local: Float[np.ndarray, "n h w"],
    global_: Float[np.ndarray, "n h w"],
    *,
    method: str,
) -> Float[np.ndarray, "n h w"]:
    """Fused maps of validation normals, each with the calibration of the others.

    A calibration that has seen an image makes it look more normal than a new one would
    look; thresholds chosen on such maps are too low. With a single image there are no
    others, and its own calibration is used.

    Args:
        local: their raw local maps.
        global_: their raw global maps.
        method: as for `calibrate`.
    """
    if method == "none" or len(local) == 1:
        calibration = calibrate(local, global_, method=method)
        return np.asarray(fuse(Maps(local, global_), calibration))
    fused = np.zeros_like(local)
    for values in (local, global_):
        low, high = quantiles_without(values, (LOW_QUANTILE, HIGH_QUANTILE)).T
        scale = np.ones_like(low)
        np.divide(0.1, high - low, out=scale, where=high > low)
        fused += 0.5 * (values - low[:, None, None]) * scale[:, None, None]
    return fused


def quantiles_without(
    values: Float[np.ndarray, "n h w"], quantiles: tuple[float, ...]
) -> Float[np.ndarray, "n q"]:
    """For each image the quantiles of all the others' values, n >= 2.

    Linear interpolation, as `np.quantile`. What lies below the lowest quantile is never
    sorted, and the rest once.
    """
    flat, n = values.reshape(-1), len(values)
    size = flat.size // n
    rest = flat.size - size
    positions = np.array(quantiles) * (rest - 1)
    lower = np.floor(positions).astype(int)
    upper = np.minimum(lower + 1, rest - 1)
    kept = min(flat.size, rest - lower.min() + size)
    top = np.argpartition(flat, flat.size - kept)[flat.size - kept :]
    top = top[np.argsort(flat[top])]
    image, largest = top // size, flat[top]
    found = np.empty((n, len(quantiles)), np.float32)
    for i in range(n):
        others = largest[image != i]  # ends where all of the others end
        low, high = others[lower - rest], others[upper - rest]
        found[i] = low + (positions - lower) * (high - low)
    return found


@functools.lru_cache
def _enlarge_and_blur_matrix(n_in: int, n_out: int) -> Float[np.ndarray, "n_out n_in"]:
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    kernel = np.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
    kernel /= kernel.sum()
    # np.pad's "reflect" does not repeat the edge, like PyTorch's.
    source = np.pad(np.arange(n_out), BLUR_RADIUS, mode="reflect")
    blur = np.zeros((n_out, n_out))
    for row in range(n_out):
        np.add.at(blur[row], source[row : row + kernel.size], kernel)
    return (blur @ resize_matrix(n_in, n_out)).astype(np.float32)
