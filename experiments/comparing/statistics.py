"""Whether a precision loses quality: what losses of paired runs can tell, and how many seeds it takes to tell it.

Pure functions of arrays. A difference is candidate less baseline of the same seed, so more is worse; in percent it is
relative to the baseline's loss of that seed. Differences over seeds are taken to be independent and near normal, for
which Student's t gives the intervals; bootstrap intervals stand beside them as a check that does not assume it, but are
too narrow for a handful of seeds, so that no verdict rests on them.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

STRICT, PARITY, WORSE, OPEN = VERDICTS = ("strict parity", "parity", "worse", "not enough evidence")
EQUIVALENT, NOT_SHOWN = "equivalent", "not shown"
# Of a wrong decision at a margin, and of the decision that a plan is to reach.
LEVEL, POWER = 0.05, 0.8
_FEWEST = 5  # of which a majority is not chance
MOST_SEEDS = 10_000
_RESAMPLES = 9999
# Beyond it the power is 1 in every digit, and the noncentral distribution is computed less well.
_LARGEST_SHIFT = 37.0

Interval = tuple[float, float]


def mean_and_sd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (with n - 1) over the last axis; both exact where all values are equal.

    Returns:
      Two arrays of x's other axes; NaN where there are too few values.
    """
    x = np.asarray(x, np.float64)
    n = x.shape[-1]
    nothing = np.full(x.shape[:-1], np.nan)
    if n == 0:
        return nothing, nothing
    is_flat = np.all(x == x[..., :1], axis=-1)
    mean = np.where(is_flat, x[..., 0], x.mean(-1))
    return mean, nothing if n < 2 else np.where(is_flat, 0.0, x.std(-1, ddof=1))


