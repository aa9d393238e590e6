"""The largest |x| of tensors, with the last step of the reduction put off until several can take it together.

On a GPU a reduction to one number takes two kernels, and what the first one leaves is of rows anyway. So a maximum is
kept by row there, and those of a dot are finished by one kernel. Elsewhere one number is as good, and stands in every
row.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.groups import extremes


def amax(x: jax.Array) -> jax.Array:
    """float32 []: max |x|, NaN or Inf if x has one, 0 if it is empty."""
    return extremes(x, (1,) * x.ndim, keep_nan=True)[1].reshape(())


def amax_of_rows(x: jax.Array) -> jax.Array:
    """float32 [...] of the shape of all axes but the last: `amax` of each row on GPUs, of the whole elsewhere.

    A scalar and an empty array have one row.
    """
    if not x.ndim or not x.size:
        return amax(x)
    by_row = lambda x: jnp.squeeze(extremes(x, (*x.shape[:-1], 1), keep_nan=True)[1], -1)
    whole = lambda x: jnp.broadcast_to(amax(x), x.shape[:-1])
    return lax.platform_dependent(x, cuda=by_row, rocm=by_row, default=whole)


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """float32 [len(parts)]: the amaxes of tensors, each given as `amax` or `amax_of_rows` has it."""
    if not parts:
        return jnp.zeros(0, jnp.float32)
    rows = [part.reshape(-1) for part in parts]

    def at_once(*rows: jax.Array) -> jax.Array:
        # Bit patterns of what is not negative are in the same order, and keep NaN.
        bits = [lax.bitcast_convert_type(row, jnp.int32) for row in rows]
        longest = max(row.size for row in bits)
        padded = jnp.stack([jnp.pad(row, (0, longest - row.size)) for row in bits])
        # With lax.reduce, because jnp.max takes its initial value into account by one more operation, a kernel.
        return lax.bitcast_convert_type(lax.reduce(padded, np.int32(0), lax.max, (1,)), jnp.float32)

    any_row = lambda *rows: jnp.stack([row[0] for row in rows])
    return lax.platform_dependent(*rows, cuda=at_once, rocm=at_once, default=any_row)
