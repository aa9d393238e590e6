"""Quantized arrays: codes with the scales that give them meaning.

    codes = cast(x · (1 / scale))        x ≈ codes · scale

in float32 whatever the dtype of x, with the very same float32 scale both ways. Multiplying by the
reciprocal, not dividing, because XLA rewrites a division by a scalar into just that where it can:
written out, the codes are the same on every backend, under jit or not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q8jax import choices
from q8jax import codebook as codebook_lib
from q8jax.calibration import SCALE_FORMATS, affine, bounded_scale, scale_from_amax
from q8jax.formats import Format, QType, cast, decode, get_format, scale_to_e8m0
from q8jax.groups import amax, check_scale_shape, per_group, reduce, scale_shape
from q8jax.rounding import check_rounding, round_to_integer

CALIBRATIONS = ("absmax", "minmax")

_LEAVES = ("qvalue", "scale", "zero_point", "codebook")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class QArray:
    """x ≈ (qvalue - zero_point) · scale, or codebook[qvalue] · scale where there is a code book.

    Invariants. The constructor checks those of shape and dtype, `check` those of value. Rebuilding
    from leaves (jit, vmap, scan, tree_map) checks nothing, since leaves need not be arrays there.
      - qvalue: codes, of dtype `get_format(qtype).dtype`.
      - scale: float32, or float8_e8m0fnu; finite and > 0, or NaN where the data had a NaN and the
        format has none. Rank of qvalue; each axis is 1, that of qvalue, or divides it (tiles).
      - zero_point: None, or the codes of zero, int32 in the format's range, shape of scale; integer
        formats only.
      - codebook: None, or finite float32 values of rank 1 in ascending order, at most one per code
        of an unsigned format; not together with a zero point.

    Attributes:
      qvalue: the codes.
      scale: what the values of codes are multiplied by.
      zero_point: the code that means zero, None for 0.
      codebook: the values of the codes, None for the format's own.
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
            raise ValueError(f"qvalue of a {fmt.name} QArray must be {fmt.dtype}, not {self.qvalue.dtype}.")
        if self.scale.dtype not in (jnp.float32, jnp.float8_e8m0fnu):
            raise ValueError(f"scale must be float32 or float8_e8m0fnu, not {self.scale.dtype}.")
        check_scale_shape(self.qvalue.shape, self.scale.shape)
        if self.zero_point is not None:
            _check_zero_point(self.zero_point, self.scale, fmt)
        if self.codebook is not None:
            codebook_lib.check_codebook(self.codebook, fmt)
            if self.zero_point is not None:
                raise ValueError("A codebook places its own zero: leave zero_point out.")

    def check(self) -> "QArray":
        """Returns self if scales, zero points and code book have the values they may; for concrete arrays only.

        Raises:
          ValueError: a scale is zero, negative or infinite, or it is NaN although the format has a
            NaN code; a zero point is no code; a code book descends or is not finite.
        """
        scale = np.asarray(self.scale.astype(jnp.float32))
        healthy = np.isfinite(scale) & (scale > 0)
        if not get_format(self.qtype).has_nan:
            healthy |= np.isnan(scale)
        if not healthy.all():
            raise ValueError(
                f"scale must be finite and > 0, but one is {scale[~healthy][0]}: build it with scale_from_amax."
            )
        if self.zero_point is not None:
            _check_range(np.asarray(self.zero_point), get_format(self.qtype))
        if self.codebook is not None:
            codebook_lib.check_values(self.codebook)
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of scales, zero points, code book, and codes packed to their format's width."""
        code_bits = self.qvalue.size * get_format(self.qtype).bits
        others = (self.scale, self.zero_point, self.codebook)
        return -(-code_bits // 8) + sum(a.size * a.dtype.itemsize for a in others if a is not None)

    def dequantize(self, dtype: np.dtype | type = jnp.float32) -> jax.Array:
        """Returns the values, computed in float32 and then converted to `dtype`."""
        if self.codebook is not None:
            value = codebook_lib.lookup(self.qvalue, self.codebook)
        else:
            value = decode(self.qvalue, self.qtype)
        if self.zero_point is not None:
            value = per_group(jnp.subtract, value, self.zero_point.astype(jnp.float32))
        return per_group(jnp.multiply, value, self.scale.astype(jnp.float32)).astype(dtype)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], str]:
        key = jax.tree_util.GetAttrKey
        return [(key(name), getattr(self, name)) for name in _LEAVES], self.qtype

    def tree_flatten(self) -> tuple[list[Any], str]:
        return [getattr(self, name) for name in _LEAVES], self.qtype

    @classmethod
    def tree_unflatten(cls, qtype: str, leaves: Sequence[Any]) -> "QArray":
        array = object.__new__(cls)
        for name, leaf in zip((*_LEAVES, "qtype"), (*leaves, qtype), strict=True):
            object.__setattr__(array, name, leaf)
        return array


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
    return cast(_scaled(x, scale), qtype, rounding=rounding, key=key, full_range=full_range)


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
    scale: jax.Array | float | None = None,
    zero_point: jax.Array | int | None = None,
    codebook: jax.Array | None = None,
) -> QArray:
    """Quantizes an array.

    ±Inf saturates and does not enter the scale. NaN stays NaN: as a code where the format has one,
    otherwise through the scale of its group.

    Args:
      x: floating-point array of any shape, also empty.
      qtype: format of the codes; with a code book, the unsigned format of the indices.
      channelwise_axes: axes with one scale per index; `groups.granularity` makes them from a word.
      tiled_axes: axis to tile size; one scale per tile.
      calibration: 'absmax', symmetric around zero, or 'minmax', affine with a zero point that
        represents 0 exactly; for integer formats.
      full_range: whether signed integers use their lowest code.
      scale_format: 'float32'; 'power_of_two', rounded up and stored as float32; or 'e8m0', the same
        stored in 8 bits.
      margin: bits of headroom of a computed scale.
      rounding, key: as in `cast`.
      scale: use these scales, a number or float32 or float8_e8m0fnu of rank 0 or of the rank of x,
        instead of computing them.
      zero_point: int32 codes of zero, shape of scale, or a number; only with a given scale.
      codebook: ascending float32 values of rank 1, the largest magnitude in the place of the
        format's max: amax is scaled to it. A book in the units of x, as `fit_codebook` makes it,
        needs scale=1.

    Raises:
      ValueError: unknown or contradictory options, a tile that does not divide its axis, or a
        concrete code book that descends or is not finite.
    """
    fmt = get_format(qtype)
    choices.check("calibration", calibration, CALIBRATIONS)
    choices.check("scale_format", scale_format, SCALE_FORMATS)
    check_rounding(rounding, key)
    if fmt.kind == "scale":
        raise ValueError(f"{fmt.name} holds scales, not values: use it as scale_format='e8m0'.")
    if codebook is not None:
        codebook_lib.check_codebook(codebook, fmt)
        if not isinstance(codebook, jax.core.Tracer):
            codebook_lib.check_values(codebook)
        if calibration != "absmax" or rounding != "nearest_even" or full_range:
            raise ValueError("codebook= takes calibration='absmax' and rounding='nearest_even' only.")
    if calibration == "minmax" and fmt.kind != "int":
        raise ValueError(f"calibration='minmax' needs an integer qtype, not {fmt.name}.")
    if scale is not None:
        if channelwise_axes or tiled_axes or margin or calibration == "minmax":
            raise ValueError("scale= is used as it is: leave out axes, margin and calibration.")
        if scale_format == "e8m0":
            raise ValueError("scale= is used as it is: pass a float8_e8m0fnu array for E8M0.")
        scale = jnp.float32(scale) if isinstance(scale, int | float) else scale
        scale = scale.reshape((1,) * x.ndim) if scale.ndim == 0 else scale
        check_scale_shape(x.shape, scale.shape)
        if zero_point is not None:
            zero_point = jnp.int32(zero_point) if isinstance(zero_point, int) else zero_point
            zero_point = zero_point.reshape(scale.shape)
        if codebook is not None or not fmt.has_nan:
            scale = _with_nan_of(x, scale)
    elif zero_point is not None:
        raise ValueError("zero_point= needs scale= too: leave both out to have them computed.")
    else:
        options: dict[str, Any] = {"margin": margin, "scale_format": scale_format}
        if calibration == "minmax":
            shape = scale_shape(x.shape, channelwise_axes, tiled_axes)
            scale, zero_point = affine(x, shape, fmt, full_range=full_range, **options)
        else:
            axes = {"channelwise_axes": channelwise_axes, "tiled_axes": tiled_axes}
            scale = _symmetric_scale(x, fmt, codebook, axes, full_range, options)
        if scale_format == "e8m0":
            scale = scale_to_e8m0(scale)

    exact = scale.astype(jnp.float32)
    if codebook is not None:
        qvalue = codebook_lib.nearest(_scaled(x, exact), codebook).astype(fmt.dtype)
    elif zero_point is not None:
        qvalue = _encode_affine(x, exact, zero_point, fmt, rounding, key, full_range)
    else:
        qvalue = encode(x, exact, fmt, rounding=rounding, key=key, full_range=full_range)
    return QArray(qvalue, scale, zero_point, codebook, qtype=fmt.name)


