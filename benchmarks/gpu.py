"""Measures this package on a GPU beside PyTorch, and prints the targets beside that.

    pip install torch
    python benchmarks/gpu.py --output=gpu.json              # what is not in it yet
    python benchmarks/gpu.py --output=gpu.json --only=ours  # some of that
    python benchmarks/gpu.py --output=tiny.json --tiny      # does it run? On CPUs, too

Every cell (a library, a computation type, a batch) has a process of its own, one after
the other, and its entry in the file as soon as it is done, so that the program may be
stopped and started again at any time. That both libraries compute the same is checked
by `speed.py`; their weights are random here.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cells

_OUTPUT = flags.DEFINE_string("output", "gpu.json", "The JSON file of all cells.")
_ONLY = flags.DEFINE_string("only", "", "Only cells whose name contains this.")
_TINY = flags.DEFINE_bool("tiny", False, "Small sizes, to see whether it runs.")
_LIMIT = flags.DEFINE_integer("limit", 600, "Seconds that a cell may take.")
_CELL = flags.DEFINE_string("cell", "", "Measure this one and print its JSON.")

OURS, EAGER, COMPILED, TRAIN = "ours", "eager", "compiled", "train.py"
DTYPES = ("tfloat32", "bfloat16")
LITE = "small"  # the config with Lite0's features; PyTorch's side has none of it
ROUNDS = 5  # of each measurement, whose median counts
KERNELS = 12  # the slowest ones that are kept
BATCHES = (1, 8, 64)
REPOSITORY = Path(__file__).resolve().parent.parent
# Beside each row of the table.
TARGETS = {
    "step 8": "0.5 of eager, 0.9 of compiled",
    "step 64": "0.5 of eager, 0.9 of compiled",
    "predict 1": "3 ms",
    "stream 64": "5,000 images/s, 12.8 ms",
    "train.py": "30 s after compilation",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one process measures.

    Attributes:
        side: one of `OURS`, `EAGER`, `COMPILED` and `TRAIN`.
        dtype: one of `DTYPES`; float32's products are TF32, as in `train.py`.
        batch: number of images of a training step; 0 for inference alone.
        system: module of `configs`.
    """

    side: str
    dtype: str
    batch: int = 0
    system: str = "default"

    @property
    def name(self) -> str:
        """The cell's key in the file."""
        return f"{self.side}, {self.dtype}, {self.system}, {self.batch}"


def list_cells() -> list[Cell]:
    """Returns all cells."""
    sides = [
        Cell(side, dtype, batch)
        for dtype in DTYPES
        for batch in BATCHES[1:]
        for side in (OURS, EAGER, COMPILED)
    ]
    lite = [Cell(OURS, dtype, system=LITE) for dtype in DTYPES]
    return [*sides, *lite, *(Cell(TRAIN, dtype) for dtype in DTYPES)]


def main(argv: list[str]) -> None:
    """Measures one cell here, or all that are missing, each in its own process."""
    del argv
    known = {cell.name: cell for cell in list_cells()}
    if _CELL.value:
        cell = known[_CELL.value]
        print(json.dumps(fit(cell) if cell.side == TRAIN else measure(cell)))
        return
    output = Path(_OUTPUT.value)
    found = json.loads(output.read_text()) if output.exists() else {}
    for name in known:
        if _ONLY.value in name and name not in found:
            found[name] = run_cell(name)
            output.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: {found[name].get('error', 'measured')}", file=sys.stderr)
    print("\n".join(make_table(found) + list_kernels(found)))


def run_cell(name: str) -> dict[str, Any]:
    """Measures a cell in a process of its own, and returns what it says."""
    command = [sys.executable, __file__, f"--cell={name}", f"--tiny={_TINY.value}"]
    # Else JAX takes most of the memory at once, and its peak says nothing.
    alone = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if _TINY.value:  # quick to compile
        alone["XLA_FLAGS"] = "--xla_backend_optimization_level=1"
    started = time.perf_counter()
    found = cells.run_cell(command, alone, _LIMIT.value)
    if "error" in found:
        return found
    return found | {"process_seconds": round(time.perf_counter() - started, 1)}


