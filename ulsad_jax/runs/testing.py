"""Evaluates a category: scores, metrics and pictures of its test images."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ulsad_jax.data.records import TEST
from ulsad_jax.data.survey import digest
from ulsad_jax.metrics import base as metrics_base
from ulsad_jax.metrics import image as image_metrics
from ulsad_jax.metrics.base import IMAGE, ORIGINAL, PIXEL, Images
from ulsad_jax.metrics.pixel import Pixels
from ulsad_jax.metrics.values import finite
from ulsad_jax.report import pictures
from ulsad_jax.runs import evaluation, full_resolution, results, saved, steps
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs.category import CategoryRun
from ulsad_jax.runtime import files, hosts, stages
from ulsad_jax.runtime.writer import open_writer
from ulsad_jax.scoring.calibration import Calibration
from ulsad_jax.scoring.prediction import Prediction, Weights, make_predict_step
from ulsad_jax.scoring.split import Truth, predict_split

if TYPE_CHECKING:
    from ulsad_jax.scoring.thresholds import Thresholds


def evaluate(
    run: CategoryRun,
    step: int | None = None,
    *,
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
) -> None:
    """Scores every test image with a checkpoint; writes results and pictures.

    Args:
        run: category to evaluate.
        step: number of updates of the checkpoint; by default that of the checkpoint
            that the config selects.
        image_threshold: replaces the run's threshold on image scores.
        pixel_threshold: replaces the run's threshold on map values.

    Raises:
        UserError: there is no such checkpoint, or it was trained on other images or
            with another trunk; a map is not finite.
    """
    if run.data.train:
        run.check_data()
    given = {"image_threshold": image_threshold, "pixel_threshold": pixel_threshold}
    wanted = given | {"step": step, "place": run.devices.choose_places}
    step, weights, decisions = saved.load(
        run.config, run.setup, run.folder, run.trunk, **wanted
    )
    timings = run.folder / files_of.STAGES
    with stages.measure(timings, "prediction"):
        prediction, truth = predict_test(run, weights)
    if not hosts.is_first():
        return
    test = run.data.test
    images = [record.image for record in test.records]
    evaluation.check_finite(prediction.anomaly_map, prediction.scores, images)
    with (
        warnings.catch_warnings(record=True) as undefined,
        stages.measure(timings, "metrics"),
    ):
        warnings.simplefilter("always", UserWarning)
        metrics, curves = _measure(run, prediction, truth, decisions.thresholds)
    results.write_scores(run.folder / files_of.SCORES, test.records, prediction)
    files.replace(run.folder / files_of.CURVES, json.dumps(curves) + "\n")
    if run.config.evaluation.write_maps:
        _write_maps(run, prediction)
    with open_writer(run.folder, run.title) as writer:
        if not images:
            writer.say("no test images: nothing to measure")
        for text in dict.fromkeys(str(warning.message) for warning in undefined):
            writer.say(text)
        writer.scalars(
            step, {f"test/{k}": v for k, v in metrics.items() if math.isfinite(v)}
        )
        writer.pictures(step, _write_pictures(run, prediction, truth, weights))
    about = decisions.to_json()
    if fusion := weights.calibration.to_json().get("fusion"):
        about["fusion"] = fusion
    document = {"decisions": about, "metrics": finite(metrics)}
    text = json.dumps(_origin(run, step, **given) | document, indent=2) + "\n"
    files.replace(run.folder / files_of.RESULTS, text)


def _write_pictures(
    run: CategoryRun, prediction: Prediction, truth: Truth, weights: Weights
) -> list[tuple[str, np.ndarray]]:
    """Writes pictures of each type; returns one of each type, for TensorBoard."""
    with stages.measure(run.folder / files_of.STAGES, "pictures"):
        return pictures.write(
            run.folder / files_of.PICTURES,
            prediction,
            truth,
            [record.stem for record in run.data.test.records],
            weights,
            limit=run.config.evaluation.pictures_per_type,
        )


def is_evaluated(run: CategoryRun, step: int) -> bool:
    """Returns whether the results on disk are those of this step on these images."""
    try:
        document = json.loads((run.folder / files_of.RESULTS).read_text())
    except (FileNotFoundError, ValueError):
        return False
    wanted = _origin(run, step)
    if not wanted["write_maps"]:
        del wanted["write_maps"]  # existing maps do no harm
    return wanted.items() <= document.items()


def predict_uncalibrated(run: CategoryRun, step: int) -> tuple[Prediction, Truth]:
    """Predicts the test images with raw maps and their plain mean.

    Args:
        run: category to evaluate.
        step: number of updates of the checkpoint.
    """
    _, weights, _ = saved.load(run.config, run.setup, run.folder, run.trunk, step=step)
    raw = dataclasses.replace(weights, calibration=Calibration())
    return predict_test(run, raw)


def predict_test(run: CategoryRun, weights: Weights) -> tuple[Prediction, Truth]:
    """Predicts every test image.

    Args:
        run: category to evaluate.
        weights: weights of the checkpoint.
    """
    predict = make_predict_step(
        run.setup.pyramid, run.setup.method, top_share=run.config.score.top_share
    )
    model = steps.place_model(run.setup.method, run.devices, weights.model)
    placed = run.devices.replicate(weights.replace(model=None)).replace(model=model)
    split = run.devices.split
    # As the batches are, in shape and place, so that the prediction is traced once.
    size = run.batch_size(run.data.test), *run.setup.input_size
    image = split(np.zeros((*size, 3), np.uint8))
    return predict_split(
        lambda image: hosts.gather(predict(placed, split(image))),
        run.batches(run.data.test, "test images"),
        shapes=jax.eval_shape(predict, placed, image),
        types=run.data.test.types,
    )


def _measure(
    run: CategoryRun,
    prediction: Prediction,
    truth: Truth,
    thresholds: Thresholds,
) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
    """Returns metrics by name, and curves to draw by name."""
    metrics = {
        "test_images": len(truth.labels),
        "test_anomalous": int(truth.labels.sum()),
    }
    if not len(truth.labels):
        return metrics, {}
    chosen = metrics_base.find(run.config.evaluation.metrics)
    loco, maps = run.data.has_saturation, prediction.anomaly_map
    images = Images(truth.labels, truth.types, prediction.score, loco)
    metrics |= metrics_base.measure(chosen, IMAGE, images)
    metrics |= image_metrics.by_score(truth.labels, truth.types, prediction.scores)
    known = truth.has_mask
    pixels = Pixels(truth.masks[known], maps[known])
    metrics |= metrics_base.measure(chosen, PIXEL, pixels)
    metrics["pixel_images_left_out"] = int((~known).sum())
    metrics["masks_lost"] = int(truth.mask_lost.sum())
    metrics |= evaluation.decision_level(prediction, truth, thresholds)
    if not run.config.evaluation.original_resolution:
        return metrics, evaluation.pixel_curves(pixels.stream)
    stream = full_resolution.stream_pixels(
        run.data.test, maps, loco=loco, title=f"[{run.title}] original resolution"
    )
    metrics |= metrics_base.measure(chosen, PIXEL, stream, ORIGINAL)
    return metrics, evaluation.pixel_curves(stream)


def _write_maps(run: CategoryRun, prediction: Prediction) -> None:
    """Writes the map of every test image, and removes those of earlier evaluations."""
    folder = files_of.maps_folder(run.folder)
    shutil.rmtree(folder, ignore_errors=True)
    with stages.measure(run.folder / files_of.STAGES, "maps"):
        full_resolution.write_maps(
            run.data.test, prediction.anomaly_map, folder, title=f"[{run.title}] maps"
        )


def _origin(
    run: CategoryRun,
    step: int,
    *,
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
) -> dict[str, Any]:
    """Returns the settings behind the results, with thresholds set by hand or None."""
    return {
        "image_threshold": image_threshold,
        "pixel_threshold": pixel_threshold,
        "step": step,
        "selection": run.config.selection,
        "data": digest(run.data.survey.contents(TEST)),
        "original_resolution": run.config.evaluation.original_resolution,
        "write_maps": run.config.evaluation.write_maps,
    }
