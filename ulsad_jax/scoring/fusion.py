"""Computes the scores of images, and adds them to one score."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Scores = Mapping[str, Float[np.ndarray, " n"]]

MAP, SCORES = "map", "scores"  # values of config.score.fusion
ROUNDING = 1e-5  # largest spread of float32 scores by rounding, as a share of them
NORMAL_MAD = 0.6745  # median absolute deviation of a standard normal distribution


@flax.struct.dataclass
class Fusion:
    """The sum of weight * (score - center) / spread over an image's scores.

    Attributes:
        center: median of the validation normals' scores, by the score's name.
        spread: robust standard deviation of the validation normals' scores.
        weight: weight in the sum.
    """

    center: dict[str, float]
    spread: dict[str, float]
    weight: dict[str, float]

    def terms(
        self, scores: Mapping[str, Float[Array, " b"]]
    ) -> dict[str, Float[Array, " b"]]:
        """Returns the terms of the sum by the score's name."""
        return {
            name: weight * ((scores[name] - self.center[name]) / self.spread[name])
            for name, weight in self.weight.items()
        }

    def __call__(self, scores: Mapping[str, Float[Array, " b"]]) -> Float[Array, " b"]:
        """Returns the fused scores."""
        return functools.reduce(operator.add, self.terms(scores).values())


def image_score(
    anomaly_map: Float[Array, "b h w"], top_share: float = 0.0
) -> Float[Array, " b"]:
    """Returns the score of each image: the mean of its map's largest values.

    Args:
        anomaly_map: maps, one for each image.
        top_share: share of the pixels, rounded up to whole pixels; 0 for the maximum.
    """
    if not top_share:
        return anomaly_map.max((1, 2))
    flat = anomaly_map.reshape(anomaly_map.shape[0], -1)
    count = math.ceil(top_share * flat.shape[1] - 1e-9)  # but for rounding errors
    return jax.lax.top_k(jnp.asarray(flat), count)[0].mean(1)


def choose_weights(
    names: tuple[str, ...], given: Mapping[str, float]
) -> dict[str, float]:
    """Returns the weight of every score in the sum; scores of weight 0 are left out.

    Names with weight 0 may be unknown, so that a config can leave out what only some
    methods have.

    Args:
        names: names of the scores.
        given: weights by name, `config.score.weights`; 1 for scores without one.

    Raises:
        UserError: a name is unknown, or no weight is left.
    """
    weights = {name: float(given.get(name, 1.0)) for name in names}
    weights = {name: weight for name, weight in weights.items() if weight}
    unknown = [name for name in given if given[name] and name not in names]
    if unknown or not weights:
        raise UserError(
            f"Expected config.score.weights to have weights of {', '.join(names)}, not "
            f"all of them 0, found {dict(given)}. Correct the names or the values."
        )
    return weights


def measure(scores: Scores, weights: Mapping[str, float]) -> Fusion:
    """Measures the fusion on the scores of validation normals.

    Args:
        scores: scores by name, [n], n >= 1.
        weights: weights by name; the other scores are left out.
    """
    centers, spreads = {}, {}
    for name in weights:
        centers[name], spreads[name] = _measure(np.asarray(scores[name], np.float64))
    return Fusion(centers, spreads, dict(weights))


def fuse_as_new(
    scores: Scores, weights: Mapping[str, float]
) -> Float[np.ndarray, " n"]:
    """Returns fused scores of validation normals, each measured on the other images.

    A single image is measured on itself.

    Args:
        scores: scores by name, [n], n >= 1.
        weights: weights by name; the other scores are left out.
    """
    used = {name: np.asarray(scores[name], np.float64) for name in weights}
    count = len(next(iter(used.values())))
    if count == 1:
        return measure(used, weights)(used)
    fused = np.empty(count)
    for i in range(count):
        own = {name: values[i] for name, values in used.items()}
        others = {name: np.delete(values, i) for name, values in used.items()}
        fused[i] = measure(others, weights)(own)
    return fused


def _measure(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Returns the center and the spread of scores; the spread is never 0.

    Scores that do not vary but for rounding, such as a single one, say nothing about
    their unit. Their spread is then the center's absolute value, which makes the result
    relative.
    """
    center = float(np.median(values))
    mad = float(np.median(np.abs(values - center)))
    for spread in (mad / NORMAL_MAD, float(values.std())):
        if spread > ROUNDING * abs(center):
            return center, spread
    return center, abs(center) or 1.0
