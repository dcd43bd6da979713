"""Validates a model: losses, calibration and thresholds on the validation normals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ulsad_jax.methods import base as methods
from ulsad_jax.methods.base import Batch, Method
from ulsad_jax.runtime import hosts
from ulsad_jax.runtime.devices import Devices
from ulsad_jax.runtime.errors import Diverged
from ulsad_jax.scoring import calibration, fusion, thresholds
from ulsad_jax.trunks import sources

if TYPE_CHECKING:
    from jaxtyping import Float

    Maps = Mapping[str, Float[np.ndarray, "n h w"]]
    Scores = Mapping[str, Float[np.ndarray, " n"]]

Losses = dict[str, float]


class Validation(NamedTuple):
    """Results of a checkpoint on the validation normals.

    Attributes:
        losses: losses by name, averaged over the images.
        calibration: calibration of the maps.
        decisions: thresholds of calibrated maps, and the data behind them.
    """

    losses: Losses
    calibration: calibration.Calibration
    decisions: thresholds.Decisions


@functools.lru_cache
def make_validation_step(
    method: Method,
) -> Callable[..., tuple[dict[str, jax.Array], ...]]:
    """Returns a jitted `step(model, batch, updates, numbers)`, cached by method.

    `updates` is the number of updates so far. The step returns the losses of the valid
    rows, and raw maps and the method's own scores of all rows.

    Args:
        method: method that computes losses, maps and scores.
    """

    @jax.jit
    def step(model, batch: Batch, updates, numbers):
        own = method.trace(numbers)
        maps, scores = own.maps(model, batch), own.scores(model, batch)
        methods.check_names(maps, scores)
        return own.losses(model, batch, updates), maps, scores

    return step


def make_validate(
    method: Method,
    source: sources.FeatureSource,
    *,
    devices: Devices,
    batch_size: int,
    calibrate: str,
    score: Mapping[str, Any],
    threshold: Mapping[str, float],
    numbers: Mapping[str, np.ndarray] | None = None,
) -> Callable[[Any, int], Validation]:
    """Returns `validate(model, updates)`, which runs over all validation normals.

    `updates` is the number of updates so far.

    Args:
        method: method that computes losses and maps.
        source: images and features of the validation normals.
        devices: devices over which batches are split.
        batch_size: number of images in a batch, a multiple of the number of devices.
        calibrate: name of the calibration method, see `calibration.calibrate`.
        score: `config.score`.
        threshold: arguments of `thresholds.choose`.
        numbers: scalar arrays by config field, see `Method.trace`.
    """
    count = len(source)
    step = make_validation_step(method)

    def validate(model: Any, updates: int) -> Validation:
        sums: dict[str, float] = {}
        kept: tuple[dict[str, np.ndarray], ...] = {}, {}  # maps and scores
        for start in range(0, count, batch_size):
            # Wrap around at the end: all batches have one shape, compiled once.
            rows = np.arange(start, start + batch_size)
            own = min(batch_size, count - start)
            batch = sources.load(source, rows % count, own, devices)
            losses, *new = hosts.gather(step(model, batch, updates, numbers or {}))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value) * own
            for tables, found in zip(kept, new, strict=True):
                for name, values in found.items():
                    table = tables.setdefault(
                        name, np.empty((count, *values.shape[1:]), np.float32)
                    )
                    table[start : start + own] = values[:own]
        losses = {name: value / count for name, value in sums.items()}
        if np.isfinite(list(losses.values())).all():  # else the caller says so
            _check_finite(*kept, updates)
        return Validation(
            losses,
            *_calibrate(*kept, calibrate=calibrate, score=score, threshold=threshold),
        )

    return validate


def _calibrate(
    maps: Maps,
    own_scores: Scores,
    *,
    calibrate: str,
    score: Mapping[str, Any],
    threshold: Mapping[str, float],
) -> tuple[calibration.Calibration, thresholds.Decisions]:
    """Returns the calibration and the thresholds from raw maps and scores."""
    found = calibration.calibrate(maps, method=calibrate)
    fused, share = calibration.fuse_as_new(maps, method=calibrate), score["top_share"]
    if score["fusion"] == fusion.MAP:
        fused_scores = np.asarray(fusion.image_score(fused, share))
    else:
        calibrated = calibration.calibrate_maps(maps, found)
        scores = {n: fusion.image_score(m, share) for n, m in calibrated.items()}
        scores |= own_scores
        weights = fusion.choose_weights(tuple(scores), score["weights"])
        fused_scores = fusion.fuse_as_new(scores, weights)
        found = found.replace(fusion=fusion.measure(scores, weights))
    return found, thresholds.choose(fused, fused_scores, **threshold)


def _check_finite(maps: Maps, scores: Scores, updates: int) -> None:
    wrong = [k for k, v in {**maps, **scores}.items() if not np.isfinite(v).all()]
    if wrong:
        raise Diverged(
            "Expected finite maps and scores of the validation images after "
            f"{updates} updates, found NaN or infinity in {', '.join(wrong)}. "
            "Checkpoints before it are kept. Look for constant images, or leave that "
            "part out of --config.method."
        )
