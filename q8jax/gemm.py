"""One GEMM on codes: what runs, in which dtypes, on which backend.

The codes themselves are the operands; the accumulator is float32 (int32 for integers), and scales are applied to it
in float32. Where the backend has an 8-bit dot, that is literally a dot of 8-bit arrays. A CPU has one for integers,
fast in one layout; else it would widen the operands anyway, by a slow route, so there the bare codes are upcast to a
dtype that holds them exactly, which is the same arithmetic. Where all scales are powers of two, an accelerator rounds
the sums to bfloat16 before it scales them, which is the same as after it, and spares writing them in float32; there
the product of two scales is one number, so a result whose scales multiply to less than 2^-126 is zero. Integer
products summed in float32 are exact up to 2^24, that is K = 1040 for int8; longer sums are cut there and added as
int32, so they agree with the integer dot bit for bit. Sums that could leave int32, K > 133,144 for int8, are cut on
every backend, and added as float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint

from q8jax.contraction import Axes, Contraction
from q8jax.formats import decode, get_format
from q8jax.qarray import QArray

Array = jax.Array
# More pieces than this cost a CPU more than its own slow integer dot does.
MAX_PIECES = 16
# The pairs of FP8 formats that tensor cores multiply; two E5M2 operands are none.
FP8_PAIRS = ({"float8_e4m3fn"}, {"float8_e4m3fn", "float8_e5m2"})


def cpu_dtype(kind: str) -> np.dtype:
    """The dtype in which this host multiplies fastest what it has no own dot for.

    Args:
      kind: 'int' or 'float' for codes of such a format, 'wide' for bfloat16 itself.
    """
    if _multiplies_bfloat16():
        return np.dtype(jnp.bfloat16)
    return np.dtype(jnp.float16 if kind == "float" else jnp.float32)


@functools.cache
def _multiplies_bfloat16() -> bool:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def gemm(
    first: QArray | Array,
    second: QArray | Array,
    contraction: Contraction,
    dtype: np.dtype | type,
    *,
    accurate: bool,
    powers_of_two: bool = False,
) -> Array:
    """Multiplies two operands, of which either, both or none is quantized.

    Args:
      first, second: quantized arrays whose scales are constant along the contracting axes, or
        arrays of the compute dtype.
      contraction: which axes do what.
      dtype: dtype of the result; accumulator and scales are float32 until the very end.
      accurate: whether a GPU must accumulate at full precision, as gradients need; False
        lets FP8 GEMMs use Hopper's fast accumulation.
      powers_of_two: whether all scales are powers of two, which commute with rounding to `dtype`.

    Returns:
      The product in the layout that the contraction says.
    """
    if isinstance(first, QArray) and isinstance(second, QArray):
        sums = _dot_codes(first, second, contraction, np.dtype(dtype), accurate, powers_of_two)
    elif isinstance(first, QArray):
        assert not isinstance(second, QArray)
        sums = _dot_mixed(first, second, contraction, 0)
    elif isinstance(second, QArray):
        sums = _dot_mixed(second, first, contraction, 1)
    else:
        sums = _dot_wide(first, second, contraction, dtype)
    return contraction.finish(sums.astype(dtype))


def scaled_by_library(formats: tuple[str, str], dtype: np.dtype, powers_of_two: bool) -> bool:
    """Whether the library that multiplies two tensors on a GPU scales and rounds the product before it writes it."""
    return set(formats) in FP8_PAIRS and powers_of_two and dtype == jnp.bfloat16


def gemm_tiled(
    first: QArray | Array,
    second: QArray | Array,
    contraction: Contraction,
    tile: int,
    *,
    accurate: bool,
    scope: Callable[[], AbstractContextManager],
) -> Array:
    """Multiplies matrices whose scales change along the contracting axis.

    One dot per tile of that axis; each is dequantized before it is added to the float32 sum, as
    DeepSeek-V3's promotion is (arXiv:2412.19437, section 3.3.2).

    Args:
      first, second: quantized arrays or arrays of rank 3, as `to_matrices` makes them.
      contraction: which of their axes do what: one batch, one free, one contracting each.
      tile: size of the pieces of the contracting axis within which all scales are constant.
      accurate: as in `gemm`.
      scope: what to trace each dot in; a loop's body does not know what the loop is traced in.

    Returns:
      float32 [batch, first free, second free].
    """
    shape = contraction.dot_shape(first.shape, second.shape)
    axes = [side.contracting[0] for side in (contraction.first, contraction.second)]
    pieces = first.shape[axes[0]] // tile

    def add_piece(sums: Array, index: Array) -> tuple[Array, None]:
        one, other = (_piece(x, axis, index, tile) for x, axis in zip((first, second), axes))
        with scope():
            return sums + gemm(one, other, contraction, jnp.float32, accurate=accurate), None

    sums = jnp.zeros(shape, jnp.float32)
    return lax.scan(add_piece, sums, jnp.arange(pieces))[0] if pieces else sums


def _piece(operand: QArray | Array, axis: int, index: Array, tile: int) -> QArray | Array:
    """The tile at `index` of the contracting axis, its scales constant along that axis."""
    if not isinstance(operand, QArray):
        return lax.dynamic_slice_in_dim(operand, index * tile, tile, axis)
    codes = lax.dynamic_slice_in_dim(operand.qvalue, index * tile, tile, axis)
    per_group = operand.qvalue.shape[axis] // operand.scale.shape[axis]
    scale = lax.dynamic_slice_in_dim(operand.scale, index * tile // per_group, 1, axis)
    free = 3 - axis
    if 1 < scale.shape[free] < codes.shape[free]:
        scale = jnp.repeat(scale, codes.shape[free] // scale.shape[free], axis=free)
    return QArray(codes, scale, qtype=operand.qtype)


def rescale(sums: Array, first: Array, second: Array, *, whole: bool = False) -> Array:
    """sums · first · second, finite and nonzero whenever the result is.

    The product of two scales may leave float32's range although their product with the sums does not. Half of its
    exponent cannot, and a product with that lies between the sums and the result. For sums that are whole numbers one
    scale's exponent can come first, with the same bits for fewer operations on each element: nothing is lost below 1,
    and up to 2^64 above it. What is left of a larger scale may overflow with the other one, and then so does the
    result, unless the sum is 0.
    """
    if whole:
        power, rest = _split(second, lambda exponent: jnp.clip(exponent, -126, 64))
        return sums * power * jnp.minimum(first * rest, np.finfo(np.float32).max)
    halves, rests = zip(*(_split(scale, lambda exponent: exponent >> 1) for scale in (first, second)))
    return sums * (halves[0] * halves[1]) * (rests[0] * rests[1])


def _split(scale: Array, part: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Factors of float32 scales: powers of two of a part of the exponent, and the rest."""
    exponent = part((lax.bitcast_convert_type(scale, jnp.int32) >> 23) - 127)
    power, inverse = (lax.bitcast_convert_type((127 + e) << 23, jnp.float32) for e in (exponent, -exponent))
    return power, scale * inverse


