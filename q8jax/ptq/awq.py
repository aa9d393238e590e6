"""Activation-aware scaling: weights that meet large inputs are made larger before they are rounded.

    w  ≈  Q(s · w) / s,     s_j = mean|x_j|^α

Weight-only: the product with x is that of x / s, which is not quantized, so 1 / s goes to whatever made x, or to x. A
larger row of a group is rounded with the same step and so relatively finer, at the cost of rows of small inputs.

References:
  Lin et al. 2023, AWQ: activation-aware weight quantization for LLM compression and acceleration, arXiv:2306.00978,
  section 3.2; the geometric mean of the extreme factors is 1, as in its published code.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.ptq.inputs import squared_error
from q8jax.ptq.smooth import best_of, bounded_factors, smooth_weights
from q8jax.ptq.target import Target, check_matrix

STRENGTHS = tuple(np.linspace(0, 1, 21).tolist())


class Scaling(NamedTuple):
    """What a search found.

    Attributes:
      factors: float32 [in]; quantize `smooth_weights(w, factors)`, and feed it `smooth_inputs(x, factors)`.
      strength: float32, 0 where no factors are best.
      error: float32, ‖X(W − Q(sW)/s)‖².
      unscaled_error: float32, that without factors.
    """

    factors: jax.Array
    strength: jax.Array
    error: jax.Array
    unscaled_error: jax.Array


def scaling_factors(magnitude: jax.Array, strength: jax.Array | float, *, power_of_two: bool = False) -> jax.Array:
    """Returns s, float32 [in], within [2^-16, 2^16].

    Args:
      magnitude: float32 [in], mean |x| of each channel; one that is 0 has factor 1.
      strength: α.
      power_of_two: whether factors are rounded to powers of two.
    """
    strength = jnp.asarray(strength, jnp.float32)
    is_used = magnitude > 0
    largest = jnp.max(magnitude, initial=0)
    smallest = jnp.min(jnp.where(is_used, magnitude, jnp.float32(jnp.inf)), initial=jnp.inf)
    # Roots first: the product of the extremes may overflow.
    middle = jnp.sqrt(largest) * jnp.sqrt(smallest)
    return bounded_factors((magnitude / middle) ** strength, is_used, power_of_two)


@functools.partial(jax.jit, static_argnames=("target", "strengths", "power_of_two"))
def search_scaling(
    w: jax.Array,
    gram: jax.Array,
    magnitude: jax.Array,
    target: Target,
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    power_of_two: bool = False,
) -> Scaling:
    """Finds the strength whose rounded weights change the output least.

    Args:
      w: floating-point [in, out].
      gram: float32 [in, in], Σ x xᵀ.
      magnitude: float32 [in], mean |x|.
      target: what s · w becomes.
      strengths: candidates for α, beginning with 0, which is no scaling.
      power_of_two: as in `scaling_factors`.
    """
    check_matrix(w)
    w = w.astype(jnp.float32)

    def error(factors: jax.Array) -> jax.Array:
        rounded = target.quantize(smooth_weights(w, factors)).dequantize()
        return squared_error(gram, w - rounded / factors[:, None])

    candidates = jnp.stack([scaling_factors(magnitude, s, power_of_two=power_of_two) for s in strengths])
    errors = lax.map(error, candidates)
    best = best_of(errors)
    return Scaling(candidates[best], jnp.asarray(strengths, jnp.float32)[best], errors[best], errors[0])
