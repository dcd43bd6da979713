"""Loads a trained category: everything but its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs import setup, steps
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring.calibration import Calibration
from ulsad_jax.scoring.prediction import Weights
from ulsad_jax.scoring.thresholds import Decisions
from ulsad_jax.trunks import weights as trunk_weights
from ulsad_jax.trunks.features import ChannelStatistics

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ulsad_jax.runtime.checkpoint import CheckpointStore, Place
    from ulsad_jax.trunks.weights import Trunk, TrunkIdentity


class Saved(NamedTuple):
    """A loaded checkpoint of a category.

    Attributes:
        step: number of updates of the checkpoint.
        weights: all arrays and numbers that turn an image into a decision.
        decisions: the thresholds in `weights`, and the data behind them.
    """

    step: int
    weights: Weights
    decisions: Decisions


class Run(NamedTuple):
    """A loaded checkpoint of a category, with its config and trunk.

    Attributes:
        config: resolved config of the run.
        category: name of the category's folder.
        trunk: identity of the trunk; None for a method that takes only images.
        step: number of updates of the checkpoint.
        weights: all arrays and numbers that turn an image into a decision.
        decisions: the thresholds in `weights`, and the data behind them.
    """

    config: ConfigDict
    category: str
    trunk: TrunkIdentity | None
    step: int
    weights: Weights
    decisions: Decisions

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels at which images enter."""
        return config_lib.input_size(self.config)


def check_trunk(
    store: CheckpointStore, step: int, trunk: Trunk | None, folder: Path
) -> None:
    """Checks that a checkpoint was trained with the given trunk.

    Args:
        store: store of the checkpoints.
        step: number of updates of the checkpoint.
        trunk: trunk of the run, or None.
        folder: folder of the category, used in the message.

    Raises:
        UserError: the trunks differ; the message shows both.
    """
    kept = store.restore_progress(step)["trunk"]
    if trunk is not None and kept is not None:
        expected = trunk_weights.TrunkIdentity(**kept)
        trunk_weights.check_same(expected, trunk.identity, folder)


def load_trunk(config: ConfigDict, workdir: Path) -> Trunk | None:
    """Reads a run's trunk; returns None if the method takes only images."""
    path = workdir / files_of.TRUNK
    if not config_lib.needs_trunk(config):
        return None
    return trunk_weights.load_saved_trunk(path)


def load(
    config: ConfigDict,
    made: setup.Setup,
    folder: Path,
    trunk: Trunk | None,
    *,
    step: int | None = None,
    place: Place | None = None,
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
) -> Saved:
    """Loads a category from its folder.

    Args:
        config: resolved config of the run.
        made: method and pyramid of the config.
        folder: folder of the category.
        trunk: trunk of the run, or None.
        step: number of updates of the checkpoint; by default that of the checkpoint
            that the config selects.
        place: function from an array's shape to its placement; by default the first
            device.
        image_threshold: replaces the stored threshold on image scores.
        pixel_threshold: replaces the stored threshold on map values.

    Raises:
        UserError: the checkpoint does not exist, is damaged, or was written with
            another trunk or by another version.
    """
    like = _model_shapes(made, config.train.batch_size)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    while True:
        with files_of.open_store(config, folder, read_only=True) as store:
            try:
                found = files_of.select(config, store) if step is None else step
                check_trunk(store, found, trunk, folder)
                item, calibration, stored = store.restore_model(
                    found, place or (lambda _: first), like=like
                )
                break
            except UserError:
                if not store.is_overtaken():  # training did not replace it
                    raise
    decisions = Decisions.from_json(stored).override(
        image=image_threshold, pixel=pixel_threshold
    )
    model, statistics = steps.read_model_item(item)
    weights = Weights(
        trunk=trunk and trunk.variables,
        statistics=statistics,
        model=model,
        calibration=Calibration.from_json(calibration),
        thresholds=decisions.thresholds,
    )
    return Saved(found, weights, decisions)


def load_run(
    workdir: str | os.PathLike[str],
    category: str = "",
    *,
    selection: str = "",
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
    batch_size: int | None = None,
) -> Run:
    """Loads a category from a run's folder.

    Args:
        workdir: folder that train.py wrote.
        category: name of the category; may be empty if the run has only one.
        selection: replaces `config.selection` unless empty.
        image_threshold: replaces the run's threshold on image scores.
        pixel_threshold: replaces the run's threshold on map values.
        batch_size: replaces `config.evaluation.batch_size`.

    Raises:
        UserError: there is no run or no such category, or another version wrote the
            checkpoint.
    """
    workdir = Path(workdir).expanduser()
    config = config_lib.load(workdir / files_of.CONFIG)
    config.selection = selection or config.selection
    if batch_size is not None:
        config.evaluation.batch_size = batch_size
    config_lib.validate(config)
    folder = files_of.find_category(workdir, category)
    trunk = load_trunk(config, workdir)
    found = load(
        config,
        setup.make(config),
        folder,
        trunk,
        image_threshold=image_threshold,
        pixel_threshold=pixel_threshold,
    )
    return Run(config, folder.name, trunk and trunk.identity, *found)


def _model_shapes(made: setup.Setup, batch_size: int) -> Any:
    """Returns the shapes of `model_item`; None if the method may change them."""
    method, spec = made.method, made.spec(batch_size)
    if not steps.keeps_shapes(method):
        return None
    state = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
    statistics = None
    if isinstance(made.features, jax.ShapeDtypeStruct):
        channels = made.features.shape[-1:]
        shapes = [channels, channels, *[2 * channels] * made.whiten]
        statistics = ChannelStatistics(
            *(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
        )
    return steps.model_item(state.model, statistics)
