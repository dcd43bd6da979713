"""Features that members share: the trunk sees every image once a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ulsad_jax.data.batches import Category, Examples
from ulsad_jax.runs import training
from ulsad_jax.runtime.progress import progress
from ulsad_jax.trunks import features
from ulsad_jax.trunks import weights as pretrained

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Rows:
    """As `features.Kept`, of some rows of features that others use, too.

    Members may split the same images differently, by their seeds. Their statistics
    differ then, so that features are standardised a batch at a time.

    Attributes:
        raw: [n, h/8, w/8, c] float32, not standardised.
        images: [n, h, w, 3] uint8.
        rows: that belong to this split.
        statistics: of the member's training images.
    """

    raw: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    statistics: features.ChannelStatistics

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.rows)

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(h/8, w/8, c) of an image's features."""
        return self.raw.shape[1:]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        return self.images.shape[1:3]

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[Float[np.ndarray, "b h/8 w/8 c"], UInt8[np.ndarray, "b h w 3"]]:
        """Features and images of some of this split's rows."""
        rows = self.rows[rows]
        return self.statistics.standardize(self.raw[rows]), self.images[rows]


class Source:
    """Raw features of all training and validation normals of a category."""

    def __init__(
        self, config: ConfigDict, data: Category, trunk: pretrained.Trunk, title: str
    ):
        """Runs the trunk.

        Args:
            config: of any member that shares them.
            data: of this member; others may part its normals in another way.
            trunk: frozen.
            title: for the progress bar.
        """
        pyramid = training.make_pyramid(config)
        splits, size = (data.train, data.validation), config.evaluation.batch_size
        total = sum(map(len, splits))
        self._raw, self._images = features.extract(
            features.make_extractor(pyramid, trunk.variables),
            progress(
                _join(splits, size),
                title,
                total=sum(-(-len(s) // size) for s in splits),
            ),
            total,
        )
        paths = [record.image for split in splits for record in split.records]
        self._row: dict[Path, int] = {path: row for row, path in enumerate(paths)}

    def part(self, data: Category, *, whiten: bool) -> features.Normals:
        """What a member trains and validates on."""
        train, validation = (
            np.array([self._row[record.image] for record in split.records])
            for split in (data.train, data.validation)
        )
        statistics = features.channel_statistics(
            (self._raw[row] for row in train), whiten=whiten
        )
        return features.Normals(
            Rows(self._raw, self._images, train, statistics),
            Rows(self._raw, self._images, validation, statistics),
            statistics,
        )


def _join(splits: Sequence[Examples], size: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches of one split after the other, numbered on."""
    start = 0
    for split in splits:
        for batch in split.batches(min(size, len(split))):
            yield batch | {"index": batch["index"] + start}
        start += len(split)
