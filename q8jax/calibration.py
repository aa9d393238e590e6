"""From the extremes of a group of values to its scale.

    scale = amax · (2^margin / format max), rounded up to a power of two where asked

and 1 where amax is 0; within [2^-126, 2^126], so that the scale and its reciprocal are normal
float32 numbers whatever the data: amax 1e-36 does not give scale 0, and 3e38 does not give
reciprocal 0. The bounds cost something only where float32 itself runs out: below an amax of
2^-126 · format max, where fewer codes are used, and, for formats whose max is below 4 (int2, code
books), above 2^126 · max, where values saturate.

The constant is multiplied with, not divided by, because XLA turns the one into the other and NumPy
does not: written out, the scale is the same number everywhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax import choices, groups
from q8jax.formats import Format, QType, get_format
from q8jax.rounding import ceil_power_of_two

SCALE_FORMATS = ("float32", "power_of_two", "e8m0")
MIN_SCALE = np.float32(2.0**-126)
MAX_SCALE = np.float32(2.0**126)


def scale_from_amax(
    amax: jax.Array,
    qtype: QType,
    *,
    margin: float = 0,
    scale_format: str = "float32",
    full_range: bool = False,
) -> jax.Array:
    """Returns the symmetric scales that map amax to the largest value of a format.

    Args:
      amax: float32 array, >= 0. Inf gives the largest scale, NaN gives NaN.
      qtype: a format. bfloat16 and float32 have the range of x itself and get scale 1.
      margin: bits of headroom: the scale is 2^margin times larger.
      scale_format: 'float32', or 'power_of_two' or 'e8m0' for the power of two above.
      full_range: whether the codes may use -128: then 127.5, the middle, takes the place of 127.

    Returns:
      float32 whatever the scale format, shape of `amax`, in [2^-126, 2^126]; 1 where amax is 0.

    Raises:
      ValueError: unknown format or scale format.
    """
    fmt = get_format(qtype)
    choices.check("scale_format", scale_format, SCALE_FORMATS)
    if fmt.kind == "float" and fmt.exponent_bits == 8:
        return jnp.ones_like(amax)
    top = fmt.max + 0.5 if full_range and fmt.kind == "int" and fmt.signed else fmt.max
    return bounded_scale(amax, np.float32(1) / np.float32(top), margin, scale_format)


def bounded_scale(amax: jax.Array, inverse_top: np.float32 | jax.Array, margin: float, scale_format: str) -> jax.Array:
    """Returns amax · inverse_top · 2^margin as a scale, for the value 1 / inverse_top of amax."""
    # One multiplication: XLA would merge two by constants, and round differently.
    scale = amax * (inverse_top * np.float32(2.0**margin))
    if scale_format != "float32":
        scale = ceil_power_of_two(scale)
    scale = jnp.clip(scale, MIN_SCALE, MAX_SCALE)
    return jnp.where(amax == 0, jnp.float32(1), scale)


def affine(
    x: jax.Array,
    scale_shape: tuple[int, ...],
    fmt: Format,
    *,
    margin: float,
    scale_format: str,
    full_range: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns scales, float32, and zero points, int32, that map each group's range onto the codes.

    The range is [min(x, 0), max(x, 0)] over the finite entries, so zero has a code of its own. NaN
    makes the scale NaN.
    """
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype)).astype(jnp.float32)
    _, largest = groups.extremes(x, scale_shape, keep_nan=True)
    high = groups.reduce(jnp.max, finite, scale_shape)
    low = groups.reduce(jnp.min, finite, scale_shape)
    scale, zero_point = affine_from_range(
        low, high, fmt, margin=margin, scale_format=scale_format, full_range=full_range
    )
    has_nan = jnp.isnan(largest)
    return jnp.where(has_nan, jnp.float32(jnp.nan), scale), jnp.where(has_nan, 0, zero_point)


def affine_from_range(
    low: jax.Array,
    high: jax.Array,
    fmt: Format,
    *,
    margin: float = 0,
    scale_format: str = "float32",
    full_range: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns scales, float32, and zero points, int32, that map [low, high] onto the codes; low <= 0 <= high."""
    lowest = jnp.float32(fmt.min if full_range else fmt.narrow_min)
    highest = jnp.float32(fmt.max)
    # Halves, because high - low may overflow.
    span = high * jnp.float32(0.5) - low * jnp.float32(0.5)
    scale = bounded_scale(span, np.float32(2) / (highest - lowest), margin, scale_format)
    zero_point = lowest - lax.round(low * (1 / scale), lax.RoundingMethod.TO_NEAREST_EVEN)
    return scale, jnp.clip(zero_point, lowest, highest).astype(jnp.int32)
