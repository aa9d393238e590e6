"""Contenders timed in turns: drift of a shared machine meets all alike, and what counts is the ratio within a round."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

# Shorter than this, a sample says more about the clock and the operating system than about the device.
_LEAST_SECONDS = 5e-3
_MOST_CALLS = 100


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
    return Spread(float(low), float(middle), float(high))


def timed(run: Callable[[], Any], calls: int = 1) -> float:
    """Wall-clock seconds of one of `calls` calls in a row, the last one's arrays being waited for."""
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def calls_for(run: Callable[[], Any]) -> int:
    """How many calls in a row make a sample that is long enough."""
    return min(max(math.ceil(_LEAST_SECONDS / timed(run)), 1), _MOST_CALLS)


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of each run by round; each round begins with another one, and a first round is not counted."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            seconds[name].append(timed(runs[name], calls))
    return {name: found[1:] for name, found in seconds.items()}
