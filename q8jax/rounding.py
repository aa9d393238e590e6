"""Rounding of float32 to fewer bits, as integer arithmetic on its bit pattern.

Integer arithmetic because floats cannot be trusted here: CPUs and TPUs flush float32 subnormals to
zero, and adding a half (or noise) to a value rounds a second time, while a shift of the significand
is exact. Everything works on magnitudes, so all roundings are symmetric in the sign.

Stochastic rounding moves a value to one of its two neighbours on the format's grid, with the
probability that makes the mean equal to the value. The grid is that of the *target*, so subnormals,
and values below the smallest one, are as unbiased as normals. Each element draws its own 32 bits;
what lies below 2^-31 of the local spacing is dropped. A value beyond the largest one saturates.

References:
  Gupta et al. 2015, Deep learning with limited numerical precision, arXiv:1502.02551, section 3.
  Croci et al. 2022, Stochastic rounding: implementation, error analysis and applications, sec. 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax import choices

if TYPE_CHECKING:
    from q8jax.formats import Format

ROUNDINGS = ("nearest_even", "nearest_away", "truncate", "stochastic")

_u32 = np.uint32
_SIGN = _u32(0x80000000)
_MAGNITUDE = _u32(0x7FFFFFFF)
_INFINITY = _u32(0x7F800000)
_HIDDEN_BIT = _u32(0x00800000)


def check_rounding(rounding: str, key: jax.Array | None) -> None:
    """Raises ValueError if `rounding` is unknown, or stochastic without a key."""
    choices.check("rounding", rounding, ROUNDINGS)
    if rounding == "stochastic" and key is None:
        raise ValueError("rounding='stochastic' needs key=, a PRNG key folded with step, site and operand.")


def round_to_integer(x: jax.Array, rounding: str, key: jax.Array | None = None) -> jax.Array:
    """Rounds float32 to whole numbers, in float32; exact for |x| < 2^24, NaN and ±Inf unchanged."""
    if rounding == "nearest_even":
        return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    magnitude = jnp.abs(x)
    whole = jnp.floor(magnitude)
    # Exact on magnitudes; x - floor(x) would round for small negative x.
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


def nearest_even_code(x: jax.Array, fmt: Format) -> jax.Array:
    """Rounds to nearest even and returns codes; see `round_float` for the rest.

    Shifts are by constants: with these a CPU encodes FP8 two to four times faster than with XLA's
    own convert.
    """
    shift = _u32(23 - fmt.mantissa_bits)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = jnp.minimum(bits & _MAGNITUDE, np.float32(fmt.max).view(np.uint32))
    odd = (magnitude >> shift) & _u32(1)
    code = (magnitude + _u32((1 << (22 - fmt.mantissa_bits)) - 1) + odd) >> shift
    code = code - _u32((127 - fmt.bias) << fmt.mantissa_bits)
    if fmt.bias != 127:
        # Adding 2^23 times the spacing of subnormals makes the adder itself round to that spacing.
        unit = np.float32(2.0**23 * fmt.smallest_subnormal)
        shifted = lax.bitcast_convert_type(magnitude, jnp.float32) + unit
        subnormal = lax.bitcast_convert_type(shifted, jnp.uint32) - unit.view(np.uint32)
        is_normal = magnitude >= np.float32(fmt.smallest_normal).view(np.uint32)
        code = jnp.where(is_normal, code, subnormal)
    return _with_sign_and_nan(code, bits, fmt)


def round_float(x: jax.Array, fmt: Format, rounding: str, key: jax.Array | None) -> jax.Array:
    """Rounds to nearest away from zero, towards zero or stochastically, and returns codes.

    A code is sign, exponent and mantissa, so codes of consecutive magnitudes are consecutive
    integers, and a carry out of the mantissa or out of the subnormals is already right.

    Args:
      x: float32 array of any shape.
      fmt: a float format of at most 16 bits.
      rounding: one of ROUNDINGS but nearest_even.
      key: a PRNG key; only used by 'stochastic'.

    Returns:
      uint32 codes, sign included, shape of `x`. Large values and ±Inf saturate; NaN gives the NaN
      code, or 0 where the format has none.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & _MAGNITUDE
    exponent = magnitude >> _u32(23)
    hidden = jnp.where(exponent > _u32(0), _HIDDEN_BIT, _u32(0))
    significand = (magnitude & (_HIDDEN_BIT - _u32(1))) | hidden
    exponent = jnp.maximum(exponent, _u32(1))
    # The exponent field, in float32, of the format's smallest normal: its spacing is the finest.
    lowest = _u32(128 - fmt.bias)
    kept = jnp.maximum(exponent, lowest)
    shift = _u32(23 - fmt.mantissa_bits) + (kept - exponent)
    # A shift of 32 or more is undefined, and more than 31 random bits would overflow the sum.
    excess = jnp.minimum(shift - jnp.minimum(shift, _u32(31)), _u32(31))
    shift = jnp.minimum(shift, _u32(31))
    significand = significand >> excess
    if rounding == "nearest_away":
        significand = significand + (_u32(1) << (shift - _u32(1)))
    elif rounding == "stochastic":
        assert key is not None
        noise = jax.random.bits(key, x.shape, jnp.uint32)
        significand = significand + (noise >> (_u32(32) - shift))
    code = ((kept - lowest) << _u32(fmt.mantissa_bits)) + (significand >> shift)
    code = jnp.where(magnitude >= _INFINITY, _u32(fmt.max_code), code)
    return _with_sign_and_nan(jnp.minimum(code, _u32(fmt.max_code)), bits, fmt)


