"""The product of operands that are codes already: what is left of a dot when a model is no longer trained.

The right operand is a `QArray`, as weights are stored, or the left one, or both; what is no QArray is quantized as the
recipe says, or stays in the compute dtype. From there on it is the forward product of training, on the same kernels:

  scales constant along the contracting axes   one dot of codes, scales on its sums
  scales in tiles along them                   a dot for each tile, dequantized before it is added
  one operand in the compute dtype             the other one's codes widened, scales on the sums; where they are in
                                               tiles, have a zero point or a code book, its values in that dtype

Zero points of integer codes cost no wider product, for with a' = a − z and b' = b − y

    Σ a'b' = Σ ab − z Σ b − y Σ a + K z y

in int32, exactly. The sums of a weight's codes are known beforehand: `code_sums`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.contraction import Axes, Contraction, DimensionNumbers, contractions, to_matrices
from q8jax.formats import get_format
from q8jax.gemm import gemm, gemm_tiled, rescale
from q8jax.groups import per_group, reduce
from q8jax.naming import role_scope
from q8jax.operands import Quantizer, Use
from q8jax.qarray import QArray
from q8jax.recipe import Recipe
from q8jax.tiles import check_operand

Operand = QArray | jax.Array


def code_sums(array: QArray, axis: int = -2) -> jax.Array | None:
    """The sums of the codes of a right operand along its contracting axis, int32 with size 1 there.

    Given to products of it with left operands that have a zero point, it spares each of them the reading of all codes.
    None where a product would not use it, for scales that are in tiles, and formats other than integers.
    """
    if array.codebook is not None or get_format(array.qtype).kind != "int" or array.scale.shape[axis] != 1:
        return None
    return jnp.sum(_signed(array).qvalue.astype(jnp.int32), axis=axis, keepdims=True)


def product(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    recipe: Recipe,
    scale: jax.Array,
    key: jax.Array | None,
    dtype: np.dtype,
    sums: jax.Array | None = None,
) -> jax.Array:
    """The product of two operands of which at least one is a QArray.

    Args:
      lhs, rhs: as in `dot_general`.
      dimension_numbers, recipe, scale, key: likewise, checked. What the recipe says of a QArray is how it was made.
      dtype: of the result.
      sums: `code_sums` of rhs.

    Raises:
      ValueError: tiles that do not divide their axis, or lie on another than the last of several contracting axes; or a
        zero point where not both operands are integers.
    """
    contraction = contractions(lhs.shape, rhs.shape, dimension_numbers)["fwd"]
    sides, asked = (contraction.first, contraction.second), tuple(recipe.fwd)
    taken = [canonical(x) if isinstance(x, QArray) else x for x in (lhs, rhs)]
    formats = [
        x.qtype if isinstance(x, QArray) else operand.qtype if operand else recipe.compute
        for x, operand in zip(taken, asked, strict=True)
    ]
    coded = [isinstance(x, QArray) or operand is not None for x, operand in zip(taken, asked, strict=True)]
    if not all(coded) or any(isinstance(x, QArray) and x.codebook is not None for x in taken):
        taken = [_for_wide(x, axes, recipe) if isinstance(x, QArray) else x for x, axes in zip(taken, sides)]
    # What was codes and now is values is not quantized again.
    asked = tuple(None if isinstance(x, QArray) else operand for x, operand in zip((lhs, rhs), asked, strict=True))
    tiles = [_tile(x, axes) for x, axes in zip(taken, sides, strict=True) if isinstance(x, QArray)]
    for name, x, axes, operand in zip(("lhs", "rhs"), taken, sides, asked, strict=True):
        if operand is not None and operand.tile:
            check_operand(f"{operand.granularity} of {name} in fwd", operand, axes, x.shape)
            tiles.append(operand.tile)
    tile = math.gcd(*(size for size in tiles if size))
    operands: list[Operand] = []
    for name, x, axes, operand in zip(("lhs", "rhs"), taken, sides, asked, strict=True):
        if isinstance(x, QArray):
            operands.append(_as_matrices(x, axes) if tile else x)
        else:
            use = Use.of(name, operand, axes, bool(tile))
            operands.append(Quantizer(recipe, (use,), scale, key)({name: x}, (use,))[0][use])
    first, second = operands
    accurate, scope = not recipe.accumulates_fast("fwd"), lambda: role_scope("fwd", *formats)
    if tile:
        matrices = contraction.of_matrices
        out = gemm_tiled(first, second, matrices, tile, accurate=accurate, scope=scope)
        if isinstance(first, QArray) and isinstance(second, QArray):
            out = _shifted_tiles(out, first, second, matrices)
        return contraction.finish(out.astype(dtype).reshape(contraction.dot_shape(lhs.shape, rhs.shape)))
    with scope():
        if any(isinstance(x, QArray) and x.zero_point is not None for x in operands):
            return contraction.finish(_shifted(first, second, contraction, sums).astype(dtype))
        powers_of_two = recipe.scales != "float32" and None not in tuple(recipe.fwd)
        return gemm(first, second, contraction, dtype, accurate=accurate, powers_of_two=powers_of_two)


def canonical(x: QArray) -> QArray:
    """In codes that products take, with float32 scales."""
    fmt = get_format(x.qtype)
    if fmt.bits > 8:
        raise ValueError(f"{fmt.name} cannot be an operand of a product: choose a format of at most 8 bits.")
    if fmt.kind == "int" and x.codebook is None:
        x = _signed(x)
    return QArray(x.qvalue, x.scale.astype(jnp.float32), x.zero_point, x.codebook, qtype=x.qtype)


def _signed(x: QArray) -> QArray:
    """Integer codes as int8: uint8 less 128, narrower ones less their zero point."""
    fmt, zero_point = get_format(x.qtype), x.zero_point
    if fmt.bits < 8:
        codes = x.qvalue.astype(jnp.int8)
        if zero_point is not None:
            codes = per_group(jnp.subtract, codes, zero_point.astype(jnp.int8))
        return QArray(codes, x.scale, qtype="int8")
    if fmt.signed:
        return x
    codes = lax.bitcast_convert_type(x.qvalue ^ np.uint8(128), jnp.int8)
    zero_point = jnp.zeros(x.scale.shape, jnp.int32) if zero_point is None else zero_point
    return QArray(codes, x.scale, zero_point - 128, qtype="int8")


def _tile(x: QArray, axes: Axes) -> int | None:
    """Size of the tiles of its scales along the contracting axes; None where they are constant there."""
    sizes = [(x.shape[i], x.scale.shape[i]) for i in axes.contracting]
    if all(groups == 1 for _, groups in sizes):
        return None
    *before, (last, groups) = sizes
    if any(n != g for n, g in before) or axes.layout[axes.of_matrices.contracting[0]] != axes.contracting:
        raise ValueError(
            f"Scales of shape {x.scale.shape} are in tiles along several contracting axes of {x.shape}: leave tiles on "
            "the last one, or flatten the array to a matrix first."
        )
    return last // groups


def _for_wide(x: QArray, axes: Axes, recipe: Recipe) -> Operand:
    """What meets an operand in the compute dtype: codes whose scale is applied to the sums, or values."""
    if x.codebook is None and x.zero_point is None and _tile(x, axes) is None:
        return x
    return x.dequantize(np.dtype(recipe.compute))


def _as_matrices(x: QArray, axes: Axes) -> QArray:
    flat = lambda part: None if part is None else to_matrices(part, axes.layout)
    return QArray(
        to_matrices(x.qvalue, axes.layout), to_matrices(x.scale, axes.layout), flat(x.zero_point), qtype=x.qtype
    )


def _shifted(first: Operand, second: Operand, contraction: Contraction, sums: jax.Array | None) -> jax.Array:
    """The product of integer codes of which one has a zero point, float32 in the dot's own order of axes."""
    if not (isinstance(first, QArray) and isinstance(second, QArray) and first.qtype == second.qtype == "int8"):
        raise ValueError("A zero point needs integers on both sides of a product: quantize the other one to int8.")
    dot = lax.dot_general(first.qvalue, second.qvalue, contraction.dimension_numbers, preferred_element_type=jnp.int32)
    of_first, of_second = (
        None if x.zero_point is None else contraction.spread(x.zero_point, i) for i, x in enumerate((first, second))
    )
    if of_first is not None:
        dot -= of_first * contraction.spread(_summed(second, contraction.second, sums), 1)
    if of_second is not None:
        dot -= of_second * contraction.spread(_summed(first, contraction.first, None), 0)
    if of_first is not None and of_second is not None:
        length = math.prod(first.shape[i] for i in contraction.first.contracting)
        dot += np.int32(length) * of_first * of_second
    scales = (contraction.spread(x.scale, i) for i, x in enumerate((first, second)))
    return rescale(dot.astype(jnp.float32), *scales, whole=True)


