"""Codes of less than a byte, against a loop in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q8jax.packing import pack, unpack


@pytest.mark.parametrize("size", [1, 6, 8, 13])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bytes_hold_codes_as_documented(bits, size):
    codes = np.random.default_rng(0).integers(0, 2**bits, (size, 3)).astype(np.uint8)
    length = -(-size * bits // 8)
    wanted = np.zeros((length, 3), int)
    for i in range(size):
        wanted[i % length] |= codes[i].astype(int) << (i // length * bits)
    packed = pack(jnp.asarray(codes), bits, 0)
    np.testing.assert_array_equal(packed, wanted)
    np.testing.assert_array_equal(unpack(packed, bits, size, 0, signed=False), codes)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_signed_codes_come_back_through_any_axis_of_a_stack(bits, axis):
    codes = np.random.default_rng(1).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, 5, 7)).astype(np.int8)
    packed = pack(jnp.asarray(codes), bits, axis)
    found = jax.vmap(lambda x: unpack(x, bits, codes.shape[axis], axis, signed=True))(packed)
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, codes)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="3 bits cannot be packed"):
        pack(jnp.zeros(4, jnp.uint8), 3)
