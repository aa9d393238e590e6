"""SmoothQuant: channels of large inputs are divided by factors that the weights are multiplied with.

    x @ w  =  (x / s) @ (s · w),     s_j = max|x_j|^α / max|w_j|^(1 − α)

The product stays, and what one scale has to hold of x becomes narrower, at the cost of w. Which strength α pays differs
from layer to layer, and one for all can hurt, so it is searched by the error of the output.

References:
  Xiao et al. 2022, SmoothQuant: accurate and efficient post-training quantization for large language models,
  arXiv:2211.10438, section 4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.groups import amax
from q8jax.ptq.target import Target, check_matrix
from q8jax.qarray import QArray
from q8jax.rounding import ceil_power_of_two

STRENGTHS = tuple(np.linspace(0, 1, 21).tolist())
LIMIT = np.float32(2.0**16)


class Smoothing(NamedTuple):
    """What a search found.

    Attributes:
      factors: float32 [in].
      strength: float32, NaN where no factors at all are best.
      error: float32, ‖XW − Q(X/s)Q(sW)‖².
      unsmoothed_error: float32, that without factors.
    """

    factors: jax.Array
    strength: jax.Array
    error: jax.Array
    unsmoothed_error: jax.Array


def smoothing_factors(
    input_amax: jax.Array, weight_amax: jax.Array, strength: jax.Array | float, *, power_of_two: bool = False
) -> jax.Array:
    """Returns s, float32 [in], within [2^-16, 2^16].

    Args:
      input_amax: float32 [in], max |x| of each channel.
      weight_amax: float32 [in], max |w| of each row of weights [in, out].
      strength: α; at 0 all rows of s·w become alike, at 1 all channels of x / s.
      power_of_two: whether factors are rounded to powers of two, so that dividing x and multiplying w are exact.

    A channel that is zero on either side has factor 1.
    """
    strength = jnp.asarray(strength, jnp.float32)
    factors = input_amax**strength / weight_amax ** (1 - strength)
    return bounded_factors(factors, (input_amax > 0) & (weight_amax > 0), power_of_two)


def bounded_factors(factors: jax.Array, is_used: jax.Array, power_of_two: bool) -> jax.Array:
    """Factors within bounds, 1 for channels that are not used; float32 [in]."""
    if power_of_two:
        # The nearest in the logarithm.
        factors = ceil_power_of_two(factors * np.float32(0.5**0.5))
    return jnp.where(is_used & ~jnp.isnan(factors), jnp.clip(factors, 1 / LIMIT, LIMIT), jnp.float32(1))


def smooth_inputs(x: jax.Array, factors: jax.Array) -> jax.Array:
    """Returns x / s in the dtype of x, floating-point [..., in]."""
    inverse = (1 / factors).reshape((1,) * (x.ndim - 1) + factors.shape)
    return (x.astype(jnp.float32) * inverse).astype(x.dtype)


def smooth_weights(w: jax.Array, factors: jax.Array) -> jax.Array:
    """Returns s · w in the dtype of w, floating-point [in, out]."""
    return (w.astype(jnp.float32) * factors[:, None]).astype(w.dtype)


@functools.partial(jax.jit, static_argnames=("inputs", "weights", "strengths", "power_of_two"))
def search_smoothing(
    x: jax.Array,
    w: jax.Array,
    inputs: Target,
    weights: Target,
    *,
    low: jax.Array | None = None,
    high: jax.Array | None = None,
    strengths: tuple[float, ...] = STRENGTHS,
    power_of_two: bool = False,
) -> Smoothing:
    """Finds the strength whose quantized product is nearest to that of x and w.

    No smoothing is a candidate too, so the error is never above that of leaving the layer alone.

    Args:
      x: floating-point [rows, in], calibration inputs. Rows that are not finite are left out.
      w: floating-point [in, out].
      inputs: what x / s becomes; 'tensor' stands for one scale, calibrated on the range of each channel.
      weights: what s · w becomes.
      low, high: float32 [in], that range, low <= 0 <= high, where x is a sample of what was seen: a few rows that are
        not in it may be what factors and scales have to hold. None for that of x.
      strengths: candidates for α.
      power_of_two: as in `smoothing_factors`.
    """
    check_matrix(x)
    check_matrix(w)
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    x = jnp.where(jnp.all(jnp.isfinite(x), axis=1, keepdims=True), x, jnp.float32(0))
    exact = jnp.matmul(x, w, precision=lax.Precision.HIGHEST)
    if low is None or high is None:
        low, high = jnp.min(x, 0, initial=0), jnp.max(x, 0, initial=0)
    input_amax = jnp.maximum(-low, high)
    weight_amax = amax(w, channelwise_axes=(0,))[:, 0]

    def quantized_inputs(x: jax.Array, low: jax.Array, high: jax.Array) -> QArray:
        if inputs.granularity != "tensor":
            return inputs.quantize(x)
        scale, zero_point = inputs.scales_of_range(jnp.min(low, initial=0), jnp.max(high, initial=0))
        return inputs.encode(x, scale, zero_point)

    def error(factors: jax.Array) -> jax.Array:
        left = quantized_inputs(smooth_inputs(x, factors), low / factors, high / factors).dequantize()
        right = weights.quantize(smooth_weights(w, factors)).dequantize()
        return jnp.sum((exact - jnp.matmul(left, right, precision=lax.Precision.HIGHEST)) ** 2)

    tried = [jnp.ones_like(input_amax)]
    tried += [smoothing_factors(input_amax, weight_amax, s, power_of_two=power_of_two) for s in strengths]
    candidates = jnp.stack(tried)
    errors = lax.map(error, candidates)
    best = best_of(errors)
    strength = jnp.asarray((np.nan, *strengths), jnp.float32)[best]
    return Smoothing(candidates[best], strength, errors[best], errors[0])


def best_of(errors: jax.Array) -> jax.Array:
    """The index of the least error; the first where all are NaN."""
    return jnp.argmin(jnp.where(jnp.isnan(errors), jnp.float32(jnp.inf), errors))
