"""Trains one category: training loop, checkpoints, resuming and signals."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.base import TOTAL, Method, Spec, State
from ulsad_jax.runs import steps
from ulsad_jax.runs.validation import Losses, Validation
from ulsad_jax.runtime.devices import Devices
from ulsad_jax.runtime.errors import Diverged, Interrupted
from ulsad_jax.runtime.progress import progress
from ulsad_jax.trunks import sources

if TYPE_CHECKING:
    from jaxtyping import Int
    from ml_collections import ConfigDict

    from ulsad_jax.runtime.checkpoint import CheckpointStore
    from ulsad_jax.runtime.profile import Profile
    from ulsad_jax.runtime.writer import Silence, Writer
    from ulsad_jax.trunks.weights import TrunkIdentity


class Trainer:
    """Training of one category, resumed from its last checkpoint.

    Training depends only on the config and the data, so that a run that was stopped and
    resumed ends like an uninterrupted one.
    """

    def __init__(
        self,
        config: ConfigDict,
        category: str,
        *,
        method: Method,
        devices: Devices,
        normals: sources.Normals,
        spec: Spec,
        validate: Callable[[Any, int], Validation],
        store: CheckpointStore,
        writer: Writer | Silence,
        trunk: TrunkIdentity | None,
        profile: Profile,
        score_test: Callable[..., float] | None = None,
    ):
        """Makes the initial state.

        Args:
            config: resolved config of the run.
            category: name of the category; with the seed it determines the initial
                weights and the order of images.
            method: method to train.
            devices: devices over which batches are split.
            normals: images and features for training and validation, and the statistics
                of the features, which are saved with the model.
            spec: shapes of the training data.
            validate: function from `validation.make_validate`.
            store: store of the checkpoints.
            writer: writer of the metrics.
            trunk: identity of the trunk, saved with every checkpoint, or None.
            profile: trace of the steps that `config.train.profile` asks for.
            score_test: function from (model, calibration) to the image AUROC on the
                test set, used only by the reference's selection.
        """
        self._config, self._category, self._method = config, category, method
        self._devices, self._train = devices, normals.train
        self._statistics = devices.replicate(normals.statistics)
        self._validate, self._score_test = validate, score_test
        self._store, self._writer = store, writer
        self._trunk = trunk and dataclasses.asdict(trunk)
        self._profile = profile
        self._steps_per_epoch = steps.steps_per_epoch(
            len(self._train),
            config.train.batch_size,
            whole_only=not method.sees_every_image,
        )
        self._epochs = steps.count_epochs(config.train, self._steps_per_epoch)
        self._key = steps.initial_key(config.seed, category)
        initial = steps.make_init(method, spec, devices)(self._key)
        self._state: State = devices.place_state(initial)
        self._train_step = steps.make_train_step(
            method, devices, config.parallel.backend
        )
        self._sums: Losses = {}  # sums of the losses over the steps of this epoch

    def run(self) -> None:
        """Trains to the last epoch.

        Raises:
            Interrupted: SIGTERM or SIGINT was received; the state is saved.
            Diverged: a loss is not finite.
        """
        self._resume()
        per_epoch, step = self._steps_per_epoch, int(self._state.step)
        with stop_signals() as stop, self._profile:
            for epoch in range(step // per_epoch, self._epochs):
                started = time.perf_counter()
                self._run_epoch(epoch, stop)
                step = int(self._state.step)
                if step == (epoch + 1) * per_epoch:
                    self._end_epoch(epoch, time.perf_counter() - started)
                if asked := self._devices.ask(stop):
                    self._save(self._state)
                    self._store.wait()
                    raise Interrupted(stop[0] if stop else int(asked), step)
        self._store.wait()

    def _run_epoch(self, epoch: int, stop: list[int]) -> None:
        """Takes the remaining steps of the epoch, or fewer if a signal arrives.

        Losses are fetched one step late, so that the device does not wait for the host.
        """
        per_epoch = self._steps_per_epoch
        order = self._order(epoch)
        first = int(self._state.step) - epoch * per_epoch
        pending = None
        indices = progress(
            range(first, per_epoch),
            f"[{self._category}] epoch {epoch + 1}/{self._epochs}",
            unit=" steps",
        )
        for i in indices:
            asked = self._devices.ask(stop)
            rows, count = self._rows(order, i)
            with self._profile.step(epoch * per_epoch + i, self._state):
                placed = sources.load(self._train, rows, count, self._devices)
                self._state, losses = self._train_step(self._state, placed, self._key)
            if pending is not None:
                self._count(epoch * per_epoch + i, pending)
            pending = losses
            if asked:
                break
        if pending is not None:
            self._count(int(self._state.step), pending)

    def _order(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Returns the order of the training images in an epoch."""
        if self._method.sees_every_image:
            return np.arange(len(self._train))
        return steps.epoch_order(
            len(self._train),
            seed=self._config.seed,
            category=self._category,
            epoch=epoch,
        )

    def _rows(
        self, order: Int[np.ndarray, " n"], i: int
    ) -> tuple[Int[np.ndarray, " b"], int]:
        """Returns the indices of batch i, padded, and their number before padding."""
        batch = self._config.train.batch_size
        return steps.fill_batch(order[i * batch : (i + 1) * batch], batch)

    def _count(self, step: int, losses: Mapping[str, jax.Array]) -> None:
        """Adds the losses of update number `step` to the sums of the epoch."""
        # All at once, not one by one.
        values = {k: float(value) for k, value in jax.device_get(losses).items()}
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
                "the learning rate (ULSAD's is --config.optimizer.learning_rate), or "
                "look for constant images. The gradients of ULSAD's terms: "
                f"python -m ulsad_jax.inspect_losses --step={updates}."
            )

    def _end_epoch(self, epoch: int, seconds: float) -> None:
        """Reports the epoch and, if a checkpoint is due, validates and saves."""
        step = int(self._state.step)
        validation, metrics, finished = None, {}, None
        losses = {k: v / self._steps_per_epoch for k, v in self._sums.items()}
        self._sums = {}
        record: dict[str, float] = {f"loss/{k}": v for k, v in losses.items()}
        last = epoch + 1 == self._epochs
        if last or (epoch + 1) % self._config.train.checkpoint_every == 0:
            finished = self._finish()
            validation = self._validate(finished.model, step)
            # The training losses are those before the last update.
            where = f"in validation after step {step}"
            self._check_finite(validation.losses, where, updates=step)
            record |= {f"validation/{k}": v for k, v in validation.losses.items()}
            # Without losses, all checkpoints rank equally.
            metrics = {"validation_loss": validation.losses.get(TOTAL, 0.0)}
            if self._score_test is not None:
                auroc = self._score_test(finished.model, validation.calibration)
                record["test/image_auroc"] = metrics["test_image_auroc"] = auroc
        # Before saving: a resumed run rewrites a report that it finds, but cannot
        # restore a missing one.
        self._writer.epoch(epoch + 1, self._epochs, step, record, seconds)
        if validation is None:
            return
        if not last or self._method.num_epochs is None:
            # Updates that follow may need what `finish` leaves out.
            finished = finished.replace(training=self._state.training)
        if last:
            self._state = finished
        self._save(finished, validation, metrics)

    def _finish(self) -> State:
        """Returns the state to validate and save, placed as prediction reads it."""
        state, replicate = self._state, self._devices.replicate
        if self._method.splits_model:
            return self._devices.place_state(self._method.finish(state))
        if self._devices.shards_state:
            if type(self._method).finish is Method.finish:
                state = state.replace(model=replicate(state.model))
            else:  # it may need the sums
                state = replicate(state)
        return jax.tree.map(
            lambda x: replicate(x) if isinstance(x, np.ndarray) else x,
            self._method.finish(state),
        )

    def _save(
        self,
        state: State,
        validation: Validation | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        self._store.save(
            int(state.step),
            model=steps.model_item(state.model, self._statistics),
            optimizer=state.training,
            progress={"sums": self._sums, "trunk": self._trunk},
            calibration=validation and validation.calibration.to_json(),
            decisions=validation and validation.decisions.to_json(),
            metrics=metrics,
        )

    def _resume(self) -> None:
        """Restores the last checkpoint, if there is one."""
        step = self._store.latest()
        self._writer.rewind(step or 0)
        if step is None:
            return
        model = None
        if steps.keeps_shapes(self._method):
            model = steps.model_item(self._state.model, self._statistics)
        item, training, saved = self._store.restore_training(
            step,
            self._devices.choose_places,
            model=model,
            optimizer=self._state.training,
        )
        model, _ = steps.read_model_item(item)
        self._state = self._devices.place_state(
            State(jnp.asarray(step, jnp.int32), model, training)
        )
        self._sums = saved["sums"]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of exiting; a second signal exits."""
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
