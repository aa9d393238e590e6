"""How sure a score is: intervals of confidence 0.95 for shares, means and perplexity.

References:
  Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
  Cochran, "Sampling Techniques", 1977, §6.4 (the variance of a ratio).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score with its interval.

    Attributes:
      value: the score.
      low, high: ends of the interval; `value` both where a single observation tells nothing of its spread.
      count: of how many observations.
    """

    value: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def text(self, digits: int = 4) -> str:
        """For a person."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def share(hits: int, count: int) -> Estimate:
    """A share, by Wilson's interval, which takes observations to be independent.

    Words of one sentence are not quite, so that the interval of a share of words is somewhat too narrow.

    Raises:
      ValueError: there are no observations.
    """
    if count < 1:
        raise ValueError("A share of nothing has no value: give a split that has examples.")
    interval = stats.binomtest(hits, count).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / count, float(interval.low), float(interval.high), count)


def mean(values: np.ndarray) -> Estimate:
    """A mean of values [n] from 0 to 1, by Student's t.

    Raises:
      ValueError: there are no values.
    """
    if len(values) < 1:
        raise ValueError("A mean of nothing has no value: give a split that has examples.")
    middle, half = float(np.mean(values)), 0.0
    if len(values) > 1:
        half = _quantile(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(middle, max(0.0, middle - half), min(1.0, middle + half), len(values))


def perplexity(nats: np.ndarray, pieces: np.ndarray) -> Estimate:
    """exp of the mean loss, which is one of pieces, with the interval that it has for being one of texts.

    Pieces of one text are not independent; texts, or windows of them, are taken to be. The interval is that of a ratio
    of sums over texts, by Student's t.

    Args:
      nats: float [texts], the summed loss of each.
      pieces: [texts], over how many it is, 1 or more.

    Returns:
      `value`, `low` and `high` are perplexities, and `count` is of texts.

    Raises:
      ValueError: there are no pieces, or a loss is not finite.
    """
    nats, pieces = np.asarray(nats, np.float64), np.asarray(pieces, np.float64)
    if not len(nats) or pieces.min() < 1:
        raise ValueError("Perplexity needs texts with pieces in each: give a split that has some.")
    if not np.isfinite(nats).all():
        raise ValueError(f"Perplexity has no value: the loss of {np.sum(~np.isfinite(nats))} texts is not finite.")
    loss, half = nats.sum() / pieces.sum(), 0.0
    if (n := len(nats)) > 1:
        deviations = nats - loss * pieces
        half = _quantile(n) * math.sqrt(n / (n - 1) * float(deviations @ deviations)) / float(pieces.sum())
    return Estimate(math.exp(loss), math.exp(loss - half), math.exp(loss + half), n)


def _quantile(n: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
