"""Defines a metric: one function, with its title and its level.

A module of this package declares its metrics by name. Table, CSV and report follow
from that:

    METRICS = {"aupro": Metric("AUPRO", PIXEL, lambda pixels: pixels.aupro())}

`config.evaluation.metrics` adds the user's own, as "module:attribute".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ulsad_jax.runtime import registry
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int

GOOD = "good"  # the type of every normal image
LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"  # MVTec LOCO's names
IMAGE, PIXEL = "image", "pixel"  # levels of metrics
MODEL, ORIGINAL = "model", "original"  # resolutions of pixels
FIELD = "config.evaluation.metrics"
SCORE_AUROC = "score_auroc"  # prefix of the AUROC of each score


class Images(NamedTuple):
    """The data from which image-level metrics are computed.

    Attributes:
        labels: int [n], 0 normal or 1 anomalous.
        types: n names, "good" or the type of the anomaly.
        scores: float [n], larger is more anomalous.
        has_saturation: True if the data set distinguishes logical and structural
            anomalies.
    """

    labels: Int[np.ndarray, " n"]
    types: Sequence[str]
    scores: Float[np.ndarray, " n"]
    has_saturation: bool


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        title: title of its table column; "" for a metric that only the CSV and the
            JSON file have.
        level: `IMAGE` or `PIXEL`.
        compute: function from the data to the metric. The data is `Images`, or pixels
            with `auroc`, `aupro` and `curve` at both resolutions, see `pixel.Pixels`
            and `stream.PixelStream`. The result is a number, NaN if undefined; or
            several by suffix, such as one per type of anomaly, "" being the metric
            itself; or None if the data set has no such metric.
        resolutions: resolutions of pixels at which it is measured.
    """

    title: str
    level: str
    compute: Callable[[Any], float | Mapping[str, float] | None]
    resolutions: tuple[str, ...] = (MODEL, ORIGINAL)

    def name_at(self, name: str, resolution: str) -> str:
        """Returns the metric's name in results, which depends on the resolution."""
        both = self.level == PIXEL and len(self.resolutions) > 1
        return f"{name}_original" if both and resolution == ORIGINAL else name


def find(references: Sequence[str]) -> dict[str, Metric]:
    """Returns the built-in metrics and further ones by name.

    Args:
        references: "module:attribute" of each further metric; its attribute becomes
            its name.

    Raises:
        UserError: there is no such metric, or its name is taken.
    """
    known = registry.collect("ulsad_jax.metrics", "METRICS")
    found = dict(known)
    for reference in references:
        name = reference.rpartition(":")[2]
        metric = registry.find(reference, known, field=FIELD)
        if not isinstance(metric, Metric) or name in found:
            raise UserError(
                f"Expected {FIELD} to name variables that hold a Metric of "
                f"ulsad_jax.metrics.base, called unlike the built-in ones "
                f"({', '.join(known)}), found {reference!r}. Rename or remove it."
            )
        found[name] = metric
    return found


def columns(metrics: Mapping[str, Metric]) -> dict[str, str]:
    """Returns the titles of a table's columns by the metrics' names in results."""
    titles = {}
    for name, metric in metrics.items():
        for resolution in metric.resolutions if metric.title else ():
            key = metric.name_at(name, resolution)
            titles[key] = metric.title + " (original size)" * (key != name)
    return titles


def measure(
    metrics: Mapping[str, Metric], level: str, evidence: Any, resolution: str = MODEL
) -> dict[str, float]:
    """Computes the metrics of a level.

    Args:
        metrics: metrics by name.
        level: `IMAGE` or `PIXEL`.
        evidence: data that the metrics' `compute` takes.
        resolution: resolution of the pixels, `MODEL` or `ORIGINAL`.

    Returns:
        Values by name in results; a suffix follows after a slash.
    """
    values = {}
    for name, metric in metrics.items():
        if metric.level != level or resolution not in metric.resolutions:
            continue
        found = metric.compute(evidence)
        key = metric.name_at(name, resolution)
        if isinstance(found, Mapping):
            for suffix, value in found.items():
                values[f"{key}/{suffix}" if suffix else key] = float(value)
        elif found is not None:
            values[key] = float(found)
    return values
