"""Saves and restores checkpoints; the only module that uses Orbax."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ulsad_jax.runtime import hosts
from ulsad_jax.runtime.checksums import describe_layout, digest, digest_arrays
from ulsad_jax.runtime.errors import UserError, sentence, storage_errors
from ulsad_jax.runtime.quiet import silence

Place = Callable[[jax.ShapeDtypeStruct], jax.sharding.Sharding]

DIGEST = "digest"  # the item with the checksums of the others
METRICS = "metrics"  # Orbax's own item
UNFINISHED = "*.orbax-checkpoint-tmp*"  # unfinished checkpoints
CHANGED = "its values are not those that were saved"
PATIENCE = 10  # tenths of a second to wait for another process


class CheckpointStore:
    """A store of the last and the best checkpoint of a category.

    Saving is asynchronous and atomic: a checkpoint exists completely or not at all. It
    holds up to six items: `model` (everything that evaluation needs), `optimizer`,
    `progress`, `digest` (Orbax has no checksums of array contents) and, unless training
    was interrupted within an epoch, `calibration` and `decisions`. The metrics of the
    checkpoints determine the best one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        metric: str | None = None,
        largest: bool = False,
        read_only: bool = False,
    ):
        """Opens the folder, or creates it.

        Args:
            folder: folder of the checkpoints.
            metric: key that ranks checkpoints, of the metrics given to `save`; None to
                keep the last checkpoint only.
            largest: True if the largest value is best, False if the smallest is.
            read_only: True to create no folder and delete no unfinished checkpoint.
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
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            # Without it no metrics are written.
            best_fn=None if metric is None else self._rank,
            create=not read_only,
            # Deletes the remains of a save that was killed.
            cleanup_tmp_directories=not read_only,
        )
        self._manager = self._open()

    def __enter__(self) -> CheckpointStore:
        """Returns the store."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Waits until everything is on disk, unless another process was lost."""
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
        """Starts saving a checkpoint, unless its step is saved already.

        It waits for the previous save. Training may continue during this one.

        Args:
            step: number of updates so far.
            model: tree of arrays.
            optimizer: tree of arrays, which may be empty.
            progress: JSON-compatible mapping.
            calibration: JSON-compatible mapping; None within an epoch.
            decisions: JSON-compatible mapping; None within an epoch.
            metrics: values by name that rank checkpoints; None within an epoch.

        Raises:
            UserError: the disk has too little free space.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        self._check_room((model, optimizer))
        # Copies, because the next step overwrites these buffers.
        model, optimizer = jax.tree.map(jnp.copy, (model, optimizer))
        arrays = {"model": model}
        if jax.tree.leaves(optimizer):  # Orbax rejects a tree without arrays
            arrays["optimizer"] = {"state": optimizer}
        texts = {"progress": progress, "calibration": calibration}
        texts |= {"decisions": decisions}
        texts = {name: dict(text) for name, text in texts.items() if text is not None}
        # Empty metrics rank last, like None, but Orbax warns about None.
        metrics = dict(metrics or {})
        digests = {k: digest_arrays(v) for k, v in arrays.items()}
        digests |= {k: digest(v) for k, v in {**texts, METRICS: metrics}.items()}
        texts[DIGEST] = {**digests, DIGEST: digest(digests)}
        items = {k: ocp.args.StandardSave(v) for k, v in arrays.items()}
        items |= {k: ocp.args.JsonSave(v) for k, v in texts.items()}
        with storage_errors(self._folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics=metrics,
                force=True,
            )

    def latest(self) -> int | None:
        """Returns the newest step, or None."""
        return self._manager.latest_step()

    def is_complete(self, step: int) -> bool:
        """Returns whether a step was saved at the end of an epoch, with its metric."""
        return self._metric in self._read_metrics(step)

    def is_overtaken(self) -> bool:
        """Returns whether training has saved or deleted a checkpoint since the opening.

        It waits up to a second, as an unreadable checkpoint may be being deleted.
        """
        for _ in range(PATIENCE):
            if self._list() != self._seen:
                return True
            time.sleep(0.1)
        return False

    def select(self, *, best: bool) -> int:
        """Returns the newest complete step to evaluate, or the best one.

        Raises:
            UserError: there is no complete step.
        """
        ranked = [
            (self._rank(metrics) if best else step, step)
            for step in self._manager.all_steps()
            if self._metric in (metrics := self._read_metrics(step))
        ]
        if not ranked:
            steps = list(self._manager.all_steps())
            found = f"the steps {steps} without it" if steps else "none"
            if any(self._folder.glob(UNFINISHED)):
                found += ", but one that is being saved, or whose saving was stopped"
            raise UserError(
                f"Expected a checkpoint with {self._metric} in {self._folder}, found "
                f"{found}. Train until an epoch with a checkpoint ends: run the "
                "train.py command again. (Test scores are there only if the run began "
                "with --config.selection=best_test_auroc.)"
            )
        return max(ranked)[1]

    def restore_training(
        self,
        step: int,
        place: Place,
        *,
        model: Any,
        optimizer: Any,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Returns (model, optimizer, progress), with trees like the given ones.

        Args:
            step: step of the checkpoint.
            place: function from the shape of an array of the model to its placement.
            model: tree with the shapes of the model; None for the saved shapes.
            optimizer: tree with the shapes of the optimizer's state.
        """
        items = {"model": self._place(step, place, model), "progress": None}
        if jax.tree.leaves(optimizer):
            items["optimizer"] = {"state": optimizer}
        restored = self._restore(step, **items)
        optimizer = restored.get("optimizer", {"state": optimizer})["state"]
        return restored["model"], optimizer, restored["progress"]

    def restore_progress(self, step: int) -> dict[str, Any]:
        """Returns the `progress` that was given to `save`."""
        return self._restore(step, progress=None)["progress"]

    def restore_model(
        self, step: int, place: Place, *, like: Any = None
    ) -> tuple[Any, dict[str, float], dict[str, Any]]:
        """Returns (model, calibration, decisions).

        Args:
            step: step of the checkpoint.
            place: function from the shape of an array of the model to its placement.
            like: tree with the shapes of the model; by default the saved shapes.

        Raises:
            UserError: the shapes differ, an item is damaged, or the checkpoint has no
                calibration or decisions.
        """
        like = self._place(step, place, like)
        restored = self._restore(step, model=like, calibration=None, decisions=None)
        return restored["model"], restored["calibration"], restored["decisions"]

    def wait(self) -> None:
        """Waits until everything is on disk, and raises the errors of saving."""
        with storage_errors(self._folder):
            self._manager.wait_until_finished()

    def _place(self, step: int, place: Place, like: Any) -> Any:
        """Returns the shapes of a model, by default the saved ones, with shardings."""
        if like is None:
            like = self._read_shapes(step, "model")
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), like
        )

    def _read_shapes(self, step: int, name: str) -> Any:
        """Reads the saved shapes of a tree of arrays; methods may change shapes."""
        folder = self._folder / str(step) / name
        with silence():
            try:
                found = ocp.StandardCheckpointer().metadata(folder.absolute())
                return found.item_metadata.tree
            except Exception as error:  # any kind, as in `_read`
                raise self._damage(step, name, str(error)) from error

    def _check_room(self, tree: Any) -> None:
        """Raises a UserError if the disk has too little space for a tree of arrays.

        Orbax would report a full disk with pages of tracebacks.
        """
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

    def _open(self) -> ocp.CheckpointManager:
        while True:
            self._seen = self._list()
            with silence():
                try:
                    return ocp.CheckpointManager(
                        self._folder.absolute(), options=self._options
                    )
                except (ValueError, FileNotFoundError) as error:
                    failure = str(error)  # all metrics are read on opening
            if not self.is_overtaken():
                break
        for step in sorted(map(int, self._seen)):
            path = self._folder / str(step) / METRICS / METRICS
            try:
                json.loads(path.read_text())
            except (ValueError, OSError) as error:
                raise self._damage(step, METRICS, str(error)) from error
        raise UserError(
            f"Expected checkpoints in {self._folder}, found: {sentence(failure)} "
            "Restore its files, or train anew in another folder."
        )

    def _list(self) -> set[str]:
        """Returns the names of the complete checkpoints on disk."""
        if not self._folder.is_dir():
            return set()
        return {path.name for path in self._folder.iterdir() if path.name.isdigit()}

    def _read_metrics(self, step: int) -> Mapping[str, float]:
        found = self._manager.metrics(step)
        if found is None and self._metric is not None:
            raise self._damage(step, METRICS, "no such file")
        saved = self._read_digests(step).get(METRICS)
        if found is not None and saved not in (None, digest(found)):
            raise self._damage(step, METRICS, CHANGED)
        return found or {}

    def _read_digests(self, step: int) -> dict[str, dict[str, Any]]:
        """Returns the digests of all items; {} in an earlier version's checkpoint."""
        if not (self._folder / str(step) / DIGEST).is_dir():
            return {}
        digests = self._read(step, DIGEST)
        if digests.pop(DIGEST, None) != digest(digests):
            raise self._damage(step, DIGEST, CHANGED)
        return digests

    def _restore(self, step: int, **items: Any) -> dict[str, Any]:
        """Restores items by name.

        Args:
            step: step of the checkpoint.
            **items: trees with the shapes of the items; None for a JSON item.

        Raises:
            UserError: an item is missing, damaged or has other shapes.
        """
        digests = self._read_digests(step)
        restored = {}
        for name, like in items.items():
            saved = digests.get(name)
            if saved and like is not None:
                self._check_layout(step, saved["layout"], describe_layout(like))
            if not saved and not (self._folder / str(step) / name).is_dir():
                raise UserError(
                    f"Expected checkpoint {step} in {self._folder} to hold {name}, "
                    "found none: another version of ulsad_jax wrote it, or files were "
                    "lost. Restore them, use that version, or train anew in another "
                    "folder."
                )
            restored[name] = found = self._read(step, name, like)
            read = digest(found) if like is None else digest_arrays(found)
            if saved not in (None, read):
                raise self._damage(step, name, CHANGED)
        return restored

    def _read(self, step: int, name: str, like: Any = None) -> Any:
        """Restores one item, without any messages of Orbax."""
        args = (
            ocp.args.JsonRestore() if like is None else ocp.args.StandardRestore(like)
        )
        items = ocp.args.Composite(**{name: args})
        try:
            with silence():
                return self._manager.restore(step, args=items)[name]
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # any kind, including Exception itself
            cause = error.__cause__ or error.__context__
            failure = str(cause if cause and type(error) is Exception else error)
        raise self._damage(step, name, failure)

    def _check_layout(
        self, step: int, saved: Mapping[str, str], asked: Mapping[str, str]
    ) -> None:
        for name in sorted(saved.keys() | asked.keys()):
            if saved.get(name) != asked.get(name):
                raise UserError(
                    f"Expected checkpoint {step} in {self._folder} to hold this "
                    f"config's networks, with {asked.get(name, 'no')} {name}, found "
                    f"{saved.get(name, 'none')}. Use the config it was trained with, "
                    "or train anew in another folder."
                )

    def _damage(self, step: int, name: str, failure: str) -> UserError:
        """Returns the error for an item that is unreadable or not as it was saved."""
        folder = self._folder / str(step)
        files = re.findall(r'local file "([^"]+[^/"])"', failure)
        reason = " ".join(failure.split(" [tensorstore_spec")[0].split())
        reason = reason.rpartition('": ')[2].rstrip(" .")
        others = sorted(map(int, self._list() - {str(step)}))
        instead = f"goes on from checkpoint {others[-1]}" if others else "begins anew"
        return UserError(
            f"Expected checkpoint {step} in {self._folder} to be as it was saved, "
            f"found {files[-1] if files else folder / name} damaged: {reason:.200}. "
            f"Restore the folder {folder} from a copy. Or delete it, and run the "
            f"train.py command again, which then {instead}."
        )
