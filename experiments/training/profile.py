"""A profiler trace of some steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Trace:
    """Traces those steps from first to last that this start of the run takes.

    A context: a trace that is going on when it ends is written as it is.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, tell: Callable[[], None]):
        """Starts nothing yet.

        Args:
          steps: first and last step, counted from 1; None traces none.
          directory: of the trace.
          tell: called when the trace is there.
        """
        self._steps = range(0) if steps is None else range(steps[0], steps[1] + 1)
        self._directory = directory
        self._tell = tell
        self._running = False

    def before(self, step: int) -> None:
        """Call it before every step."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Call it after every step, with what the step computes."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        self._tell()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._running:
            self._stop()
