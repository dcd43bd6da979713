"""Calibrates anomaly maps to one scale, and fuses them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from ulsad_jax.nn.layers import resize_matrix
from ulsad_jax.scoring.fusion import Fusion

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

    Maps = Mapping[str, Float[ArrayLike, "b h w"]]

BLUR_SIGMA = 4.0
BLUR_RADIUS = 16
LOW_QUANTILE, HIGH_QUANTILE = 0.9, 0.995


@flax.struct.dataclass
class Calibration:
    """The affine functions that make maps of different kinds comparable.

    A calibrated map is (map - offset) * scale: 0 at the 0.9 quantile of validation
    normals, 0.1 at their 0.995 quantile. A map without an offset stays as it is.

    Attributes:
        offset: offset by a map's name, in that map's unit.
        scale: scale by a map's name.
        fusion: fusion of the image scores; None if an image's score is that of its
            anomaly map.
        display_low: fused value of the coldest colour in every picture of a run.
        display_high: fused value of the hottest colour in every picture of a run.
    """

    offset: dict[str, float] = flax.struct.field(default_factory=dict)
    scale: dict[str, float] = flax.struct.field(default_factory=dict)
    fusion: Fusion | None = None
    display_low: float = 0.0
    display_high: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns {"<map>_offset": ..., "<map>_scale": ..., "display_low": ...}."""
        return {
            **{f"{name}_offset": value for name, value in self.offset.items()},
            **{f"{name}_scale": value for name, value in self.scale.items()},
            **({"fusion": vars(self.fusion)} if self.fusion else {}),
            "display_low": self.display_low,
            "display_high": self.display_high,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Calibration:
        """Returns the calibration from the result of `to_json`."""
        fields: dict[str, Any] = {"offset": {}, "scale": {}}
        for key, value in document.items():
            name, _, kind = key.rpartition("_")
            if kind in fields:
                fields[kind][name] = value
            else:
                fields[key] = value
        return cls.from_arrays(fields)

    @classmethod
    def from_arrays(cls, fields: Mapping[str, Any]) -> Calibration:
        """Returns the calibration from its fields, with those of `fusion` in a dict."""
        fusion = fields.get("fusion")
        return cls(**{**fields, "fusion": fusion and Fusion(**fusion)})


def enlarge_and_blur(
    maps: Float[Array, "b h w"], size: tuple[int, int], *, aligned: bool = False
) -> Float[Array, "b height width"]:
    """Resizes maps bilinearly, then blurs (Gaussian, sigma 4, 33 x 33, reflected).

    Both are linear and act on each axis separately, so one matrix per axis does both.

    Args:
        maps: maps to enlarge.
        size: (height, width) in pixels.
        aligned: see `nn.layers.resize_matrix`.
    """
    rows = _enlarge_and_blur_matrix(maps.shape[1], size[0], aligned)
    columns = _enlarge_and_blur_matrix(maps.shape[2], size[1], aligned)
    return jnp.einsum(
        "Hh,bhw,Ww->bHW", rows, maps, columns, precision="highest", optimize="optimal"
    )


def fuse(maps: Maps, calibration: Calibration) -> Float[Array, "b h w"]:
    """Returns the anomaly map: the mean of the calibrated maps."""
    calibrated = calibrate_maps(maps, calibration).values()
    return functools.reduce(operator.add, (m * (1 / len(maps)) for m in calibrated))


def calibrate_maps(
    maps: Maps, calibration: Calibration
) -> dict[str, Float[Array, "b h w"]]:
    """Applies the calibration to every map that it has an offset for."""
    offset, scale = calibration.offset, calibration.scale
    return {
        name: (m - offset[name]) * scale[name] if name in offset else m
        for name, m in maps.items()
    }


def calibrate(maps: Maps, *, method: str) -> Calibration:
    """Measures the calibration on the raw maps of validation normals.

    Args:
        maps: raw maps by name, [n, h, w] float32.
        method: "quantile", or "none" for the plain average of raw maps.

    Returns:
        The calibration. Its display range begins at the median of the normals' fused
        maps, and is twice as long as the distance from there to their 0.995 quantile,
        so that normal images have cold colours.
    """
    offset, scale = dict.fromkeys(maps, 0.0), dict.fromkeys(maps, 1.0)
    if method == "quantile":
        for name, values in maps.items():
            low, high = np.quantile(values, (LOW_QUANTILE, HIGH_QUANTILE))
            offset[name] = float(low)
            if high > low:  # maps that are one constant carry nothing to scale by
                scale[name] = float(0.1 / (high - low))
    calibration = Calibration(offset, scale)
    fused = np.asarray(fuse(maps, calibration))
    low, high = (float(q) for q in np.quantile(fused, (0.5, HIGH_QUANTILE)))
    return calibration.replace(
        display_low=low, display_high=low + 2 * max(high - low, 1e-6)
    )


def fuse_as_new(maps: Maps, *, method: str) -> Float[np.ndarray, "n h w"]:
    """Returns fused maps of validation normals, each calibrated on the other images.

    A calibration that includes an image makes it look more normal than a new image, and
    thresholds chosen on such maps are too low. A single image is calibrated on itself.

    Args:
        maps: raw maps by name, [n, h, w] float32.
        method: method of calibration; see `calibrate`.
    """
    count = len(next(iter(maps.values())))
    if method == "none" or count == 1:
        return np.asarray(fuse(maps, calibrate(maps, method=method)))
    fused = 0.0
    for values in maps.values():
        low, high = quantiles_without(values, (LOW_QUANTILE, HIGH_QUANTILE)).T
        scale = np.ones_like(low)
        np.divide(0.1, high - low, out=scale, where=high > low)
        own = (values - low[:, None, None]) * scale[:, None, None]
        fused = fused + own / len(maps)
    return fused


def quantiles_without(
    values: Float[np.ndarray, "n h w"], quantiles: tuple[float, ...]
) -> Float[np.ndarray, "n q"]:
    """Returns for each image the quantiles of all other images' values, n >= 2.

    Quantiles are interpolated linearly, as in `np.quantile`. Values below the lowest
    quantile are never sorted, and the others are sorted once.
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
        others = largest[image != i]  # its last value is the largest of all others
        low, high = others[lower - rest], others[upper - rest]
        found[i] = low + (positions - lower) * (high - low)
    return found


@functools.lru_cache
def _enlarge_and_blur_matrix(
    n_in: int, n_out: int, aligned: bool
) -> Float[np.ndarray, "n_out n_in"]:
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    kernel = np.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
    kernel /= kernel.sum()
    # np.pad's "reflect" does not repeat the edge, like PyTorch's.
    source = np.pad(np.arange(n_out), BLUR_RADIUS, mode="reflect")
    blur = np.zeros((n_out, n_out))
    for row in range(n_out):
        np.add.at(blur[row], source[row : row + kernel.size], kernel)
    return (blur @ resize_matrix(n_in, n_out, aligned=aligned)).astype(np.float32)
