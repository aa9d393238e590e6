"""Four ways to round a float32 to fewer bits, as integer arithmetic on its bit pattern.

Integer arithmetic because floats cannot be trusted here: CPUs and TPUs flush float32 subnormals to zero, adding a
half (or noise) to a value rounds a second time, and a shift of the significand is exact. Everything works on
magnitudes, so 'nearest_away' and 'truncate' are symmetric in the sign.

Stochastic rounding moves a value to one of its two neighbours on the format's grid with the probability that makes
the mean equal to the value. The grid is that of the *target*, so subnormals (and values below the smallest one) are
as unbiased as normals. One draw of 32 bits per element; what lies below 2^-31 of the local grid spacing is dropped.

References:
  Gupta et al. 2015, Deep learning with limited numerical precision, arXiv:1502.02551, section 3.
  Croci et al. 2022, Stochastic rounding: implementation, error analysis and applications, section 2.
"""

import jax
import jax.numpy as jnp
from jax import lax

from q8jax import choices

ROUNDINGS = ("nearest_even", "nearest_away", "truncate", "stochastic")

_SIGN = 0x80000000
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_HIDDEN_BIT = 0x00800000


def check_rounding(rounding: str, key: jax.Array | None) -> None:
    """Raises ValueError if `rounding` is unknown, or stochastic without a key."""
    choices.check("rounding", rounding, ROUNDINGS)
    if rounding == "stochastic" and key is None:
        raise ValueError(
            "rounding='stochastic' needs key=, a jax.random.key folded with step, site and operand."
        )


def round_to_integer(x: jax.Array, rounding: str, key: jax.Array | None = None) -> jax.Array:
    """Rounds to integers, exactly, for |x| < 2^24.

    Args:
      x: float32 array of any shape.
      rounding: one of ROUNDINGS.
      key: a PRNG key; only used by 'stochastic'.

    Returns:
      float32 array of integers, shape of `x`; NaN and ±Inf are unchanged.
    """
    if rounding == "nearest_even":
        return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    magnitude = jnp.abs(x)
    whole = jnp.floor(magnitude)
    # Exact: both have the exponent of `magnitude` at most. x - floor(x) would not be, for small negative x.
    fraction = magnitude - whole
    if rounding == "nearest_away":
        up = fraction >= 0.5
    elif rounding == "stochastic":
        assert key is not None
        threshold = (fraction * jnp.float32(2.0**32)).astype(jnp.uint32)
        up = jax.random.bits(key, x.shape, jnp.uint32) < threshold
    else:
        up = jnp.zeros(x.shape, bool)
    return jnp.copysign(whole + up.astype(jnp.float32), x)


def float_to_code(
    x: jax.Array,
    *,
    mantissa_bits: int,
    bias: int,
    max_code: int,
    rounding: str,
    key: jax.Array | None = None,
) -> jax.Array:
    """Rounds |x| to a binary floating-point format and returns the code of the magnitude.

    Codes are the usual exponent-then-mantissa pattern, in which codes of consecutive values are consecutive integers;
    so a carry out of the mantissa, and out of the subnormals, is already right.

    Args:
      x: float32 array of any shape.
      mantissa_bits: stored mantissa bits of the format, 1 to 22.
      bias: exponent bias; the smallest normal is 2^(1 - bias).
      max_code: code of the largest finite value; larger values and ±Inf saturate to it.
      rounding: one of ROUNDINGS.
      key: a PRNG key; only used by 'stochastic'.

    Returns:
      uint32 codes without sign, shape of `x`. NaN gives `max_code`: the caller knows whether there is a NaN code.
    """
    u32 = jnp.uint32
    bits = lax.bitcast_convert_type(x, u32) & u32(_MAGNITUDE)
    exponent = bits >> u32(23)
    significand = (bits & u32(_HIDDEN_BIT - 1)) | jnp.where(
        exponent > u32(0), u32(_HIDDEN_BIT), u32(0)
    )
    exponent = jnp.maximum(exponent, u32(1))
    # float32 exponent field of the format's smallest normal; its grid is the finest there is.
    lowest = u32(128 - bias)
    kept = jnp.maximum(exponent, lowest)
    shift = u32(23 - mantissa_bits) + (kept - exponent)
    # A shift of 32 or more is undefined, and more than 31 random bits would overflow the sum below.
    excess = jnp.minimum(shift - jnp.minimum(shift, u32(31)), u32(31))
    shift = jnp.minimum(shift, u32(31))
    significand = significand >> excess
    half = u32(1) << (shift - u32(1))
    if rounding == "nearest_even":
        addend = half - u32(1) + ((significand >> shift) & u32(1))
    elif rounding == "nearest_away":
        addend = half
    elif rounding == "stochastic":
        assert key is not None
        addend = jax.random.bits(key, x.shape, jnp.uint32) >> (u32(32) - shift)
    else:
        addend = u32(0)
    code = ((kept - lowest) << u32(mantissa_bits)) + ((significand + addend) >> shift)
    code = jnp.where(bits >= u32(_INFINITY), u32(max_code), code)
    return jnp.minimum(code, u32(max_code))


def exponent_code(x: jax.Array, rounding: str, key: jax.Array | None = None) -> jax.Array:
    """Rounds x to a power of two 2^(code - 127), code in 0 … 254 (E8M0), saturating.

    Zero, negative values and anything below 2^-127 give code 0. A tie, 1.5 · 2^k, goes up, as in ml_dtypes: with no
    mantissa there is no even neighbour.

    Args:
      x: float32 array of any shape.
      rounding: one of ROUNDINGS; 'truncate' rounds down, as the OCP MX specification 1.0 (section 6.3) does.
      key: a PRNG key; only used by 'stochastic'.

    Returns:
      uint32 codes, shape of `x`. NaN gives 254: the caller adds the NaN code, 255.
    """
    u32 = jnp.uint32
    bits = lax.bitcast_convert_type(x, u32)
    bits = jnp.where(bits >= u32(_SIGN), u32(0), bits)
    # [2^-127, 2^-126) is subnormal in float32: stretch it to a binade with exponent field 0.
    half = u32(_HIDDEN_BIT // 2)
    bits = jnp.where(bits < u32(_HIDDEN_BIT), u32(2) * (jnp.maximum(bits, half) - half), bits)
    if rounding == "truncate":
        addend = u32(0)
    elif rounding == "stochastic":
        assert key is not None
        addend = jax.random.bits(key, x.shape, jnp.uint32) >> u32(9)
    else:
        addend = half
    return jnp.minimum((bits + addend) >> u32(23), u32(254))
