"""A histogram of constant size that loses nothing as its range grows.

Bins of equal width tile [-2^e, 2^e), where 2^e is the least power of two above every magnitude seen. When e grows by
one, bins are joined in pairs, which is what they would have held from the start. So counts depend on the values alone,
not on how they were split into batches or over devices, nor on the order in which those were merged.

A value is known to a width, 2^e / 4096: to 1/2048 of the largest magnitude or better. Extremes are kept exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LOG_BINS = 12
# Of one sign.
BINS = 2**_LOG_BINS
# Below 2^-100 a width would leave the normal numbers; 2^128 is above all.
_LEAST_EXPONENT = -100
_MOST_EXPONENT = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often which values were seen.

    Attributes:
      low, high: uint32 [2 · BINS], the lower and the upper half of 64-bit counts; bin BINS begins at zero.
      exponent: int32, e.
      smallest, largest: float32, of the values counted and 0.
      nonfinite: bool, whether a value that is not finite was seen; it is not counted.
    """

    low: jax.Array
    high: jax.Array
    exponent: jax.Array
    smallest: jax.Array
    largest: jax.Array
    nonfinite: jax.Array

    @property
    def counts(self) -> np.ndarray:
        """float64 [2 · BINS], of concrete arrays."""
        return np.asarray(self.high).astype(np.float64) * 2.0**32 + np.asarray(self.low).astype(np.float64)

    @property
    def width(self) -> float:
        return 2.0 ** int(self.exponent) / BINS


def init() -> Histogram:
    """Returns the histogram of nothing."""
    counts, zero = jnp.zeros(2 * BINS, jnp.uint32), jnp.zeros((), jnp.float32)
    return Histogram(counts, counts, jnp.int32(_LEAST_EXPONENT), zero, zero, jnp.zeros((), bool))


def update(histogram: Histogram, x: jax.Array) -> Histogram:
    """Counts a batch, floating-point of any shape and of fewer than 2^32 values."""
    x = x.reshape(-1).astype(jnp.float32)
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, jnp.float32(0))
    smallest, largest = jnp.min(x, initial=0), jnp.max(x, initial=0)
    exponent = _exponent_above(jnp.maximum(-smallest, largest))
    # A product with a power of two is exact, but where it underflows to zero.
    bins = jnp.floor(x * _power_of_two(_LOG_BINS - exponent)).astype(jnp.int32)
    bins = jnp.where(x < 0, jnp.minimum(bins, -1), bins) + BINS
    low = jnp.zeros(2 * BINS, jnp.uint32).at[bins].add(finite.astype(jnp.uint32))
    batch = Histogram(low, jnp.zeros_like(low), exponent, smallest, largest, ~jnp.all(finite))
    return merge(histogram, batch)


def merge(first: Histogram, second: Histogram) -> Histogram:
    """Joins what two devices, or two runs, have seen."""
    exponent = jnp.maximum(first.exponent, second.exponent)
    first_counts, second_counts = _widened(first, exponent), _widened(second, exponent)
    low, high = _sum(*first_counts, *second_counts)
    return Histogram(
        low,
        high,
        exponent,
        jnp.minimum(first.smallest, second.smallest),
        jnp.maximum(first.largest, second.largest),
        first.nonfinite | second.nonfinite,
    )


def _widened(histogram: Histogram, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The counts in bins of a wider range."""

    def join_pairs(_: jax.Array, counts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        even, odd = ([half[start::2] for half in counts] for start in (0, 1))
        pad = lambda half: jnp.pad(half, (BINS // 2, BINS // 2))
        low, high = _sum(*even, *odd)
        return pad(low), pad(high)

    # After so many all that is below zero is in one bin, and all else in the next.
    times = jnp.minimum(exponent - histogram.exponent, _LOG_BINS + 1)
    return lax.fori_loop(0, times, join_pairs, (histogram.low, histogram.high))


def _sum(low_a: jax.Array, high_a: jax.Array, low_b: jax.Array, high_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    low = low_a + low_b
    return low, high_a + high_b + (low < low_a).astype(jnp.uint32)


def _exponent_above(x: jax.Array) -> jax.Array:
    """The least exponent whose power of two is above x, which is finite and not negative."""
    field = lax.bitcast_convert_type(x, jnp.int32) >> 23
    return jnp.clip(field - 126, _LEAST_EXPONENT, _MOST_EXPONENT)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
