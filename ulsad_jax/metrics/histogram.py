"""Sums over float32 scores of any range, as finely as a fixed memory allows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, UInt32

PAGES = 1 << 16  # a page holds the scores with the same upper 16 bits of their keys
OCTAVE = 128  # pages of a binary order of magnitude and a sign


class ScoreHistogram:
    """A histogram with named columns of sums over the same bins of scores.

    Up to `max_bins` scores are kept exactly. More scores go to bins, which are ranges
    of neighbouring float32 numbers, at first single numbers. Bins are allocated for the
    binary orders of magnitude that occur. If they would take more than `max_bins`, bins
    are merged in pairs, first where there are the fewest scores per bin. So no range
    has to be known in advance, and bins are narrow where scores are dense. With 2^22
    bins, the scores of one bin agree to one part in 8192 at least.
    """

    def __init__(self, *, max_bins: int = 1 << 22):
        """Creates an empty histogram; a column takes at most 12 bytes per bin.

        Args:
            max_bins: largest number of bins, at least 2^16.
        """
        if max_bins < PAGES:
            raise ValueError(
                f"Expected max_bins of at least {PAGES}, found {max_bins}."
            )
        self._max_bins = max_bins
        self._max_shift = 17 - (max_bins // PAGES).bit_length()  # always fits
        # For each page: number of scores, log2 of a bin's width, first bin or -1.
        self._counts = np.zeros(PAGES, np.int64)
        self._shift = np.zeros(PAGES, np.int64)
        self._start = np.full(PAGES, -1)
        self._size = 0
        self._waiting: list[tuple[Hashable, np.ndarray, np.ndarray | None]] = []
        self._sums: dict[Hashable, np.ndarray] = {}

    def add(
        self,
        column: Hashable,
        scores: Float32[np.ndarray, " n"],
        weights: Float[np.ndarray, " n"] | None = None,
    ) -> None:
        """Adds weights to the bins of scores.

        Args:
            column: name of the column.
            scores: finite scores, float32 [n].
            weights: weight of each score, float [n]; by default 1.
        """
        self._waiting.append((column, _order_keys(scores), weights))
        if self._size or sum(k.size for _, k, _ in self._waiting) > self._max_bins:
            self._fill_bins()

    def read(
        self, columns: Iterable[Iterable[Hashable]]
    ) -> tuple[list[Float[np.ndarray, " k"]], Bool[np.ndarray, " k"]]:
        """Returns sums in the order of scores, the largest first, without empty bins.

        Args:
            columns: names of the columns to add up, one group per result.

        Returns:
            (results, binned): one array [k] per result, and a bool array [k], True for
            bins that may hold several scores.
        """
        if not self._size:
            return self._read_waiting(columns)
        totals = []
        for names in columns:
            total = np.zeros(self._size)
            for name in names:
                if name in self._sums:
                    total += self._sums[name]
            totals.append(total[::-1])
        filled = np.any(totals, axis=0)
        opened = self._start >= 0
        binned = np.repeat(self._shift[opened] > 0, PAGES >> self._shift[opened])
        return [total[filled] for total in totals], binned[::-1][filled]

    def _read_waiting(
        self, columns: Iterable[Iterable[Hashable]]
    ) -> tuple[list[Float[np.ndarray, " k"]], Bool[np.ndarray, " k"]]:
        """Returns the result of `read` while all scores are kept exactly."""
        keys = [keys for _, keys, _ in self._waiting]
        found, places = np.unique(
            np.concatenate([np.zeros(0, np.uint32), *keys]), return_inverse=True
        )
        places = np.split(places, np.cumsum([k.size for k in keys])[:-1])
        totals = []
        for names in map(set, columns):
            total = np.zeros(len(found))
            for (name, _, weights), at in zip(self._waiting, places, strict=False):
                if name in names:
                    total += np.bincount(at, weights, len(found))
            totals.append(total[::-1])
        filled = np.any(totals, axis=0)
        return [total[filled] for total in totals], np.zeros(filled.sum(), bool)

    def _fill_bins(self) -> None:
        """Moves the waiting scores to bins."""
        for _, keys, _ in self._waiting:
            self._counts += np.bincount(keys >> 16, minlength=PAGES)
        self._make_room()
        for column, keys, weights in self._waiting:
            if column not in self._sums:
                # Floats for counts as well: integers up to 2^53 are exact.
                self._sums[column] = np.zeros(self._size)
            pages = keys >> 16
            bins = self._start[pages] + ((keys & 0xFFFF) >> self._shift[pages])
            np.add.at(self._sums[column], bins, 1.0 if weights is None else weights)
        self._waiting = []

    def _make_room(self) -> None:
        """Allocates bins for the orders of magnitude that are new."""
        octaves = self._counts.reshape(-1, OCTAVE).any(1)
        opened = np.repeat(octaves, OCTAVE)
        if (self._start[opened] >= 0).all():
            return
        shift = self._choose_shifts(opened)
        sizes = np.where(opened, PAGES >> shift, 0)
        start = np.cumsum(sizes) - sizes
        # Where each old bin goes; pages lie in the order of their scores.
        old = np.flatnonzero(self._start >= 0)
        page = np.repeat(old, PAGES >> self._shift[old])
        offset = np.arange(self._size) - self._start[page]
        bins = start[page] + (offset >> (shift - self._shift)[page])
        self._size = int(sizes.sum())
        for name, sums in self._sums.items():
            self._sums[name] = np.bincount(bins, sums, self._size)
        self._shift, self._start = shift, np.where(opened, start, -1)

    def _choose_shifts(self, opened: Bool[np.ndarray, " pages"]) -> np.ndarray:
        """Returns log2 of the width of a bin for each page.

        Bins are as narrow as the memory allows, with at least 2^k scores on average and
        the same k for all pages.
        """
        magnitude = np.log2(np.maximum(self._counts, 1)).astype(np.int64)
        shift = self._shift
        k = -16
        while (PAGES >> shift[opened]).sum() > self._max_bins:
            wanted = np.clip(16 + k - magnitude, 0, self._max_shift)
            shift = np.maximum(self._shift, wanted)
            k += 1
        return shift


def _order_keys(scores: Float32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Returns integers in the order of the scores, equal for equal scores.

    The bits of a float32, read as an integer, increase with a positive number and
    decrease with a negative one.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0: both zeros are one
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
