"""Stopping at the end of a step instead of in the middle of one."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Catches SIGTERM and the first SIGINT while its `with` block runs.

    A scheduler sends SIGTERM some seconds before it kills; Ctrl-C sends SIGINT. Either only sets
    `requested`, so that the training loop can save and leave; a second Ctrl-C raises
    KeyboardInterrupt at once, for the user who will not wait. Only the main thread of a process may
    enter the block. The former handlers are put back at its end.

    Attributes:
      requested: the name of the first signal that came ("SIGTERM" or "SIGINT"), else None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupted = False
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.requested = self.requested or signal.Signals(number).name
