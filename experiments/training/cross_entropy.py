"""Cross-entropy that keeps for its gradient the logits in the dtype that they came in, and nothing else as large.

Differentiated as it stands, it would keep the exponentials of all logits in float32 beside them: with a vocabulary of
128,256 that is two thirds of what a training step needs at its peak.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] in nats, computed in float32; the gradient has the dtype of the logits.

    Args:
      logits: floats [..., V].
      labels: integers [...], from 0 to V - 1.

    Returns:
      float32 [...].
    """
    return _fwd(logits, labels)[0]


def _fwd(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    wide = logits.astype(jnp.float32)
    largest = jnp.max(wide, axis=-1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, jnp.float32(0))
    total = jnp.sum(jnp.exp(wide - largest), axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1).astype(jnp.float32)
    loss = jnp.squeeze(jnp.log(total) + largest - chosen, -1)
    return loss, (logits, labels, largest, total)


def _bwd(residuals: Any, grad: jax.Array) -> tuple[jax.Array, None]:
    logits, labels, largest, total = residuals
    # Behind the barrier the exponentials are computed again; without it XLA would keep those of the loss.
    wide = lax.optimization_barrier(logits).astype(jnp.float32)
    grad = grad[..., None]
    gradient = jnp.exp(wide - largest) * (grad / total)
    is_label = lax.broadcasted_iota(labels.dtype, wide.shape, wide.ndim - 1) == labels[..., None]
    return jnp.where(is_label, gradient - grad, gradient).astype(logits.dtype), None


cross_entropy.defvjp(_fwd, _bwd)
