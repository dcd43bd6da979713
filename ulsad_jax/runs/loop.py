"""The training loop of one category: validation, checkpoints, resuming, signals."""

from __future__ import annotations

import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.ulsad.losses import TOTAL
from ulsad_jax.methods.ulsad.networks import Ulsad
from ulsad_jax.runs import training
from ulsad_jax.runtime import devices as parallel
from ulsad_jax.runtime import hosts
from ulsad_jax.runtime.errors import Diverged, Interrupted
from ulsad_jax.runtime.progress import progress
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.scoring.thresholds import Decisions, choose
from ulsad_jax.trunks.features import ChannelStatistics, FeatureSource

if TYPE_CHECKING:
    from jaxtyping import Int
    from ml_collections import ConfigDict

    from ulsad_jax.runtime.checkpoint import CheckpointStore
    from ulsad_jax.runtime.writer import Silence, Writer
    from ulsad_jax.trunks.weights import TrunkIdentity

Losses = dict[str, float]


class Validation(NamedTuple):
    """What a checkpoint learns from the validation normals.

    Attributes:
        losses: total and terms, averaged over the images.
        calibration: of the maps.
        decisions: thresholds for calibrated maps.
    """

    losses: Losses
    calibration: scoring.Calibration
    decisions: Decisions


@functools.lru_cache
def make_validation_step(
    model: Ulsad, loss_fn: Callable, size: tuple[int, int]
) -> Callable[..., tuple[dict[str, jax.Array], scoring.Maps]]:
    """Jits `step(variables, features, image, valid, updates, numbers)`.

    It returns the losses of the valid rows and raw maps of all rows; for equal
    arguments it is the same function, compiled once.

    Args:
        model: the networks.
        loss_fn: see `losses.make_loss_fn`.
        size: (height, width) of the maps.
    """

    @jax.jit
    def step(variables, features, image, valid, updates, numbers):
        outputs = model.apply(variables, features, image, train=False)
        total, terms = loss_fn(outputs, valid, step=updates, numbers=numbers)
        return {TOTAL: total, **terms}, scoring.raw_maps(outputs, size)

    return step


def make_validate(
    model: Ulsad,
    loss_fn: Callable,
    source: FeatureSource,
    *,
    devices: parallel.Devices,
    batch_size: int,
    method: str,
    image_fpr: float,
    pixel_fpr: float,
    numbers: Mapping[str, Mapping[str, float]] | None = None,
) -> Callable[[Mapping[str, Any], int], Validation]:
    """Returns `validate(variables, updates so far)` over the validation normals.

    Args:
        model: the networks.
        loss_fn: see `losses.make_loss_fn`.
        source: features and images of the validation normals.
        devices: to split batches over.
        batch_size: images at once, a multiple of the devices.
        method: of calibration, see `scoring.calibrate`.
        image_fpr: see `decisions.choose`.
        pixel_fpr: see `decisions.choose`.
        numbers: of the loss function, where they are not its own.
    """
    size = source.image_size
    count = len(source)
    step = make_validation_step(model, loss_fn, size)

    def validate(variables: Mapping[str, Any], updates: int) -> Validation:
        sums: dict[str, float] = {}
        local = np.empty((count, *size), np.float32)
        global_ = np.empty_like(local)
        for start in range(0, count, batch_size):
            # Wrap around at the end: every batch has one shape, and compiles once.
            rows = np.arange(start, start + batch_size)
            valid = rows < count
            rows = rows % count
            batch = devices.load(source, rows)
            losses, maps = hosts.gather(
                step(variables, *batch, valid, updates, numbers)
            )
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value) * int(valid.sum())
            local[rows[valid]] = maps.local[valid]
            global_[rows[valid]] = maps.global_[valid]
        losses = {name: value / count for name, value in sums.items()}
        maps = scoring.fuse_as_new(local, global_, method=method)
        return Validation(
            losses,
            scoring.calibrate(local, global_, method=method),
            choose(maps, image_fpr=image_fpr, pixel_fpr=pixel_fpr),
        )

    return validate


