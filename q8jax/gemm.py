"""One GEMM on codes: what runs, in which dtypes, on which backend.

The codes themselves are the operands; the accumulator is float32 (int32 for integers), and scales are applied to it
in float32. Where the backend has an 8-bit dot, that is literally a dot of 8-bit arrays. A CPU has none: it would
widen the operands anyway, by a slow route, so there the bare codes are upcast to a dtype that holds them exactly,
which is the same arithmetic. int8 products summed in float32 are exact while K·127² < 2²⁴; longer sums are cut there
and added as int32, so they agree with the integer dot bit for bit.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.contraction import Axes, Contraction
from q8jax.formats import decode, get_format
from q8jax.qarray import QArray

# Longest sum of products of two int8 codes within ±127 that float32 holds exactly.
EXACT_INT8_SUM = 2**24 // 127**2
_MAX_SLICES = 16
_MATRIX = Axes(batch=(0,), free=(1,), contracting=(2,))


@functools.cache
def _cpu_dtype() -> np.dtype:
    """The dtype that this host multiplies fastest: bfloat16 with instructions for it, else float32."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    return np.dtype(jnp.bfloat16 if flags & {"avx512_bf16", "amx_bf16"} else jnp.float32)


def gemm(
    first: QArray | jax.Array, second: QArray | jax.Array, contraction: Contraction, dtype, *, accurate: bool
) -> jax.Array:
    """Multiplies two operands, of which either, both or none is quantized.

    Args:
      first, second: quantized arrays whose scales are constant along the contracting axes, or arrays of the compute
        dtype.
      contraction: which axes do what.
      dtype: dtype of the result; the accumulator and the scales are float32 until the very end.
      accurate: whether a GPU must accumulate at full precision, which the gradients need; False lets FP8 GEMMs use
        Hopper's fast accumulation.

    Returns:
      The product in the layout that the contraction says.
    """
    if isinstance(first, QArray) and isinstance(second, QArray):
        sums = _dot_codes(first, second, contraction, accurate)
        sums = _rescale(sums, _spread(first, contraction, 0), _spread(second, contraction, 1))
    elif isinstance(first, QArray):
        assert not isinstance(second, QArray)
        sums = _dot_mixed(first, second, contraction) * _spread(first, contraction, 0)
    elif isinstance(second, QArray):
        sums = _dot_mixed(second, first, contraction, swapped=True) * _spread(second, contraction, 1)
    else:
        sums = _dot_wide(first, second, contraction, dtype)
    return contraction.finish(sums.astype(dtype))


def gemm_tiled(
    first: QArray | jax.Array,
    second: QArray | jax.Array,
    tile: int,
    shape: tuple[int, ...],
    contraction: Contraction,
    dtype,
    *,
    accurate: bool,
) -> jax.Array:
    """Multiplies operands whose scales change along the contracting axis.

    One dot per tile of that axis; each is dequantized before it is added to the float32 sum, as DeepSeek-V3's
    promotion is (arXiv:2412.19437, section 3.3.2).

    Args:
      first, second: [batch, free, contracting] quantized arrays or arrays, as `to_matrices` makes them.
      tile: size of the pieces of the contracting axis within which all scales are constant.
      shape: shape of the dot's (batch, first free, second free).
      contraction, dtype, accurate: as in `gemm`.
    """
    (batch, rows, length), columns = first.shape, second.shape[1]
    matrices = Contraction(_MATRIX, _MATRIX, permutation=(0, 1, 2))
    pieces = length // tile

    def add_tile(sums, index):
        parts = [_tile_of(operand, index, tile, pieces) for operand in (first, second)]
        return sums + gemm(*parts, matrices, jnp.float32, accurate=accurate), None

    sums, _ = lax.scan(add_tile, jnp.zeros((batch, rows, columns), jnp.float32), jnp.arange(pieces))
    return contraction.finish(sums.astype(dtype).reshape(shape))


