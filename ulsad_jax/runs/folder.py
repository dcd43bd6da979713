"""Defines the names of the files in a run's folder.

config.json           the resolved config
trunk.safetensors     the frozen trunk and its identity
results.json, .csv    metrics of every category, and their mean
report.html           the results, with figures and pictures
<category>/           one folder per category, see the names below
maps/<category>/      maps of test images, if asked for
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ulsad_jax.runs import config as config_lib
from ulsad_jax.runtime import files
from ulsad_jax.runtime.checkpoint import CheckpointStore
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# In a run's folder.
CONFIG, TRUNK, REPORT, MAPS = "config.json", "trunk.safetensors", "report.html", "maps"
RESULTS, TABLE = "results.json", "results.csv"
# In a category's folder, beside `RESULTS`.
CHECKPOINTS, PICTURES, PROFILE = "checkpoints", "pictures", "profile"
SCORES, CURVES, STAGES = "scores.csv", "curves.json", "stages.json"
EPOCHS = "metrics.jsonl"  # losses of every epoch
DATA = "data.json"  # digests of the images trained and validated on
# In the folder of a sweep, and of its members.
SWEEP, MEMBERS, TRUNKS = "sweep.json", "members", "trunks"
DIVERGED = "diverged.txt"  # why a member has no results
_TAKEN = {CONFIG, TRUNK, REPORT, MAPS, RESULTS, TABLE, SWEEP, DIVERGED}


def folder_name(category: str) -> str:
    """Returns the name of a category's folder, unlike that of any file of a run."""
    name = files.safe_name(category)
    taken = name.removesuffix(".tmp") in _TAKEN  # .tmp is the suffix while writing
    return files.mark(name, category) if taken else name


def find_category(workdir: Path, category: str = "") -> Path:
    """Returns the folder of a trained category.

    Args:
        workdir: folder of the run.
        category: name of the category or of its folder; may be empty if there is only
            one.

    Raises:
        UserError: there is no such category; the message lists those that exist.
    """
    found = sorted(p.parent.name for p in workdir.glob(f"*/{CHECKPOINTS}"))
    if not category and len(found) == 1:
        return workdir / found[0]
    for name in (category, folder_name(category)):
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


def open_store(
    config: ConfigDict, folder: Path, *, read_only: bool = False
) -> CheckpointStore:
    """Opens the checkpoints in a category's folder, ranked as the config says."""
    on_test = config.selection == config_lib.BEST_TEST_AUROC
    return CheckpointStore(
        folder / CHECKPOINTS,
        metric="test_image_auroc" if on_test else "validation_loss",
        largest=on_test,
        read_only=read_only,
    )


def select(config: ConfigDict, store: CheckpointStore) -> int:
    """Returns the step of the checkpoint that the config selects."""
    return store.select(best=config.selection != "last")


def category_folder(workdir: Path, category: str) -> Path:
    """Returns the folder of a category in a run's folder."""
    return workdir / folder_name(category)


def maps_folder(folder: Path) -> Path:
    """Returns the folder of a category's maps, where MVTec's evaluation expects it.

    Args:
        folder: folder of the category.
    """
    return folder.parent / MAPS / folder.name
