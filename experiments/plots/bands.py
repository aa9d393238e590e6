"""What curves are drawn from: means over seeds with their confidence band, and fewer points where there are many."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike

from experiments.comparing.statistics import t_interval

CONFIDENCE = 0.95
# More than a column has pixels at 300 dpi.
_MOST_POINTS = 2000
_THINNED = "the least and the largest of each stretch of equal length"


def drawn(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which points of a mean over seeds to draw, as `thinned` says, and its `band` there.

    Args:
      values: float64 [seeds, points].
    """
    kept = thinned(np.mean(values, axis=0))
    return kept, *band(np.take(values, kept, axis=1))


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds and Student's confidence interval of it, at each point on its own.

    Args:
      values: float64 [seeds, points].

    Returns:
      Mean, lower and upper end, float64 [points]; of a single seed the ends are NaN.
    """
    return np.mean(values, axis=0), *t_interval(values.T, CONFIDENCE)


def thinned(values: np.ndarray, most: int = _MOST_POINTS) -> np.ndarray:
    """Indices of the points to draw, ascending: all, or the least and the largest of each stretch of equal length.

    Args:
      values: finite [points].
      most: about how many to draw.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    edges = np.linspace(0, count, most // 2 + 1).astype(np.int64)
    stretches = [(start, values[start:end]) for start, end in itertools.pairwise(edges)]
    extremes = [start + find(stretch) for start, stretch in stretches for find in (np.argmin, np.argmax)]
    return np.unique([0, *extremes, count - 1])


def thinning(points: int, kept: int) -> dict[str, str]:
    """What numbers that `thinned` has chosen say beside themselves: nothing if they are all there are."""
    return {"drawn": f"of {points} points {_THINNED}"} if kept < points else {}


def on_thinning(points: int) -> str:
    """A sentence for the caption of curves of which one has so many points; none if all are drawn."""
    return f" Of the {points:,} points of a curve, {_THINNED} are drawn." if points > _MOST_POINTS else ""


def limits(centers: ArrayLike, ends: ArrayLike, least: float = 0.0) -> tuple[float, float]:
    """Ends of an axis that show all centers, and as much of their intervals as leaves the centers apart.

    The interval of two seeds is so wide that nothing else could be seen.

    Args:
      centers: means, and whatever is to be seen; NaN is left out of both.
      ends: of the intervals.
      least: what the centers are taken to span at least.
    """
    centers, ends = np.ravel(centers), np.ravel(ends)
    low, high = np.nanmin(centers), np.nanmax(centers)
    span = max(high - low, least)
    low, high = max(np.nanmin([low, *ends]), low - span), min(np.nanmax([high, *ends]), high + span)
    room = 0.05 * (high - low) or 0.05
    return float(low - room), float(high + room)