def t_interval(x: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided confidence interval of the mean over the last axis, by Student's t; NaN for fewer than two values.

    Its ends are also the one-sided bounds of confidence (1 + confidence) / 2.
    """
    mean, sd = mean_and_sd(x)
    n = np.shape(x)[-1]
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * sd / math.sqrt(n) if n > 1 else np.nan
    return mean - half, mean + half


def bootstrap_interval(x: np.ndarray, confidence: float) -> Interval | None:
    """Bootstrap confidence interval of the mean of x [n]; the same data give the same interval.

    Bias-corrected and accelerated (BCa), or of percentiles where the data do not let that be computed; a point where
    all values are equal; None for fewer than two.
    """
    if len(x) < 2:
        return None
    if np.all(x == x[0]):
        return float(x[0]), float(x[0])
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the next method is for
            low, high = stats.bootstrap(
                (x,),
                np.mean,
                confidence_level=confidence,
                n_resamples=_RESAMPLES,
                method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval
        if math.isfinite(low) and math.isfinite(high):
            break
    return float(low), float(high)


def sd_interval(sd: float, n: int, confidence: float) -> Interval | None:
    """Confidence interval of a standard deviation seen in n normal values, by chi-square; None for fewer than two."""
    if n < 2:
        return None
    low, high = (sd * math.sqrt((n - 1) / stats.chi2.ppf((1 + sign * confidence) / 2, n - 1)) for sign in (1, -1))
    return low, high


def p_noninferior(x: np.ndarray, margin: float) -> float | None:
    """p-value of the mean of x [n] being at the margin or above, against its being below; None for fewer than two."""
    return None if len(x) < 2 else float(stats.t.cdf(_t(x, margin), len(x) - 1))


def p_equivalent(x: np.ndarray, margin: float) -> float | None:
    """p-value of two one-sided tests (Schuirmann 1987): that the mean of x [n] is not within ± margin."""
    if len(x) < 2:
        return None
    return max(float(stats.t.cdf(_t(x, margin), len(x) - 1)), float(stats.t.sf(_t(x, -margin), len(x) - 1)))


def _t(x: np.ndarray, margin: float) -> float:
    mean, sd = map(float, mean_and_sd(x))
    if sd == 0:
        return math.copysign(math.inf, mean - margin) if mean != margin else 0.0
    return (mean - margin) / (sd / math.sqrt(len(x)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, by Holm's method (1979), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdicts(lower95: np.ndarray | float, upper95: np.ndarray | float, margins: Mapping[str, float]) -> np.ndarray:
    """The verdict of each pair of one-sided 95 % bounds on the mean difference in percent, of any shape.

    Non-inferiority: the upper bound below a margin is parity, the lower one above the wider margin is worse. NaN, where
    there are too few seeds for a bound, decides nothing.
    """
    strict, parity = margins["strict"], margins["parity"]
    lower95, upper95 = np.asarray(lower95), np.asarray(upper95)
    return np.select([upper95 < strict, upper95 < parity, lower95 > parity], [STRICT, PARITY, WORSE], OPEN)


def power(n: int, effect: float, level: float = LEVEL) -> float:
    """The chance that a one-sided t test of n values decides.

    Args:
      n: at least 2.
      effect: true distance of the mean from the margin, in standard deviations, to the side that is to be found.
      level: of the test.
    """
    shift = min(effect * math.sqrt(n), _LARGEST_SHIFT)
    return float(stats.nct.sf(stats.t.ppf(1 - level, n - 1), n - 1, shift))


def sd_to_plan_with(sd: float, n: int) -> float:
    """The upper 80 % bound of a standard deviation that was seen in n normal values; NaN for fewer than two.

    With the value seen, every other plan would come out too small (Browne 1995, On the use of a pilot sample for sample
    size determination, Statistics in Medicine 14).
    """
    return sd * math.sqrt((n - 1) / stats.chi2.ppf(1 - POWER, n - 1)) if n > 1 else math.nan


def seeds_needed(mean: float, sd: float, margin: float, level: float = LEVEL) -> int | None:
    """The fewest seeds that decide about a margin, to either side, with 80 % power if mean and sd are the truth.

    None where 10,000 are too few, as when the mean is the margin, or where sd is not known.
    """
    if mean == margin or math.isnan(sd):
        return None
    effect = math.inf if sd == 0 else abs(mean - margin) / sd
    return _fewest(range(2, MOST_SEEDS + 1), lambda n: power(n, effect, level) >= POWER)


def _fewest(counts: range, decides: Any) -> int | None:
    found = bisect.bisect_left(counts, True, key=decides)
    return counts[found] if found < len(counts) else None


def p_diverges_more(alone: int, spared: int) -> float:
    """p-value of McNemar's exact test: that a candidate diverges no more often than its baseline.

    Of a pair of which exactly one run diverged, either is as likely to be the one if both diverge equally often.

    Args:
      alone: pairs in which only the candidate diverged.
      spared: pairs in which only the baseline did.
    """
    return float(stats.binom.sf(alone - 1, alone + spared, 0.5))


def seeds_to_show_divergence(alone: int, spared: int, pairs: int) -> int | None:
    """How many seeds it takes McNemar's test to find that the candidate diverges more, with 80 % power.

    The shares seen, of `pairs`, are taken to be the truth. None where 10,000 are too few, as when they are equal. Some
    fewer may do where the baseline diverges too: the power of a test of counts does not rise with each of them.
    """
    if alone <= spared:
        return None

    def decides(n: int) -> bool:
        one_sided = np.arange(n + 1)
        # The least count of the candidate's that is significant among so many.
        critical = stats.binom.isf(LEVEL, one_sided, 0.5) + 1
        found = stats.binom.sf(critical - 1, one_sided, alone / (alone + spared))
        return float(stats.binom.pmf(one_sided, n, (alone + spared) / pairs) @ found) >= POWER

    return _fewest(range(1, MOST_SEEDS + 1), decides)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What paired runs tell of a candidate; differences, intervals and bounds in percent but for `delta_nats`.

    Attributes:
      delta_nats, delta_percent, sd_percent: mean and standard deviation of the differences of `seeds` pairs.
      ci90, ci95: two-sided intervals of the mean by Student's t; bootstrap90, bootstrap95 by the bootstrap.
      lower95, upper95: its one-sided bounds.
      seeds: pairs of which both runs finished. All of the above is over these, and None where they are too few.
      diverged: runs of the candidate that diverged.
      baseline_diverged: runs of the baseline that did, whose pairs tell nothing of the loss.
      verdict: one of VERDICTS.
      seeds_needed: how many settle it, where the evidence is not enough, if the mean is as seen and the standard
        deviation at its upper 80 % bound.
      seeds_needed_strict: how many show strict parity, where it is parity.
      noninferiority, equivalence: by name of the margin, p-values and what they say.
    """

    delta_nats: float | None
    delta_percent: float | None
    sd_percent: float | None
    ci90: Interval | None
    ci95: Interval | None
    bootstrap90: Interval | None
    bootstrap95: Interval | None
    lower95: float | None
    upper95: float | None
    seeds: int
    diverged: int
    baseline_diverged: int
    verdict: str
    seeds_needed: int | None
    seeds_needed_strict: int | None
    noninferiority: dict[str, dict[str, Any]]
    equivalence: dict[str, dict[str, Any]]


def compare(candidate: np.ndarray, baseline: np.ndarray, margins: Mapping[str, float]) -> Comparison:
    """Compares a candidate's final losses with its baseline's.

    A run that diverged has lost everything: its difference is infinite, and so is any mean with it. Hence no candidate
    with a diverged run is at parity. It is worse if

    - of at least five runs more than half diverged, and none of the baseline's: then the median difference is infinite
      too;
    - or it diverges more often than the baseline by McNemar's exact test at 5 %, which takes five seeds with which it
      alone diverged and none with which the baseline alone did: what happens to both is the model's doing, or the
      data's, not the precision's;
    - or the runs that did finish are worse already.

    Else there is not enough evidence: one run may diverge by bad luck, as the baseline's might have.

    Args:
      candidate: float [n], in nats; infinite for a run that diverged.
      baseline: with the same seeds, float [n]; infinite likewise, NaN if it has not ended.
      margins: percent, "parity" and "strict".
    """
    candidate, baseline = np.asarray(candidate, np.float64), np.asarray(baseline, np.float64)
    usable, both = np.isfinite(baseline), np.isfinite(baseline) & np.isfinite(candidate)
    nats = candidate[both] - baseline[both]
    x = 100 * nats / baseline[both]
    mean, sd = map(float, mean_and_sd(x))
    ci90, ci95 = _pair(*t_interval(x, 0.90)), _pair(*t_interval(x, 0.95))
    lower95, upper95 = ci90 or (math.nan, math.nan)
    verdict = str(verdicts(lower95, upper95, margins))
    cautious = sd_to_plan_with(sd, len(x))
    needed = seeds_needed(mean, cautious, margins["parity"]) if verdict == OPEN else None
    diverged = int(np.sum(np.isinf(candidate)))
    if diverged:
        alone = int(np.sum(usable & np.isinf(candidate)))
        spared = int(np.sum(np.isinf(baseline) & np.isfinite(candidate)))
        is_majority = usable.sum() >= _FEWEST and usable.all() and 2 * alone > usable.sum()
        is_worse = verdict == WORSE or is_majority or p_diverges_more(alone, spared) <= LEVEL
        verdict = WORSE if is_worse else OPEN
        needed = None if is_worse else seeds_to_show_divergence(alone, spared, int(np.sum(~np.isnan(baseline))))
    is_strictly_promising = verdict == PARITY and mean < margins["strict"]
    noninferiority, equivalence = {}, {}
    for name, margin in margins.items():
        p = 1.0 if diverged else p_equivalent(x, margin)
        is_equivalent = p is not None and p < LEVEL
        noninferiority[name] = {"margin": margin, "p": 1.0 if diverged else p_noninferior(x, margin)}
        equivalence[name] = {"margin": margin, "p": p, "verdict": EQUIVALENT if is_equivalent else NOT_SHOWN}
    return Comparison(
        delta_nats=float(mean_and_sd(nats)[0]) if len(x) else None,
        delta_percent=mean if len(x) else None,
        sd_percent=sd if len(x) > 1 else None,
        ci90=ci90,
        ci95=ci95,
        bootstrap90=bootstrap_interval(x, 0.90),
        bootstrap95=bootstrap_interval(x, 0.95),
        lower95=ci90 and lower95,
        upper95=ci90 and upper95,
        seeds=len(x),
        diverged=diverged,
        baseline_diverged=int(np.sum(np.isinf(baseline))),
        verdict=verdict,
        seeds_needed=needed,
        seeds_needed_strict=seeds_needed(mean, cautious, margins["strict"]) if is_strictly_promising else None,
        noninferiority=noninferiority,
        equivalence=equivalence,
    )


def _pair(low: np.ndarray, high: np.ndarray) -> Interval | None:
    return (float(low), float(high)) if np.isfinite(low) else None
