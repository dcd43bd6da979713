"""Trains a category until it has a checkpoint to evaluate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np

from ulsad_jax.methods.base import Method
from ulsad_jax.metrics import image as image_metrics
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs import loop, saved, steps, testing, validation
from ulsad_jax.runs.category import CategoryRun
from ulsad_jax.runtime import stages
from ulsad_jax.runtime.devices import host_bytes
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.profile import Profile
from ulsad_jax.runtime.writer import Silence, Writer, open_writer
from ulsad_jax.scoring.prediction import Weights
from ulsad_jax.scoring.thresholds import Thresholds
from ulsad_jax.trunks import sources

if TYPE_CHECKING:
    from ulsad_jax.runtime.checkpoint import CheckpointStore

AnyTrainer = TypeVar("AnyTrainer", bound=loop.Trainer)


def fit(run: CategoryRun) -> int:
    """Trains the remaining epochs and returns the step of the checkpoint to evaluate.

    Raises:
        UserError: the category cannot be resumed (see `is_trained`), or training
            diverged.
        errors.Interrupted: a signal was received; the state is saved.
    """
    data = run.data
    with open_files(run) as (writer, store):
        if is_trained(run, store):
            return files_of.select(run.config, store)
        writer.say(
            f"{len(data.train)} training, {len(data.validation)} validation, "
            f"{len(data.test)} test images"
        )
        with stages.measure(run.folder / files_of.STAGES, "features"):
            normals = sources.place(_extract(run, writer), run.devices)
        trainer = make_trainer(run, loop.Trainer, normals, store, writer)
        with stages.measure(run.folder / files_of.STAGES, "training"):
            trainer.run()
        return files_of.select(run.config, store)


@contextlib.contextmanager
def open_files(run: CategoryRun) -> Iterator[tuple[Writer | Silence, CheckpointStore]]:
    """Opens the files that training writes to.

    Raises:
        UserError: the checkpoint is to be selected on test images that give no AUROC,
            or there are too few training images for one batch.
    """
    _check_selection(run)
    count_steps(run)  # raises if there is no batch
    with (
        open_writer(run.folder, run.title) as writer,
        files_of.open_store(run.config, run.folder) as store,
    ):
        yield writer, store


def count_steps(run: CategoryRun) -> int:
    """Returns the number of updates of a complete training.

    Raises:
        UserError: there are too few training images for one batch.
    """
    config = run.config.train
    per_epoch = steps.steps_per_epoch(
        len(run.data.train),
        config.batch_size,
        validation=len(run.data.validation),
        whole_only=not run.setup.method.sees_every_image,
    )
    return per_epoch * steps.count_epochs(config, per_epoch)


def is_trained(run: CategoryRun, store: CheckpointStore) -> bool:
    """Returns whether training is complete.

    Raises:
        UserError: training began with another trunk or on other images, or has taken
            more updates than the config asks for.
    """
    latest = store.latest()
    if latest is None:
        return False
    saved.check_trunk(store, latest, run.trunk, run.folder)
    run.check_data()
    wanted = count_steps(run)
    if latest > wanted or (latest == wanted and not store.is_complete(latest)):
        train = run.config.train
        field = "num_updates" if train.num_updates else "num_epochs"
        raise UserError(
            f"Expected config.train.{field} to be raised, or as it was, found "
            f"{train[field]}, which are {wanted} updates; {run.folder} has been "
            f"trained for {latest}. Raise it, or train anew in another --workdir."
        )
    return latest == wanted


def make_trainer(
    run: CategoryRun,
    kind: type[AnyTrainer],
    normals: sources.Normals,
    store: CheckpointStore,
    writer: Writer | Silence,
    numbers: Mapping[str, np.ndarray] | None = None,
) -> AnyTrainer:
    """Makes the trainer of a category.

    Args:
        run: category to train.
        kind: `Trainer` or a subclass of it.
        normals: images and features for training and validation.
        store: store of the checkpoints.
        writer: writer of the metrics.
        numbers: scalar arrays by config field, see `Method.trace`.
    """
    config, method = run.config, run.setup.method
    run.keep_data()
    size, count = config.train.batch_size, len(normals.train)
    if type(method).adapt is not Method.adapt:  # others need no batch read for it
        first = steps.fill_batch(np.arange(min(count, size)), size)
        method = method.adapt(jax.device_get(sources.read(normals.train, *first)))
    validate = validation.make_validate(
        run.setup.method,
        normals.validation,
        devices=run.devices,
        batch_size=run.batch_size(run.data.validation),
        calibrate=config.calibration,
        score=config.score,
        threshold=config.threshold,
        numbers=numbers,
    )
    return kind(
        config,
        run.name,
        method=method,
        devices=run.devices,
        normals=normals,
        spec=run.setup.spec(size, count, count_steps(run)),
        validate=validate,
        store=store,
        writer=writer,
        trunk=run.trunk and run.trunk.identity,
        profile=Profile(config.train.profile, run.folder / files_of.PROFILE),
        score_test=_make_score_test(run, normals),
    )


def _extract(run: CategoryRun, writer: Writer | Silence) -> sources.Normals:
    """Returns images and features of the training and validation normals."""
    splits = run.data.train, run.data.validation
    batches = [
        run.batches(split, f"{title} features")
        for split, title in zip(splits, ("training", "validation"), strict=True)
    ]
    counts = [len(split) for split in splits]
    setup = run.setup
    needed = sources.count_bytes(sum(counts), setup.image_size, setup.features)
    allowed = run.config.train.feature_memory * host_bytes()
    kind = "features of " if setup.pyramid else ""
    told = f"{kind}{sum(counts)} images: {needed / 2**20:.0f} MiB of memory"
    what = setup.pyramid, run.trunk_variables, batches, counts
    how = {"whiten": setup.whiten, "devices": run.devices}
    if needed <= allowed or setup.pyramid is None:
        writer.say(told)
        return sources.keep(*what, **how)
    writer.say(
        f"{told}, more than config.train.feature_memory allows "
        f"({allowed / 2**20:.0f} MiB): they are not kept, and every step runs the "
        "trunk, too"
    )
    return sources.stream(*what, image_size=setup.input_size, **how)


def _check_selection(run: CategoryRun) -> None:
    """Rejects a selection on test images that give no AUROC."""
    on_test = run.config.selection == config_lib.BEST_TEST_AUROC
    anomalous = int(run.data.test.labels.sum())
    normal = len(run.data.test) - anomalous
    if on_test and not (normal and anomalous):
        raise UserError(
            f"Expected normal and anomalous test images of {run.name!r}, to "
            f"select on them, found {normal} and {anomalous}. Add some, or set "
            "another --config.selection than best_test_auroc."
        )


def _make_score_test(
    run: CategoryRun, normals: sources.Normals
) -> Callable[..., float] | None:
    """Returns a function for the image AUROC on the test set, or None if not needed."""
    if run.config.selection != config_lib.BEST_TEST_AUROC:
        return None

    def score_test(model, calibration) -> float:
        weights = Weights(
            run.trunk_variables, normals.statistics, model, calibration, Thresholds()
        )
        prediction, truth = testing.predict_test(run, weights)
        return image_metrics.auroc(truth.labels, prediction.score)

    return score_test
