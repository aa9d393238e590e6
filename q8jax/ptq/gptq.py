"""GPTQ: weights rounded one row after the other, the error of each made up for by those still to come.

With inputs of Gram matrix G, H = G + damping, and UᵀU = H⁻¹ for an upper triangular U: row i of w [in, out] is rounded
to q, and rows j > i become

    w[j] - U[i, j] / U[i, i] · (w[i] - q)

which minimizes ‖X(w − ŵ)‖² over them, given what is rounded already (Frantar and Alistarh 2022, OBQ, in fixed order).
Rows are taken in blocks, and what a block owes to the rows after it is paid in one product. A block never straddles two
groups, so the scales of a group are found of weights that are up to date: published code finds them of weights that
lack the corrections of their own block.

U comes from H without an inverse: where H = A Aᵀ with A upper triangular, which is a Cholesky factorization from the
last row to the first, U = A⁻¹.

What can go wrong with H: a channel that was never seen is rounded to nearest, as it is told nothing about; a singular H
gets more damping, tenfold each time, until its pivots stand above rounding error; an H that is not finite makes the
result NaN.

References:
  Frantar et al. 2022, GPTQ: accurate post-training quantization for generative pre-trained transformers,
  arXiv:2210.17323, algorithm 1; its published code for the order of activations (act-order) and static groups.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.ptq.target import Target, check_matrix
from q8jax.qarray import QArray

_LARGEST_BLOCK = 128
_LEAST_RAISED_DAMPING = np.float32(1e-4)
_MOST_DAMPING = np.float32(1e3)


def gptq(
    w: jax.Array,
    gram: jax.Array,
    target: Target,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> QArray:
    """Quantizes weights so that the products with given inputs change little.

    Args:
      w: floating-point [in, out].
      gram: float32 [in, in], Σ x xᵀ of the inputs, on any scale.
      target: what w becomes. The scales of groups along `in` are found as each group begins, of weights corrected so
        far; all others, and those under `act_order`, of the weights as they are.
      damping: what is added to the diagonal, as a share of its mean.
      act_order: whether rows are taken by falling diagonal of `gram`. The groups stay those of neighbours.
      scale: float32 of the shape of the scales; use these, as `clip` finds them.
      zero_point: int32, those that belong to `scale`.

    Returns:
      Codes of the shape of w. NaN stays NaN and ±Inf saturates, neither touching other rows.

    Raises:
      ValueError: w is no matrix, gram does not fit it, or a group size does not divide it.
    """
    check_matrix(w)
    rows = w.shape[0]
    if gram.shape != (rows, rows):
        raise ValueError(f"gram of weights {w.shape} must be [in, in], {(rows, rows)}, not {gram.shape}.")
    order, upper = _prepared(gram, damping, act_order)
    return _rounded(w, order, upper, target, act_order, scale, zero_point)


# Apart from what follows, so that it is compiled once for all targets.
@functools.partial(jax.jit, static_argnames="act_order")
def _prepared(gram: jax.Array, damping: jax.Array | float, act_order: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the order of the rows, int32 [in], and U in that order, NaN where the matrix is not finite."""
    order = jnp.argsort(-jnp.diagonal(gram)) if act_order else jnp.arange(gram.shape[0])
    upper = _inverse_factor(gram[order][:, order].astype(jnp.float32), jnp.asarray(damping, jnp.float32))
    return order, jnp.where(jnp.all(jnp.isfinite(gram)), upper, jnp.float32(jnp.nan))