def _tile_of(operand: QArray | jax.Array, index: jax.Array, tile: int, pieces: int) -> QArray | jax.Array:
    if not isinstance(operand, QArray):
        return lax.dynamic_slice_in_dim(operand, index * tile, tile, axis=2)
    codes = lax.dynamic_slice_in_dim(operand.qvalue, index * tile, tile, axis=2)
    _, rows, groups = operand.scale.shape
    column = index * groups // pieces if groups > 1 else 0
    scale = lax.dynamic_slice_in_dim(operand.scale, column, 1, axis=2)
    if 1 < rows < codes.shape[1]:
        scale = jnp.repeat(scale, codes.shape[1] // rows, axis=1)
    return QArray(codes, scale, qtype=operand.qtype)


def _spread(operand: QArray, contraction: Contraction, position: int) -> jax.Array:
    """The operand's scales in the shape of the dot's result, with axes of size 1 where they do not depend on it."""
    axes = (contraction.first, contraction.second)[position]
    others = len((contraction.second, contraction.first)[position].free)
    kept = lax.transpose(operand.scale, (*axes.kept, *axes.contracting)).reshape([operand.scale.shape[i] for i in axes.kept])
    new = len(axes.batch) if position == 1 else kept.ndim
    return lax.expand_dims(kept, range(new, new + others))


def _rescale(sums: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    # One multiplication by the product of the scales, unless the product of two tiny scales would vanish while the
    # product with the sums does not.
    product = first * second
    vanishes = product < np.float32(2.0**-126)
    small, large = jnp.minimum(first, second), jnp.maximum(first, second)
    product = jnp.where(vanishes, large, product)
    return sums * product * jnp.where(vanishes, small, np.float32(1))


def _dot(first, second, contraction: Contraction, preferred, precision=None) -> jax.Array:
    return lax.dot_general(
        first, second, contraction.dimension_numbers, precision=precision, preferred_element_type=preferred
    )


def _dot_wide(first: jax.Array, second: jax.Array, contraction: Contraction, dtype) -> jax.Array:
    precision = lax.Precision.HIGHEST if first.dtype == jnp.float32 else None

    def on_cpu(first, second):
        upcast = _cpu_dtype() if first.dtype == jnp.bfloat16 else np.dtype(jnp.float32)
        return _dot(first.astype(upcast), second.astype(upcast), contraction, jnp.float32).astype(dtype)

    def elsewhere(first, second):
        return _dot(first, second, contraction, dtype, precision)

    return lax.platform_dependent(first, second, cpu=on_cpu, default=elsewhere)


def _dot_mixed(codes: QArray, wide: jax.Array, contraction: Contraction, swapped: bool = False) -> jax.Array:
    def product(qvalue, wide, dtype):
        operands = (decode(qvalue, codes.qtype, dtype), wide.astype(dtype))
        return _dot(*(operands[::-1] if swapped else operands), contraction, jnp.float32)

    def on_cpu(qvalue, wide):
        return product(qvalue, wide, jnp.float32)

    def elsewhere(qvalue, wide):
        # The barrier, because XLA:GPU takes a cast to 8 bits and back for the identity.
        return product(lax.optimization_barrier(qvalue), wide, wide.dtype)

    return lax.platform_dependent(codes.qvalue, wide, cpu=on_cpu, default=elsewhere)


def _dot_codes(first: QArray, second: QArray, contraction: Contraction, accurate: bool) -> jax.Array:
    formats = [get_format(operand.qtype) for operand in (first, second)]
    integers = all(fmt.kind == "int" for fmt in formats)

    def upcast(dtype, a, b):
        a, b = decode(a, first.qtype, dtype), decode(b, second.qtype, dtype)
        return _sum_integers(a, b, contraction) if integers else _dot(a, b, contraction, jnp.float32)

    def direct(a, b):
        if integers:
            return _dot(a.astype(jnp.int8), b.astype(jnp.int8), contraction, jnp.int32).astype(jnp.float32)
        if all(fmt.bits == 8 and fmt.kind == "float" for fmt in formats):
            return _dot(a, b, contraction, jnp.float32, lax.Precision.HIGHEST if accurate else None)
        # No backend multiplies these as they are; every one of their codes is exact in bfloat16.
        return upcast(jnp.bfloat16, *lax.optimization_barrier((a, b)))

    on_cpu = functools.partial(upcast, _cpu_dtype())
    return lax.platform_dependent(first.qvalue, second.qvalue, cpu=on_cpu, default=direct)


def _sum_integers(a: jax.Array, b: jax.Array, contraction: Contraction) -> jax.Array:
    """The integer dot of upcast integer codes, as float32."""
    sizes = [a.shape[i] for i in contraction.first.contracting]
    if math.prod(sizes) <= EXACT_INT8_SUM:
        return _dot(a, b, contraction, jnp.float32)
    longest = sizes.index(max(sizes))
    step = EXACT_INT8_SUM // (math.prod(sizes) // sizes[longest])
    if step < 1 or -(-sizes[longest] // step) > _MAX_SLICES:
        return _dot(a.astype(jnp.int8), b.astype(jnp.int8), contraction, jnp.int32).astype(jnp.float32)
    a_axis, b_axis = contraction.first.contracting[longest], contraction.second.contracting[longest]
    total = None
    for start in range(0, sizes[longest], step):
        stop = min(start + step, sizes[longest])
        piece = _dot(
            lax.slice_in_dim(a, start, stop, axis=a_axis),
            lax.slice_in_dim(b, start, stop, axis=b_axis),
            contraction,
            jnp.float32,
        ).astype(jnp.int32)
        total = piece if total is None else total + piece
    return total.astype(jnp.float32)
