"""Defines one category of a run, with all that training and evaluation need."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ulsad_jax.data.batches import Category, Examples
from ulsad_jax.data.records import TRAIN, VALIDATION
from ulsad_jax.data.survey import describe_changes
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs.setup import Setup
from ulsad_jax.runtime import files, hosts
from ulsad_jax.runtime.devices import Devices
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.progress import progress
from ulsad_jax.trunks.weights import Trunk

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class CategoryRun:
    """A category of a run.

    Attributes:
        config: resolved config of the run.
        setup: method and pyramid of the config.
        name: name of the category.
        data: images of the category.
        folder: folder of the category in the work directory.
        trunk: trunk of the run; None for a method that takes only images.
        devices: devices over which batches are split.
        title: name on the console.
    """

    config: ConfigDict
    setup: Setup
    name: str
    data: Category
    folder: Path
    trunk: Trunk | None
    devices: Devices
    title: str

    @property
    def trunk_variables(self) -> Any:
        """Variables of the feature pyramid; None without a trunk."""
        return self.trunk and self.trunk.variables

    def batch_size(self, split: Examples) -> int:
        """Returns the batch size for scoring, limited by the size of the split."""
        wanted = min(self.config.evaluation.batch_size, max(1, len(split)))
        return self.devices.round_up(wanted)

    def batches(self, split: Examples, title: str) -> Iterable[dict[str, np.ndarray]]:
        """Reads a split in batches, with a progress bar.

        Args:
            split: images to read, a split of `data`.
            title: title of the progress bar.
        """
        size = self.batch_size(split)
        return progress(
            map(hosts.gather, split.batches(size, self.devices.own(size))),
            f"[{self.title}] {title}",
            total=-(-len(split) // size),
        )

    def keep_data(self) -> None:
        """Writes the digests of the training and validation images to data.json."""
        if hosts.is_first():
            kept = json.dumps(self._contents, indent=1) + "\n"
            files.replace(self.folder / files_of.DATA, kept)

    def check_data(self) -> None:
        """Checks that training and validation images are those of the training.

        A folder without digests, from an earlier version, is accepted without a check.

        Raises:
            UserError: images were added, removed or changed; the message says which.
        """
        path = self.folder / files_of.DATA
        if not path.exists():
            return
        changes = describe_changes(json.loads(path.read_text()), self._contents)
        if changes:
            raise UserError(
                f"Expected the training and validation images that {self.folder} was "
                f"trained with, found others: {changes}. Restore them, or train anew "
                "in another --workdir. To score other images with this run, use "
                "python -m ulsad_jax.predict, or eval.py --root with a folder that "
                "has no training images."
            )

    @property
    def _contents(self) -> dict[str, str]:
        return self.data.survey.contents(TRAIN, VALIDATION)