def _with_sign_and_nan(code: jax.Array, bits: jax.Array, fmt: Format) -> jax.Array:
    signed = code | ((bits & _SIGN) >> _u32(32 - fmt.bits))
    if not fmt.has_negative_zero:
        signed = jnp.where(code == _u32(0), code, signed)
    nan = fmt.nan_code or 0
    return jnp.where((bits & _MAGNITUDE) > _INFINITY, _u32(nan), signed)


def without_infinities(x: jax.Array) -> jax.Array:
    """Replaces ±Inf in a float32 array by the largest finite values; by bits, as clip may flush."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    is_infinite = (bits & _MAGNITUDE) == _INFINITY
    return lax.bitcast_convert_type(jnp.where(is_infinite, bits - _u32(1), bits), jnp.float32)


def exponent_code(x: jax.Array, rounding: str, key: jax.Array | None = None) -> jax.Array:
    """Rounds to powers of two 2^(code - 127), code in 0 … 254 (E8M0), saturating.

    Zero, negative values and all below 2^-127 give code 0; NaN gives 255. Without a mantissa no
    neighbour is even, so 'nearest_even' does what ml_dtypes does: a tie, 1.5 · 2^k, goes up, and so
    does everything between 2^-127 and 2^-126, which is subnormal in float32.

    Args:
      x: float32 array of any shape.
      rounding: one of ROUNDINGS; 'truncate' rounds down.
      key: a PRNG key; only used by 'stochastic'.

    Returns:
      uint32 codes, shape of `x`.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    positive = jnp.where(bits >= _SIGN, _u32(0), bits)
    half = _HIDDEN_BIT >> _u32(1)
    if rounding == "nearest_even":
        positive = positive + jnp.where(positive < _HIDDEN_BIT, half - _u32(1), half)
    else:
        # Stretches [2^-127, 2^-126) to a full binade with exponent field 0.
        stretched = _u32(2) * (jnp.maximum(positive, half) - half)
        positive = jnp.where(positive < _HIDDEN_BIT, stretched, positive)
    if rounding == "nearest_away":
        positive = positive + half
    elif rounding == "stochastic":
        assert key is not None
        positive = positive + (jax.random.bits(key, x.shape, jnp.uint32) >> _u32(9))
    code = jnp.minimum(positive >> _u32(23), _u32(254))
    return jnp.where((bits & _MAGNITUDE) > _INFINITY, _u32(255), code)


def ceil_power_of_two(x: jax.Array) -> jax.Array:
    """Returns the smallest normal float32 power of two that is at least x, by bit manipulation.

    Args:
      x: float32 array of any shape, not negative.

    Returns:
      float32, shape of `x`, in [2^-126, 2^127]: zero and subnormals give 2^-126, Inf and what is
      above 2^127 give 2^127. NaN stays NaN.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32) & _MAGNITUDE
    rounded = (bits + (_HIDDEN_BIT - _u32(1))) & _INFINITY
    rounded = jnp.clip(rounded, _HIDDEN_BIT, _INFINITY - _HIDDEN_BIT)
    return lax.bitcast_convert_type(jnp.where(bits > _INFINITY, bits, rounded), jnp.float32)
