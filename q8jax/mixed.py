"""Products of an array with codes: what is stored in few bits is multiplied as it is, and its scales are taken out.

A scale that is the same for all that is summed multiplies the sums. One that is not, as of values with a scale per
token when tokens are summed, multiplies the other operand before. Either way no wide copy of the codes is asked for,
and where a backend needs one, it is of the bare codes, which it holds exactly.
"""

import jax
import jax.numpy as jnp

from q8jax.contraction import contractions
from q8jax.einsum import as_dot
from q8jax.gemm import gemm
from q8jax.qarray import QArray
from q8jax.rounding import ceil_power_of_two


def mixed_einsum(subscripts: str, lhs: jax.Array, rhs: QArray) -> jax.Array:
    """`jnp.einsum` of an array and a quantized one.

    Args:
      subscripts: as in `q8jax.einsum`; each operand's indices are summed with the other's, or stay.
      lhs: a floating-point array.
      rhs: codes without a zero point or a code book. Each axis of its scale is 1 or that of the codes; one that changes
        along what is summed may not change along what only rhs has.

    Returns:
      The product, in the dtype of `lhs`, summed and scaled in float32.

    Raises:
      ValueError: subscripts that do not fit, an index that occurs once and not in the result, or scales other than
        these.
    """
    if rhs.zero_point is not None or rhs.codebook is not None:
        raise ValueError("mixed_einsum multiplies bare codes: quantize symmetrically, without a code book.")
    planned = as_dot(subscripts, lhs.shape, rhs.shape)
    if planned.lhs_summed or planned.rhs_summed:
        raise ValueError(f"einsum {subscripts!r} sums or broadcasts an index of one operand: do that before.")
    if any(size not in (1, full) for size, full in zip(rhs.scale.shape, rhs.shape, strict=True)):
        raise ValueError("mixed_einsum takes no scales per tile: give each axis one scale or one per index.")
    (_, contracting), _ = planned.dimension_numbers
    if any(rhs.scale.shape[axis] > 1 for axis in contracting):
        lhs, rhs = _with_scale_in_lhs(subscripts, lhs, rhs, planned.dimension_numbers)
    contraction = contractions(lhs.shape, rhs.shape, planned.dimension_numbers)["fwd"]
    product = gemm(lhs, rhs, contraction, lhs.dtype, accurate=True)
    return jax.lax.transpose(product, planned.permutation)


def _with_scale_in_lhs(subscripts: str, lhs: jax.Array, rhs: QArray, dimension_numbers) -> tuple[jax.Array, QArray]:
    (lhs_contracting, contracting), (lhs_batch, batch) = dimension_numbers
    scale = rhs.scale.astype(jnp.float32)
    shared = dict(zip((*contracting, *batch), (*lhs_contracting, *lhs_batch), strict=True))
    if any(size > 1 and axis not in shared for axis, size in enumerate(scale.shape)):
        raise ValueError(
            f"einsum {subscripts!r} sums over an axis along which scales change, and they change along an axis that "
            "only rhs has: give it one scale along one of them."
        )
    # A power of two stays behind, so that nothing is lost where lhs has few exponents.
    common = ceil_power_of_two(jnp.max(scale, axis=contracting, keepdims=True))
    rest = scale * (1 / common)
    order = sorted(shared, key=lambda axis: shared[axis])
    sizes = [1] * lhs.ndim
    for axis in order:
        sizes[shared[axis]] = rest.shape[axis]
    alone = [axis for axis in range(rest.ndim) if axis not in shared]
    rest = jax.lax.transpose(rest, (*order, *alone)).reshape(sizes)
    scaled = (lhs.astype(jnp.float32) * rest).astype(lhs.dtype)
    return scaled, QArray(rhs.qvalue, common, qtype=rhs.qtype)
