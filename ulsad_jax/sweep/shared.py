"""Shares features among members, so that the trunk sees every image once per sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ulsad_jax.data.batches import Category, Examples
from ulsad_jax.runtime.progress import progress
from ulsad_jax.trunks.features import ChannelStatistics, channel_statistics
from ulsad_jax.trunks.sources import Normals, extract

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8

    from ulsad_jax.trunks.pyramid import Features


@dataclasses.dataclass(frozen=True)
class Rows:
    """A split of images and features that members share; see `sources.Kept`.

    Seeds may split the same images differently. The statistics then differ between
    members, so that features are standardised one batch at a time.

    Attributes:
        images: uint8 [n, h, w, 3].
        raw: float32 [n, gh, gw, c], or several by name, not standardised; or None.
        rows: int [k], indices of the images of this split.
        statistics: statistics of the member's training images, which standardise its
            features; None to leave them as they are.
    """

    images: np.ndarray
    raw: Any
    rows: np.ndarray
    statistics: ChannelStatistics | None

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.rows)

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[UInt8[np.ndarray, "b h w 3"], Features | None]:
        """Returns images and features of some of this split's rows."""
        chosen = self.rows[rows]
        images, raw = jax.tree.map(lambda x: x[chosen], (self.images, self.raw))
        if self.statistics is None:
            return images, raw
        return images, self.statistics.standardize(raw)


class Source:
    """Images and raw features of all training and validation normals of a category."""

    def __init__(
        self,
        data: Category,
        extractor: Callable | None,
        *,
        batch_size: int,
        title: str,
    ):
        """Reads the images and runs the trunk on them.

        Args:
            data: category of any member that shares the images; other members may split
                them differently.
            extractor: function from `features.make_extractor`; None to keep only
                images.
            batch_size: number of images in a batch.
            title: title of the progress bar.
        """
        splits = data.train, data.validation
        self._images, self._raw = extract(
            extractor,
            progress(
                _join(splits, batch_size),
                title,
                total=sum(-(-len(s) // batch_size) for s in splits),
            ),
            sum(map(len, splits)),
        )
        paths = [record.image for split in splits for record in split.records]
        self._row: dict[Path, int] = {path: row for row, path in enumerate(paths)}

    def part(self, data: Category, *, whiten: bool) -> Normals:
        """Returns the training and validation images and features of a member.

        Args:
            data: category of the member, with its split.
            whiten: True to whiten features, see `channel_statistics`.
        """
        train, validation = (
            np.array([self._row[record.image] for record in split.records])
            for split in (data.train, data.validation)
        )
        statistics = None
        if isinstance(self._raw, np.ndarray):  # levels are not standardised
            rows = (self._raw[row] for row in train)
            statistics = channel_statistics(rows, whiten=whiten)
        return Normals(
            *(
                Rows(self._images, self._raw, rows, statistics)
                for rows in (train, validation)
            ),
            statistics,
        )


def _join(splits: Sequence[Examples], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of all splits, with consecutive indices."""
    start = 0
    for split in splits:
        for batch in split.batches(min(size, len(split))):
            yield batch | {"index": batch["index"] + start}
        start += len(split)