def _dot(
    first: Array,
    second: Array,
    contraction: Contraction,
    dtype: np.dtype | type,
    precision: lax.Precision | None = None,
) -> Array:
    return lax.dot_general(
        first,
        second,
        contraction.dimension_numbers,
        precision=precision,
        preferred_element_type=dtype,
    )


def precision_for(dtype: np.dtype) -> lax.Precision | None:
    """What it takes for operands not to be rounded to bfloat16 or TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _cpu_dtype_for(dtype: np.dtype, contraction: Contraction) -> np.dtype:
    return _in_layout(cpu_dtype("wide") if dtype == jnp.bfloat16 else np.dtype(jnp.float32), contraction)


def _in_layout(dtype: np.dtype, contraction: Contraction) -> np.dtype:
    """The dtype in which XLA:CPU multiplies operands of another one that hold the same values.

    Where the first is not summed along its rows it has no kernel for bfloat16 and mostly multiplies in float32, but now
    and then it finds that out too late.
    """
    is_slow = dtype == jnp.bfloat16 and not _sums_along_rows(contraction.first)
    return np.dtype(jnp.float32) if is_slow else dtype


def _dot_wide(first: Array, second: Array, contraction: Contraction, dtype: np.dtype | type) -> Array:
    # A GEMM whose result has the dtype of its operands rounds the float32 sums itself.
    out_dtype = first.dtype if first.dtype == dtype else np.dtype(jnp.float32)

    def on_cpu(first: Array, second: Array) -> Array:
        upcast = _cpu_dtype_for(first.dtype, contraction)
        sums = _dot(first.astype(upcast), second.astype(upcast), contraction, jnp.float32)
        return sums.astype(out_dtype)

    def elsewhere(first: Array, second: Array) -> Array:
        return _dot(first, second, contraction, out_dtype, precision_for(first.dtype))

    return lax.platform_dependent(first, second, cpu=on_cpu, default=elsewhere)


def _dot_mixed(codes: QArray, wide: Array, contraction: Contraction, position: int) -> Array:
    """The dot of a quantized array, the operand at `position`, and an array."""
    # Codes of at most 1: sums of larger ones with the largest values would overflow although the
    # result does not. With float16 they cannot, and there small codes would vanish.
    largest = get_format(codes.qtype).max
    exponent = 0 if wide.dtype == jnp.float16 else math.ceil(math.log2(largest))

    def product(dtype: np.dtype, qvalue: Array, wide: Array) -> Array:
        a = decode(qvalue, codes.qtype, dtype) * np.asarray(2.0**-exponent, dtype)
        b = wide.astype(dtype)
        first, second = (b, a) if position else (a, b)
        return _dot(first, second, contraction, jnp.float32, precision_for(dtype))

    def elsewhere(qvalue: Array, wide: Array) -> Array:
        # The barrier, because XLA:GPU takes a cast to 8 bits and back for the identity.
        return product(wide.dtype, lax.optimization_barrier(qvalue), wide)

    on_cpu = functools.partial(product, _cpu_dtype_for(wide.dtype, contraction))
    sums = lax.platform_dependent(codes.qvalue, wide, cpu=on_cpu, default=elsewhere)
    return rescale(sums, contraction.spread(codes.scale.astype(jnp.float32), position), jnp.float32(2.0**exponent))


def _dot_codes(
    first: QArray, second: QArray, contraction: Contraction, dtype: np.dtype, accurate: bool, powers_of_two: bool
) -> Array:
    """The product of two quantized arrays, float32 or `dtype`."""
    formats = [get_format(operand.qtype) for operand in (first, second)]
    integers = all(fmt.kind == "int" for fmt in formats)
    names = first.qtype, second.qtype
    multiplied_as_fp8 = set(names) in FP8_PAIRS
    is_scaled = scaled_by_library(names, dtype, powers_of_two) and first.scale.size == second.scale.size == 1
    out_dtype = dtype if is_scaled else np.dtype(jnp.float32)
    scales = tuple(contraction.spread(x.scale.astype(jnp.float32), i) for i, x in enumerate((first, second)))
    largest = int(formats[0].max * formats[1].max)
    length = math.prod(first.shape[i] for i in contraction.first.contracting)

    def upcast(dtype: np.dtype | type, a: Array, b: Array, contraction: Contraction) -> Array:
        a, b = decode(a, first.qtype, dtype), decode(b, second.qtype, dtype)
        return _dot(a, b, contraction, jnp.float32)

    def as_int8(a: Array, b: Array, contraction: Contraction) -> Array:
        def dot(a: Array, b: Array) -> Array:
            return _dot(a, b, contraction, jnp.int32).astype(jnp.float32)

        a, b = a.astype(jnp.int8), b.astype(jnp.int8)
        return _sum_of_pieces(dot, a, b, contraction, (2**31 - 1) // largest)

    def sums_on_cpu(a: Array, b: Array) -> Array:
        def dot(a: Array, b: Array) -> Array:
            axes, moved = contraction.first, contraction
            if not _sums_along_rows(axes) and a.size <= b.size:
                # The barrier, because XLA would take the transpose back into the dot.
                a = lax.optimization_barrier(lax.transpose(a, axes.kept + axes.contracting))
                moved = dataclasses.replace(contraction, first=axes.along_rows)
            return upcast(_in_layout(cpu_dtype("int" if integers else "float"), moved), a, b, moved)

        longest = 2**24 // largest
        if integers and (_sums_along_rows(contraction.first) or length > MAX_PIECES * longest):
            return as_int8(a, b, contraction)
        if not integers or length <= longest:
            return dot(a, b)
        exact = _sum_of_pieces(lambda a, b: dot(a, b).astype(jnp.int32), a, b, contraction, longest)
        return exact.astype(jnp.float32)

    def sums_elsewhere(a: Array, b: Array, contraction: Contraction) -> Array:
        if integers:
            return as_int8(a, b, contraction)
        if multiplied_as_fp8:
            return _dot(a, b, contraction, out_dtype, lax.Precision.HIGHEST if accurate else None)
        # No GPU multiplies these as they are; every one of their codes is exact in bfloat16.
        return upcast(jnp.bfloat16, a, b, contraction)

    def on_cpu(a: Array, b: Array, scales: tuple[Array, Array]) -> Array:
        return rescale(sums_on_cpu(a, b), *scales, whole=integers).astype(out_dtype)

    def on_gpu(a: Array, b: Array, scales: tuple[Array, Array]) -> Array:
        if not integers:
            # What is transposed here is the input of a layer, for the gradient of its weight. XLA:GPU would compute the
            # input anew for its transposed codes, or write it in 16 bits, where the forward pass has written codes.
            a = lax.optimization_barrier(a)
        a, b = _summed_last(a, contraction.first), _summed_last(b, contraction.second)
        if not integers:
            # XLA:GPU takes a cast to 8 bits and back for the identity, and casts back what an older GPU does not
            # multiply.
            a, b = lax.optimization_barrier((a, b))
        axes = contraction.first.along_rows, contraction.second.along_rows
        return elsewhere(a, b, scales, Contraction(*axes, contraction.permutation))

    def elsewhere(a: Array, b: Array, scales: tuple[Array, Array], contraction: Contraction = contraction) -> Array:
        sums = sums_elsewhere(a, b, contraction)
        if not is_scaled:
            return rescale(sums, *scales, whole=integers)
        scale = jnp.minimum(scales[0].reshape(()) * scales[1].reshape(()), jnp.float32(2.0**127))
        return sums * scale.astype(out_dtype)

    return lax.platform_dependent(
        first.qvalue, second.qvalue, scales, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=elsewhere
    )


def _summed_last(codes: Array, axes: Axes) -> Array:
    """Codes with the contracting axes last, in memory too: the one layout that FP8 and integer tensor cores take.

    The layout is pinned on both sides of the transpose. Else XLA:GPU would transpose the wide tensor in its place, and
    with it all else that is made of that tensor.
    """
    codes = _row_major(codes)
    order = axes.kept + axes.contracting
    return codes if order == tuple(range(codes.ndim)) else _row_major(lax.transpose(codes, order))


@jax.custom_batching.custom_vmap
def _row_major(x: Array) -> Array:
    """The same array, its last axis contiguous in memory."""
    return _pin(x.ndim)(x) if x.ndim > 1 else x


@_row_major.def_vmap
def _row_major_vmap(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _row_major(x), True


@functools.cache
def _pin(ndim: int) -> Callable[[Array], Array]:
    """A layout constraint that XLA's partitioner splits as it does its operand, where it would gather a bare one."""
    constrain = lambda x: with_layout_constraint(x, Layout(major_to_minor=tuple(range(ndim))))

    def partition(mesh, operands, result):
        del result
        return mesh, constrain, operands[0].sharding, (operands[0].sharding,)

    pin = custom_partitioning(constrain)
    axes = " ".join(f"axis{i}" for i in range(ndim))
    pin.def_partition(partition, sharding_rule=f"{axes} -> {axes}")
    return pin


def _sums_along_rows(axes: Axes) -> bool:
    """Whether the contracting axes are the last ones: the layout of a first operand that XLA:CPU multiplies fastest."""
    return min(axes.contracting, default=0) >= len(axes.kept)


def _sum_of_pieces(
    dot: Callable[[Array, Array], Array],
    a: Array,
    b: Array,
    contraction: Contraction,
    longest: int,
) -> Array:
    """dot(a, b) as the sum of dots over at most `longest` products each."""
    sizes = [a.shape[i] for i in contraction.first.contracting]
    pieces = -(-math.prod(sizes) // longest)
    if pieces <= 1:
        return dot(a, b)
    cut = sizes.index(max(sizes))
    step = -(-sizes[cut] // pieces)
    sums = [
        _sum_of_pieces(
            dot,
            lax.slice_in_dim(a, start, stop, axis=contraction.first.contracting[cut]),
            lax.slice_in_dim(b, start, stop, axis=contraction.second.contracting[cut]),
            contraction,
            longest,
        )
        for start in range(0, sizes[cut], step)
        for stop in (min(start + step, sizes[cut]),)
    ]
    return functools.reduce(jnp.add, sums)
