"""How well a quantized array represents its original; pure functions that work under jit.

Each result is a float32 scalar over the whole array, but for `staleness`, which has one for each
scale. Entries that are NaN in the original are no values, and count neither way in the shares.
"""

import math

import jax
import jax.numpy as jnp

from q8jax.codebook import lookup
from q8jax.formats import decode, get_format
from q8jax.groups import extremes, per_group
from q8jax.qarray import QArray
from q8jax.rounding import ceil_power_of_two


def sqnr(x: jax.Array, xq: QArray | jax.Array) -> jax.Array:
    """Signal to quantization noise ratio, 10·log10(‖x‖² / ‖x − x̂‖²), in dB.

    Args:
      x: floating-point array of any shape.
      xq: its quantized or already dequantized version.

    Returns:
      float32 scalar: +inf where nothing is lost, also for an empty or zero array; not finite where
      an array has a NaN or an infinity.
    """
    x, xq = x.astype(jnp.float32), _values(xq)
    # Scaled by a power of two, so that no square overflows and few vanish.
    unit = jnp.minimum(ceil_power_of_two(jnp.max(jnp.abs(x), initial=0)), jnp.float32(2.0**126))
    x, xq = x / unit, xq / unit
    signal, noise = jnp.sum(x * x), jnp.sum((x - xq) ** 2)
    ratio = jnp.float32(10) * (jnp.log10(signal) - jnp.log10(noise))
    return jnp.where(noise == 0, jnp.float32(jnp.inf), ratio)


def saturation(x: jax.Array, xq: QArray) -> jax.Array:
    """Share of values clipped: those that would round beyond the range of their codes.

    A value within half a step of the largest one is rounded, not clipped. ±Inf is clipped.

    Args:
      x: floating-point array of any shape.
      xq: its quantized version; a dequantized array does not know its range.
    """
    fmt = get_format(xq.qtype)
    if xq.codebook is not None:
        value = lookup(xq.qvalue, xq.codebook)
        low, high = xq.codebook[0], xq.codebook[-1]
        steps = jnp.diff(xq.codebook)
        low_step, high_step = steps[0], steps[-1]
    else:
        value = decode(xq.qvalue, fmt)
        low, high = jnp.float32(fmt.narrow_min), jnp.float32(fmt.max)
        binade = 0 if fmt.kind == "int" else math.frexp(fmt.max)[1] - 1 - fmt.mantissa_bits
        low_step = high_step = jnp.float32(2.0**binade)
    scaled = per_group(jnp.multiply, x.astype(jnp.float32), 1 / xq.scale.astype(jnp.float32))
    if xq.zero_point is not None:
        scaled = per_group(jnp.add, scaled, xq.zero_point.astype(jnp.float32))
    above = (value >= high) & (scaled - value > high_step / 2)
    below = (value <= low) & (value - scaled > low_step / 2)
    return _share(above | below, ~jnp.isnan(x))


def underflow(x: jax.Array, xq: QArray | jax.Array) -> jax.Array:
    """Share of nonzero values that became zero; 0 where there is no nonzero value."""
    nonzero = (x != 0) & ~jnp.isnan(x)
    return _share(nonzero & (_values(xq) == 0), nonzero)


def staleness(x: jax.Array, xq: QArray, *, margin: float = 0) -> jax.Array:
    """True amax ÷ the amax that a scale was built for, of each group of values that share one.

    1 is fresh; above 2^margin values saturate. The amax that a scale was built for is the largest
    magnitude that it lets codes reach; of a scale rounded up to a power of two, the largest amax
    that gives this scale.

    Args:
      x: floating-point array of any shape.
      xq: its quantized version; a dequantized array does not know its scales.
      margin: bits of headroom that the scales were built with.

    Returns:
      float32 array of the scales' shape: 0 for a group without finite nonzero values, NaN where the
      scale is NaN.
    """
    fmt = get_format(xq.qtype)
    top = jnp.float32(fmt.max) if xq.codebook is None else jnp.max(jnp.abs(xq.codebook))
    if xq.zero_point is not None:
        zero = xq.zero_point.astype(jnp.float32)
        top = jnp.maximum(fmt.max - zero, zero - fmt.narrow_min)
    amax, _ = extremes(x, xq.scale.shape, keep_nan=False)
    return amax / xq.scale.astype(jnp.float32) * (jnp.float32(2.0**margin) / top)


def _values(xq: QArray | jax.Array) -> jax.Array:
    return xq.dequantize() if isinstance(xq, QArray) else xq.astype(jnp.float32)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    # Counted as integers: a float32 sum of ones stops at 2^24.
    count = jnp.sum(whole, dtype=jnp.int32)
    return jnp.sum(part & whole, dtype=jnp.int32) / jnp.maximum(count, 1)
