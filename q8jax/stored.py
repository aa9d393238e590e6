"""Quantized arrays as they lie in memory and on disk.

A `QArray` is what arithmetic is defined on; a `Stored` is the same array in as few bytes as its format needs:

  codes         of 8 bits as they are (floats as their bytes); narrower ones several to a byte, see `packing`
  scale         float32; or rounded to bfloat16, to E8M0, or to E4M3 times one power of two for the whole array, the
                two-level scales of NVFP4. Then codes were made with the rounded scale, so that nothing is lost.
  zero_point    of 8 bits, or packed as codes are
  codebook      float32

so that `Stored.of(array).array == array`, bit for bit.

References:
  NVIDIA 2025, Pretraining large language models with NVFP4, arXiv:2509.25149, section 2 (two-level scales).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax import choices, packing
from q8jax.codes import code_sums
from q8jax.formats import as_bytes, cast, decode, get_format, of_bytes
from q8jax.groups import per_group
from q8jax.qarray import QArray
from q8jax.rounding import ceil_power_of_two

STORED_SCALES = ("float32", "bfloat16", "e8m0", "e4m3")
_BLOCK_SCALE = get_format("e4m3fn")


def round_scale(scale: jax.Array, stored_as: str) -> jax.Array:
    """Rounds float32 scales of a matrix to what is stored of them, float32 of the same shape; to nearest, E8M0 up.

    A scale that E4M3 would round to zero becomes its least value; NaN stays NaN.
    """
    choices.check("stored scale", stored_as, STORED_SCALES)
    if stored_as == "bfloat16":
        return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    if stored_as == "e8m0":
        return ceil_power_of_two(scale)
    if stored_as == "e4m3":
        codes, whole = _two_levels(scale)
        return decode(codes, _BLOCK_SCALE) * whole
    return scale


def _two_levels(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes of the scales of a matrix, or of each of a stack, and the power of two that they are times."""
    largest = jnp.max(jnp.where(jnp.isnan(scale), jnp.float32(0), scale), axis=(-2, -1), keepdims=True, initial=0)
    power = ceil_power_of_two(largest * np.float32(1 / _BLOCK_SCALE.max))
    power = jnp.where(largest > 0, power, jnp.float32(1))
    least = np.float32(_BLOCK_SCALE.smallest_subnormal)
    return cast(jnp.maximum(scale / power, least), _BLOCK_SCALE), power


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static about a stored array.

    Attributes:
      qtype: name of the format of the codes.
      bits: that a code takes: those of its format, or as many as the code book needs.
      axis: -1 or -2, along which narrow codes share bytes.
      size: codes along it.
      groups: scales along it.
      scales: one of STORED_SCALES.
    """

    qtype: str
    bits: int
    axis: int
    size: int
    groups: int
    scales: str = "float32"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A QArray in few bytes; a pytree of arrays, so that it can be stacked, scanned over and sharded.

    Attributes:
      codes: int8, uint8, or bytes of narrower codes and of 8-bit floats.
      scale: float32, bfloat16, or uint8, the bytes of E8M0 and E4M3.
      zero_point: int8 or uint8, or bytes of narrower ones; None for 0.
      codebook: float32, or None.
      whole: float32 with every axis but those of a stack 1, what E4M3 scales are times; None of others.
      sums: int32, `codes.code_sums`, for products with left operands that have a zero point; None where there are none.
      form: what is static.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    codebook: jax.Array | None
    whole: jax.Array | None
    sums: jax.Array | None
    form: Form = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, array: QArray, *, axis: int = -2, scales: str = "float32") -> "Stored":
        """Stores an array.

        Args:
          array: of rank 2 or more; leading axes are a stack.
          axis: -1 or -2, along which narrow codes share bytes.
          scales: what is stored of scales, one of STORED_SCALES; they have to be rounded to it, by `round_scale`.

        Raises:
          ValueError: a format of more than 8 bits, a rank below 2, or, of concrete arrays, scales that are not rounded.
        """
        fmt = get_format(array.qtype)
        choices.check("stored scale", scales, STORED_SCALES)
        if fmt.bits > 8 or array.ndim < 2:
            raise ValueError(f"Only matrices of codes of at most 8 bits are stored, not {fmt.name} {array.shape}.")
        bits = 8 if fmt.bits > 4 else fmt.bits
        if array.codebook is not None:
            needed = (array.codebook.shape[-1] - 1).bit_length()
            bits = next(width for width in packing.WIDTHS if width >= needed)
        form = Form(fmt.name, bits, axis, array.shape[axis], array.scale.shape[axis], scales)
        scale = array.scale.astype(jnp.float32)
        whole = None
        if scales == "e4m3":
            codes, whole = _two_levels(scale)
            kept = as_bytes(codes)
        else:
            kept = as_bytes(
                scale.astype({"bfloat16": jnp.bfloat16, "e8m0": jnp.float8_e8m0fnu}.get(scales, scale.dtype))
            )
        zero_point = array.zero_point
        if zero_point is not None:
            zero_point = _packed(zero_point.astype(fmt.dtype), form)
        stored = cls(_packed(array.qvalue, form), kept, zero_point, array.codebook, whole, None, form)
        if not isinstance(scale, jax.core.Tracer) and not np.array_equal(
            np.asarray(stored._scale()), np.asarray(scale), equal_nan=True
        ):
            raise ValueError(f"These scales are none that {scales} holds: make codes with `round_scale` of them.")
        return stored

    def check(self) -> "Stored":
        """Returns self if it is what a QArray was stored as; for concrete arrays, as those of a file.

        Raises:
          ValueError: parts of other dtypes or shapes than the form says, or values that no QArray has.
        """
        form, fmt = self.form, get_format(self.form.qtype)
        choices.check("stored scale", form.scales, STORED_SCALES)
        if form.bits not in packing.WIDTHS or form.axis not in (-1, -2) or self.codes.ndim < 2:
            raise ValueError(f"{form} describes no stored matrix.")
        narrow = form.bits < 8
        own = np.dtype(jnp.uint8) if narrow or fmt.kind != "int" else fmt.dtype
        per_byte = 8 // form.bits
        wanted = {"codes": (-(-form.size // per_byte), own)}
        of_scale = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(form.scales, jnp.uint8)
        wanted["scale"] = (form.groups, np.dtype(of_scale))
        wanted["zero_point"] = (-(-form.groups // per_byte), own)
        for name, (length, dtype) in wanted.items():
            part = getattr(self, name)
            if part is not None and (part.ndim < 2 or part.shape[form.axis] != length or part.dtype != dtype):
                raise ValueError(f"{name} is {part.dtype} of shape {part.shape}, where {form} has {length} {dtype}.")
        if (self.whole is not None) != (form.scales == "e4m3"):
            raise ValueError("Scales of E4M3, and no others, are times one number.")
        self.array.check()
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.form.axis] = self.form.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes in memory, and on disk."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def array(self) -> QArray:
        """The array that was stored."""
        form = self.form
        codes = self._unpacked(self.codes, form.size)
        return QArray(codes, self._scale(), self._zero_point(), self.codebook, qtype=form.qtype)

    @property
    def operand(self) -> QArray:
        """The same values in codes of 8 bits, as products take them: int4 as int8, FP4 as E4M3."""
        form, fmt = self.form, get_format(self.form.qtype)
        if form.bits == 8 or self.codebook is not None:
            return self.array
        if fmt.kind == "float":
            # Every value of FP4 is one of E4M3.
            codes = packing.unpack(self.codes, form.bits, form.size, form.axis, signed=False)
            return QArray(
                of_bytes(_fp4_as_e4m3(codes), np.dtype(jnp.float8_e4m3fn)), self._scale(), qtype="float8_e4m3fn"
            )
        codes = packing.unpack(self.codes, form.bits, form.size, form.axis, signed=fmt.signed)
        zero_point = self._zero_point()
        if zero_point is not None:
            codes = per_group(jnp.subtract, codes.astype(jnp.int8), zero_point.astype(jnp.int8))
        return QArray(codes.astype(jnp.int8), self._scale(), qtype="int8")

    def dequantize(self, dtype: np.dtype | type = jnp.float32) -> jax.Array:
        """Returns the values, computed in float32 and then converted to `dtype`."""
        return self.array.dequantize(dtype)

    def with_sums(self) -> "Stored":
        """The same with its `sums`, where products can use them."""
        return dataclasses.replace(self, sums=code_sums(self.operand))

    def rows(self, indices: jax.Array, dtype: np.dtype | type = jnp.float32) -> jax.Array:
        """Returns the values of some rows of a matrix of which each has scales of its own, as of a table of embeddings.

        Args:
          indices: integers of any shape.
          dtype: of the result, [*indices, columns].

        Raises:
          ValueError: no matrix, packed along its rows, or rows that share a scale.
        """
        if self.ndim != 2 or (self.form.bits < 8 and self.form.axis != -1) or self.scale.shape[0] != self.shape[0]:
            raise ValueError("Rows are looked up in a matrix that is packed along -1 and has scales for each row.")
        flat = indices.reshape(-1)
        of_rows = lambda leaf: jnp.take(leaf, flat, axis=0)
        zero_point = None if self.zero_point is None else of_rows(self.zero_point)
        chosen = dataclasses.replace(self, codes=of_rows(self.codes), scale=of_rows(self.scale), zero_point=zero_point)
        return chosen.dequantize(dtype).reshape(*indices.shape, -1)

    def _scale(self) -> jax.Array:
        kept = {"e8m0": jnp.float8_e8m0fnu, "e4m3": jnp.float8_e4m3fn}.get(self.form.scales, self.scale.dtype)
        scale = of_bytes(self.scale, np.dtype(kept))
        if self.whole is not None:
            return decode(scale, _BLOCK_SCALE) * self.whole
        return scale.astype(jnp.float32)

    def _zero_point(self) -> jax.Array | None:
        if self.zero_point is None:
            return None
        return self._unpacked(self.zero_point, self.form.groups).astype(jnp.int32)

    def _unpacked(self, packed: jax.Array, size: int) -> jax.Array:
        fmt = get_format(self.form.qtype)
        if self.form.bits == 8:
            return of_bytes(packed, fmt.dtype)
        codes = packing.unpack(packed, self.form.bits, size, self.form.axis, signed=fmt.kind == "int" and fmt.signed)
        if fmt.kind == "float":
            return lax.bitcast_convert_type(codes.astype(jnp.uint4), fmt.dtype)
        return codes.astype(fmt.dtype)


def _packed(codes: jax.Array, form: Form) -> jax.Array:
    if form.bits == 8:
        return as_bytes(codes)
    fmt = get_format(form.qtype)
    if fmt.kind == "float":
        codes = lax.bitcast_convert_type(codes, jnp.uint4)
    wide: Any = jnp.int8 if fmt.kind == "int" and fmt.signed else jnp.uint8
    return packing.pack(codes.astype(wide), form.bits, form.axis)


def _fp4_as_e4m3(codes: jax.Array) -> jax.Array:
    """Bytes of E4M3 with the values of E2M1 codes, uint8 both."""
    sign, magnitude = (codes & np.uint8(8)) << np.uint8(4), codes & np.uint8(7)
    # Exponents are rebiased from 1 to 7, and the one subnormal, 0.5, is normal in E4M3.
    moved = (magnitude << np.uint8(2)) + np.uint8(6 << 3)
    small = magnitude * np.uint8(6 << 3)
    return sign | jnp.where(magnitude < np.uint8(2), small, moved)
