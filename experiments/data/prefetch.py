"""Batches made ready on a background thread."""

import collections
import itertools
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Batch = TypeVar("Batch")


def prefetch(
    function_of_step: Callable[[int], Batch], start: int, stop: int, depth: int = 2
) -> Generator[Batch, None, None]:
    """Yields `function_of_step(step)` for `start <= step < stop`, up to `depth` steps ahead.

    An exception of the function is raised at its own step. Closing the generator, or leaving the
    loop that drives it, ends the thread after the call in progress.

    Raises:
        ValueError: `depth` is below 1.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth must be 1 or more, not {depth}.")
    return _prefetch(function_of_step, start, stop, depth)


def _prefetch(
    function_of_step: Callable[[int], Batch], start: int, stop: int, depth: int
) -> Generator[Batch, None, None]:
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        steps = iter(range(start, stop))
        pending = collections.deque(pool.submit(function_of_step, step) for step in itertools.islice(steps, depth))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(function_of_step, step) for step in itertools.islice(steps, 1))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
