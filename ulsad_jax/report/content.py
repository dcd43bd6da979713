"""Defines the content of a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ulsad_jax.data.records import GOOD
from ulsad_jax.scoring.result import Result


@dataclasses.dataclass(frozen=True)
class Shown:
    """A test image and its result.

    Attributes:
        name: "<type>/<stem>".
        type: `GOOD`, or the kind of anomaly.
        is_defective: True for an image that is known to be anomalous.
        result: predicted score and decision, without arrays.
        picture: path of the image's picture, which may not exist.
    """

    name: str
    type: str
    is_defective: bool
    result: Result
    picture: Path

    @property
    def is_wrong(self) -> bool:
        """True for a missed anomaly or a false alarm."""
        return self.is_defective != self.result.is_anomalous


@dataclasses.dataclass(frozen=True)
class CategoryFiles:
    """Content of a category's folder; a missing optional file gives an empty part.

    Attributes:
        name: name of the category.
        metrics: metrics by name; NaN where undefined.
        thresholds: fields of `thresholds.Thresholds` by name.
        basis: fields of `thresholds.Basis` by name.
        scores: test images and their results.
        epochs: lines of metrics.jsonl.
        curves: curves by name, see `evaluation.pixel_curves`.
        stages: time and memory by stage, see `stages.measure`.
        fusion: fields of `fusion.Fusion` by name; None without a fusion of scores.
    """

    name: str
    metrics: dict[str, float]
    thresholds: dict[str, float]
    basis: dict[str, Any]
    scores: list[Shown]
    epochs: list[dict[str, float]]
    curves: dict[str, dict[str, list[float]]]
    stages: dict[str, dict[str, Any]]
    fusion: dict[str, dict[str, float]] | None = None

    @property
    def types(self) -> list[str]:
        """Types of the test images, the normal one first."""
        found = {row.type for row in self.scores}
        return sorted(found, key=lambda name: (name != GOOD, name))

    def by_badness(self) -> list[Shown]:
        """Returns the images with a picture, the most wrongly scored ones first.

        The order is that of their distance to the image threshold, on its wrong side.
        """

        def badness(row: Shown) -> float:
            over = row.result.score - self.thresholds["image"]
            return -over if row.is_defective else over

        pictured = (row for row in self.scores if row.picture.is_file())
        return sorted(pictured, key=badness, reverse=True)


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """Content of a run's folder.

    Attributes:
        name: name of the folder.
        about: results.json without the metrics.
        config: resolved config.
        categories: categories in the order of results.json.
    """

    name: str
    about: dict[str, Any]
    config: dict[str, Any]
    categories: list[CategoryFiles]
