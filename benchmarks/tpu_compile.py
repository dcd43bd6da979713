"""Compiles the package's programs for TPUs, on a machine that has none.

    pip install "jax[tpu]"
    python benchmarks/tpu_compile.py            # every cell that is not in the file yet
    python benchmarks/tpu_compile.py --only=small
    python benchmarks/tpu_compile.py --table    # for docs/devices.md

The compiler is the one of a TPU machine; nothing is run. Every cell has a process of
its own, and its entry in benchmarks/tpu_compile.json as soon as it is done, so that the
program may be stopped and started again at any time.
"""

from __future__ import annotations

import collections
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cells
from benchmarks.tpu_programs import PROGRAMS, SYSTEMS, Cell

_CELL = flags.DEFINE_string("cell", "", "Compile this one and print its JSON.")
_ONLY = flags.DEFINE_string("only", "", "Only cells whose name contains this.")
_LIMIT = flags.DEFINE_integer("limit", 2400, "Seconds that a cell may take.")
_TABLE = flags.DEFINE_bool("table", False, "Print the table of what is in the file.")
_TEXTS = flags.DEFINE_string("texts", "", "A folder for the compiled programs' HLO.")

RESULTS = Path(__file__).with_suffix(".json")


def list_cells() -> list[Cell]:
    """Returns all cells, those that are compiled quickly first."""
    here = [
        *(("padim_update", 32), ("padim_finish", 32), ("features", 32)),
        *(("predict", 1), ("predict", 8), ("predict", 64)),
        *(("train", 32), ("sweep", 8)),
    ]
    elsewhere = [
        *(("v5e:1x1", 2), ("v5e:1x1", 8), ("v5e:1x1", 32), ("v5e:4x4", 128)),
        *(("v4:2x2x1", 32), ("v5p:2x2x1", 32), ("v5e:16x16", 2048)),
    ]
    return [
        *(Cell(s, program, "v5e:2x2", n) for s in SYSTEMS for program, n in here),
        *(Cell("published", "train", *where) for where in elsewhere),
        Cell("published", "train_sharded", "v5e:2x2", 32),
    ]


def main(argv: list[str]) -> None:
    """Compiles one cell here, or all that are missing, each in its own process."""
    del argv
    known = {cell.name: cell for cell in list_cells()}
    if _CELL.value:
        print(json.dumps(compile_cell(known[_CELL.value])))
        return
    if _TABLE.value:
        print(make_table(read_results()))
        return
    for name in known:
        if _ONLY.value in name and name not in read_results():
            new = {name: run_cell(known[name])}
            RESULTS.write_text(json.dumps(read_results() | new, indent=1) + "\n")
            print(new, flush=True)


