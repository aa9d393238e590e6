"""Number formats: one table, a saturating cast to codes, and the exact value of codes.

Names are those of ml_dtypes. The one scheme of short names: the ml_dtypes name without `float8_`,
`float6_` or `float4_`, so `e4m3fn` is float8_e4m3fn, and `e4m3` is the IEEE-like float8_e4m3, which
is another format.

FP6 has no XLA type, so its codes are uint8 with sign, exponent and mantissa in the low six bits:
the byte that ml_dtypes stores.

The nearest-even cast is clip and convert where XLA's convert is exact and fast. For FP8 it is exact
(seen with the CPU compiler), but four times slower on CPUs than integer arithmetic, which therefore
takes its place there. For bfloat16 (XLA flushes subnormals), E8M0 (the same), FP4 (slower on CPUs)
and FP6 (absent) it is integer arithmetic on every platform. tests/test_formats.py holds both ways
against ml_dtypes, bit for bit.

References:
  Micikevicius et al. 2022, FP8 formats for deep learning, arXiv:2209.05433, table 1 (E4M3FN, E5M2).
  Noune et al. 2022, 8-bit numerical formats for deep neural networks, arXiv:2206.02915 (FNUZ).
  OCP Microscaling formats (MX) specification 1.0, 2023, section 5 (FP6, FP4, E8M0, INT8).
"""

