"""Defines the result of one image, which detectors return and scores.csv holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from ulsad_jax.scoring.prediction import Prediction

SUFFIX = "_score"  # suffix of the columns of single maps' scores
FIRST = ("score", "normalized_score", "is_anomalous")  # columns before them
LAST = ("mask_area", "mask_share")  # columns after them


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The result of one image.

    Attributes:
        score: score of the image, as in scores.csv; see `prediction.Prediction`.
        normalized_score: normalised score; see `thresholds.normalize`.
        is_anomalous: True if the score is above the image threshold.
        scores: scores of the calibrated maps, and the method's own, by name.
        mask_area: number of pixels of the mask.
        mask_share: share of the image's pixels in the mask.
        anomaly_map: [h, w] float32, mean of `maps`; None in a result read from a file.
        maps: calibrated maps by name, [h, w] float32; empty if they are not kept.
        mask: [h, w] bool, True for pixels above the pixel threshold; None in a result
            read from a file.
    """

    score: float
    normalized_score: float
    is_anomalous: bool
    scores: dict[str, float]
    mask_area: int
    mask_share: float
    anomaly_map: Float[np.ndarray, "h w"] | None = None
    maps: dict[str, Float[np.ndarray, "h w"]] = dataclasses.field(default_factory=dict)
    mask: Bool[np.ndarray, "h w"] | None = None

    def row(self) -> dict[str, float | bool | int]:
        """Returns the numbers by column, in the order of `columns`."""
        values = {name: getattr(self, name) for name in (*FIRST, *LAST)}
        values |= {f"{name}{SUFFIX}": value for name, value in self.scores.items()}
        return {name: values[name] for name in columns(self.scores)}


def columns(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the columns of results.

    Args:
        names: names of the method's maps and of its own scores.
    """
    return (*FIRST, *(f"{name}{SUFFIX}" for name in names), *LAST)


def read_row(row: Mapping[str, str]) -> Result:
    """Returns the result in a row of a CSV file, without arrays.

    Args:
        row: cells by column; further columns are ignored.
    """
    names = [c.removesuffix(SUFFIX) for c in row if c.endswith(SUFFIX)]
    return Result(
        score=float(row["score"]),
        normalized_score=float(row["normalized_score"]),
        is_anomalous=row["is_anomalous"] == "True",
        scores={n: float(row[f"{n}{SUFFIX}"]) for n in names if n != "normalized"},
        mask_area=int(row["mask_area"]),
        mask_share=float(row["mask_share"]),
    )


def take(prediction: Prediction, i: int) -> Result:
    """Returns the result of image i at model resolution.

    Args:
        prediction: prediction for a batch or a split, in NumPy arrays.
        i: index of the image in it.
    """
    area = int(prediction.mask_area[i])
    return Result(
        score=prediction.score[i].item(),
        normalized_score=prediction.normalized_score[i].item(),
        is_anomalous=prediction.is_anomalous[i].item(),
        scores={name: of[i].item() for name, of in prediction.scores.items()},
        mask_area=area,
        mask_share=area / prediction.anomaly_map[i].size,
        anomaly_map=prediction.anomaly_map[i],
        maps={name: of[i] for name, of in prediction.maps.items()},
    )
