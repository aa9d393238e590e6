"""Contenders built, audited and timed at one piece of work."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from tqdm import tqdm

from experiments.benchmarks.results import Measurement, Program
from experiments.benchmarks.timing import calls_for, in_turns


class Entrant(Protocol):
    """A contender that is ready to run.

    Attributes:
      program: what it was compiled to.
      losses: of the calls so far; empty where there is no loss.
    """

    program: Program
    losses: list[jax.Array]

    def __call__(self) -> Any:
        """Does the work once; returns arrays, which need not be ready."""


def contest(
    work: str,
    sizes: Mapping[str, int],
    flops: float,
    builders: Mapping[str, Callable[[], Entrant]],
    reference: str,
    rounds: int,
    *,
    devices: int = 1,
    repeats: bool = False,
) -> Measurement:
    """Times the contenders in turns.

    Args:
      work, sizes, flops, reference, devices: as in `Measurement`.
      builders: of the contenders; one that raises is left out, and reported.
      rounds: timed ones.
      repeats: whether a sample is as many calls in a row as make it long enough.

    Raises:
      ValueError: the reference does not run.
    """
    entrants: dict[str, Entrant] = {}
    failures: dict[str, str] = {}
    for name, build in tqdm(builders.items(), work, leave=False, disable=None):
        try:
            entrant = build()
            jax.block_until_ready(entrant())
            entrants[name] = entrant
        # Whatever another library raises about a device or a shape is news to report, not the end of the others.
        except Exception as error:
            reason, *_ = str(error).strip().splitlines() or [""]
            failures[name] = f"{type(error).__name__}: {reason}"
    if reference not in entrants:
        raise ValueError(f"{reference}, which all are compared with, does not run here ({failures[reference]}).")
    calls = calls_for(entrants[reference]) if repeats else 1
    for entrant in entrants.values():
        entrant.losses.clear()
    seconds = in_turns(entrants, rounds, calls)
    # Without those of the round that is not counted.
    losses = {name: [_finite(loss) for loss in e.losses[1:]] for name, e in entrants.items() if e.losses}
    programs = {name: entrant.program for name, entrant in entrants.items()}
    return Measurement(work, dict(sizes), flops, reference, programs, failures, seconds, losses, calls, devices)


def _finite(loss: jax.Array) -> float | None:
    value = float(loss)
    return value if math.isfinite(value) else None