import dataclasses
import functools
import math
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax import choices
from q8jax import rounding as rounding_lib


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format.

    Invariants: min and max are finite and values of the format;
    0 < smallest_subnormal <= smallest_normal <= max.

    Attributes:
      name: the ml_dtypes or NumPy name.
      kind: 'float', 'int', or 'scale' (powers of two only, no zero and no sign: E8M0).
      bits: bits of one code, sign included.
      exponent_bits: 0 for integers.
      mantissa_bits: stored mantissa bits; for integers, the bits of the magnitude.
      bias: a code with exponent field E > 0 has exponent E - bias; 0 for integers.
      max: largest finite value.
      min: smallest finite value: -max for floats, the full two's complement range for integers.
      smallest_normal: smallest positive value with a full mantissa; 1 for integers.
      smallest_subnormal: smallest positive value; 1 for integers.
      has_inf: whether a code is infinite; casts saturate all the same.
      has_nan: whether a code is NaN.
      dtype: dtype of arrays of codes.
    """

    name: str
    kind: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    min: float
    smallest_normal: float
    smallest_subnormal: float
    has_inf: bool
    has_nan: bool
    dtype: np.dtype

    @property
    def signed(self) -> bool:
        return self.min < 0

    @property
    def narrow_min(self) -> float:
        """Lower end of the range that is symmetric around zero, -127 for int8; 0 if unsigned."""
        return max(self.min, -self.max)

    @property
    def has_negative_zero(self) -> bool:
        return self.kind == "float" and not self.name.endswith("fnuz")

    @property
    def max_code(self) -> int:
        """Code of max, of a float format."""
        mantissa, exponent = math.frexp(self.max)
        field = exponent - 1 + self.bias
        return (field << self.mantissa_bits) + int((2 * mantissa - 1) * 2**self.mantissa_bits)

    @property
    def nan_code(self) -> int | None:
        """Code of NaN in a float format, None without one: all ones, or the place of -0."""
        if not self.has_nan:
            return None
        return (1 << (self.bits - 1)) - self.has_negative_zero


def _float(name: str, exponent_bits: int, mantissa_bits: int, bias: int, max_value: float, special: str) -> Format:
    return Format(
        name=name,
        kind="float",
        bits=1 + exponent_bits + mantissa_bits,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
        max=max_value,
        min=-max_value,
        smallest_normal=2.0 ** (1 - bias),
        smallest_subnormal=2.0 ** (1 - bias - mantissa_bits),
        has_inf="inf" in special,
        has_nan="nan" in special,
        dtype=jnp.dtype(jnp.uint8 if name.startswith("float6") else name),
    )


def _int(name: str, bits: int, signed: bool) -> Format:
    return Format(
        name=name,
        kind="int",
        bits=bits,
        exponent_bits=0,
        mantissa_bits=bits - signed,
        bias=0,
        max=float(2 ** (bits - signed) - 1),
        min=-float(2 ** (bits - 1)) if signed else 0.0,
        smallest_normal=1.0,
        smallest_subnormal=1.0,
        has_inf=False,
        has_nan=False,
        dtype=jnp.dtype(name),
    )


_E8M0 = Format(
    name="float8_e8m0fnu",
    kind="scale",
    bits=8,
    exponent_bits=8,
    mantissa_bits=0,
    bias=127,
    max=2.0**127,
    min=2.0**-127,
    smallest_normal=2.0**-127,
    smallest_subnormal=2.0**-127,
    has_inf=False,
    has_nan=True,
    dtype=jnp.dtype("float8_e8m0fnu"),
)

FORMATS = MappingProxyType(
    {
        format.name: format
        for format in (
            _float("float32", 8, 23, 127, (2 - 2.0**-23) * 2.0**127, "inf nan"),
            _float("bfloat16", 8, 7, 127, (2 - 2.0**-7) * 2.0**127, "inf nan"),
            _float("float16", 5, 10, 15, 65504.0, "inf nan"),
            _float("float8_e4m3fn", 4, 3, 7, 448.0, "nan"),
            _float("float8_e5m2", 5, 2, 15, 57344.0, "inf nan"),
            _float("float8_e3m4", 3, 4, 3, 15.5, "inf nan"),
            _float("float8_e4m3", 4, 3, 7, 240.0, "inf nan"),
            _float("float8_e4m3b11fnuz", 4, 3, 11, 30.0, "nan"),
            _float("float8_e4m3fnuz", 4, 3, 8, 240.0, "nan"),
            _float("float8_e5m2fnuz", 5, 2, 16, 57344.0, "nan"),
            _E8M0,
            _float("float6_e2m3fn", 2, 3, 1, 7.5, ""),
            _float("float6_e3m2fn", 3, 2, 3, 28.0, ""),
            _float("float4_e2m1fn", 2, 1, 1, 6.0, ""),
            _int("int16", 16, True),
            _int("int8", 8, True),
            _int("uint8", 8, False),
            _int("int4", 4, True),
            _int("uint4", 4, False),
            _int("int2", 2, True),
        )
    }
)

_SHORT = {name.split("_", 1)[1]: name for name in FORMATS if "_" in name}

QType = str | Format | np.dtype | type


def get_format(qtype: QType) -> Format:
    """Returns the format for a name, a short name, a dtype or a Format.

    Raises:
      ValueError: no such format; names the nearest one.
    """
    if isinstance(qtype, Format):
        return qtype
    name = qtype if isinstance(qtype, str) else jnp.dtype(qtype).name
    name = _SHORT.get(name, name)
    if name not in FORMATS:
        choices.check("format", name, [*FORMATS, *_SHORT])
    return FORMATS[name]


def cast(
    x: jax.Array,
    qtype: QType,
    *,
    rounding: str = "nearest_even",
    key: jax.Array | None = None,
    full_range: bool = False,
) -> jax.Array:
    """Rounds to the values of a format, saturating, and returns their codes.

    Values beyond the format's range, ±Inf included, become its largest finite value, also where it
    has an infinity. NaN stays NaN where the format has one; in integers, FP6 and FP4 it becomes
    code 0, and a QArray then carries a NaN scale. E8M0 has neither zero nor sign: what is below
    2^-127 becomes 2^-127.

    Args:
      x: floating-point array of any shape; anything but bfloat16 is taken as float32 first.
      qtype: a format.
      rounding: 'nearest_even' (ties in E8M0 go up), 'nearest_away', 'truncate' (towards zero) or
        'stochastic'.
      key: a PRNG key for 'stochastic'; one independent draw per element.
      full_range: whether signed integers use their lowest code, as -128; otherwise clipping is
        symmetric, because asymmetric clipping biases gradients (arXiv:2510.25602).

    Returns:
      Codes of dtype `get_format(qtype).dtype`, shape of `x`.

    Raises:
      ValueError: unknown format or rounding, stochastic rounding without a key, or `x` is not
        floating-point.
    """
    fmt = get_format(qtype)
    rounding_lib.check_rounding(rounding, key)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"cast takes floating-point values, not {x.dtype}: use x.astype first.")
    if fmt.kind == "float" and rounding == "nearest_even":
        if fmt.name == "float16":
            return _clip_and_convert(x, fmt)
        if fmt.bits == 8:
            return lax.platform_dependent(
                x,
                cpu=functools.partial(_nearest_even_by_bits, fmt=fmt),
                default=functools.partial(_clip_and_convert, fmt=fmt),
            )
    x = x.astype(jnp.float32)
    if fmt.kind == "int":
        low, high = jnp.float32(fmt.min if full_range else fmt.narrow_min), jnp.float32(fmt.max)
        x = jnp.where(jnp.isnan(x), jnp.float32(0), jnp.clip(x, low, high))
        convert = lambda x: rounding_lib.round_to_integer(x, rounding, key).astype(fmt.dtype)
        if rounding == "nearest_even" and fmt.bits in (8, 16):
            return lax.platform_dependent(x, cpu=functools.partial(_integers_by_bits, fmt=fmt), default=convert)
        return convert(x)
    if fmt.kind == "scale":
        return _as_codes(rounding_lib.exponent_code(x, rounding, key), fmt)
    if fmt.name == "float32":
        return rounding_lib.without_infinities(x)
    if rounding == "nearest_even":
        return _nearest_even_by_bits(x, fmt)
    return _as_codes(rounding_lib.round_float(x, fmt, rounding, key), fmt)


def scale_to_e8m0(scale: jax.Array) -> jax.Array:
    """Rounds scales up to E8M0.

    Up, so that the largest value of a block never saturates (Mishra et al. 2025, Recipes for
    pre-training LLMs with MXFP8, arXiv:2506.08027); `cast(scale, 'e8m0fnu')` goes to nearest.

    Args:
      scale: float32 array of any shape, not negative.

    Returns:
      float8_e8m0fnu array, shape of `scale`, in [2^-126, 2^127]; NaN stays NaN.
    """
    return cast(rounding_lib.ceil_power_of_two(scale), "float8_e8m0fnu")


def decode(codes: jax.Array, qtype: QType, dtype: np.dtype | type = jnp.float32) -> jax.Array:
    """Returns the values of codes: exact in float32, and in any dtype that holds the format.

    Args:
      codes: array of dtype `get_format(qtype).dtype`, any shape.
      qtype: a format.
      dtype: floating dtype of the result.

    Raises:
      ValueError: `codes` has another dtype than the format's codes.
    """
    fmt = get_format(qtype)
    if codes.dtype != fmt.dtype:
        raise ValueError(f"Codes of {fmt.name} are {fmt.dtype}, not {codes.dtype}: use cast to make them.")
    if fmt.name == "bfloat16" and jnp.dtype(dtype) == jnp.float32:
        # A convert may flush subnormals.
        bits = lax.bitcast_convert_type(codes, jnp.uint16).astype(jnp.uint32) << np.uint32(16)
        return lax.bitcast_convert_type(bits, jnp.float32)
    convert = lambda codes: codes.astype(dtype)
    by_bits = lambda codes: _narrow_exactly(_small_float_values(codes, fmt), dtype)
    if fmt.bits == 6:
        return by_bits(codes)
    if fmt.bits == 8 and fmt.kind == "float" and jnp.dtype(dtype) != jnp.float16:
        return lax.platform_dependent(codes, cpu=by_bits, default=convert)
    if fmt.bits <= 8 and fmt.kind == "int":
        narrowed = lambda codes: _narrow_exactly(codes.astype(jnp.float32), dtype)
        return lax.platform_dependent(codes, cpu=narrowed, default=convert)
    return convert(codes)


def _clip_and_convert(x: jax.Array, fmt: Format) -> jax.Array:
    # bfloat16 is clipped as it is where it holds the bound exactly, which saves a convert.
    exact = x.dtype == jnp.bfloat16 and float(np.asarray(fmt.max, x.dtype)) == fmt.max
    x = x if exact else x.astype(jnp.float32)
    limit = np.asarray(fmt.max, x.dtype)
    return jnp.clip(x, -limit, limit).astype(fmt.dtype)


def _nearest_even_by_bits(x: jax.Array, fmt: Format) -> jax.Array:
    return _as_codes(rounding_lib.nearest_even_code(x.astype(jnp.float32), fmt), fmt)


def _integers_by_bits(x: jax.Array, fmt: Format) -> jax.Array:
    # The adder rounds, and leaves two's complement in the low bits; XLA's convert to int8 is not vectorized on CPUs.
    bits = lax.bitcast_convert_type(x + jnp.float32(1.5 * 2**23), jnp.uint32)
    return _as_codes(bits & np.uint32((1 << fmt.bits) - 1), fmt)


def _as_codes(code: jax.Array, fmt: Format) -> jax.Array:
    unsigned = {16: jnp.uint16, 8: jnp.uint8, 6: jnp.uint8, 4: jnp.uint4}[fmt.bits]
    return lax.bitcast_convert_type(code.astype(unsigned), fmt.dtype)


def _narrow_exactly(x: jax.Array, dtype: np.dtype | type) -> jax.Array:
    """Converts float32 values that `dtype` holds; to bfloat16 by dropping zero bits, ten times faster on CPUs."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32) >> np.uint32(16)
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def _small_float_values(codes: jax.Array, fmt: Format) -> jax.Array:
    """The values of FP6 and FP8 codes, float32; on CPUs twice as fast as XLA's convert."""
    u32 = np.uint32
    if fmt.bits == 8:
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    bits = codes.astype(jnp.uint32)
    sign_bit = 1 << (fmt.bits - 1)
    magnitude = bits & u32(sign_bit - 1)
    # Exponent and mantissa moved to where float32 has them, the exponent rebiased. A subnormal has the exponent of
    # the smallest normal but no hidden bit, which is taken off again.
    moved = (magnitude << u32(23 - fmt.mantissa_bits)) + u32((127 - fmt.bias) << 23)
    normal = lax.bitcast_convert_type(moved, jnp.float32)
    subnormal = lax.bitcast_convert_type(moved + u32(1 << 23), jnp.float32) - jnp.float32(fmt.smallest_normal)
    value = jnp.where(magnitude < u32(1 << fmt.mantissa_bits), subnormal, normal)
    if fmt.has_inf:
        value = jnp.where(magnitude > u32(fmt.max_code), jnp.float32(jnp.inf), value)
    signed = lax.bitcast_convert_type(value, jnp.uint32) | ((bits & u32(sign_bit)) << u32(32 - fmt.bits))
    value = lax.bitcast_convert_type(signed, jnp.float32)
    if not fmt.has_nan:
        return value
    first_nan = fmt.max_code + 1 + fmt.has_inf
    is_nan = magnitude >= u32(first_nan) if fmt.has_negative_zero else bits == u32(sign_bit)
    return jnp.where(is_nan, jnp.float32(jnp.nan), value)


def as_bytes(codes: jax.Array) -> jax.Array:
    """The same codes, of 8-bit floats as uint8: XLA:CPU converts FP8 to float16 and back for moving it."""
    return lax.bitcast_convert_type(codes, jnp.uint8) if _is_byte_float(codes.dtype) else codes


def of_bytes(codes: jax.Array, dtype: np.dtype) -> jax.Array:
    """Codes of this dtype, from what `as_bytes` made of them."""
    return lax.bitcast_convert_type(codes, dtype) if _is_byte_float(dtype) else codes


def _is_byte_float(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1 and jnp.finfo(dtype).bits == 8


def bits_of(name: str) -> int:
    """Of one element: of a format, or of a NumPy dtype."""
    return get_format(name).bits if name in FORMATS else np.dtype(name).itemsize * 8
