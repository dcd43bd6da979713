"""What a training step costs on 4 to 256 chips, from `benchmarks/tpu_compile.json`.

    python benchmarks/tpu_scaling.py    # the tables of docs/devices.md

Nothing is measured: a chip's share of a step takes at least what `tpu_compile.bound`
says, and its all-reduces what their bytes take on the published links, afterwards.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import tpu_compile
from benchmarks.tpu_programs import CHIPS, Cell

CHIP = CHIPS["v5e"]
SLICES = {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
RING = 16  # chips along a side from which on a v5e's sides are closed to rings
PUBLISHED = 8  # the published batch
SHARE = 0.9  # of a step that computes, from which on more chips are said to pay


def main() -> None:
    """Prints the tables."""
    found = tpu_compile.read_results()
    print("\n".join([*make_table(found), "", *make_members(found)]))


def seconds_alone(found: dict[str, Any], batch: int) -> float:
    """Returns the least seconds of a step of so many images on one chip.

    It is interpolated between the batches that were compiled, and continued beyond
    them: traffic and operations are a constant and a share for each image.
    """
    cells = [
        cell
        for cell in tpu_compile.list_cells()
        if (cell.program, cell.topology) == ("train", "v5e:1x1")
        and "flops" in found.get(cell.name, {})
    ]
    points = sorted(
        (cell.batch, max(tpu_compile.bound(cell, found[cell.name]).values()))
        for cell in cells
    )
    for (low, a), (high, b) in itertools.pairwise(points):
        if batch <= high or high == points[-1][0]:
            return a + (b - a) * (batch - low) / (high - low)
    raise ValueError(f"Expected two batches on v5e:1x1, found {points}.")


def seconds_reduce(found: dict[str, Any], chips: int) -> float:
    """Returns the least seconds of a step's all-reduces.

    A chip sends 2 (n - 1) / n of the bytes, over all of its links where the slice's
    sides are rings, over half of them where they are not.
    """
    cell = Cell("published", "train", "v5e:2x2", 32)
    entries = found[cell.name]["collectives"].values()
    size = sum(entry["bytes"] for entry in entries)
    side = int(SLICES[chips].partition("x")[0])
    links = CHIP.links if side >= RING else CHIP.links / 2
    return 2 * (chips - 1) / chips * size / links


def least_batch(found: dict[str, Any], chips: int) -> int:
    """Returns the least batch of which `SHARE` of the step's seconds compute."""
    reduce = seconds_reduce(found, chips)
    each = 1
    while (alone := seconds_alone(found, each)) / (alone + reduce) < SHARE:
        each += 1
    return each * chips


def make_table(found: dict[str, Any]) -> list[str]:
    """Returns a Markdown table of slices: times of a step and what they come to."""
    lines = [
        f"| chips | a step of {PUBLISHED} images each computes | all-reduce | images/s "
        f"| times one chip | batch from which {SHARE:.0%} computes |",
        "|---|---|---|---|---|---|",
    ]
    alone = seconds_alone(found, PUBLISHED)
    for chips in SLICES:
        reduce = seconds_reduce(found, chips)
        speed = chips * PUBLISHED / (alone + reduce)
        lines.append(
            f"| {chips} | {1e3 * alone:.1f} ms | {1e3 * reduce:.2f} ms | {speed:,.0f} "
            f"| {speed * alone / PUBLISHED:.1f} | {least_batch(found, chips)} |"
        )
    return lines


def make_members(found: dict[str, Any]) -> list[str]:
    """Returns a Markdown table: one run on more chips, or a run on each of them."""
    lines = [
        "| batch | a step on 1 chip | on 4 | on 16 | on 64 | times faster | members, "
        "a chip each: times as many |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch in (8, 32, 128):
        alone = seconds_alone(found, batch)
        split = {
            chips: seconds_alone(found, batch // chips) + seconds_reduce(found, chips)
            for chips in SLICES
            if batch >= chips and chips < 256
        }
        told = [f"{1e3 * split[n]:.1f} ms" if n in split else "" for n in (4, 16, 64)]
        faster = ", ".join(f"{alone / seconds:.1f}" for seconds in split.values())
        members = ", ".join(map(str, split))
        lines.append(
            f"| {batch} | {1e3 * alone:.1f} ms | {' | '.join(told)} | {faster} "
            f"| {members} |"
        )
    return lines


if __name__ == "__main__":
    main()
