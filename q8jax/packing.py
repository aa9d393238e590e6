"""Codes of less than a byte, several to a byte.

Of n codes along an axis, p to a byte, byte j holds codes j, j + m, j + 2m, …, where m = ceil(n / p): the first in its
lowest bits. What is missing at the end is zero. So to unpack is to shift the bytes p times and to join the results,
which needs no interleaving, and a stack of arrays is packed like each of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WIDTHS = (1, 2, 4, 8)


def pack(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """Returns the bytes of codes, uint8 with ceil(n / p) entries along the axis.

    Args:
      codes: uint8 or int8; of each the lowest bits count.
      bits: of a code, 1, 2, 4 or 8.
      axis: along which codes share bytes.

    Raises:
      ValueError: another number of bits.
    """
    _check(bits)
    codes = lax.bitcast_convert_type(codes, jnp.uint8)
    per_byte = 8 // bits
    axis = axis % codes.ndim
    length = -(-codes.shape[axis] // per_byte)
    padding = [(0, length * per_byte - n if i == axis else 0) for i, n in enumerate(codes.shape)]
    parts = jnp.split(jnp.pad(codes & np.uint8(2**bits - 1), padding), per_byte, axis)
    packed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        packed = packed | (part << np.uint8(i * bits))
    return packed


def unpack(packed: jax.Array, bits: int, size: int, axis: int = -1, *, signed: bool) -> jax.Array:
    """Inverse of `pack`.

    Args:
      packed: uint8, as `pack` returns it.
      bits, axis: likewise.
      size: n, the number of codes along the axis.
      signed: whether codes are in two's complement.

    Returns:
      int8 if signed, else uint8.
    """
    _check(bits)
    per_byte = 8 // bits
    shifts = [8 - bits - i * bits for i in range(per_byte)]
    # To the top of the byte and down again, which extends the sign.
    raised = [packed << np.uint8(shift) for shift in shifts]
    if signed:
        parts = [lax.bitcast_convert_type(part, jnp.int8) >> np.int8(8 - bits) for part in raised]
    else:
        parts = [part >> np.uint8(8 - bits) for part in raised]
    joined = parts[0] if per_byte == 1 else jnp.concatenate(parts, axis)
    return lax.slice_in_dim(joined, 0, size, axis=axis % packed.ndim)


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"Codes of {bits} bits cannot be packed: choose from {', '.join(map(str, WIDTHS))}.")