def read_results() -> dict[str, Any]:
    """Returns what has been found so far, by the cells' names."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def run_cell(cell: Cell) -> dict[str, Any]:
    """Compiles a cell in a process of its own, and returns what it says."""
    chip = cell.chip
    place = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU to share
        "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-{cell.count * chip.cores}",
    }
    command = [sys.executable, __file__, f"--cell={cell.name}"]
    if _TEXTS.value:
        command.append(f"--texts={_TEXTS.value}")
    return cells.run_cell(["nice", "-n", "19", *command], place, _LIMIT.value)


def compile_cell(cell: Cell) -> dict[str, Any]:
    """Lowers and compiles a cell's program; returns numbers a chip."""
    import jax
    from jax.experimental import topologies

    # By default a host has four chips.
    host = {"chips_per_host_bounds": (1, 1, 1)} if cell.count == 1 else {}
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name=cell.topology, **host
    ).devices
    function, arguments = PROGRAMS[cell.program](cell, list(chips))
    started = time.perf_counter()
    lowered = function.lower(*arguments)
    between, worked = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    ended, worked = time.perf_counter(), time.process_time() - worked
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if _TEXTS.value:
        Path(_TEXTS.value, f"{cell.name}.txt").write_text(text)
    cost = compiled.cost_analysis()
    return {
        "jax": jax.__version__,
        "lower_seconds": round(between - started, 1),
        "compile_seconds": round(ended - between, 1),
        "compile_cpu_seconds": round(worked, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": cost["flops"],
        "traffic_bytes": cost["bytes accessed"],
        **read_text(text),
    }


BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(-done)?\(.*?channel_id=(\d+)"
)


def read_text(text: str) -> dict[str, Any]:
    """Returns what the compiled program moves and multiplies, and its cycles.

    A collective that overlaps with others is in several computations, and counts once.
    Copies are those outside of fusions. The cycles are the compiler's estimate, summed
    over the operations that have one.
    """
    types = dict(re.findall(r"^ *(?:ROOT )?(%\S+) = (\S+)", text, re.M))
    collectives: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    products: collections.Counter[str] = collections.Counter()
    copied = cycles = 0
    is_fused, channels = False, set()
    for line in text.splitlines():
        if line.endswith("{"):
            is_fused = "fused_computation" in line.partition("(")[0]
        if match := COLLECTIVE.search(line):
            entry, is_new = collectives[match[2]], match[4] not in channels
            channels.add(match[4])
            entry[0] += is_new
            entry[1] += is_new * count_bytes(match[1])
        elif match := re.search(r" (?:convolution|dot)\((%\S+?), (%\S+?)\)", line):
            kinds = {types[name].partition("[")[0] for name in match.groups()}
            products["+".join(sorted(kinds))] += 1
        elif match := re.search(r"= (\S+) (?:copy|transpose)\(", line):
            copied += 0 if is_fused else count_bytes(match[1])
        if match := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles += int(match[1])
    return {
        "collectives": {
            name: {"count": count, "bytes": size}
            for name, (count, size) in collectives.items()
        },
        "copied_bytes": copied,
        "products": dict(products),
        "estimated_cycles": cycles,
    }


def count_bytes(text: str) -> int:
    """Returns the bytes of all arrays in a type, such as "(f32[2,3], s32[])"."""
    total = 0
    for kind, shape in ARRAY.findall(text):
        bits = BITS.get(kind) or int(kind[1:])
        total += bits * math.prod(int(n) for n in shape.split(",") if n) // 8
    return total


def bound(cell: Cell, found: dict[str, Any]) -> dict[str, float]:
    """Returns the least seconds of one call by what bounds them.

    "compute" is the program's FLOPs by the peak in bfloat16, "memory" its traffic by
    the memory's bandwidth (Williams et al., "Roofline", CACM 2009), and "links" the
    bytes of its collectives by the links'. Of those of an all-reduce, a ring sends
    2 (n - 1) / n, of others half of that.
    """
    chip, n = cell.chip, cell.count
    sent = sum(
        entry["bytes"] * (2 if name == "all-reduce" else 1)
        for name, entry in found["collectives"].items()
    )
    return {
        "compute": found["flops"] / chip.flops,
        "memory": found["traffic_bytes"] / chip.bandwidth,
        "links": (n - 1) / n * sent / chip.links,
    }


def make_table(found: dict[str, Any]) -> str:
    """Returns a Markdown table of all cells in the file."""
    lines = [
        "| system, program | chips | batch | compiles in | memory a chip | GFLOP | GB "
        "moved | collectives | at least |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in list_cells():
        if cell.name not in found:
            continue
        got = found[cell.name]
        head = f"| {cell.system}, {cell.program} | {cell.topology} | {cell.batch} | "
        if "error" in got:
            lines.append(f"{head}{got['error'].replace('|', '/')} | | | | | |")
            continue
        least = bound(cell, got)
        by = max(least, key=least.get)
        used = got["argument_bytes"] + got["temporary_bytes"] + got["output_bytes"]
        used -= got["donated_bytes"]
        reduced = sum(entry["bytes"] for entry in got["collectives"].values())
        lines.append(
            f"{head}{got['lower_seconds'] + got['compile_seconds']:.0f} s | "
            f"{used / 1e9:.2f} of {cell.chip.memory / 1e9:.0f} GB | "
            f"{got['flops'] / 1e9:.0f} | {got['traffic_bytes'] / 1e9:.2f} | "
            f"{reduced / 1e6:.1f} MB | {1e3 * least[by]:.2f} ms ({by}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
