"""Calibrators that cut a range, from a histogram of what was seen.

A few large values cost all others their resolution. What to cut is decided once, from concrete counts, on the host in
float64, in which counts and their sums are exact.

References:
  Wu et al. 2020, Integer quantization for deep learning inference: principles and empirical evaluation,
  arXiv:2004.09602, section 4.1 (all three).
  Migacz 2017, 8-bit inference with TensorRT, GTC (entropy).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from q8jax.formats import decode
from q8jax.ptq import histogram
from q8jax.ptq.histogram import BINS, Histogram
from q8jax.ptq.ranges import Calibrator, Scales
from q8jax.ptq.target import Target

_MOST_ENTROPY_BINS = 2048
# Shares of the range to try: first eight to an octave, over ten octaves, then 64 to an octave around the best.
_COARSE = 2.0 ** (-np.arange(81) / 8)
_FINE = 2.0 ** (np.arange(-8, 9) / 64)


def percentile(target: Target, percent: float) -> Calibrator:
    """The range that holds so many percent of the values.

    Of a symmetric target the range of |x|; of an affine one, half of the others lie beyond each end. The end is that of
    the bin in which the percentile lies: at most a width, 1/2048 of the largest magnitude, beyond it, never before it.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be more than 0 and at most 100, not {percent}.")

    def ends(seen: Histogram) -> tuple[float, float]:
        if not target.is_affine:
            reach = _reach(_magnitudes(seen), percent / 100) * seen.width
            return -reach, reach
        share = (1 + percent / 100) / 2
        below = _reach(seen.counts[::-1], share) - BINS
        above = _reach(seen.counts, share) - BINS
        return -max(below, 0) * seen.width, max(above, 0) * seen.width

    return _calibrator(target, ends)


def mean_squared_error(target: Target) -> Calibrator:
    """The range that codes represent with the least mean squared error.

    The error counts each value as the middle of its bin. As the distance to the nearest value of a code grows no faster
    than a value moves, its root is that of the values themselves to within half a width.
    """

    def ends(seen: Histogram) -> tuple[float, float]:
        values, counts = (np.arange(2 * BINS) - BINS + 0.5) * seen.width, seen.counts
        smallest, largest = float(seen.smallest), float(seen.largest)

        def best(lows: np.ndarray | float, highs: np.ndarray | float) -> tuple[float, float]:
            lows, highs = np.broadcast_arrays(np.maximum(lows, smallest), np.minimum(highs, largest))
            least = np.argmin(_squared_errors(target, values, counts, lows, highs))
            return float(lows[least]), float(highs[least])

        low, high = best(smallest * _COARSE, largest * _COARSE)
        low, high = best(low * _FINE, high * _FINE)
        if target.is_affine:
            for grow in (_COARSE / _COARSE[-1], _FINE):
                low, high = best(low, np.append(high * _COARSE, high * grow))
                low, high = best(np.append(low * _COARSE, low * grow), high)
        return low, high

    return _calibrator(target, ends)


def entropy(target: Target) -> Calibrator:
    """The symmetric range whose quantized distribution diverges least, after Kullback and Leibler, from that of values.

    For each candidate, the first i bins of |x|: P holds their counts, with all that lies beyond added to the last;
    Q the same counts *without* what lies beyond, the bins of one code sharing theirs equally, but for those of them
    that are empty in P. The codes are the format's own, where Migacz cuts the range into 128 equal parts.

    Raises:
      ValueError: the target is affine, for which this is not defined, or of more than 8 bits.
    """
    if target.is_affine or target.format.bits > 8:
        raise ValueError("entropy takes symmetric targets of at most 8 bits: choose mean_squared_error or percentile.")

    def ends(seen: Histogram) -> tuple[float, float]:
        counts, width = _magnitudes(seen), seen.width
        counts = np.trim_zeros(counts, "b")
        while counts.size > _MOST_ENTROPY_BINS:
            counts, width = np.append(counts, np.zeros(counts.size % 2)).reshape(-1, 2).sum(1), 2 * width
        if not counts.size:
            return 0.0, 0.0
        reach = kl_threshold(counts, target) * width
        return -reach, reach

    return _calibrator(target, ends)