def measure(cell: Cell) -> dict[str, Any]:
    """Returns milliseconds of steps and inference, peaks of memory, and kernels."""
    from benchmarks import speed_sides

    kind = speed_sides.JaxSide if cell.side == OURS else speed_sides.TorchSide
    scale = 16 if _TINY.value else 1
    worker = kind(
        size=64 if _TINY.value else 256,
        batch=max(cell.batch // scale, 2),
        dtype=cell.dtype,
        training_layout="channels_last",
        compiled=cell.side == COMPILED,
        system=cell.system,
    )
    profile = profile_jax if cell.side == OURS else profile_torch
    count = 2 if _TINY.value else 20
    found: dict[str, Any] = {"versions": worker.versions}
    if cell.batch:
        key = f"step {cell.batch}"
        found |= {key: time_each(lambda: worker.steps(count) / count)}
        found |= {f"{key} peak bytes": worker.peak_memory()}
        found |= {f"{key} kernels": profile(lambda: worker.steps(3), 3)}
    # The others are measured in another cell.
    batches = {0: BATCHES, 8: BATCHES[:2], 64: BATCHES[2:]}[cell.batch]
    for batch in batches:
        size = max(batch // scale, 1)
        key = f"predict {batch}"
        found |= {key: time_each(lambda size=size: worker.predict(size))}
        many = time_each(lambda size=size: worker.stream(size, count) / count)
        found |= {f"stream {batch}": many}
        found |= {f"{key} peak bytes": worker.peak_memory()}
        found |= {f"{key} kernels": profile(lambda size=size: worker.predict(size), 1)}
    return found


def time_each(job: Callable[[], float]) -> float:
    """Returns the median milliseconds of a job that says its seconds."""
    job(), job()  # the first calls compile
    rounds = 1 if _TINY.value else ROUNDS
    return 1e3 * statistics.median(job() for _ in range(rounds))


def profile_jax(job: Callable[[], Any], calls: int) -> list[list[Any]]:
    """Returns the slowest kernels of a job as [name, milliseconds a call, count].

    Names end in numbers that tell instances apart; those are added up.
    """
    import jax

    times: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            job()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = [*jax.profiler.ProfileData.from_file(str(path)).planes]
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in on_gpu or planes:
        for line in plane.lines:
            # On a GPU the kernels are in the streams' lines, on a CPU in those of
            # XLA's threads, beside Python's.
            if line.name.startswith("Stream" if on_gpu else "tf_XLA"):
                for event in line.events:
                    times[event.name.rstrip("0123456789.")].append(event.duration_ns)
    return sort_kernels(times, calls)


def profile_torch(job: Callable[[], Any], calls: int) -> list[list[Any]]:
    """Returns the slowest kernels of a job, see `profile_jax`."""
    from torch import profiler

    kinds = [*profiler.supported_activities()]
    with profiler.profile(activities=kinds) as traced:
        job()
    events = traced.key_averages()
    on_gpu = any(event.self_device_time_total for event in events)
    times = {
        event.key: [
            1e3
            * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        ]
        + [0.0] * (event.count - 1)
        for event in events
    }
    return sort_kernels(times, calls)


def sort_kernels(times: dict[str, list[float]], calls: int) -> list[list[Any]]:
    """Returns the slowest kernels from the nanoseconds of each of their runs."""
    rows = [
        [name[:120], round(sum(all_) / 1e6 / calls, 4), len(all_) // calls]
        for name, all_ in times.items()
    ]
    return sorted(rows, key=lambda row: -row[1])[:KERNELS]


def fit(cell: Cell) -> dict[str, Any]:
    """Returns the seconds of `train.py` on 209 images, its programs compiled before.

    The first run draws the images and compiles, the second is another seed's.
    """
    images, epochs, size = (12, 2, 64) if _TINY.value else (209, 200, 256)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed, title in enumerate(("first", "compiled before")):
            fields = {
                "dataset.name": "synthetic",
                "dataset.root": f"{folder}/images",
                "dataset.cache_dir": f"{folder}/cache",
                "dataset.synthetic.train": images,
                "trunk.source": "random",
                "image_size": f"({size}, {size})",
                "train.dtype": cell.dtype.replace("tfloat32", "float32"),
                "train.num_epochs": epochs,
                "train.checkpoint_every": epochs,
                "seed": seed,
            }
            if _TINY.value:
                fields |= {"trunk.architecture": "resnet18", "model.local_width": 8}
            workdir = Path(folder) / title
            started = time.perf_counter()
            subprocess.run(
                [
                    *(sys.executable, "train.py", "--config=configs/default.py:panel"),
                    f"--workdir={workdir}",
                    *(f"--config.{name}={value}" for name, value in fields.items()),
                ],
                cwd=REPOSITORY,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            stages = json.loads((workdir / "panel" / "stages.json").read_text())
            found |= {
                f"{title}, whole": time.perf_counter() - started,
                f"{title}, training": stages["training"]["seconds"],
                f"{title}, peak bytes": stages["training"]["device_peak_bytes"],
            }
    return found


def make_table(found: dict[str, Any]) -> list[str]:
    """Returns a Markdown table: milliseconds, ratios, peaks of memory and targets."""
    lines = [
        "| what | type | ours, ms | eager | compiled | of eager | of compiled "
        "| peak, GB (ours, eager, compiled) | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype in DTYPES:
        jobs = [(8, "step 8"), (64, "step 64")]
        jobs += [(64 if n == 64 else 8, f"predict {n}") for n in BATCHES]
        jobs += [(64 if n == 64 else 8, f"stream {n}") for n in BATCHES]
        jobs += [(0, f"{kind} {n}") for kind in ("predict", "stream") for n in BATCHES]
        lines += [make_row(found, dtype, *job) for job in jobs]
        seconds = found.get(Cell(TRAIN, dtype).name, {})
        for kind in ("whole", "training"):
            told = [seconds.get(f"{t}, {kind}") for t in ("compiled before", "first")]
            told = [f"{x:.1f} s" if x else seconds.get("error", "") for x in told]
            lines.append(
                f"| 200 epochs of 209 images, {kind} | {dtype} | {told[0]} (compiling: "
                f"{told[1]}) | | | | | | {TARGETS[TRAIN]} |"
            )
    return lines


def make_row(found: dict[str, Any], dtype: str, batch: int, job: str) -> str:
    """Returns a row of the table for a job of three sides, or of Lite0's."""
    system = "default" if batch else LITE
    names = [Cell(s, dtype, batch, system).name for s in (OURS, EAGER, COMPILED)]
    got = [found.get(name, {}) for name in names]
    times = [cell.get(job) for cell in got]
    peaks = [cell.get(f"{job.replace('stream', 'predict')} peak bytes") for cell in got]
    told = [
        f"{t:.2f}" if t else c.get("error", "") for t, c in zip(times, got, strict=True)
    ]
    ratios = [f"{times[0] / t:.2f}" if t and times[0] else "" for t in times[1:]]
    memory = ", ".join(f"{p / 1e9:.1f}" if p else "-" for p in peaks)
    title = job + (", Lite0" if system == LITE else "")
    cells = [title, dtype, *told, *ratios, memory, TARGETS.get(job, "")]
    return f"| {' | '.join(str(x).replace('|', '/') for x in cells)} |"


def list_kernels(found: dict[str, Any]) -> list[str]:
    """Returns the slowest kernels of every cell, a line each."""
    lines = []
    for name, cell in found.items():
        for job, kernels in cell.items():
            if job.endswith("kernels"):
                lines.append(f"\n{name}: {job}, ms a call and count")
                lines += [f"  {ms:9.3f} {count:5d}  {k}" for k, ms, count in kernels]
    return lines


if __name__ == "__main__":
    app.run(main)