def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    return per_group(jnp.multiply, x.astype(jnp.float32), 1 / scale)


def _with_nan_of(x: jax.Array, scale: jax.Array) -> jax.Array:
    has_nan = reduce(jnp.max, jnp.isnan(x).astype(jnp.float32), scale.shape) > 0
    return jnp.where(has_nan, np.asarray(np.nan, scale.dtype), scale)


def _symmetric_scale(
    x: jax.Array,
    fmt: Format,
    codebook: jax.Array | None,
    axes: dict[str, Any],
    full_range: bool,
    options: dict[str, Any],
) -> jax.Array:
    if codebook is not None:
        inverse_top = 1 / jnp.max(jnp.abs(codebook))
        return bounded_scale(amax(x, keep_nan=True, **axes), inverse_top, **options)
    if fmt.kind == "int" and not fmt.signed:
        raise ValueError(
            f"{fmt.name} has no negative codes: use calibration='minmax', or pass scale= for data "
            "that is never negative."
        )
    found = amax(x, keep_nan=not fmt.has_nan, **axes)
    return scale_from_amax(found, fmt, full_range=full_range, **options)


def _encode_affine(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array,
    fmt: Format,
    rounding: str,
    key: jax.Array | None,
    full_range: bool,
) -> jax.Array:
    # Clipped to twice the range first, so that rounding and the sum with the zero point are exact.
    limit = np.float32(2.0 ** (fmt.bits + 1))
    code = round_to_integer(jnp.clip(_scaled(x, scale), -limit, limit), rounding, key)
    code = per_group(jnp.add, code, zero_point.astype(jnp.float32))
    return cast(code, fmt, full_range=full_range)


def _check_zero_point(zero_point: jax.Array, scale: jax.Array, fmt: Format) -> None:
    if fmt.kind != "int":
        raise ValueError(f"zero_point needs an integer qtype, not {fmt.name}.")
    if zero_point.dtype != jnp.int32 or zero_point.shape != scale.shape:
        raise ValueError(
            f"zero_point must be int32 with the shape of scale, {scale.shape}, not "
            f"{zero_point.dtype} of shape {zero_point.shape}."
        )


def _check_range(zero_point: np.ndarray, fmt: Format) -> None:
    outside = (zero_point < fmt.min) | (zero_point > fmt.max)
    if outside.any():
        raise ValueError(
            f"zero_point must be a code of {fmt.name}, from {fmt.min:g} to {fmt.max:g}, but one is "
            f"{zero_point[outside][0]}: clip it to that range."
        )
