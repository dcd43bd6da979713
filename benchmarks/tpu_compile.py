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
import dataclasses
import functools
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

_CELL = flags.DEFINE_string("cell", "", "Compile this one and print its JSON.")
_ONLY = flags.DEFINE_string("only", "", "Only cells whose name contains this.")
_LIMIT = flags.DEFINE_integer("limit", 2400, "Seconds that a cell may take.")
_TABLE = flags.DEFINE_bool("table", False, "Print the table of what is in the file.")
_TEXTS = flags.DEFINE_string("texts", "", "A folder for the compiled programs' HLO.")

RESULTS = Path(__file__).with_suffix(".json")
SYSTEMS = {"small": "configs.small", "published": "configs.default"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as Google publishes it (docs.cloud.google.com/tpu/docs/v5e, v5p and v4).

    Attributes:
        flops: peak in bfloat16, per second.
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        links: to other chips, bytes per second, all together.
        accelerator: prefix of the accelerator type.
        cores: that the accelerator type counts per chip.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    accelerator: str
    cores: int


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, "v5litepod", 1),
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, "v4", 2),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, "v5p", 2),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A program to compile.

    Attributes:
        system: one of `SYSTEMS`.
        program: one of `PROGRAMS`.
        topology: chips to compile for, such as "v5e:2x2".
        batch: number of images; in a sweep that of each member.
    """

    system: str
    program: str
    topology: str
    batch: int

    @property
    def name(self) -> str:
        """The cell's key in the file."""
        return f"{self.system}, {self.program}, {self.topology}, {self.batch}"

    @property
    def chip(self) -> Chip:
        """The kind of its chips."""
        return CHIPS[self.topology.partition(":")[0]]

    @property
    def count(self) -> int:
        """Number of its chips."""
        return math.prod(map(int, self.topology.partition(":")[2].split("x")))


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


def make_setup(cell: Cell) -> tuple[Any, Any]:
    """Returns the resolved config of a cell in bfloat16, and its `setup.Setup`."""
    import importlib

    from ulsad_jax.runs import config as config_lib
    from ulsad_jax.runs import setup

    config = importlib.import_module(SYSTEMS[cell.system]).get_config()
    config.train.dtype, config.train.batch_size = "bfloat16", cell.batch
    if cell.program.startswith("padim"):
        config.method = "padim"
    config = config_lib.resolve(config)
    return config, setup.make(config)


def place(tree: Any, chips: list[Any], axis: str, *, split: bool) -> Any:
    """Returns shapes with a sharding: split along the first axis, or whole."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(chips), (axis,))
    sharding = NamedSharding(mesh, PartitionSpec(axis) if split else PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def get_shapes(cell: Cell, made: Any) -> tuple[Any, Any, Any]:
    """Returns shapes of a state, a batch and a random key."""
    import jax

    spec, key = made.spec(cell.batch, 209), jax.eval_shape(jax.random.key, 0)
    return (
        jax.eval_shape(functools.partial(made.method.init, spec=spec), key),
        spec.batch,
        key,
    )


def make_training(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the training step, and its arguments' shapes."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from ulsad_jax.runs import steps
    from ulsad_jax.runtime.devices import DATA, Devices

    _, made = make_setup(cell)
    state, batch, key = get_shapes(cell, made)
    shards_state = cell.program == "train_sharded"
    devices = Devices(Mesh(np.array(chips), (DATA,)), shards_state)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(state, devices.choose_places(state)),
    )
    step = steps.make_train_step(made.method, devices, "jit")
    whole = functools.partial(place, chips=chips, axis=DATA, split=False)
    return step, (state, place(batch, chips, DATA, split=True), whole(key))


def make_finish(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns PaDiM's `finish`, and its argument's shapes."""
    import jax

    from ulsad_jax.runtime.devices import DATA

    _, made = make_setup(cell)
    state, _, _ = get_shapes(cell, made)
    return jax.jit(made.method.finish), (place(state, chips, DATA, split=False),)


def make_features(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the trunk, and its arguments' shapes."""
    import jax

    from ulsad_jax.runtime.devices import DATA
    from ulsad_jax.trunks import features

    _, made = make_setup(cell)
    trunk, image = get_trunk(made, cell.batch)
    return jax.jit(functools.partial(features.apply, made.pyramid)), (
        place(trunk, chips, DATA, split=False),
        place(image, chips, DATA, split=True),
    )


def get_trunk(made: Any, batch: int) -> tuple[Any, Any]:
    """Returns shapes of the trunk's variables and of a batch of images."""
    import jax
    import numpy as np

    image = jax.ShapeDtypeStruct((batch, *made.input_size, 3), np.uint8)
    return jax.eval_shape(made.pyramid.init, jax.random.key(0), image), image


def make_inference(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the predict step over as many chips as divide the batch."""
    import jax
    import numpy as np

    from ulsad_jax.runtime.devices import DATA
    from ulsad_jax.scoring.calibration import Calibration
    from ulsad_jax.scoring.prediction import Weights, make_predict_step
    from ulsad_jax.scoring.thresholds import Thresholds
    from ulsad_jax.trunks.features import ChannelStatistics

    chips = chips[: math.gcd(len(chips), cell.batch)]
    config, made = make_setup(cell)
    trunk, image = get_trunk(made, cell.batch)
    state, batch, _ = get_shapes(cell, made)
    state = jax.eval_shape(made.method.finish, state)
    channels = np.zeros(batch.features.shape[-1], np.float32)
    whitening = np.zeros((len(channels),) * 2, np.float32) if made.whiten else None
    maps = jax.eval_shape(made.method.maps, state.model, batch)
    scale = dict.fromkeys(maps, np.float32(1))
    weights = Weights(
        trunk,
        ChannelStatistics(channels, channels, whitening),
        state.model,
        Calibration(scale, scale),
        Thresholds(),
    )
    weights = jax.tree.map(
        lambda x: x if hasattr(x, "shape") else np.float32(x), weights
    )
    step = make_predict_step(
        made.pyramid, made.method, top_share=config.score.top_share, keep_maps=True
    )
    return step, (
        place(weights, chips, DATA, split=False),
        place(image, chips, DATA, split=True),
    )


def make_sweep(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the training step of a wave of eight members."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from ulsad_jax.sweep import wave

    config, made = make_setup(cell)
    numbers = wave.take_numbers(config, ["optimizer.learning_rate"])
    one = numbers, *get_shapes(cell, made)
    all_ = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype), one)
    step = wave.vectorize(
        wave.make_update(made.method), Mesh(np.array(chips), (wave.MEMBER,))
    )
    return step, place(all_, chips, wave.MEMBER, split=True)


PROGRAMS = {
    "train": make_training,
    "train_sharded": make_training,
    "predict": make_inference,
    "features": make_features,
    "sweep": make_sweep,
    "padim_update": make_training,
    "padim_finish": make_finish,
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
