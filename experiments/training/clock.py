"""Where a run's time goes besides its steps: waiting for batches, and checkpoints."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Window(NamedTuple):
    """Some steps in a row, between two moments at which the device was waited for.

    Attributes:
      steps: how many.
      seconds: that they took.
      waited: of these, that the loop waited for batches; the device may have been busy meanwhile.
      writing: whether a checkpoint was being written when they began.
    """

    steps: int
    seconds: float
    waited: float
    writing: bool


class Clock:
    """Times the loop of one start of a run.

    Args:
      is_writing: says whether a checkpoint is being written in the background.
    """

    def __init__(self, is_writing: Callable[[], bool]):
        self._is_writing = is_writing
        self._windows: list[Window] = []
        self._seconds = self._stood = self._waited = 0.0

    def begin(self, done: int) -> None:
        """Begins a window after so many steps of the run."""
        self._done, self._waited, self._writing = done, 0.0, self._is_writing()
        self._began = time.perf_counter()

    def end(self, done: int, *, looked: bool) -> Window:
        """Ends the window, of which the device has been waited for.

        Args:
          done: steps of the run.
          looked: whether telemetry took a part of the time, so that its steps do not count as such.
        """
        seconds = time.perf_counter() - self._began
        window = Window(done - self._done, seconds, self._waited, self._writing)
        self._seconds += seconds
        if not looked:
            self._windows.append(window)
        return window

    def batches(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, the time that each is waited for being counted."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield item

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Counts the time inside as one in which the loop stood still for a checkpoint."""
        started = time.perf_counter()
        yield
        self._stood += time.perf_counter() - started

    @property
    def checkpoint_wait(self) -> float | None:
        """Share of the time of steps and checkpoints in which the loop stood still for these; None without steps."""
        return self._share(self._stood)

    @property
    def checkpoint_share(self) -> float | None:
        """The same, with what steps took longer than their median while a checkpoint was being written."""
        usual = [window.seconds / window.steps for window in self._windows if not window.writing]
        slowed = [window for window in self._windows if window.writing] if usual else []
        longer = sum(window.seconds - window.steps * statistics.median(usual) for window in slowed)
        return self._share(self._stood + longer)

    def _share(self, seconds: float) -> float | None:
        return seconds / (self._seconds + self._stood) if self._seconds else None
