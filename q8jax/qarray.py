"""Quantized arrays: codes with the scales that give them meaning.

How x becomes codes, in float32 whatever the dtype of x:

    amax  = max |x| over the finite entries of a group (tensor, channel, row, tile, block)
    scale = amax · (2^margin / format max), made a power of two if asked, within [2^-126, 2^126]; 1 where amax is 0
    codes = cast(x · (1 / scale))

Multiplying by the reciprocal, not dividing, because XLA rewrites a division by a scalar or a constant into just that
where it can: written out, the codes are the same on every backend, under jit or not. Bounding the scale keeps both
it and its reciprocal normal numbers, so amax 1e-36 does not give scale 0 and 3e38 does not give reciprocal 0; only
the formats whose max is below 4 (int2, code books) saturate above 2^126 · max. The bound costs precision only where
float32 itself runs out, amax below about 1e-36.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax import choices
from q8jax import codebook as codebook_lib
from q8jax.formats import Format, cast, ceil_power_of_two, decode, get_format, scale_to_e8m0
from q8jax.rounding import check_rounding, round_to_integer

CALIBRATIONS = ("absmax", "minmax")
SCALE_FORMATS = ("float32", "power_of_two", "e8m0")
GRANULARITIES = ("tensor", "channel", "row", "tile", "block")

MIN_SCALE = 2.0**-126
MAX_SCALE = 2.0**126

QType = str | Format | np.dtype | type


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class QArray:
    """x ≈ (qvalue - zero_point) · scale, or codebook[qvalue] · scale where there is a code book.

    Invariants. The constructor checks those of shape and dtype and `check` those of value; rebuilding from leaves
    (jit, vmap, scan, tree_map) checks nothing, since leaves need not be arrays there.
      - qvalue: codes, of dtype `get_format(qtype).dtype`.
      - scale: float32, or float8_e8m0fnu; every value finite and > 0, or NaN where the data had a NaN and the format
        has none. Rank of qvalue; each axis is 1 (shared), that of qvalue (one per index), or divides it (tiles).
      - zero_point: None, or int32 codes of zero with the shape of scale; integer formats only.
      - codebook: None, or float32 values of rank 1, at most 2^bits of them; unsigned formats without a zero point only.

    Attributes:
      qvalue: the codes.
      scale: what the codes are multiplied by.
      zero_point: the code that means zero, or None for 0.
      codebook: the values of the codes, or None for the format's own.
      qtype: name of the format of the codes; static.
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    codebook: jax.Array | None = None
    qtype: str = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        fmt = get_format(self.qtype)
        object.__setattr__(self, "qtype", fmt.name)
        if self.qvalue.dtype != fmt.dtype:
            raise ValueError(
                f"qvalue of a {fmt.name} QArray must be {fmt.dtype}, not {self.qvalue.dtype}."
            )
        if self.scale.dtype not in (jnp.float32, jnp.float8_e8m0fnu):
            raise ValueError(f"scale must be float32 or float8_e8m0fnu, not {self.scale.dtype}.")
        _check_scale_shape(self.qvalue.shape, self.scale.shape)
        if self.zero_point is not None:
            if fmt.kind != "int":
                raise ValueError(f"zero_point needs an integer qtype, not {fmt.name}.")
            if self.zero_point.dtype != jnp.int32 or self.zero_point.shape != self.scale.shape:
                raise ValueError(
                    f"zero_point must be int32 with the shape of scale, {self.scale.shape}, "
                    f"not {self.zero_point.dtype} with shape {self.zero_point.shape}."
                )
        if self.codebook is not None:
            if self.zero_point is not None:
                raise ValueError(
                    "zero_point and codebook exclude each other: a code book places its own zero."
                )
            codebook_lib.check_codebook(self.codebook, fmt)

    def check(self) -> "QArray":
        """Returns self if every scale is finite and > 0, or NaN where NaN is allowed; for concrete arrays.

        Raises:
          ValueError: a scale is zero, negative, infinite, or NaN although the format has a NaN code.
        """
        scale = np.asarray(self.scale.astype(jnp.float32))
        healthy = np.isfinite(scale) & (scale > 0)
        if not get_format(self.qtype).has_nan:
            healthy |= np.isnan(scale)
        if not healthy.all():
            raise ValueError(
                f"scale must be finite and > 0, but has {scale[~healthy][0]}: rebuild it with quantize."
            )
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of codes at their format's width, scales, zero points and code book."""
        code_bits = self.qvalue.size * get_format(self.qtype).bits
        others = [self.scale, self.zero_point, self.codebook]
        return -(-code_bits // 8) + sum(a.size * a.dtype.itemsize for a in others if a is not None)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the values, computed in float32 and then converted to `dtype`; shape of qvalue."""
        if self.codebook is not None:
            value = codebook_lib.lookup(self.qvalue, self.codebook)
        else:
            value = decode(self.qvalue, self.qtype)
        if self.zero_point is not None:
            value = _per_group(jnp.subtract, value, self.zero_point.astype(jnp.float32))
        return _per_group(jnp.multiply, value, self.scale.astype(jnp.float32)).astype(dtype)

    def tree_flatten_with_keys(self):
        names = ("qvalue", "scale", "zero_point", "codebook")
        return [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names], self.qtype

    def tree_flatten(self):
        return (self.qvalue, self.scale, self.zero_point, self.codebook), self.qtype

    @classmethod
    def tree_unflatten(cls, qtype, leaves):
        array = object.__new__(cls)
        for name, leaf in zip(("qvalue", "scale", "zero_point", "codebook"), leaves, strict=True):
            object.__setattr__(array, name, leaf)
        object.__setattr__(array, "qtype", qtype)
        return array


def granularity(word: str, ndim: int, size: int = 128) -> dict[str, Any]:
    """Returns `channelwise_axes` and `tiled_axes` for an array whose last axis is the row that a dot sums over.

    'tensor': one scale. 'channel': one per index of the last axis (a weight [in, out]: one per output). 'row': one
    per row, that is per token of [..., tokens, features]. 'tile': one per 1×size piece of a row. 'block': one per
    size×size block of the last two axes, and leading axes apart.

    Args:
      word: one of GRANULARITIES.
      ndim: rank of the array.
      size: edge K of tiles and blocks.

    Raises:
      ValueError: unknown word, or a rank too low for it.
    """
    choices.check("granularity", word, GRANULARITIES)
    needed = {"tensor": 0, "block": 2}.get(word, 1)
    if ndim < needed:
        raise ValueError(
            f"granularity {word!r} needs an array of rank {needed} or more, not {ndim}."
        )
    if word == "tensor":
        return {"channelwise_axes": (), "tiled_axes": None}
    if word == "channel":
        return {"channelwise_axes": (ndim - 1,), "tiled_axes": None}
    if word == "row":
        return {"channelwise_axes": tuple(range(ndim - 1)), "tiled_axes": None}
    if word == "tile":
        return {"channelwise_axes": tuple(range(ndim - 1)), "tiled_axes": {ndim - 1: size}}
    return {
        "channelwise_axes": tuple(range(ndim - 2)),
        "tiled_axes": {ndim - 2: size, ndim - 1: size},
    }


def scale_shape(
    shape: Sequence[int],
    channelwise_axes: Sequence[int] = (),
    tiled_axes: Mapping[int, int] | None = None,
) -> tuple[int, ...]:
    """Returns the shape of the scales of an array: 1 on shared axes, n on channelwise ones, n / tile on tiled ones.

    Raises:
      ValueError: an axis is out of range or named twice, or a tile does not divide its axis.
    """
    result = [1] * len(shape)
    tiles = {**dict.fromkeys(channelwise_axes, 1), **(tiled_axes or {})}
    seen: set[int] = set()
    for axis, tile in tiles.items():
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"axis {axis} of channelwise_axes or tiled_axes is out of range for rank {len(shape)}."
            )
        seen.add(axis % len(shape))
        if tile < 1 or shape[axis] % tile:
            raise ValueError(
                f"tiled_axes: a tile of {tile} does not divide axis {axis} of size {shape[axis]}; "
                "choose a divisor, or pad the array."
            )
        result[axis] = shape[axis] // tile
    if len(seen) < len(tuple(channelwise_axes)) + len(tiled_axes or {}):
        raise ValueError(
            "channelwise_axes and tiled_axes name an axis twice: leave it in one of them."
        )
    return tuple(result)