class Trainer:
    """Trains one category, from wherever its last checkpoint left off.

    The loop is a function of the config and the data alone, so that a run that was
    stopped and resumed ends as an uninterrupted one does.
    """

    def __init__(
        self,
        config: ConfigDict,
        category: str,
        *,
        devices: parallel.Devices,
        train: FeatureSource,
        statistics: ChannelStatistics,
        loss_fn: Callable,
        validate: Callable[[Mapping[str, Any], int], Validation],
        store: CheckpointStore,
        writer: Writer | Silence,
        trunk: TrunkIdentity,
        score_test: Callable[..., float] | None = None,
    ):
        """Makes the initial state.

        Args:
            config: the run's.
            category: decides, with the seed, weights and order.
            devices: to split batches over.
            train: features and images of the training normals.
            statistics: of the feature channels, kept with the networks.
            loss_fn: see `losses.make_loss_fn`.
            validate: see `make_validate`.
            store: of the checkpoints.
            writer: of the metrics.
            trunk: what made the features, stored with every checkpoint.
            score_test: for the reference's selection, gives the image AUROC on the
                test set of (variables, calibration).
        """
        self._config, self._category = config, category
        self._devices, self._train = devices, train
        self._statistics = devices.replicate(statistics)
        self._validate, self._score_test = validate, score_test
        self._store, self._writer = store, writer
        self._trunk = dataclasses.asdict(trunk)
        batch = config.train.batch_size
        self._steps_per_epoch = training.steps_per_epoch(len(train), batch)
        model = training.make_model(config)
        optimizer = training.make_optimizer(**config.optimizer)
        self._state = devices.replicate(
            training.init_state(
                model,
                optimizer,
                training.initial_key(config.seed, category),
                features=jax.ShapeDtypeStruct(
                    (batch, *train.feature_shape), jnp.float32
                ),
                image=jax.ShapeDtypeStruct((batch, *train.image_size, 3), jnp.uint8),
            )
        )
        self._train_step = parallel.make_train_step(
            model,
            loss_fn,
            optimizer,
            devices=devices,
            backend=config.parallel.backend,
        )
        self._sums: Losses = {}  # of the losses of this epoch's steps

    def run(self) -> None:
        """Trains to the last epoch.

        Raises:
            Interrupted: by SIGTERM or SIGINT, after saving.
            Diverged: a loss that is not finite.
        """
        self._resume()
        epochs, per_epoch = self._config.train.num_epochs, self._steps_per_epoch
        step = int(self._state.step)
        with stop_signals() as stop:
            for epoch in range(step // per_epoch, epochs):
                started = time.perf_counter()
                self._run_epoch(epoch, stop)
                step = int(self._state.step)
                if step == (epoch + 1) * per_epoch:
                    self._end_epoch(epoch, time.perf_counter() - started)
                if asked := self._devices.ask(stop):
                    self._save()
                    self._store.wait()
                    raise Interrupted(stop[0] if stop else int(asked), step)
        self._store.wait()

    def _run_epoch(self, epoch: int, stop: list[int]) -> None:
        """Takes the epoch's remaining steps, or those before a signal.

        Losses are fetched one step late, so that the device never waits for us.
        """
        config, per_epoch = self._config, self._steps_per_epoch
        batch = config.train.batch_size
        order = self._order(epoch)
        first = int(self._state.step) - epoch * per_epoch
        pending = None
        steps = progress(
            range(first, per_epoch),
            f"[{self._category}] epoch {epoch + 1}/{config.train.num_epochs}",
            unit=" steps",
        )
        for i in steps:
            asked = self._devices.ask(stop)
            rows = order[i * batch : (i + 1) * batch]
            self._state, losses = self._train_step(
                self._state, *self._devices.load(self._train, rows)
            )
            if pending is not None:
                self._count(epoch * per_epoch + i, pending)
            pending = losses
            if asked:
                break
        if pending is not None:
            self._count(int(self._state.step), pending)

    def _order(self, epoch: int) -> Int[np.ndarray, " n"]:
        """The order of the training images in an epoch."""
        return training.epoch_order(
            len(self._train),
            seed=self._config.seed,
            category=self._category,
            epoch=epoch,
        )

    def _count(self, step: int, losses: Mapping[str, jax.Array]) -> None:
        """Adds a step's losses to the epoch's; `step` is the update they belong to."""
        values = {name: float(value) for name, value in losses.items()}
        self._check_finite(values, f"at step {step}", updates=step - 1)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _check_finite(self, losses: Losses, where: str, *, updates: int) -> None:
        wrong = [name for name, value in losses.items() if not np.isfinite(value)]
        if wrong:
            terms = [name for name in wrong if name != TOTAL] or wrong
            raise Diverged(
                f"Expected finite losses, found {losses[terms[0]]} in "
                f"{' and '.join(repr(t) for t in terms)} {where} of "
                f"{self._category!r}. Checkpoints before it are kept. Lower "
                "--config.optimizer.learning_rate, or look for constant images. The "
                "gradients of a term of your own: python -m ulsad_jax.inspect_losses "
                f"--step={updates}."
            )

    def _end_epoch(self, epoch: int, seconds: float) -> None:
        """Reports the epoch and, if one is due, validates and saves."""
        config, step = self._config.train, int(self._state.step)
        validation, metrics = None, {}
        losses = {k: v / self._steps_per_epoch for k, v in self._sums.items()}
        self._sums = {}
        record: dict[str, float] = {f"loss/{k}": v for k, v in losses.items()}
        last = epoch + 1 == config.num_epochs
        if last or (epoch + 1) % config.checkpoint_every == 0:
            validation = self._validate(self._state.variables, step)
            # The losses above are from before the last update.
            where = f"in validation after step {step}"
            self._check_finite(validation.losses, where, updates=step)
            record |= {f"validation/{k}": v for k, v in validation.losses.items()}
            metrics = {"validation_loss": validation.losses[TOTAL]}
            if self._score_test is not None:
                auroc = self._score_test(self._state.variables, validation.calibration)
                record["test/image_auroc"] = metrics["test_image_auroc"] = auroc
        # First: a resumed run drops reports that it makes again, but makes none up.
        self._writer.epoch(epoch + 1, config.num_epochs, step, record, seconds)
        if validation is not None:
            self._save(validation, metrics)

    def _save(
        self,
        validation: Validation | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        self._store.save(
            int(self._state.step),
            model=training.model_tree(self._state.variables, self._statistics),
            optimizer=self._state.opt_state,
            progress={"sums": self._sums, "trunk": self._trunk},
            calibration=validation and dataclasses.asdict(validation.calibration),
            decisions=validation and validation.decisions.to_json(),
            metrics=metrics,
        )

    def _resume(self) -> None:
        """Takes up the last checkpoint, if there is one."""
        step = self._store.latest()
        self._writer.rewind(step or 0)
        if step is None:
            return
        model, opt_state, saved = self._store.restore_training(
            step,
            model=training.model_tree(self._state.variables, self._statistics),
            optimizer=self._state.opt_state,
        )
        self._state = self._devices.replicate(
            training.TrainState(
                step=jnp.asarray(step, jnp.int32),
                params=model["variables"]["params"],
                batch_stats=model["variables"]["batch_stats"],
                opt_state=opt_state,
            )
        )
        self._sums = saved["sums"]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying from them; the second one kills."""
    received: list[int] = []

    def handle(signum, frame):
        received.append(signum)
        for other in previous:
            signal.signal(other, previous[other])

    previous = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for signum in previous:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
