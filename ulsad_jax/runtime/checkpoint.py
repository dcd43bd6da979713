"""Checkpoints of one category; the only file that knows Orbax."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ulsad_jax.runtime import hosts
from ulsad_jax.runtime.errors import UserError, storage_errors


class CheckpointStore:
    """The last and the best checkpoint of a category.

    Saving is asynchronous and atomic: a checkpoint is there whole or not at all. A
    checkpoint holds five items: `model` (what evaluation needs), `optimizer`,
    `progress` and, unless training was interrupted within an epoch, `calibration` and
    `decisions`.
    The metrics of a checkpoint decide which one is best.
    """

    def __init__(
        self,
        folder: Path,
        *,
        metric: str | None = None,
        largest: bool = False,
        read_only: bool = False,
    ):
        """Opens the folder, or makes it.

        Args:
            folder: of the checkpoints.
            metric: the key, in what `save` is given, that ranks checkpoints; None to
                keep the last one alone.
            largest: whether the largest value is best, not the smallest.
            read_only: whether to leave alone what another process may be saving.
        """
        self._folder = folder
        self._sign = 1.0 if largest else -1.0
        self._metric = metric
        keep: list[checkpoint_managers.PreservationPolicy]
        keep = [checkpoint_managers.LatestN(1)]
        if metric is not None:
            best = checkpoint_managers.BestN(
                get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False
            )
            keep.append(best)
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                # Without it no metrics are written.
                best_fn=None if metric is None else self._rank,
                create=not read_only,
                # Remains of a save that was killed are no checkpoint.
                cleanup_tmp_directories=not read_only,
            ),
        )

    def __enter__(self) -> CheckpointStore:
        """Returns the store."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Waits until everything is on disk."""
        if hosts.tells_a_loss(error):
            return  # what several processes were saving stays unfinished
        with storage_errors(self._folder):
            self._manager.close()

    def save(
        self,
        step: int,
        *,
        model: Any,
        optimizer: Any,
        progress: Mapping[str, Any],
        calibration: Mapping[str, float] | None = None,
        decisions: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save; training may go on meanwhile. A saved step is left as it is.

        Args:
            step: number of updates so far.
            model: a tree of arrays.
            optimizer: a tree of arrays.
            progress: JSON.
            calibration: JSON; None within an epoch.
            decisions: JSON; None within an epoch.
            metrics: for choosing the best; None within an epoch.

        Raises:
            UserError: there is no room for it.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        self._check_room((model, optimizer))
        # Copies: the next step is given these very buffers to overwrite.
        model, optimizer = jax.tree.map(jnp.copy, (model, optimizer))
        items = {
            "model": ocp.args.StandardSave(model),
            "optimizer": ocp.args.StandardSave({"state": optimizer}),
            "progress": ocp.args.JsonSave(dict(progress)),
        }
        for name, value in (("calibration", calibration), ("decisions", decisions)):
            if value is not None:
                items[name] = ocp.args.JsonSave(dict(value))
        with storage_errors(self._folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                # Empty metrics rank last, as none do, but Orbax warns of none.
                metrics=dict(metrics or {}),
                force=True,
            )

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def is_complete(self, step: int) -> bool:
        """Whether it was saved at the end of an epoch, with what it is ranked by."""
        return self._metric in (self._manager.metrics(step) or {})

    def select(self, *, best: bool) -> int:
        """The step to evaluate: the newest complete one, or the best.

        Raises:
            UserError: there is none.
        """
        ranked = [
            (self._rank(metrics) if best else step, step)
            for step in self._manager.all_steps()
            if self.is_complete(step) and (metrics := self._manager.metrics(step))
        ]
        if not ranked:
            steps = list(self._manager.all_steps())
            found = f"the steps {steps} without it" if steps else "none"
            raise UserError(
                f"Expected a checkpoint with {self._metric} in {self._folder}, found "
                f"{found}. Train until an epoch with a checkpoint ends: run the "
                "train.py command again. (Test scores are there only if the run began "
                "with --config.selection=best_test_auroc.)"
            )
        return max(ranked)[1]

    def restore_training(
        self, step: int, *, model: Any, optimizer: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Returns (model, optimizer, progress) as trees like the given ones."""
        restored = self._restore(
            step,
            model=ocp.args.StandardRestore(model),
            optimizer=ocp.args.StandardRestore({"state": optimizer}),
            progress=ocp.args.JsonRestore(),
        )
        return restored["model"], restored["optimizer"]["state"], restored["progress"]

    def restore_progress(self, step: int) -> dict[str, Any]:
        """What `save` was given as `progress`."""
        return self._restore(step, progress=ocp.args.JsonRestore())["progress"]

    def restore_model(
        self, step: int, *, model: Any
    ) -> tuple[Any, dict[str, float], dict[str, Any]]:
        """Returns (model as a tree like the given one, calibration, decisions).

        Raises:
            UserError: other networks, or a checkpoint without decisions.
        """
        if not (self._folder / str(step) / "decisions").is_dir():
            raise UserError(
                f"Expected checkpoint {step} in {self._folder} to hold thresholds, "
                "found none: another version of ulsad_jax wrote it, or files were "
                "lost. Restore them, use that version, or train anew in another folder."
            )
        restored = self._restore(
            step,
            model=ocp.args.StandardRestore(model),
            calibration=ocp.args.JsonRestore(),
            decisions=ocp.args.JsonRestore(),
        )
        return restored["model"], restored["calibration"], restored["decisions"]

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong."""
        with storage_errors(self._folder):
            self._manager.wait_until_finished()

    def _check_room(self, tree: Any) -> None:
        """Foresees a full disk, of which Orbax would make pages of tracebacks."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise UserError(
                f"Expected {needed / 1e6:.0f} MB of free disk space for a checkpoint "
                f"in {self._folder}, found {free / 1e6:.0f} MB. Free some space and "
                "run the same command again; earlier checkpoints are kept."
            )

    def _rank(self, metrics: Mapping[str, float]) -> float:
        return self._sign * metrics.get(self._metric, -self._sign * math.inf)

    def _restore(self, step: int, **items: Any) -> Mapping[str, Any]:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            raise UserError(
                f"Expected checkpoint {step} in {self._folder} to hold this config's "
                f"networks, found: {error!s:.300}. Use the config it was trained with, "
                "restore the checkpoint's files, or train anew in another folder."
            ) from error
