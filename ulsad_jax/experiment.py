"""A run: a work directory, its categories, training and evaluation of each."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ulsad_jax import config as config_lib
from ulsad_jax import evaluation, features, pretrained, results, scoring, training
from ulsad_jax.checkpoint import CheckpointStore
from ulsad_jax.data import synthetic
from ulsad_jax.data.layouts import find_categories
from ulsad_jax.data.pipeline import Category, Examples, open_category
from ulsad_jax.data.records import listing
from ulsad_jax.errors import UserError
from ulsad_jax.losses import make_loss_fn
from ulsad_jax.models.pyramid import FEATURE_CHANNELS, FeaturePyramid
from ulsad_jax.report import figures
from ulsad_jax.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import UInt8

CONFIG, TRUNK, RESULTS = "config.json", "trunk.safetensors", "results.json"
LOCO_LAYOUTS = ("mvtec_loco", "synthetic")  # their headline is the mean of two types


def train(config: ConfigDict, workdir: Path) -> str:
    """Trains and evaluates every category of a config, or goes on doing so.

    Args:
        config: resolved.
        workdir: where everything goes; an earlier run of the same config is resumed.

    Returns:
        The table of results and where to find the rest.

    Raises:
        UserError: see README; what is finished by then stays.
        errors.Interrupted: by a signal, after saving.
    """
    config_lib.validate(config)
    make_loss_fn(config.losses)  # before anything is written
    _cache_compilations(config)
    _claim(config, workdir)
    categories = list_categories(config)
    trunk = _trunk(config, workdir)
    for category in categories:
        folder = workdir / results.file_name(category)
        folder.mkdir(exist_ok=True)
        run = CategoryRun(config, category, folder, trunk)
        step = run.fit()
        if not run.is_evaluated(step):
            run.evaluate(step)
    return _collect(config, workdir, categories, trunk)


def evaluate(workdir: Path, *, root: str = "", selection: str = "") -> str:
    """Evaluates the checkpoints of a run again.

    Args:
        workdir: that `train` wrote.
        root: of the data, if it moved.
        selection: another `config.selection` than the run's.

    Returns:
        The table of results and where to find the rest.

    Raises:
        UserError: no run, no checkpoint, another trunk.
    """
    config = config_lib.load(workdir / CONFIG)
    if root:
        config.dataset.root = root
    if selection:
        config.selection = selection
        config_lib.validate(config)
    _cache_compilations(config)
    categories = list_categories(config)
    trunk = pretrained.load_saved_trunk(workdir / TRUNK)
    for category in categories:
        folder = workdir / results.file_name(category)
        CategoryRun(config, category, folder, trunk).evaluate()
    return _collect(config, workdir, categories, trunk)


def list_categories(config: ConfigDict) -> list[str]:
    """The categories that a config asks for; draws the synthetic ones."""
    dataset = config.dataset
    if dataset.name == "synthetic":
        names = dataset.category
        if names == "all":
            names = "assembly"
        for name in names.split(","):
            synthetic.write_category(
                synthetic_root(config), category=name, **dataset.synthetic
            )
        return names.split(",")
    found = find_categories(dataset.name, Path(dataset.root).expanduser())
    if dataset.category == "all":
        return found
    return dataset.category.split(",")


def synthetic_root(config: ConfigDict) -> Path:
    """Where the synthetic data set lies: a folder of its own for each drawing."""
    dataset = config.dataset
    if dataset.root:
        return Path(dataset.root).expanduser()
    drawing = "-".join(str(v) for v in dataset.synthetic.to_dict().values())
    return Path(dataset.cache_dir).expanduser() / "synthetic" / drawing


class CategoryRun:
    """One category of a run: its data, its networks, its folder."""

    def __init__(
        self,
        config: ConfigDict,
        category: str,
        folder: Path,
        trunk: pretrained.Trunk,
    ):
        """Opens the data.

        Args:
            config: the run's.
            category: its name.
            folder: its folder in the work directory.
            trunk: the run's.
        """
        self._config, self._name, self._folder = config, category, folder
        self._trunk = trunk
        dtype = jnp.dtype(config.train.dtype)
        self._pyramid = FeaturePyramid(config.trunk.architecture, dtype)
        self._model = training.make_model(config)
        self._predict = evaluation.make_predict_step(self._pyramid, self._model)
        self._data = open_data(config, category)

    def fit(self) -> int:
        """Trains what is left to train; returns the step to evaluate."""
        config, data = self._config, self._data
        with Writer(self._folder, self._name) as writer, self._store() as store:
            if self._is_trained(store):
                return self._select(store)
            writer.say(
                f"{len(data.train)} training, {len(data.validation)} validation, "
                f"{len(data.test)} test images"
            )
            train, validation, statistics = self._extract(writer)
            loss_fn = make_loss_fn(config.losses)
            validate = training.make_validate(
                self._model,
                loss_fn,
                validation,
                batch_size=config.evaluation.batch_size,
                method=config.calibration,
            )
            training.Trainer(
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
            ).run()
            return self._select(store)

    def evaluate(self, step: int | None = None) -> None:
        """Scores every test image with a checkpoint; writes results and pictures."""
        with self._store() as store:
            step = self._select(store) if step is None else step
            weights = self._restore(store, step)
        test = self._data.test
        with Writer(self._folder, self._name) as writer:
            prediction, truth = self._predict_split(test, weights, writer)
            metrics: dict[str, Any] = {
                "test_images": len(test),
                "test_anomalous": int(truth.labels.sum()),
            }
            if len(test):
                metrics |= evaluation.image_level(
                    truth.labels,
                    truth.types,
                    prediction.score,
                    loco=self._config.dataset.name in LOCO_LAYOUTS,
                )
                metrics |= evaluation.pixel_level(
                    truth.masks, truth.has_mask, prediction.anomaly_map
                )
            else:
                writer.say("no test images: nothing to measure")
            results.write_scores(self._folder / "scores.csv", test.records, prediction)
            pictures = self._write_pictures(prediction, truth, weights.calibration)
            numbers = {k: v for k, v in metrics.items() if np.isfinite(v)}
            writer.scalars(step, {f"test/{k}": v for k, v in numbers.items()})
            writer.pictures(step, pictures)
        document = {"step": step, "selection": self._config.selection}
        document["metrics"] = results.finite(metrics)
        (self._folder / RESULTS).write_text(json.dumps(document, indent=2) + "\n")

    def is_evaluated(self, step: int) -> bool:
        """Whether the folder's results are those of this step."""
        path = self._folder / RESULTS
        if not path.exists():
            return False
        document = json.loads(path.read_text())
        return (document["step"], document["selection"]) == (
            step,
            self._config.selection,
        )

    def _store(self) -> CheckpointStore:
        on_test = self._config.selection == config_lib.BEST_TEST_AUROC
        return CheckpointStore(
            self._folder / "checkpoints",
            metric="test_image_auroc" if on_test else "validation_loss",
            largest=on_test,
        )

    def _select(self, store: CheckpointStore) -> int:
        return store.select(best=self._config.selection != "last")

    def _is_trained(self, store: CheckpointStore) -> bool:
        train = self._config.train
        steps = len(self._data.train) // train.batch_size * train.num_epochs
        return 0 < steps <= (store.latest() or 0)

    def _extract(
        self, writer: Writer
    ) -> tuple[features.Kept, features.Kept, features.ChannelStatistics]:
        """Features of the training and validation normals, standardised."""
        extractor = features.make_extractor(self._pyramid, self._trunk.variables)
        kept = []
        for split, title in (
            (self._data.train, "training features"),
            (self._data.validation, "validation features"),
        ):
            size = self._config.evaluation.batch_size
            batches = writer.progress(
                split.batches(size), title, total=-(-len(split) // size)
            )
            kept.append(features.extract(extractor, batches, len(split)))
        statistics = features.channel_statistics(kept[0][0])
        for raw, _ in kept:  # in place: features may be most of the memory
            raw -= statistics.mean
            raw /= statistics.std
        train, validation = (features.Kept(*pair) for pair in kept)
        return train, validation, statistics

    def _make_score_test(
        self, statistics: features.ChannelStatistics
    ) -> Callable[..., float] | None:
        """Image AUROC on the test set, for the reference's selection alone."""
        if self._config.selection != config_lib.BEST_TEST_AUROC:
            return None

        def score_test(variables, calibration) -> float:
            weights = evaluation.Weights(
                self._trunk.variables, statistics, variables, calibration
            )
            with Writer(self._folder, self._name) as writer:
                prediction, truth = self._predict_split(
                    self._data.test, weights, writer
                )
            return evaluation.image_metrics.auroc(truth.labels, prediction.score)

        return score_test

    def _predict_split(
        self, split: Examples, weights: evaluation.Weights, writer: Writer
    ) -> tuple[evaluation.Prediction, evaluation.Truth]:
        size = self._config.evaluation.batch_size
        return evaluation.predict_split(
            lambda image: self._predict(weights, image),
            writer.progress(
                split.batches(size), "test images", total=-(-len(split) // size)
            ),
            types=split.types,
            image_size=tuple(self._config.image_size),
        )

    def _restore(self, store: CheckpointStore, step: int) -> evaluation.Weights:
        """The weights of a checkpoint, if it was trained with this trunk."""
        progress = store.restore_progress(step)
        expected = pretrained.TrunkIdentity(**progress["trunk"])
        pretrained.check_same(expected, self._trunk.identity, self._folder)
        model, calibration = store.restore_model(step, model=self._abstract_model())
        return evaluation.Weights(
            trunk=self._trunk.variables,
            statistics=features.ChannelStatistics(**model["channels"]),
            variables=model["variables"],
            calibration=scoring.Calibration(**calibration),
        )

    def _abstract_model(self) -> Any:
        """Shapes of the checkpoint item that evaluation reads."""
        height, width = self._config.image_size
        channels = (FEATURE_CHANNELS,)
        variables = jax.eval_shape(
            lambda: self._model.init(
                jax.random.key(0),
                jnp.zeros((2, height // 8, width // 8, *channels)),
                jnp.zeros((2, height, width, 3)),
                train=False,
            )
        )
        statistics = features.ChannelStatistics(
            *(jax.ShapeDtypeStruct(channels, jnp.float32),) * 2
        )
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            training.model_tree(variables, statistics),
        )

    def _write_pictures(
        self,
        prediction: evaluation.Prediction,
        truth: evaluation.Truth,
        calibration: scoring.Calibration,
    ) -> list[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
        """Writes pictures of each type; returns one a type for TensorBoard."""
        folder = self._folder / "pictures"
        shutil.rmtree(folder, ignore_errors=True)
        limit = self._config.evaluation.pictures_per_type
        shown = []
        for kind in dict.fromkeys(truth.types):
            rows = [i for i, name in enumerate(truth.types) if name == kind]
            if limit >= 0:  # spread over the type's images
                rows = [
                    rows[k]
                    for k in np.linspace(
                        0, len(rows) - 1, min(limit, len(rows))
                    ).astype(int)
                ]
            target = folder / results.file_name(kind)
            target.mkdir(parents=True, exist_ok=True)
            for i in rows:
                drawn = figures.picture(
                    truth.images[i],
                    truth.masks[i],
                    prediction.anomaly_map[i],
                    low=calibration.display_low,
                    high=calibration.display_high,
                )
                stem = results.file_name(self._data.test.records[i].image.stem)
                Image.fromarray(drawn).save(target / f"{stem}.png")
                if i == rows[0]:
                    shown.append((f"test/{kind}", drawn))
        return shown


def open_data(config: ConfigDict, category: str) -> Category:
    """The images of a category that `list_categories` gave."""
    dataset = config.dataset
    root = synthetic_root(config) if dataset.name == "synthetic" else Path(dataset.root)
    return open_category(
        dataset.name,
        root=root.expanduser(),
        category=category,
        image_size=tuple(config.image_size),
        cache_dir=Path(dataset.cache_dir).expanduser(),
        validation_fraction=dataset.validation_fraction,
        seed=config.seed,
    )


def _cache_compilations(config: ConfigDict) -> None:
    """Keeps compiled programs beside the data sets, unless JAX is told otherwise."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(config.dataset.cache_dir).expanduser() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _claim(config: ConfigDict, workdir: Path) -> None:
    """Makes the work directory this run's, or checks that it is.

    Raises:
        UserError: it is something else, belongs to another config, or cannot be
            written.
    """
    path = workdir / CONFIG
    if path.exists():
        config_lib.check_resumable(config_lib.load(path), config, workdir)
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(
            f"Expected an empty or new folder, or that of an earlier run, found "
            f"{workdir} with other files in it. Give another --workdir."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, path)


def _trunk(config: ConfigDict, workdir: Path) -> pretrained.Trunk:
    """The run's own copy of its trunk, made by its first command."""
    path = workdir / TRUNK
    if not path.exists():
        trunk = pretrained.load_trunk(**config.trunk, seed=config.seed)
        pretrained.save_trunk(trunk, path)
    return pretrained.load_saved_trunk(path)


def _collect(
    config: ConfigDict, workdir: Path, categories: list[str], trunk: pretrained.Trunk
) -> str:
    """Joins the categories' results; returns what to tell the person."""
    rows = {}
    for name in categories:
        path = workdir / results.file_name(name) / RESULTS
        metrics = json.loads(path.read_text())["metrics"]
        rows[name] = {k: math.nan if v is None else v for k, v in metrics.items()}
    about = {
        "selection": config.selection,
        "selected_on_test": config.selection == config_lib.BEST_TEST_AUROC,
        "calibration": config.calibration,
        "trunk": dataclasses.asdict(trunk.identity),
        "image_size": list(config.image_size),
        "versions": {
            name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")
        },
    }
    results.write(workdir, rows, about)
    lines = [results.table(rows, about)]
    if trunk.identity.source.startswith("random"):
        lines.append(
            "The trunk has random weights, whose features detect little: expect "
            "poor numbers until you use a trained one (README, section Trunk weights)."
        )
    lines.append(f"Results: {workdir / RESULTS}, {workdir / 'results.csv'}")
    lines.append(f"Pictures: {workdir}/<category>/pictures/<type>/*.png")
    return "\n".join(lines)
