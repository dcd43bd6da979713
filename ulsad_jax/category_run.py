"""One category of a run: its data, its networks, its folder."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from ulsad_jax import config as config_lib
from ulsad_jax import (
    evaluation,
    features,
    files,
    full_resolution,
    inference,
    pretrained,
    results,
    stages,
    trained,
    trainer,
    training,
)
from ulsad_jax.data.pipeline import Category, Examples
from ulsad_jax.data.records import listing
from ulsad_jax.decisions import Thresholds
from ulsad_jax.errors import UserError
from ulsad_jax.losses import make_loss_fn
from ulsad_jax.metrics import image as image_metrics
from ulsad_jax.models.pyramid import FeaturePyramid
from ulsad_jax.progress import progress
from ulsad_jax.report import figures
from ulsad_jax.writer import Writer

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from ml_collections import ConfigDict

RESULTS, SCORES, CURVES = "results.json", "scores.csv", "curves.json"
PICTURES, MAPS = "pictures", "maps"
LOCO_LAYOUTS = ("mvtec_loco", "synthetic")  # their headline is the mean of two types


class CategoryRun:
    """One category of a run: its data, its networks, its folder."""

    def __init__(
        self,
        config: ConfigDict,
        category: str,
        *,
        data: Category,
        folder: Path,
        trunk: pretrained.Trunk,
    ):
        """Makes what training and evaluation share.

        Args:
            config: the run's.
            category: its name.
            data: its images.
            folder: its folder in the work directory.
            trunk: the run's.
        """
        self._config, self._name, self._folder = config, category, folder
        self._data, self._trunk = data, trunk
        dtype = jnp.dtype(config.train.dtype)
        self._pyramid = FeaturePyramid(config.trunk.architecture, dtype)
        self._model = training.make_model(config)
        self._predict = inference.make_predict_step(self._pyramid, self._model)

    def fit(self) -> int:
        """Trains what is left to train; returns the step to evaluate."""
        config, data = self._config, self._data
        self._check_selection()
        steps = config.train.num_epochs * training.steps_per_epoch(
            len(data.train), config.train.batch_size
        )
        with (
            Writer(self._folder, self._name) as writer,
            trained.open_store(config, self._folder) as store,
        ):
            latest = store.latest()
            if latest is not None:
                trained.check_trunk(store, latest, self._trunk, self._folder)
                if latest >= steps:
                    return trained.select(config, store)
            writer.say(
                f"{len(data.train)} training, {len(data.validation)} validation, "
                f"{len(data.test)} test images"
            )
            with stages.measure(self._folder, "features"):
                train, validation, statistics = self._extract(writer)
            loss_fn = make_loss_fn(config.losses)
            validate = trainer.make_validate(
                self._model,
                loss_fn,
                validation,
                batch_size=config.evaluation.batch_size,
                method=config.calibration,
                **config.threshold,
            )
            loop = trainer.Trainer(
                config,
                self._name,
                train=train,
                statistics=statistics,
                loss_fn=loss_fn,
                validate=validate,
                store=store,
                writer=writer,
                listing=listing([*data.train.records, *data.validation.records]),
                trunk=self._trunk.identity,
                score_test=self._make_score_test(statistics),
            )
            with stages.measure(self._folder, "training"):
                loop.run()
            return trained.select(config, store)

    def evaluate(
        self,
        step: int | None = None,
        *,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
    ) -> None:
        """Scores every test image with a checkpoint; writes results and pictures.

        Args:
            step: of the checkpoint; by default the one that the config asks for.
            image_threshold: instead of the run's.
            pixel_threshold: instead of the run's.
        """
        given = {"image_threshold": image_threshold, "pixel_threshold": pixel_threshold}
        step, weights, decisions = trained.load(
            self._config, self._folder, self._trunk, step=step, **given
        )
        with stages.measure(self._folder, "prediction"):
            prediction, truth = self._predict_test(weights)
        test = self._data.test
        images = [record.image for record in test.records]
        evaluation.check_finite(prediction.anomaly_map, images)
        with (
            warnings.catch_warnings(record=True) as undefined,
            stages.measure(self._folder, "metrics"),
        ):
            warnings.simplefilter("always", UserWarning)
            metrics, curves = self._measure(prediction, truth, decisions.thresholds)
        results.write_scores(self._folder / SCORES, test.records, prediction)
        files.replace(self._folder / CURVES, json.dumps(curves) + "\n")
        with stages.measure(self._folder, "pictures"):
            pictures = self._write_pictures(prediction, truth, weights)
        if self._config.evaluation.write_maps:
            self._write_maps(prediction)
        with Writer(self._folder, self._name) as writer:
            if not images:
                writer.say("no test images: nothing to measure")
            for text in dict.fromkeys(str(warning.message) for warning in undefined):
                writer.say(text)
            writer.scalars(
                step,
                {f"test/{k}": v for k, v in metrics.items() if math.isfinite(v)},
            )
            writer.pictures(step, pictures)
        document = self._origin(step, **given) | {
            "decisions": decisions.to_json(),
            "metrics": results.finite(metrics),
        }
        files.replace(self._folder / RESULTS, json.dumps(document, indent=2) + "\n")

    def _measure(
        self,
        prediction: inference.Prediction,
        truth: evaluation.Truth,
        thresholds: Thresholds,
    ) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
        """Returns metrics by name, and curves by name to draw."""
        metrics = {
            "test_images": len(truth.labels),
            "test_anomalous": int(truth.labels.sum()),
        }
        if not len(truth.labels):
            return metrics, {}
        loco = self._config.dataset.name in LOCO_LAYOUTS
        metrics |= evaluation.image_level(
            truth.labels, truth.types, prediction.score, loco=loco
        )
        metrics |= evaluation.pixel_level(
            truth.masks, truth.has_mask, prediction.anomaly_map
        )
        metrics |= evaluation.decision_level(prediction, truth, thresholds)
        maps = prediction.anomaly_map
        original = self._config.evaluation.original_resolution
        if original:
            title = f"[{self._name}] original resolution"
            stream = full_resolution.stream_pixels(
                self._data.test, maps, loco=loco, title=title
            )
            metrics |= full_resolution.measure(stream, loco=loco)
        else:
            stream = evaluation.stream_pixels(truth.masks, truth.has_mask, maps)
        return metrics, evaluation.pixel_curves(stream, loco=loco and original)

    def _write_maps(self, prediction: inference.Prediction) -> None:
        """Writes every test image's map, in place of those of before."""
        shutil.rmtree(self._maps, ignore_errors=True)
        with stages.measure(self._folder, "maps"):
            full_resolution.write_maps(
                self._data.test,
                prediction.anomaly_map,
                self._maps,
                title=f"[{self._name}] maps",
            )

    def is_evaluated(self, step: int) -> bool:
        """Whether the folder's results are those of this step, on these images."""
        if self._config.evaluation.write_maps and not self._maps.exists():
            return False
        path = self._folder / RESULTS
        try:
            document = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return False
        return self._origin(step).items() <= document.items()

    def _origin(
        self,
        step: int,
        *,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
    ) -> dict[str, Any]:
        """What results rest on; thresholds are None unless given by hand."""
        return {
            "image_threshold": image_threshold,
            "pixel_threshold": pixel_threshold,
            "step": step,
            "selection": self._config.selection,
            "data": self._data.fingerprint,
            "original_resolution": self._config.evaluation.original_resolution,
        }

    @property
    def _maps(self) -> Path:
        """Of all categories in one folder, as MVTec's evaluation scripts expect."""
        return self._folder.parent / MAPS / self._folder.name

    def _extract(self, writer: Writer) -> features.Normals:
        """Features of the training and validation normals, standardised."""
        splits = self._data.train, self._data.validation
        batches = [
            self._batches(split, f"{title} features")
            for split, title in zip(splits, ("training", "validation"), strict=True)
        ]
        counts = [len(split) for split in splits]
        size = tuple(self._config.image_size)
        needed = features.count_bytes(sum(counts), size)
        allowed = self._config.train.feature_memory * features.host_bytes()
        told = f"features of {sum(counts)} images: {needed / 2**20:.0f} MiB of memory"
        if needed <= allowed:
            writer.say(told)
            return features.keep(self._pyramid, self._trunk.variables, batches, counts)
        writer.say(
            f"{told}, more than config.train.feature_memory allows "
            f"({allowed / 2**20:.0f} MiB): they are not kept, and every step runs the "
            "trunk, too"
        )
        return features.stream(
            self._pyramid, self._trunk.variables, batches, counts, image_size=size
        )

    def _check_selection(self) -> None:
        """Refuses to select on test images that give no AUROC."""
        on_test = self._config.selection == config_lib.BEST_TEST_AUROC
        anomalous = int(self._data.test.labels.sum())
        normal = len(self._data.test) - anomalous
        if on_test and not (normal and anomalous):
            raise UserError(
                f"Expected normal and anomalous test images of {self._name!r}, to "
                f"select on them, found {normal} and {anomalous}. Add some, or set "
                "another --config.selection than best_test_auroc."
            )

    def _make_score_test(
        self, statistics: features.ChannelStatistics
    ) -> Callable[..., float] | None:
        """Image AUROC on the test set, for the reference's selection alone."""
        if self._config.selection != config_lib.BEST_TEST_AUROC:
            return None

        def score_test(variables, calibration) -> float:
            weights = inference.Weights(
                self._trunk.variables, statistics, variables, calibration, Thresholds()
            )
            prediction, truth = self._predict_test(weights)
            return image_metrics.auroc(truth.labels, prediction.score)

        return score_test

    def _predict_test(
        self, weights: inference.Weights
    ) -> tuple[inference.Prediction, evaluation.Truth]:
        return evaluation.predict_split(
            lambda image: self._predict(weights, image),
            self._batches(self._data.test, "test images"),
            types=self._data.test.types,
            image_size=tuple(self._config.image_size),
        )

    def _batches(self, split: Examples, title: str) -> Iterable[dict[str, np.ndarray]]:
        size = self._config.evaluation.batch_size
        return progress(
            split.batches(size),
            f"[{self._name}] {title}",
            total=-(-len(split) // size),
        )

    def _write_pictures(
        self,
        prediction: inference.Prediction,
        truth: evaluation.Truth,
        weights: inference.Weights,
    ) -> list[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
        """Writes pictures of each type; returns one a type for TensorBoard."""
        folder = self._folder / PICTURES
        calibration = weights.calibration
        shutil.rmtree(folder, ignore_errors=True)
        limit = self._config.evaluation.pictures_per_type
        shown = []
        for kind in dict.fromkeys(truth.types):
            rows = [i for i, name in enumerate(truth.types) if name == kind]
            sign = -1 if truth.labels[rows[0]] == 0 else 1
            rows.sort(key=lambda i, s=sign: s * prediction.score[i])
            rows = _choose_pictures(rows, limit)
            target = folder / results.file_name(kind)
            target.mkdir(parents=True, exist_ok=True)
            for i in rows:
                drawn = figures.picture(
                    truth.images[i],
                    truth.masks[i],
                    prediction.anomaly_map[i],
                    low=calibration.display_low,
                    high=calibration.display_high,
                    threshold=weights.thresholds.pixel,
                )
                stem = results.file_name(self._data.test.records[i].image.stem)
                Image.fromarray(drawn).save(target / f"{stem}.png")
                if i == rows[0]:
                    shown.append((f"test/{kind}", drawn))
        return shown


def _choose_pictures(rows: list[int], limit: int) -> list[int]:
    """Of rows, the most wrongly scored first: half such ones, the others spread."""
    if limit < 0 or limit >= len(rows):
        return rows
    worst = -(-limit // 2)
    spread = np.linspace(worst, len(rows) - 1, limit - worst).astype(int)
    return rows[:worst] + [rows[k] for k in spread]