def amax(
    x: jax.Array,
    *,
    channelwise_axes: Sequence[int] = (),
    tiled_axes: Mapping[int, int] | None = None,
    keep_nan: bool = False,
) -> jax.Array:
    """Returns the largest finite |x| of each group.

    Args:
      x: floating-point array of any shape; the reduction runs in its dtype.
      channelwise_axes: axes that keep one value per index.
      tiled_axes: axis to tile size, for one value per tile.
      keep_nan: whether a NaN makes its group's result NaN, for formats without a NaN code.

    Returns:
      float32 of shape `scale_shape(...)`; 0 for a group that is empty or has no finite entry.
    """
    skipped = jnp.isinf(x) if keep_nan else ~jnp.isfinite(x)
    magnitude = jnp.where(skipped, jnp.zeros((), x.dtype), jnp.abs(x))
    shape = scale_shape(x.shape, channelwise_axes, tiled_axes)
    return _reduce(jnp.max, magnitude, shape).astype(jnp.float32)


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
      amax: float32 array, >= 0. Inf is taken as the largest scale; NaN gives NaN.
      qtype: a format. Those with float32's exponent range (bfloat16, float32) need no scale and get 1.
      margin: bits of headroom: the scale is 2^margin times larger.
      scale_format: 'float32', or 'power_of_two' or 'e8m0' for the power of two above; float32 in every case.
      full_range: whether the codes may use -128: then 127.5, the middle, takes the place of 127.

    Returns:
      float32, shape of `amax`, in [2^-126, 2^126]; 1 where amax is 0.

    Raises:
      ValueError: unknown format or scale format.
    """
    fmt = get_format(qtype)
    choices.check("scale_format", scale_format, SCALE_FORMATS)
    if fmt.kind == "float" and fmt.exponent_bits == 8:
        return jnp.ones_like(amax)
    top = fmt.max + 0.5 if full_range and fmt.kind == "int" and fmt.signed else fmt.max
    return _scale(amax, np.float32(1) / np.float32(top), margin, scale_format)


def encode(
    x: jax.Array,
    scale: jax.Array,
    qtype: QType,
    *,
    rounding: str = "nearest_even",
    key: jax.Array | None = None,
    full_range: bool = False,
) -> jax.Array:
    """Returns the codes of x for given scales: cast(x · (1 / scale)), in float32.

    Args:
      x: floating-point array.
      scale: float32 array of the rank of x; each axis is 1, that of x, or divides it.
      qtype, rounding, key, full_range: as in `cast`.

    Returns:
      Codes of the format's dtype, shape of `x`.
    """
    scaled = _per_group(jnp.multiply, x.astype(jnp.float32), 1 / scale)
    return cast(scaled, qtype, rounding=rounding, key=key, full_range=full_range)


def quantize(
    x: jax.Array,
    qtype: QType,
    *,
    channelwise_axes: Sequence[int] = (),
    tiled_axes: Mapping[int, int] | None = None,
    calibration: str = "absmax",
    full_range: bool = False,
    scale_format: str = "float32",
    margin: float = 0,
    rounding: str = "nearest_even",
    key: jax.Array | None = None,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
    codebook: jax.Array | None = None,
) -> QArray:
    """Quantizes an array.

    ±Inf saturates and does not enter the scale. NaN stays NaN: as a code where the format has one, otherwise through
    the scale of its group.

    Args:
      x: floating-point array of any shape, also empty.
      qtype: format of the codes; with a code book, the unsigned format of the indices.
      channelwise_axes: axes with one scale per index.
      tiled_axes: axis to tile size; one scale per tile.
      calibration: 'absmax', symmetric around zero, or 'minmax', affine with a zero point that represents 0 exactly
        (integer formats).
      full_range: whether signed integers use their lowest code.
      scale_format: 'float32', 'power_of_two' (rounded up, stored as float32) or 'e8m0' (the same, stored in 8 bits).
      margin: bits of headroom of a computed scale.
      rounding, key: as in `cast`.
      scale: use these scales, float32 of rank 0 or of the rank of x, instead of computing them.
      zero_point: int32 codes of zero, with a given scale only and of its shape.
      codebook: float32 values of rank 1, ascending; the largest magnitude takes the place of the format's max.

    Raises:
      ValueError: unknown or contradictory options, or a tile that does not divide its axis.
    """
    fmt = get_format(qtype)
    choices.check("calibration", calibration, CALIBRATIONS)
    choices.check("scale_format", scale_format, SCALE_FORMATS)
    if fmt.kind == "scale":
        raise ValueError(
            f"qtype {fmt.name} holds scales, not values: use it as scale_format='e8m0'."
        )
    if scale is not None and (
        channelwise_axes or tiled_axes or margin or scale_format != "float32"
    ):
        raise ValueError(
            "scale= excludes channelwise_axes, tiled_axes, margin and scale_format: its shape says it all."
        )
    if zero_point is not None and scale is None:
        raise ValueError("zero_point= needs scale=; leave both out to compute them.")
    if codebook is not None:
        if (
            calibration != "absmax"
            or rounding != "nearest_even"
            or zero_point is not None
            or full_range
        ):
            raise ValueError(
                "codebook= goes with calibration='absmax' and rounding to nearest, and no other range."
            )
        codebook_lib.check_codebook(codebook, fmt)
    elif fmt.kind == "int" and not fmt.signed and calibration == "absmax" and scale is None:
        raise ValueError(
            f"{fmt.name} has no negative codes: use calibration='minmax', or give scale=."
        )
    if calibration == "minmax" and (fmt.kind != "int" or scale is not None):
        raise ValueError("calibration='minmax' needs an integer qtype and no given scale.")

    if scale is not None:
        scale = scale.reshape((1,) * x.ndim) if scale.ndim == 0 else scale
        _check_scale_shape(x.shape, scale.shape)
        if zero_point is not None:
            zero_point = zero_point.reshape(scale.shape)
    elif calibration == "minmax":
        shape = scale_shape(x.shape, channelwise_axes, tiled_axes)
        scale, zero_point = _affine(x, shape, fmt, full_range, margin, scale_format)
    else:
        kept = amax(
            x,
            channelwise_axes=channelwise_axes,
            tiled_axes=tiled_axes,
            keep_nan=codebook is not None or not fmt.has_nan,
        )
        if codebook is not None:
            scale = _scale(kept, 1 / jnp.max(jnp.abs(codebook)), margin, scale_format)
        else:
            scale = scale_from_amax(
                kept, fmt, margin=margin, scale_format=scale_format, full_range=full_range
            )

    exact_scale = scale.astype(jnp.float32)
    if codebook is not None:
        scaled = _per_group(jnp.multiply, x.astype(jnp.float32), 1 / exact_scale)
        qvalue = codebook_lib.nearest(scaled, codebook).astype(fmt.dtype)
    elif zero_point is not None:
        qvalue = _encode_affine(x, exact_scale, zero_point, fmt, rounding, key, full_range)
    else:
        qvalue = encode(x, exact_scale, fmt, rounding=rounding, key=key, full_range=full_range)
    stored = scale_to_e8m0(scale) if scale_format == "e8m0" else scale
    return QArray(qvalue, stored, zero_point, codebook, qtype=fmt.name)


def _scale(amax: jax.Array, inverse_top: Any, margin: float, scale_format: str) -> jax.Array:
    # One multiplication: XLA would merge two by constants into one, and round differently.
    scale = amax * (inverse_top * np.float32(2.0**margin))
    if scale_format != "float32":
        scale = ceil_power_of_two(scale)
    scale = jnp.clip(scale, jnp.float32(MIN_SCALE), jnp.float32(MAX_SCALE))
    return jnp.where(amax == 0, jnp.float32(1), scale)


def _affine(
    x: jax.Array,
    shape: tuple[int, ...],
    fmt: Format,
    full_range: bool,
    margin: float,
    scale_format: str,
) -> tuple[jax.Array, jax.Array]:
    finite = jnp.where(jnp.isinf(x), jnp.zeros((), x.dtype), x)
    # Reductions start from 0, so the range contains it.
    high = _reduce(jnp.max, finite, shape).astype(jnp.float32)
    low = _reduce(jnp.min, finite, shape).astype(jnp.float32)
    lowest = fmt.min if full_range else fmt.narrow_min
    # Halves, because high - low may overflow.
    span = high * jnp.float32(0.5) - low * jnp.float32(0.5)
    scale = _scale(span, np.float32(2) / np.float32(fmt.max - lowest), margin, scale_format)
    zero_point = jnp.float32(lowest) - lax.round(
        low * (1 / scale), lax.RoundingMethod.TO_NEAREST_EVEN
    )
    zero_point = jnp.clip(zero_point, jnp.float32(lowest), jnp.float32(fmt.max))
    return scale, jnp.where(jnp.isnan(scale), jnp.float32(0), zero_point).astype(jnp.int32)


def _encode_affine(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array,
    fmt: Format,
    rounding: str,
    key: jax.Array | None,
    full_range: bool,
) -> jax.Array:
    check_rounding(rounding, key)
    scaled = _per_group(jnp.multiply, x.astype(jnp.float32), 1 / scale)
    # Clipped first, so that rounding is exact and the sum with the zero point too.
    limit = jnp.float32(2.0 ** (fmt.bits + 1))
    code = round_to_integer(jnp.clip(scaled, -limit, limit), rounding, key)
    code = _per_group(jnp.add, code, zero_point.astype(jnp.float32))
    return cast(code, fmt, full_range=full_range)


def _split(shape: Sequence[int], groups: Sequence[int]) -> list[tuple[int, ...]]:
    # A tiled axis n becomes (n / tile, tile); the others stay.
    return [(g, n // g) if 1 < g < n else (n,) for n, g in zip(shape, groups, strict=True)]


def _reduce(reduction: Any, x: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    split = _split(x.shape, groups)
    axes: list[int] = []
    position = 0
    for sizes, group in zip(split, groups, strict=True):
        position += len(sizes)
        if len(sizes) == 2 or group != sizes[0]:
            axes.append(position - 1)
    reshaped = x.reshape([n for sizes in split for n in sizes])
    return reduction(reshaped, axis=tuple(axes), initial=0).reshape(groups)


def _per_group(operation: Any, x: jax.Array, per_group: jax.Array) -> jax.Array:
    split = _split(x.shape, per_group.shape)
    if all(len(sizes) == 1 for sizes in split):
        return operation(x, per_group)
    wide = [n for sizes in split for n in sizes]
    narrow = [
        n
        for sizes, group in zip(split, per_group.shape, strict=True)
        for n in ((group, 1) if len(sizes) == 2 else (group,))
    ]
    return operation(x.reshape(wide), per_group.reshape(narrow)).reshape(x.shape)


def _check_scale_shape(shape: Sequence[int], groups: Sequence[int]) -> None:
    fits = len(shape) == len(groups) and all(
        g in (1, n) or (g and n % g == 0) for n, g in zip(shape, groups, strict=True)
    )
    if not fits:
        raise ValueError(
            f"scale of shape {tuple(groups)} does not fit values of shape {tuple(shape)}: "
            "give it the same rank, and each axis 1, the full size, or a divisor of it."
        )