def kl_threshold(counts: np.ndarray, target: Target) -> int:
    """Returns how many of the bins to keep, by the least Kullback–Leibler divergence.

    Args:
      counts: float64 [n], a histogram of magnitudes from 0 on, the last bin not empty.
      target: whose codes the bins are merged to.
    """
    candidates = range(min(_positive_values(target).size, counts.size), counts.size + 1)
    divergences = [_divergence(counts, _codes_of_bins(target, kept)) for kept in candidates]
    return candidates[int(np.argmin(divergences))]


def _divergence(counts: np.ndarray, codes: np.ndarray) -> float:
    kept = codes.size
    inside = counts[:kept]
    p = inside.copy()
    p[-1] += counts[kept:].sum()
    filled = p > 0
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    sizes = np.diff(np.append(starts, kept))
    shared = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(filled.astype(float), starts), 1)
    q = np.where(filled, np.repeat(shared, sizes), 0)
    if not q.any() or (q[filled] == 0).any():
        return np.inf
    p, q = p[filled] / p.sum(), q[filled] / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _codes_of_bins(target: Target, kept: int) -> np.ndarray:
    """Which value each of the first bins is rounded to, as ascending integers, when codes reach their end."""
    values = _positive_values(target)
    middles = (values[1:] + values[:-1]) / 2
    return np.searchsorted(middles, (np.arange(kept) + 0.5) / kept * values[-1])


def _positive_values(target: Target) -> np.ndarray:
    """The values of codes from zero on, ascending float64."""
    if target.codebook is not None:
        values = np.abs(target.codebook)
    elif target.format.kind == "int":
        return np.arange(target.format.max + 1)
    else:
        codes = np.arange(2**target.format.bits, dtype=np.uint8).view(target.format.dtype)
        values = np.abs(np.asarray(decode(jnp.asarray(codes), target.format), np.float64))
    return np.unique(values[np.isfinite(values)])


def _calibrator(target: Target, ends: Callable[[Histogram], tuple[float, float]]) -> Calibrator:
    def finish(seen: Histogram) -> Scales:
        low, high = ends(seen)
        # What is beyond the extremes was never seen.
        reach = max(-float(seen.smallest), float(seen.largest))
        smallest, largest = (float(seen.smallest), float(seen.largest)) if target.is_affine else (-reach, reach)
        return target.scales_of_range(jnp.float32(max(low, smallest)), jnp.float32(min(high, largest)))

    return Calibrator(histogram.init, histogram.update, histogram.merge, finish)


def _magnitudes(seen: Histogram) -> np.ndarray:
    """float64 [BINS], counts of |x|."""
    return seen.counts[BINS:] + seen.counts[BINS - 1 :: -1]


def _reach(counts: np.ndarray, share: float) -> int:
    """How many bins hold this share of the counts."""
    total = np.cumsum(counts)
    # The rank of a value, which rounding of the share must not move.
    rank = np.ceil(np.round(share * total[-1], 6))
    return int(np.searchsorted(total, rank)) + 1 if rank else 0


def _squared_errors(
    target: Target, values: np.ndarray, counts: np.ndarray, lows: np.ndarray, highs: np.ndarray
) -> np.ndarray:
    """float64 [candidates], Σ counts · (value − quantized value)² of each range."""
    x = jnp.asarray(values, jnp.float32)
    errors = []
    for low, high in zip(lows, highs, strict=True):
        got = np.asarray(_rounded(target, x, jnp.float32(low), jnp.float32(high)), np.float64)
        errors.append(np.sum(counts * (values - got) ** 2))
    return np.array(errors)


@functools.partial(jax.jit, static_argnums=0)
def _rounded(target: Target, x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    scale, zero_point = target.scales_of_range(low, high)
    return target.encode(x, scale, zero_point).dequantize()
