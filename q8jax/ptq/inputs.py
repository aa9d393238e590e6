"""What is kept of the inputs of a layer's product over any number of calibration batches.

Sums and maxima of constant size, so batches can come one by one and devices can be merged in any order. A row with an
entry that is not finite enters none of them, and is counted.

The Gram matrix G = XᵀX is all that a squared output error needs: ‖XD‖² = Σ D ⊙ (G D).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Sums over the rows x of a layer's inputs.

    Attributes:
      gram: float32 [in, in], Σ x xᵀ.
      total: float32 [in], Σ x.
      magnitude: float32 [in], Σ |x|.
      amax: float32 [in], max |x|.
      rows: uint32, how many rows are in the sums.
      skipped: uint32, how many were left out because an entry was not finite.
    """

    gram: jax.Array
    total: jax.Array
    magnitude: jax.Array
    amax: jax.Array
    rows: jax.Array
    skipped: jax.Array

    @property
    def mean(self) -> jax.Array:
        """float32 [in], the mean of x; 0 where there are no rows."""
        return self.total / self._count

    @property
    def mean_magnitude(self) -> jax.Array:
        """float32 [in], the mean of |x|."""
        return self.magnitude / self._count

    @property
    def _count(self) -> jax.Array:
        return jnp.maximum(self.rows, 1).astype(jnp.float32)


def init(features: int) -> Inputs:
    """Returns the sums before any row, for inputs of so many features."""
    vector, count = jnp.zeros(features, jnp.float32), jnp.zeros((), jnp.uint32)
    return Inputs(jnp.zeros((features, features), jnp.float32), vector, vector, vector, count, count)


def update(inputs: Inputs, x: jax.Array) -> Inputs:
    """Adds a batch.

    Args:
      inputs: so far.
      x: floating-point [..., in].
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    taken = jnp.all(jnp.isfinite(x), axis=1)
    x = jnp.where(taken[:, None], x, jnp.float32(0))
    magnitude = jnp.abs(x)
    count = jnp.sum(taken, dtype=jnp.uint32)
    batch = Inputs(
        jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST),
        jnp.sum(x, 0),
        jnp.sum(magnitude, 0),
        jnp.max(magnitude, 0, initial=0),
        count,
        jnp.uint32(x.shape[0]) - count,
    )
    return merge(inputs, batch)


def merge(first: Inputs, second: Inputs) -> Inputs:
    """Joins what two devices, or two runs, have seen."""
    joined = jax.tree.map(jnp.add, first, second)
    return dataclasses.replace(joined, amax=jnp.maximum(first.amax, second.amax))


def squared_error(gram: jax.Array, difference: jax.Array) -> jax.Array:
    """Returns ‖X·difference‖², float32, of the inputs of this Gram matrix.

    Args:
      gram: float32 [in, in].
      difference: floating-point [in, out].
    """
    difference = difference.astype(jnp.float32)
    product = jnp.matmul(gram, difference, precision=lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(difference * product), jnp.float32(0))


def relative_error(gram: jax.Array, w: jax.Array, approximation: jax.Array) -> jax.Array:
    """Returns ‖X(w − approximation)‖ / ‖Xw‖, float32; 0 where nothing differs."""
    error = squared_error(gram, w.astype(jnp.float32) - approximation.astype(jnp.float32))
    signal = squared_error(gram, w)
    return jnp.where(error == 0, jnp.float32(0), jnp.sqrt(error / signal))
