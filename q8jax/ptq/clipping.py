"""Weight clipping: of each group's scale, the shrunk one that loses least.

A range that is cut clips the few largest weights and rounds all others finer. Each group is searched by itself; the
first candidate is the whole range, so no group gets worse in the error that is measured.

References:
  Lin et al. 2023, AWQ, arXiv:2306.00978, and its published code, which searches a clipping range per group.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.groups import reduce
from q8jax.ptq.target import Target, check_matrix
from q8jax.qarray import QArray

SHRINKS = tuple(np.linspace(1, 0.3, 29).tolist())


@functools.partial(jax.jit, static_argnames=("target", "shrinks"))
def clip(
    w: jax.Array, target: Target, importance: jax.Array | None = None, shrinks: tuple[float, ...] = SHRINKS
) -> QArray:
    """Quantizes weights with the range of each group shrunk to what minimizes Σ importance · (w − ŵ)².

    Args:
      w: floating-point [in, out].
      target: what they become.
      importance: float32 [in], not negative, as the diagonal of a Gram matrix; None weighs all alike.
      shrinks: factors of the range to try, beginning with 1.

    Returns:
      Codes of the shape of w. A group with a NaN is as `Target.quantize` leaves it.

    Raises:
      ValueError: w is no matrix, or a group size does not divide it.
    """
    check_matrix(w)
    groups = target.scale_shape(w.shape)
    weight = jnp.ones(w.shape[0], jnp.float32) if importance is None else importance

    def error(scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        difference = w.astype(jnp.float32) - target.encode(w, scale, zero_point).dequantize()
        return reduce(jnp.sum, difference**2 * weight[:, None], groups)

    def consider(best: tuple, shrink: jax.Array) -> tuple[tuple, None]:
        scale, zero_point = target.scales(w, shrink)
        found = error(scale, zero_point)
        better = found < best[0]
        candidate = (found, scale, zero_point)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), candidate, best), None

    first = target.scales(w)
    start = (error(*first), *first)
    (_, scale, zero_point), _ = lax.scan(consider, start, jnp.asarray(shrinks[1:], jnp.float32))
    return target.assemble(target.encode(w, scale, zero_point).qvalue, scale, zero_point)
