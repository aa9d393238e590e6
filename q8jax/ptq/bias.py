"""Bias correction: what rounding weights shifts an output by on average is given back to the bias.

With inputs of mean m, the outputs of ŵ differ from those of w by (ŵ − w)ᵀm on average.

References:
  Nagel et al. 2019, Data-free quantization through weight equalization and bias correction, arXiv:1906.04721, sec. 4.2.
"""

import jax
import jax.numpy as jnp
from jax import lax

from q8jax.qarray import QArray


def bias_correction(w: jax.Array, approximation: QArray | jax.Array, mean: jax.Array) -> jax.Array:
    """Returns what to add to a layer's bias, float32 [out], so that the mean of each output stays as it was.

    Args:
      w: floating-point [in, out], the weights as they were.
      approximation: [in, out], what takes their place, for the very same inputs: of smoothed weights, with the factors
        divided out again.
      mean: float32 [in], the mean input.
    """
    values = approximation.dequantize() if isinstance(approximation, QArray) else approximation.astype(jnp.float32)
    return jnp.matmul(mean, w.astype(jnp.float32) - values, precision=lax.Precision.HIGHEST)
