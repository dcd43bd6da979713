"""Measures what trained members cost: time, memory, and numbers that they keep."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ulsad_jax.methods.base import Batch, Method, count_bytes
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs import saved, steps
from ulsad_jax.runs.category import CategoryRun
from ulsad_jax.runtime import files
from ulsad_jax.scoring.prediction import Weights, make_predict_step
from ulsad_jax.trunks import features

if TYPE_CHECKING:
    from collections.abc import Callable

COSTS = "costs.json"
MIB, MILLION, MILLI = 2.0**-20, 1e-6, 1e3
SIZES = (1, 8)  # numbers of images whose prediction is timed
LEAST, MOST = 5, 50  # runs of a prediction that is timed
LONGEST = 2.0  # seconds after which `LEAST` runs are enough


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        title: title with the unit.
        scale: factor from the measured number to that unit.
        digits: number of decimals.
    """

    title: str
    scale: float
    digits: int


COLUMNS = {
    "fit_seconds": Column("fit, s", 1, 1),
    "image_seconds_1": Column("ms an image, batch 1", MILLI, 1),
    "image_seconds_8": Column("ms an image, batch 8", MILLI, 1),
    "parameters": Column("parameters, M", MILLION, 2),
    "model_bytes": Column("model, MiB", MIB, 1),
    "training_bytes": Column("training step, MiB", MIB, 0),
    "prediction_bytes": Column("prediction, MiB", MIB, 0),
    "published_share": Column("of published training, %", 100, 1),
}


def write(run: CategoryRun, step: int, *, again: bool) -> None:
    """Writes what a member costs: {"step": ..., name in `COLUMNS`: number}.

    Args:
        run: category of the member, which was trained alone.
        step: number of updates of the checkpoint.
        again: True to write the file even if it exists for this step.
    """
    path = run.folder / COSTS
    if path.exists() and not again and json.loads(path.read_text())["step"] == step:
        return
    _, weights, _ = saved.load(run.config, run.setup, run.folder, run.trunk, step=step)
    recorded = json.loads((run.folder / files_of.STAGES).read_text())
    found = {
        "step": step,
        "fit_seconds": sum(recorded[s]["seconds"] for s in ("features", "training")),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(_read(weights))),
        "model_bytes": count_bytes(weights.model),
        "training_bytes": _measure_training(run, weights),
        "published_share": _share(run, step),
    }
    for size in SIZES:
        predict, image = _compile_prediction(run, weights, size)
        seconds = time_call(lambda p=predict, i=image: p(weights, i))
        found[f"image_seconds_{size}"] = seconds / size
        found["prediction_bytes"] = count_program_bytes(predict)  # of the last size
    files.replace(path, json.dumps(found, indent=2) + "\n")


def time_call(call: Callable[[], Any]) -> float:
    """Returns the median seconds of a call until its results are in host memory."""
    jax.device_get(call())
    seconds: list[float] = []
    while len(seconds) < MOST and (len(seconds) < LEAST or sum(seconds) < LONGEST):
        started = time.perf_counter()
        jax.device_get(call())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def count_program_bytes(program: jax.stages.Compiled) -> int:
    """Returns the device memory of a program: arguments, results and what is between.

    Buffers that the results take over from the arguments are counted once.
    """
    found = program.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def _read(weights: Weights) -> Any:
    """Returns the arrays that a prediction reads, except calibration and thresholds."""
    return weights.trunk, weights.statistics, weights.model


def _share(run: CategoryRun, step: int) -> float:
    """Returns the share of the published updates and passes that were done, up to 1."""
    method = run.setup.method
    epochs = step * run.config.train.batch_size / len(run.data.train)
    shares = [1.0]
    if method.published_updates is not None:
        shares.append(step / method.published_updates)
    if method.published_epochs is not None:
        shares.append(epochs / method.published_epochs)
    return min(shares)


def _compile_prediction(
    run: CategoryRun, weights: Weights, size: int
) -> tuple[jax.stages.Compiled, np.ndarray]:
    """Returns the compiled prediction of some images, and these images."""
    predict = make_predict_step(
        run.setup.pyramid, run.setup.method, top_share=run.config.score.top_share
    )
    shape = size, *run.setup.input_size, 3
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return predict.lower(weights, image).compile(), image


def _measure_training(run: CategoryRun, weights: Weights) -> int:
    """Returns the device memory of an update in bytes."""
    made, size = run.setup, run.config.train.batch_size
    method, spec = made.method, made.spec(size, len(run.data.train))
    if type(method).adapt is not Method.adapt:
        first = next(iter(run.data.train.batches(min(size, len(run.data.train)))))
        given = first["image"], None
        if made.pyramid is not None:
            extract = features.make_extractor(
                made.pyramid, weights.trunk, weights.statistics
            )
            given = extract(first["image"])
        method = method.adapt(jax.device_get(Batch(*given, first["valid"])))
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(steps.make_init(method, spec), key)
    update = steps.make_train_step(method, run.devices, run.config.parallel.backend)
    return count_program_bytes(update.lower(state, spec.batch, key).compile())
