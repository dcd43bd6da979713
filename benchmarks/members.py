"""How fast members of a sweep are trained at once: one line of JSON for each number.

    python benchmarks/members.py --config=configs/quickstart.py --members=1,2,4,8

Each line has the seconds of the first step, which compiles, peaks of memory so far
beside the estimate that waves are cut by, and updates of single members in a second.
Images and features are noise: no data set is read. On several devices (on a CPU with
XLA_FLAGS=--xla_force_host_platform_device_count=8, whose devices share the cores and
say nothing about speed) members are placed over them.
"""

import json
import sys
import time
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ulsad_jax import command_line

_CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py")
_MEMBERS = flags.DEFINE_list("members", ["1", "2", "4", "8"], "How many at once.")
_BACKEND = flags.DEFINE_string("backend", "", "As config.sweep.backend.")
_STEPS = flags.DEFINE_integer("steps", 5, "Timed, after one that is not.")


def main(argv: list[str]) -> None:
    """Measures every number of members, one after the other."""
    command_line.begin(argv)  # as train.py does: it changes how memory is kept
    for count in map(int, _MEMBERS.value):
        print(json.dumps(measure(_CONFIG.value, count, _STEPS.value)), flush=True)


def measure(config, count: int, steps: int) -> dict[str, float]:
    """Compiles the update of so many members, and takes steps."""
    import jax
    import numpy as np

    from ulsad_jax.methods.base import Batch
    from ulsad_jax.runs import config as config_lib
    from ulsad_jax.runs import setup
    from ulsad_jax.runs.steps import make_init
    from ulsad_jax.runtime import stages
    from ulsad_jax.sweep import wave

    config = config_lib.resolve(config)
    made, key = setup.make(config), jax.random.key(0)
    spec = made.spec(config.train.batch_size)
    rng = np.random.default_rng(0)
    batch = Batch(
        image=rng.integers(0, 256, spec.batch.image.shape, np.uint8),
        features=rng.normal(size=spec.batch.features.shape).astype(np.float32),
        valid=np.ones(spec.batch.valid.shape, bool),
    )
    state = jax.device_get(make_init(made.method, spec)(key))
    numbers = wave.take_numbers(config, ["optimizer.learning_rate"])
    program = wave.choose_backend(_BACKEND.value)(
        wave.make_update(made.method),
        [state] * count,
        [numbers] * count,
        [key] * count,
    )
    batches = [batch] * count
    started = time.perf_counter()
    jax.block_until_ready((program.step(batches), program.state(0)))
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        losses_ = program.step(batches)
    jax.block_until_ready((losses_, program.state(0)))
    seconds = (time.perf_counter() - started) / steps
    device = jax.devices()[0]
    return {
        "members": count,
        "devices": jax.device_count(),
        "device": device.device_kind,
        "backend": type(program).__name__,
        "first_step_seconds": round(first, 2),
        "estimated_bytes_a_member": made.method.estimate_bytes(spec),
        "process_peak_bytes": stages.peak_bytes(),
        "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "seconds_per_step": round(seconds, 4),
        "member_steps_per_second": round(count / seconds, 3),
    }


if __name__ == "__main__":
    app.run(main)
