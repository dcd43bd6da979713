"""Reduces compile time: caches programs, and draws random numbers quickly."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax


def keep(cache_dir: str) -> None:
    """Keeps compiled programs in a folder, unless JAX has a compilation cache already.

    The next start reads them, so that compiling takes a second or two instead of a
    minute. If the folder cannot be written, programs are compiled at every start.

    Args:
        cache_dir: folder of prepared data sets (`config.dataset.cache_dir`); compiled
            programs go to its folder `xla`.
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
        # Also programs that compile in less than JAX's second: there are many.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def draw_by_kernel() -> None:
    """Makes GPUs draw random numbers with JAX's own kernel; the numbers stay the same.

    Otherwise XLA compiles every draw, and the networks' initial weights take 12 s
    instead of 1 s on an H200.
    """
    with contextlib.suppress(AttributeError):  # a JAX without the option
        jax.config.update("jax_threefry_gpu_kernel_lowering", True)


def run_once() -> dict[str, int]:
    """Returns `compiler_options` for a function that is called once.

    An example is the drawing of random weights. XLA's CPU compiler takes four times as
    long to optimise many random draws as to compile them without optimisation, and the
    numbers are the same.
    """
    cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": 1} if cpu else {}
