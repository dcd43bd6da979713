"""One category of a run: its data, its networks, its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ulsad_jax.data.batches import Category, Examples
from ulsad_jax.data.records import TEST, TRAIN, VALIDATION
from ulsad_jax.data.survey import describe_changes, digest
from ulsad_jax.methods.ulsad.losses import make_loss_fn
from ulsad_jax.metrics import image as image_metrics
from ulsad_jax.report import pictures
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import evaluation, full_resolution, results, trained, training
from ulsad_jax.runs import loop as trainer
from ulsad_jax.runtime import devices as parallel
from ulsad_jax.runtime import files, hosts, stages
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.progress import progress
from ulsad_jax.runtime.writer import Silence, Writer, open_writer
from ulsad_jax.scoring import prediction as inference
from ulsad_jax.scoring.calibration import Calibration
from ulsad_jax.scoring.thresholds import Thresholds
from ulsad_jax.trunks import features
from ulsad_jax.trunks import weights as pretrained

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ulsad_jax.runtime.checkpoint import CheckpointStore

AnyTrainer = TypeVar("AnyTrainer", bound=trainer.Trainer)
RESULTS, SCORES, CURVES = "results.json", "scores.csv", "curves.json"
DATA = "data.json"  # digests of the images trained and validated on
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
        title: str = "",
    ):
        """Makes what training and evaluation share.

        Args:
            config: the run's.
            category: its name.
            data: its images.
            folder: its folder in the work directory.
            trunk: the run's.
            title: what it is called on the console, if not by its category.
        """
        self._config, self._name, self._folder = config, category, folder
        self._title = title or category
        self._data, self._trunk = data, trunk
        self._pyramid = training.make_pyramid(config)
        self._model = training.make_model(config)
        self._devices = parallel.find_devices(config.parallel.devices)
        self._predict = inference.make_predict_step(self._pyramid, self._model)

    def fit(self) -> int:
        """Trains what is left to train; returns the step to evaluate."""
        data = self._data
        with self.open() as (writer, store):
            if self.is_trained(store):
                return trained.select(self._config, store)
            writer.say(
                f"{len(data.train)} training, {len(data.validation)} validation, "
                f"{len(data.test)} test images"
            )
            with stages.measure(self._folder, "features"):
                normals = features.place(self._extract(writer), self._devices)
            loss_fn = make_loss_fn(self._config.losses)
            loop = self.make_trainer(trainer.Trainer, normals, loss_fn, store, writer)
            with stages.measure(self._folder, "training"):
                loop.run()
            return trained.select(self._config, store)

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[Writer | Silence, CheckpointStore]]:
        """The files that training writes to."""
        self._check_selection()
        _ = self.steps  # there is a batch
        with (
            open_writer(self._folder, self._title) as writer,
            trained.open_store(self._config, self._folder) as store,
        ):
            yield writer, store

    @property
    def steps(self) -> int:
        """How many updates training takes."""
        config, data = self._config.train, self._data
        return config.num_epochs * training.steps_per_epoch(
            len(data.train), config.batch_size, validation=len(data.validation)
        )

    def is_trained(self, store: CheckpointStore) -> bool:
        """Whether nothing is left to train.

        Raises:
            UserError: it was begun with another trunk or on other images, or has been
                trained for longer.
        """
        latest = store.latest()
        if latest is None:
            return False
        trained.check_trunk(store, latest, self._trunk, self._folder)
        self._check_data()
        if latest > self.steps or (
            latest == self.steps and not store.is_complete(latest)
        ):
            epochs = self._config.train.num_epochs
            raise UserError(
                "Expected config.train.num_epochs to be raised, or as it was, found "
                f"{epochs}, which are {self.steps} updates; {self._folder} has been "
                f"trained for {latest}. Raise it, or train anew in another --workdir."
            )
        return latest == self.steps

    def make_trainer(
        self,
        kind: type[AnyTrainer],
        normals: features.Normals,
        loss_fn: Callable,
        store: CheckpointStore,
        writer: Writer | Silence,
        numbers: Mapping[str, Mapping[str, float]] | None = None,
    ) -> AnyTrainer:
        """Makes the training loop.

        Args:
            kind: `Trainer`, or a class made from it.
            normals: what to train and validate on.
            loss_fn: see `losses.make_loss_fn`.
            store: of the checkpoints.
            writer: of the metrics.
            numbers: of the loss function, where they are not its own.
        """
        config = self._config
        if hosts.is_first():
            kept = json.dumps(self._contents, indent=1) + "\n"
            files.replace(self._folder / DATA, kept)
        validate = trainer.make_validate(
            self._model,
            loss_fn,
            normals.validation,
            devices=self._devices,
            batch_size=self._batch_size(self._data.validation),
            method=config.calibration,
            numbers=numbers,
            **config.threshold,
        )
        return kind(
            config,
            self._name,
            devices=self._devices,
            train=normals.train,
            statistics=normals.statistics,
            loss_fn=loss_fn,
            validate=validate,
            store=store,
            writer=writer,
            trunk=self._trunk.identity,
            score_test=self._make_score_test(normals.statistics),
        )

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
        if self._data.train:
            self._check_data()
        given = {"image_threshold": image_threshold, "pixel_threshold": pixel_threshold}
        step, weights, decisions = trained.load(
            self._config,
            self._folder,
            self._trunk,
            step=step,
            sharding=self._devices.everywhere,
            **given,
        )
        with stages.measure(self._folder, "prediction"):
            prediction, truth = self._predict_test(weights)
        if not hosts.is_first():
            return
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
            shown = pictures.write(
                self._folder / PICTURES,
                prediction,
                truth,
                [record.stem for record in test.records],
                weights,
                limit=self._config.evaluation.pictures_per_type,
            )
        if self._config.evaluation.write_maps:
            self._write_maps(prediction)
        with open_writer(self._folder, self._title) as writer:
            if not images:
                writer.say("no test images: nothing to measure")
            for text in dict.fromkeys(str(warning.message) for warning in undefined):
                writer.say(text)
            writer.scalars(
                step,
                {f"test/{k}": v for k, v in metrics.items() if math.isfinite(v)},
            )
            writer.pictures(step, shown)
        document = self._origin(step, **given) | {
            "decisions": decisions.to_json(),
            "metrics": results.finite(metrics),
        }
        files.replace(self._folder / RESULTS, json.dumps(document, indent=2) + "\n")

    def predict_uncalibrated(
        self, step: int
    ) -> tuple[inference.Prediction, evaluation.Truth, bool]:
        """Predicts the test images with raw maps and their plain mean.

        Returns:
            The prediction, the truth, and whether logical and structural anomalies are
            told apart.
        """
        _, weights, _ = trained.load(self._config, self._folder, self._trunk, step=step)
        raw = dataclasses.replace(weights, calibration=Calibration())
        return *self._predict_test(raw), self._is_loco

    @property
    def _is_loco(self) -> bool:
        return self._config.dataset.name in LOCO_LAYOUTS

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
        loco = self._is_loco
        metrics |= evaluation.image_level(
            truth.labels, truth.types, prediction.score, loco=loco
        )
        metrics |= evaluation.pixel_level(
            truth.masks, truth.has_mask, prediction.anomaly_map
        )
        metrics["masks_lost"] = int(truth.mask_lost.sum())
        metrics |= evaluation.decision_level(prediction, truth, thresholds)
        maps = prediction.anomaly_map
        original = self._config.evaluation.original_resolution
        if original:
            title = f"[{self._title}] original resolution"
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
                title=f"[{self._title}] maps",
            )

    def is_evaluated(self, step: int) -> bool:
        """Whether the folder's results are those of this step, on these images."""
        path = self._folder / RESULTS
        try:
            document = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return False
        wanted = self._origin(step)
        if not wanted["write_maps"]:
            del wanted["write_maps"]  # maps that were not asked for are no fault
        return wanted.items() <= document.items()

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
            "data": digest(self._data.survey.contents(TEST)),
            "original_resolution": self._config.evaluation.original_resolution,
            "write_maps": self._config.evaluation.write_maps,
        }

    @property
    def _maps(self) -> Path:
        """Of all categories in one folder, as MVTec's evaluation scripts expect."""
        return self._folder.parent / MAPS / self._folder.name

    def _extract(self, writer: Writer | Silence) -> features.Normals:
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
        what = self._pyramid, self._trunk.variables, batches, counts
        how = {"whiten": config_lib.whitens(self._config), "devices": self._devices}
        if needed <= allowed:
            writer.say(told)
            return features.keep(*what, **how)
        writer.say(
            f"{told}, more than config.train.feature_memory allows "
            f"({allowed / 2**20:.0f} MiB): they are not kept, and every step runs the "
            "trunk, too"
        )
        return features.stream(*what, image_size=size, **how)

    @property
    def _contents(self) -> dict[str, str]:
        """Digests of the images to train and to validate on."""
        return self._data.survey.contents(TRAIN, VALIDATION)

    def _check_data(self) -> None:
        """Refuses other images than the category was trained and validated on.

        A folder of a version that kept no digests is taken as it is.
        """
        path = self._folder / DATA
        if not path.exists():
            return
        changes = describe_changes(json.loads(path.read_text()), self._contents)
        if changes:
            raise UserError(
                f"Expected the training and validation images that {self._folder} was "
                f"trained with, found others: {changes}. Restore them, or train anew "
                "in another --workdir. To score other images with this run, use "
                "python -m ulsad_jax.predict, or eval.py --root with a folder that "
                "has no training images."
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
        placed, split = self._devices.replicate(weights), self._devices.split
        return evaluation.predict_split(
            lambda image: hosts.gather(self._predict(placed, split(image))),
            self._batches(self._data.test, "test images"),
            types=self._data.test.types,
            image_size=tuple(self._config.image_size),
        )

    def _batches(self, split: Examples, title: str) -> Iterable[dict[str, np.ndarray]]:
        size = self._batch_size(split)
        return progress(
            map(hosts.gather, split.batches(size, self._devices.own(size))),
            f"[{self._title}] {title}",
            total=-(-len(split) // size),
        )

    def _batch_size(self, split: Examples) -> int:
        """Images at once, rounded up to the devices: no more than the split has."""
        count = min(self._config.evaluation.batch_size, max(1, len(split)))
        return self._devices.round_up(count)
