"""What compiling takes: programs kept for the next start, and quick random draws."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax


def keep(cache_dir: str) -> None:
    """Keeps compiled programs in a folder, unless JAX is told of one already.

    The next start reads them, so that compiling takes a second or two in place of a
    minute. Where the folder cannot be written, it compiles every time.

    Args:
        cache_dir: where prepared data sets are, too (`config.dataset.cache_dir`).
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = Path(cache_dir).expanduser() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Also what compiles in less than JAX's second: there is much of it.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def draw_by_kernel() -> None:
    """Random draws on GPUs are calls of JAX's own kernel, which gives the same numbers.

    Otherwise XLA compiles every draw: the networks' initial weights in 12 s rather than
    1 s on an H200.
    """
    with contextlib.suppress(AttributeError):  # a JAX that knows no other way
        jax.config.update("jax_threefry_gpu_kernel_lowering", True)


def run_once() -> dict[str, int]:
    """`compiler_options` for a function that is called once, such as random weights.

    XLA's CPU compiler takes four times as long to optimise many random draws as to
    compile them plainly, and the numbers are the same.
    """
    cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": 1} if cpu else {}
