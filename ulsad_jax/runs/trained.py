"""What training left of a category, put together again: everything but its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import results, training
from ulsad_jax.runtime.checkpoint import CheckpointStore
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.scoring import prediction as inference
from ulsad_jax.scoring.thresholds import Decisions
from ulsad_jax.trunks import features
from ulsad_jax.trunks import weights as pretrained
from ulsad_jax.trunks.pyramid import FEATURE_CHANNELS

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG, TRUNK, CHECKPOINTS = "config.json", "trunk.safetensors", "checkpoints"


class Trained(NamedTuple):
    """A trained category.

    Attributes:
        step: of the checkpoint.
        weights: everything that turns an image into a decision.
        decisions: the thresholds in `weights`, and what they rest on.
    """

    step: int
    weights: inference.Weights
    decisions: Decisions


class Run(NamedTuple):
    """A trained category and where it comes from.

    Attributes:
        config: the run's.
        category: the name of its folder.
        trunk: which trunk it is.
        step: of the checkpoint.
        weights: everything that turns an image into a decision.
        decisions: the thresholds in `weights`, and what they rest on.
    """

    config: ConfigDict
    category: str
    trunk: pretrained.TrunkIdentity
    step: int
    weights: inference.Weights
    decisions: Decisions


def open_store(
    config: ConfigDict, folder: Path, *, read_only: bool = False
) -> CheckpointStore:
    """The checkpoints of a category's folder, ranked as the config says."""
    on_test = config.selection == config_lib.BEST_TEST_AUROC
    return CheckpointStore(
        folder / CHECKPOINTS,
        metric="test_image_auroc" if on_test else "validation_loss",
        largest=on_test,
        read_only=read_only,
    )


def select(config: ConfigDict, store: CheckpointStore) -> int:
    """The step of the checkpoint that the config asks for."""
    return store.select(best=config.selection != "last")


def check_trunk(
    store: CheckpointStore, step: int, trunk: pretrained.Trunk, folder: Path
) -> None:
    """Refuses a trunk that the checkpoint was not trained with."""
    expected = pretrained.TrunkIdentity(**store.restore_progress(step)["trunk"])
    pretrained.check_same(expected, trunk.identity, folder)


def load(
    config: ConfigDict,
    folder: Path,
    trunk: pretrained.Trunk,
    *,
    step: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
) -> Trained:
    """Loads a category from its folder.

    Args:
        config: the run's.
        folder: of the category.
        trunk: the run's.
        step: of the checkpoint; by default the one that the config asks for.
        sharding: of the networks; by default they are on the first device.
        image_threshold: instead of the stored one.
        pixel_threshold: instead of the stored one.

    Raises:
        UserError: no such checkpoint, a damaged one, another trunk, another version's
            checkpoint.
    """
    like = _abstract_model(config, sharding)
    while True:
        with open_store(config, folder, read_only=True) as store:
            try:
                found = select(config, store) if step is None else step
                check_trunk(store, found, trunk, folder)
                model, calibration, stored = store.restore_model(found, model=like)
                break
            except UserError:
                if not store.is_overtaken():  # by training, which deletes the last one
                    raise
    decisions = Decisions.from_json(stored).override(
        image=image_threshold, pixel=pixel_threshold
    )
    weights = inference.Weights(
        trunk=trunk.variables,
        statistics=features.ChannelStatistics(**model["channels"]),
        variables=model["variables"],
        calibration=scoring.Calibration(**calibration),
        thresholds=decisions.thresholds,
    )
    return Trained(found, weights, decisions)


def load_run(
    workdir: str | os.PathLike[str],
    category: str = "",
    *,
    selection: str = "",
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
    batch_size: int | None = None,
) -> Run:
    """Loads a category of a run from the run's folder alone.

    Args:
        workdir: that train.py wrote.
        category: may be left out where the run has one.
        selection: of the checkpoint, if not the config's.
        image_threshold: instead of the run's.
        pixel_threshold: instead of the run's.
        batch_size: instead of `config.evaluation.batch_size`.

    Raises:
        UserError: no run, no such category, another version's checkpoint.
    """
    workdir = Path(workdir).expanduser()
    config = config_lib.load(workdir / CONFIG)
    config.selection = selection or config.selection
    if batch_size is not None:
        config.evaluation.batch_size = batch_size
    config_lib.validate(config)
    folder = find_category(workdir, category)
    trunk = pretrained.load_saved_trunk(workdir / TRUNK)
    found = load(
        config,
        folder,
        trunk,
        image_threshold=image_threshold,
        pixel_threshold=pixel_threshold,
    )
    return Run(config, folder.name, trunk.identity, *found)


def find_category(workdir: Path, category: str = "") -> Path:
    """The folder of a trained category.

    Args:
        workdir: of the run.
        category: its name or its folder's; may be empty where there is one.

    Raises:
        UserError: lists the categories that there are.
    """
    found = sorted(p.parent.name for p in workdir.glob(f"*/{CHECKPOINTS}"))
    if not category and len(found) == 1:
        return workdir / found[0]
    for name in (category, results.folder_name(category)):
        if name in found:
            return workdir / name
    if not found:
        raise UserError(
            f"Expected checkpoints of a category in {workdir}, found none. Run the "
            "train.py command again."
        )
    raise UserError(
        f"Expected one of the categories of {workdir} ({', '.join(found)}), found "
        f"{repr(category) if category else 'no choice'}. Name one."
    )


def _abstract_model(config: ConfigDict, sharding: jax.sharding.Sharding | None) -> Any:
    """Shapes of the checkpoint item that evaluation reads."""
    height, width = config.image_size
    channels = (FEATURE_CHANNELS,)
    variables = jax.eval_shape(
        lambda: training.make_model(config).init(
            jax.random.key(0),
            jnp.zeros((2, height // 8, width // 8, *channels)),
            jnp.zeros((2, height, width, 3)),
            train=False,
        )
    )
    statistics = features.ChannelStatistics(
        *(jax.ShapeDtypeStruct(channels, jnp.float32),) * 2,
        jax.ShapeDtypeStruct(channels * 2, jnp.float32)
        if config_lib.whitens(config)
        else None,
    )
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        training.model_tree(variables, statistics),
    )