@functools.partial(jax.jit, static_argnames=("target", "act_order"))
def _rounded(
    w: jax.Array,
    order: jax.Array,
    upper: jax.Array,
    target: Target,
    act_order: bool,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
) -> QArray:
    rows = w.shape[0]
    w = jnp.where(jnp.isnan(upper[0, 0]), jnp.float32(jnp.nan), w.astype(jnp.float32))
    groups = target.scale_shape(w.shape)[0]
    group = rows // groups
    group_of = order // group
    is_found_on_the_way = scale is None and groups > 1 and not act_order
    if scale is None:
        scale, zero_point = target.scales(w)
    block = _largest_divisor(group if is_found_on_the_way else rows)

    def round_block(k: jax.Array, state: tuple) -> tuple:
        w, scale, zero_point = state
        start = k * block
        if is_found_on_the_way:
            found = lambda: _with_scales_of_group(w, start, group, target, scale, zero_point)
            scale, zero_point = lax.cond(start % group == 0, found, lambda: (scale, zero_point))
        members = lax.dynamic_slice_in_dim(group_of, start, block)
        own = scale[members], None if zero_point is None else zero_point[members]
        piece = lax.dynamic_slice_in_dim(w, start, block)
        right = lax.dynamic_slice_in_dim(upper, start, block)
        piece, errors = _round_rows(piece, lax.dynamic_slice_in_dim(right, start, block, 1), own, target)
        later = jnp.arange(rows) >= start + block
        debt = jnp.matmul(jnp.where(later, right, jnp.float32(0)).T, errors, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(w, piece, start, 0) - debt, scale, zero_point

    w, scale, zero_point = lax.fori_loop(0, rows // block, round_block, (w[order], scale, zero_point))
    # Each row as it was when it was rounded; rounding them again spares a loop that carries codes, which are slow.
    rounded = target.encode(w[jnp.argsort(order)], scale, zero_point)
    return target.assemble(rounded.qvalue, rounded.scale, zero_point)


def _round_rows(
    piece: jax.Array, upper: jax.Array, scales: tuple[jax.Array, jax.Array | None], target: Target
) -> tuple[jax.Array, jax.Array]:
    """Corrects the rows of a block one by one; returns them, and the error of each over its pivot."""
    index = jnp.arange(piece.shape[0])

    def round_row(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        piece, errors = state
        row = piece[i][None]
        own = jax.tree.map(lambda values: values[i][None], scales)
        error = (row - target.encode(row, *own).dequantize()) / upper[i, i]
        error = jnp.where(jnp.isfinite(error), error, jnp.float32(0))
        later = jnp.where(index > i, upper[i], jnp.float32(0))
        return piece - later[:, None] * error, errors.at[i].set(error[0])

    return lax.fori_loop(0, piece.shape[0], round_row, (piece, jnp.zeros_like(piece)))


def _with_scales_of_group(
    w: jax.Array, start: jax.Array, group: int, target: Target, scale: jax.Array, zero_point: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Puts scales of the group that begins at `start` in their place."""
    found = target.scales(lax.dynamic_slice_in_dim(w, start, group))
    put = lambda new, old: lax.dynamic_update_slice_in_dim(old, new, start // group, 0)
    scale, zero_point = jax.tree.map(put, found, (scale, zero_point))
    return scale, zero_point


def _inverse_factor(gram: jax.Array, damping: jax.Array) -> jax.Array:
    """Returns U, upper triangular, with UᵀU the inverse of the damped matrix, on a scale of its own."""
    rows = gram.shape[0]
    diagonal = jnp.diagonal(gram)
    is_seen = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(is_seen), 1).astype(jnp.float32)
    h = gram / jnp.where(mean > 0, mean, jnp.float32(1))
    h = h + jnp.diag(jnp.where(is_seen, jnp.float32(0), jnp.float32(1)))
    least_pivot = np.float32(np.sqrt(rows * np.finfo(np.float32).eps))

    def factor(damping: jax.Array) -> jax.Array:
        reversed_h = jnp.flip(h + damping * jnp.eye(rows, dtype=jnp.float32))
        return jnp.flip(jnp.linalg.cholesky(reversed_h, symmetrize_input=False))

    def is_weak(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        damping, a = state
        # NaN, which a factorization that fails gives, is not above.
        return ~jnp.all(jnp.diagonal(a) >= least_pivot) & (damping < _MOST_DAMPING)

    def raised(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        damping = jnp.maximum(state[0] * jnp.float32(10), _LEAST_RAISED_DAMPING)
        return damping, factor(damping)

    _, a = lax.while_loop(is_weak, raised, (damping, factor(damping)))
    return jax.scipy.linalg.solve_triangular(a, jnp.eye(rows, dtype=jnp.float32), lower=False)


def _largest_divisor(size: int) -> int:
    return max(d for d in range(1, min(size, _LARGEST_BLOCK) + 1) if size % d == 0)
