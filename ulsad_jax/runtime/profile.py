"""Writes a trace of some training steps, for XProf or TensorBoard's profiler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax


class Profile:
    """A trace of the steps from `first` to before `end`, written to a folder.

    It ends with the block that it is entered for, if that comes first.
    """

    def __init__(self, steps: Sequence[int], folder: Path):
        """Takes the steps.

        Args:
            steps: (first, end), numbers of updates before the first step that is traced
                and after the last one; empty for no trace.
            folder: folder to write `plugins/profile/<time>/` to.
        """
        self._steps = range(*steps or (0,))
        self._folder = folder
        self._is_running = False

    def step(self, number: int, state: Any) -> jax.profiler.StepTraceAnnotation:
        """Returns the context of a step; starts or ends the trace before it.

        Args:
            number: number of updates before the step.
            state: tree of arrays that the step before computes.
        """
        if number in self._steps and not self._is_running:
            jax.profiler.start_trace(str(self._folder))
            self._is_running = True
        elif self._is_running and number not in self._steps:
            jax.block_until_ready(state)
            self._end()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def __enter__(self) -> Profile:
        """Returns the profile."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the trace."""
        self._end()

    def _end(self) -> None:
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
