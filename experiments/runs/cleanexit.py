"""Stopping at the end of a step instead of in the middle of one."""

from __future__ import annotations

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Catches SIGTERM and the first SIGINT while its `with` block runs.

    A scheduler sends SIGTERM some seconds before it kills; Ctrl-C sends SIGINT. Either only sets
    `requested`, so that the training loop can save and leave; a second Ctrl-C raises
    KeyboardInterrupt at once, for the user who will not wait. Only the main thread of a process may
    enter the block. The former handlers are put back at its end.

    Of several processes all must leave after the same step, whichever of them was told to. JAX has a service for that,
    which catches SIGTERM itself, so there SIGTERM is left to it, and SIGINT is handed on as SIGTERM. Of maintenance and
    preemption, too, it learns by SIGTERM, which Slurm and Kubernetes send, a VM that shuts down, and `maintenance`.

    Attributes:
      requested: the name of the first signal that came ("SIGTERM" or "SIGINT"), else None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupted = False
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        several = jax.process_count() > 1
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._former.clear()

    def reached(self, step: int) -> bool:
        """Whether to leave after this step: the same on every process, each of which asks after every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.requested = self.requested or signal.SIGTERM.name
        return self.requested is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
                return
        self.requested = self.requested or signal.Signals(number).name