def _summed(x: QArray, axes: Axes, known: jax.Array | None) -> jax.Array:
    if known is not None:
        return known.reshape([1 if i in axes.contracting else n for i, n in enumerate(x.shape)])
    return jnp.sum(x.qvalue.astype(jnp.int32), axis=axes.contracting, keepdims=True)


def _shifted_tiles(out: jax.Array, first: QArray, second: QArray, matrices: Contraction) -> jax.Array:
    """What zero points make of a product of tiles of codes, float32 [batch, first free, second free]."""
    if first.zero_point is not None:
        if _tile(first, matrices.first) is not None:
            raise ValueError("A left operand with scales in tiles has no zero point: make its codes symmetric.")
        sums = jnp.sum(second.dequantize(), axis=matrices.second.contracting, keepdims=True)
        zeros = first.zero_point.astype(jnp.float32) * first.scale
        out = out - matrices.spread(zeros, 0) * matrices.spread(sums, 1)
    if second.zero_point is not None:
        codes = QArray(first.qvalue, first.scale, qtype=first.qtype).dequantize()
        (axis,) = matrices.first.contracting
        groups = [
            second.zero_point.shape[matrices.second.contracting[0]] if i == axis else n
            for i, n in enumerate(codes.shape)
        ]
        zeros = second.zero_point.astype(jnp.float32) * second.scale
        out = out - lax.dot_general(
            reduce(jnp.sum, codes, groups),
            jnp.broadcast_to(
                zeros,
                [n if i in matrices.second.kept else g for i, (n, g) in enumerate(zip(second.shape, zeros.shape))],
            ),
            matrices.dimension_numbers,
            precision=lax.Precision.HIGHEST,
        )
    return out
