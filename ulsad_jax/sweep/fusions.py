"""Scores other fusions of a trained member's maps, without training again."""

from __future__ import annotations

import json

from ulsad_jax.metrics import base
from ulsad_jax.metrics.values import finite
from ulsad_jax.runs import testing
from ulsad_jax.runs.category import CategoryRun
from ulsad_jax.runtime import files

FUSIONS = "fusions.json"
RAW_MEAN = "raw mean"


def write(run: CategoryRun, step: int, *, again: bool) -> None:
    """Writes the image metrics of each fusion: {"step": ..., fusion: {metric: value}}.

    The fusions are each map alone and the mean of the raw maps. Single maps need no
    calibration, because an affine calibration does not change the order of their
    scores.

    Args:
        run: category of the member.
        step: number of updates of the checkpoint.
        again: True to write the file even if it exists for this step.
    """
    path = run.folder / FUSIONS
    if path.exists() and not again and json.loads(path.read_text())["step"] == step:
        return
    prediction, truth = testing.predict_uncalibrated(run, step)
    metrics = base.find(run.config.evaluation.metrics)
    found = {}
    for name, score in {**prediction.scores, RAW_MEAN: prediction.score}.items():
        if len(truth.labels):
            images = base.Images(
                truth.labels, truth.types, score, run.data.has_saturation
            )
            found[name] = finite(base.measure(metrics, base.IMAGE, images))
    files.replace(path, json.dumps({"step": step, **found}, indent=2) + "\n")
