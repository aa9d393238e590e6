"""Straight through a cast: the gradient of what saturates, for its range.

Within its range a cast to codes is taken for the identity (Bengio et al. 2013, arXiv:1308.3432). Beyond it the result
is an end of the range, whatever the value, so the gradient belongs to the range (PACT, Choi et al. 2018,
arXiv:1805.06085, equation 3, there for a range from 0; here for a symmetric one).
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def within(x: jax.Array, bound: jax.Array) -> jax.Array:
    """Returns x, to be cast to codes that saturate at the bound.

    Args:
      x: a floating-point array. Left as it is, so that its amax can be observed.
      bound: float32 []. Its gradient is the sum, over x beyond it, of the gradients of x times its signs; those of x
        are 0 there.
    """
    del bound
    return x


def _within_fwd(x: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    # A byte for each, where x itself need not be kept.
    side = (wide > bound).astype(jnp.int8) - (wide < -bound).astype(jnp.int8)
    return x, side


def _within_bwd(side: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    of_bound = jnp.sum(grad.astype(jnp.float32) * side.astype(jnp.float32))
    return jnp.where(side == 0, grad, jnp.zeros((), grad.dtype)), of_bound


within.defvjp(_within_fwd, _within_bwd)
