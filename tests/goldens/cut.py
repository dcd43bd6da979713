"""Cuts a small golden out of a full one: `python tests/goldens/cut.py FULL.npz`.

The result, under the same file name next to this script, is what the parity tests
compare with. Every number in it is the reference implementation's, untouched.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

# Strides that meet every phase of the 2 x and 8 x resampling inside the networks.
MAP_STRIDE, GRID_STRIDE = 7, 5


def cut(name: str, value: np.ndarray) -> np.ndarray:
    """The part of the array `name` that is kept: a strided grid, or all of it."""
    if name.startswith("map_"):
        return value[:, ::MAP_STRIDE, ::MAP_STRIDE]
    if value.ndim == 4 and not name.startswith("grad/"):
        return value[:, ::GRID_STRIDE, ::GRID_STRIDE]
    return value


def main(source: pathlib.Path) -> None:
    """Writes the small golden."""
    with np.load(source) as full:
        small = {name: cut(name, full[name]) for name in full}
    np.savez_compressed(pathlib.Path(__file__).with_name(source.name), **small)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
