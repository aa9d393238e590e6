"""Many drawings saved at once: a few here, more by a process for each core, since matplotlib uses one."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from experiments.plots.drawing import Drawing, style
from experiments.plots.plot import Plot
from experiments.plots.style import Venue

# To start the processes takes as long as to save so many.
_FEW = 12
_Saved = tuple[Plot, dict[str, bytes]]


def saved(drawings: Iterable[Drawing | str], venue: Venue) -> Iterator[_Saved | str]:
    """What `Drawing.saved` gives of each, in their order; sentences are handed on. Call it under the venue's style."""
    rest = iter(drawings)
    first = list(itertools.islice(rest, _FEW + 1))
    if len(first) <= _FEW:
        yield from (item if isinstance(item, str) else item.saved() for item in first)
        return
    # Not where it is imported by the processes, which need no JAX.
    from experiments.runs.environment import usable_cores

    # Not forked: a process with threads must not be.
    with ProcessPoolExecutor(usable_cores(), multiprocessing.get_context("spawn")) as pool:
        begun: list[Future[_Saved] | str] = [
            item if isinstance(item, str) else pool.submit(_save, item, venue) for item in itertools.chain(first, rest)
        ]
        yield from (item if isinstance(item, str) else item.result() for item in begun)


def _save(drawing: Drawing, venue: Venue) -> _Saved:
    with style(venue):
        return drawing.saved()
