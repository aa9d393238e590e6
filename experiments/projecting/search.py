"""The largest batch that fits, under each way to rematerialize."""

import dataclasses
from collections.abc import Callable, Iterator

from experiments.projecting.projection import Projection

# From the least that is computed again to the most: --remat, and --remat_keeps.
REMATS = ((False, "nothing"), (True, "products"), (True, "nothing"))
_GROWTH = 8


@dataclasses.dataclass(frozen=True)
class Fit:
    """The largest batch that fits.

    Attributes:
      remat: whether blocks are computed again.
      keeps: what of them is not.
      rows: of each part of the batch.
      projection: of the step.
    """

    remat: bool
    keeps: str
    rows: int
    projection: Projection

    @property
    def tokens_per_second(self) -> float:
        """Of one device, with nothing hidden."""
        return self.projection.tokens / self.projection.slowest


def search(attempt: Callable[[bool, str, int], Projection | None]) -> Iterator[Fit]:
    """For each way to rematerialize that lets one row fit, the most rows that do.

    Args:
      attempt: compiles a step, given `remat`, `keeps` and `rows`; None if the compiler finds no room for it.
    """
    for remat, keeps in REMATS:
        found = largest(lambda rows: attempt(remat, keeps, rows))  # noqa: B023
        if found is not None:
            yield Fit(remat, keeps, *found)


def largest(attempt: Callable[[int], Projection | None]) -> tuple[int, Projection] | None:
    """The most rows that fit, and their step; None if not even one does.

    Memory is nearly linear in the rows, so the next guess lies on the line through the last two that fit.
    """
    fitting: list[tuple[int, Projection]] = []
    least_too_many = None
    rows = 1
    while True:
        projection = attempt(rows)
        if projection is not None and projection.fits:
            fitting.append((rows, projection))
        else:
            least_too_many = rows
        most = fitting[-1][0] if fitting else 0
        if least_too_many == most + 1:
            return fitting[-1] if fitting else None
        rows = max(most + 1, min(_guess(fitting), (least_too_many or most * _GROWTH + 1) - 1))


def _guess(fitting: list[tuple[int, Projection]]) -> int:
    if len(fitting) < 2:
        return 2
    (fewer, before), (most, last) = fitting[-2:]
    each = max(1.0, (last.resident - before.resident) / (most - fewer))
    return most + int((last.available - last.resident) / each)
