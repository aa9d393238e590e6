"""The outlier path: a few input channels stay in the compute dtype, all others go to 8 bits.

    x @ w  =  x_rest @ w_rest  +  x_outliers @ w_outliers

Only the first product is quantized. Channels are chosen once, from what calibration saw, so that shapes are static.

References:
  Dettmers et al. 2022, LLM.int8(): 8-bit matrix multiplication for transformers at scale, arXiv:2208.07339, section 3.2
  (which chooses them anew for each batch, above a threshold of 6).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from q8jax.ptq.target import Target, check_matrix
from q8jax.qarray import QArray


class Split(NamedTuple):
    """A weight matrix in two parts.

    Attributes:
      rest: codes [in − n, out].
      outliers: [n, out], in the dtype of the weights.
      rest_channels: int32 [in − n], ascending; which rows of the weights `rest` are.
      outlier_channels: int32 [n], ascending.
    """

    rest: QArray
    outliers: jax.Array
    rest_channels: jax.Array
    outlier_channels: jax.Array


def channels_above(amax: jax.Array, threshold: float, multiple: int = 1) -> np.ndarray:
    """Returns the channels whose amax exceeds a threshold, int32, ascending; of concrete arrays.

    Args:
      amax: float32 [in], max |x| of each channel.
      threshold: on the scale of x.
      multiple: the next largest channels join until the count is a multiple of this, or all are in; so that what is
        left divides into groups or tiles.
    """
    count = int(np.sum(np.asarray(amax) > threshold))
    return largest_channels(amax, min(-(-count // multiple) * multiple, amax.shape[0]))


def largest_channels(amax: jax.Array, count: int) -> np.ndarray:
    """Returns so many channels of largest amax, int32, ascending; the lower index first on a tie."""
    order = np.argsort(-np.asarray(amax), kind="stable")
    return np.sort(order[:count]).astype(np.int32)


def split(w: jax.Array, channels: np.ndarray, target: Target) -> Split:
    """Splits weights at channels, and rounds those of the rest to nearest.

    Args:
      w: floating-point [in, out].
      channels: concrete integers, which rows stay as they are.
      target: what the rest becomes.

    Raises:
      ValueError: w is no matrix, a channel is named twice or does not exist, or a group size does not divide the rest.
    """
    check_matrix(w)
    chosen = np.unique(channels).astype(np.int32)
    if chosen.size != np.size(channels) or (chosen.size and not 0 <= chosen[0] <= chosen[-1] < w.shape[0]):
        raise ValueError(f"channels must be different ones from 0 to {w.shape[0] - 1}, not {np.asarray(channels)}.")
    rest = np.setdiff1d(np.arange(w.shape[0], dtype=np.int32), chosen)
    return Split(target.quantize(w[rest]), w[chosen], jnp.asarray(rest), jnp.asarray(chosen))


def split_inputs(x: jax.Array, parts: Split) -> tuple[jax.Array, jax.Array]:
    """Returns what `rest` and `outliers` are multiplied with, of inputs [..., in]."""
    return jnp.take(x, parts.rest_channels, axis=-1), jnp.take(x, parts.outlier_channels, axis=-1)
