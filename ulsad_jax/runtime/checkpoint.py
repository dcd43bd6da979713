"""Checkpoints of one category; the only file that knows Orbax."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ulsad_jax.runtime import hosts
from ulsad_jax.runtime.errors import UserError, sentence, storage_errors

DIGEST = "digest"  # the item that says what the others were when they were saved
METRICS = "metrics"  # Orbax's own item
UNFINISHED = "*.orbax-checkpoint-tmp*"  # what is being saved
CHANGED = "its values are not those that were saved"
PATIENCE = 10  # tenths of a second, for what another process is just deleting


class CheckpointStore:
    """The last and the best checkpoint of a category.

    Saving is asynchronous and atomic: a checkpoint is there whole or not at all. A
    checkpoint holds six items: `model` (what evaluation needs), `optimizer`,
    `progress`, `digest` (Orbax has no checksums of what is in arrays) and, unless
    training was interrupted within an epoch, `calibration` and `decisions`.
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
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            # Without it no metrics are written.
            best_fn=None if metric is None else self._rank,
            create=not read_only,
            # Remains of a save that was killed are no checkpoint.
            cleanup_tmp_directories=not read_only,
        )
        self._manager = self._open()

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
        arrays = {"model": model, "optimizer": {"state": optimizer}}
        texts = {"progress": progress, "calibration": calibration}
        texts |= {"decisions": decisions}
        texts = {name: dict(text) for name, text in texts.items() if text is not None}
        # Empty metrics rank last, as none do, but Orbax warns of none.
        metrics = dict(metrics or {})
        digests = {k: _digest_arrays(v) for k, v in arrays.items()}
        digests |= {k: _digest(v) for k, v in {**texts, METRICS: metrics}.items()}
        texts[DIGEST] = {**digests, DIGEST: _digest(digests)}
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
        """The newest step, or None."""
        return self._manager.latest_step()

    def is_complete(self, step: int) -> bool:
        """Whether it was saved at the end of an epoch, with what it is ranked by."""
        return self._metric in self._read_metrics(step)

    def is_overtaken(self) -> bool:
        """Tells whether training has saved or deleted a checkpoint since the opening.

        It waits for that a while: what cannot be read may be just being deleted.
        """
        for _ in range(PATIENCE):
            if self._list() != self._seen:
                return True
            time.sleep(0.1)
        return False

    def select(self, *, best: bool) -> int:
        """The step to evaluate: the newest complete one, or the best.

        Raises:
            UserError: there is none.
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
        self, step: int, *, model: Any, optimizer: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Returns (model, optimizer, progress) as trees like the given ones."""
        restored = self._restore(
            step,
            model=model,
            optimizer={"state": optimizer},
            progress=None,
        )
        return restored["model"], restored["optimizer"]["state"], restored["progress"]

    def restore_progress(self, step: int) -> dict[str, Any]:
        """What `save` was given as `progress`."""
        return self._restore(step, progress=None)["progress"]

    def restore_model(
        self, step: int, *, model: Any
    ) -> tuple[Any, dict[str, float], dict[str, Any]]:
        """Returns (model as a tree like the given one, calibration, decisions).

        Raises:
            UserError: other networks; what is damaged; a checkpoint without decisions.
        """
        restored = self._restore(step, model=model, calibration=None, decisions=None)
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

    def _open(self) -> ocp.CheckpointManager:
        while True:
            self._seen = self._list()
            with _silent():
                try:
                    return ocp.CheckpointManager(
                        self._folder.absolute(), options=self._options
                    )
                except (ValueError, FileNotFoundError) as error:
                    failure = str(error)  # of the metrics, all of which are read
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
        """Returns the names of whole checkpoints that are on disk."""
        if not self._folder.is_dir():
            return set()
        return {path.name for path in self._folder.iterdir() if path.name.isdigit()}

    def _read_metrics(self, step: int) -> Mapping[str, float]:
        found = self._manager.metrics(step)
        if found is None and self._metric is not None:
            raise self._damage(step, METRICS, "no such file")
        digest = self._read_digests(step).get(METRICS)
        if found is not None and digest not in (None, _digest(found)):
            raise self._damage(step, METRICS, CHANGED)
        return found or {}

    def _read_digests(self, step: int) -> dict[str, dict[str, Any]]:
        """Returns what is known of every item; nothing in an earlier version's."""
        if not (self._folder / str(step) / DIGEST).is_dir():
            return {}
        digests = self._read(step, DIGEST)
        if digests.pop(DIGEST, None) != _digest(digests):
            raise self._damage(step, DIGEST, CHANGED)
        return digests

    def _restore(self, step: int, **items: Any) -> dict[str, Any]:
        """Restores items: trees like the given ones, JSON where None is given.

        Raises:
            UserError: one is not what was saved, or the trees are others.
        """
        digests = self._read_digests(step)
        restored = {}
        for name, like in items.items():
            digest = digests.get(name)
            if digest and like is not None:
                self._check_layout(step, digest["layout"], _describe_layout(like))
            if not digest and not (self._folder / str(step) / name).is_dir():
                raise UserError(
                    f"Expected checkpoint {step} in {self._folder} to hold {name}, "
                    "found none: another version of ulsad_jax wrote it, or files were "
                    "lost. Restore them, use that version, or train anew in another "
                    "folder."
                )
            restored[name] = found = self._read(step, name, like)
            read = _digest(found) if like is None else _digest_arrays(found)
            if digest not in (None, read):
                raise self._damage(step, name, CHANGED)
        return restored

    def _read(self, step: int, name: str, like: Any = None) -> Any:
        """Restores one item, without a word of Orbax's."""
        args = (
            ocp.args.JsonRestore() if like is None else ocp.args.StandardRestore(like)
        )
        items = ocp.args.Composite(**{name: args})
        try:
            with _silent():
                return self._manager.restore(step, args=items)[name]
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of all kinds, Exception itself among them
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
        """Returns what to tell of an item that cannot be read, or is not as saved."""
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


def _digest(value: Any) -> dict[str, Any]:
    """Returns the checksum of what is written as JSON."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return {"crc32": zlib.crc32(text.encode())}


def _digest_arrays(tree: Any) -> dict[str, Any]:
    """Returns the checksum and the layout of a tree of arrays."""
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        flat = np.ascontiguousarray(jax.device_get(leaf)).reshape(-1)
        checksum = zlib.crc32(flat.view(np.uint8), checksum)
    return {"crc32": checksum, "layout": _describe_layout(tree)}


def _describe_layout(tree: Any) -> dict[str, str]:
    """Returns type and shape of every array by its path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps the log and the warnings of libraries from the console.

    If that fails, Orbax's tasks stay silent for good: they complain in threads of their
    own, and whenever they happen to be collected.
    """
    disabled, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    if hook is sys.__unraisablehook__:
        sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
        raise
    else:
        sys.unraisablehook = hook
    finally:
        logging.disable(disabled)
