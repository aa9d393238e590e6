"""Statistics against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q8jax.calibration import scale_from_amax
from q8jax.codebook import normal_float
from q8jax.groups import amax
from q8jax.qarray import quantize
from q8jax.stats import saturation, sqnr, staleness, underflow

X = (np.random.default_rng(0).standard_normal((64, 128)) * 2).astype(np.float32)


def test_sqnr_is_its_definition_for_quantized_and_dequantized_arrays():
    @jax.jit
    def both(x):
        q = quantize(x, "e5m2")
        return q.dequantize(), sqnr(x, q), sqnr(x, q.dequantize())

    value, from_codes, from_values = both(X)
    wanted = 10 * np.log10((X.astype(np.float64) ** 2).sum() / ((X.astype(np.float64) - value) ** 2).sum())
    np.testing.assert_allclose([from_codes, from_values], wanted, atol=1e-3)


def test_sqnr_counts_a_million_values_exactly_enough():
    x = np.random.default_rng(1).standard_normal(2**20).astype(np.float32)
    noisy = (x + 0.01 * np.random.default_rng(2).standard_normal(2**20)).astype(np.float32)
    wanted = 10 * np.log10((x.astype(np.float64) ** 2).sum() / ((x.astype(np.float64) - noisy) ** 2).sum())
    np.testing.assert_allclose(jax.jit(sqnr)(x, noisy), wanted, atol=2e-3)


@pytest.mark.parametrize("magnitude", [1e-34, 1e-20, 1e20, 3e37])
def test_sqnr_does_not_depend_on_the_magnitude(magnitude):
    x = (X / np.abs(X).max() * magnitude).astype(np.float32)
    noisy = (x * np.float32(1.01)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(sqnr)(x, noisy), 40, atol=0.01)


def test_sqnr_at_its_ends():
    found = jax.jit(sqnr)
    zeros = np.zeros_like(X)
    assert found(X, X) == np.inf
    assert found(zeros, zeros) == np.inf
    assert sqnr(jnp.zeros((0, 3), jnp.float32), jnp.zeros((0, 3), jnp.float32)) == np.inf
    np.testing.assert_allclose(found(X, zeros), 0, atol=1e-5)
    assert found(zeros, X) == -np.inf
    assert np.isnan(found(np.where(X > 3, np.nan, X).astype(np.float32), X))
    half = jnp.asarray(X, jnp.bfloat16)
    assert found(half, half) == np.inf


def test_saturation_counts_what_would_round_beyond_the_range():
    x = np.array([0, 3.4, -3.4, 3.6, -3.6, 100, np.inf, -np.inf, np.nan, 1], np.float32)

    @jax.jit
    def shares(x):
        # E2M1's largest value is 6 and its last step 2, so 7 rounds to it and 7.2 would not; with scale
        # 1/2 that is 3.5 and 3.6. Integers clip at half a step, too: 7.5 of 7 for int4 at this scale.
        fp4 = quantize(x[:-2], "e2m1fn", scale=jnp.float32(0.5))
        int4 = quantize(x[:-2], "int4", scale=jnp.float32(3.4 / 7.4))
        scale = jnp.float32(2)
        wide = quantize(jnp.array([253.9, 255.1, -255.1, 1], jnp.float32), "int8", scale=scale)
        return (
            saturation(x[:-2], fp4),
            saturation(x[:-2], int4),
            saturation(jnp.array([253.9, 255.1, -255.1, 1], jnp.float32), wide),
        )

    fp4, int4, wide = shares(x)
    assert fp4 == 5 / 8
    assert int4 == 5 / 8
    assert wide == 0.5


def test_saturation_of_the_full_range_affine_codes_and_code_books():
    x = np.array([-128.4, -127.4, 127.4, 3], np.float32)
    one = np.float32(1)
    y = np.array([-3.4, -3.6, 252.4, 252.6], np.float32)
    # The outermost steps of NF4 are 0.304 and 0.277.
    z = np.array([-1.1, -1.2, 1.1, 1.2, 0], np.float32)

    @jax.jit
    def shares(x, y, z):
        return (
            saturation(x, quantize(x, "int8", scale=one)),
            saturation(x, quantize(x, "int8", scale=one, full_range=True)),
            saturation(y, quantize(y, "uint8", scale=one, zero_point=jnp.int32(3))),
            saturation(z, quantize(z, "uint4", scale=one, codebook=normal_float(4))),
        )

    np.testing.assert_allclose(shares(x, y, z), [0.25, 0, 0.5, 0.4], rtol=1e-6)


def test_current_scaling_saturates_nothing_and_a_stale_scale_does():
    @jax.jit
    def shares(x):
        scale = scale_from_amax(amax(x), "e4m3fn")
        fresh, stale = (quantize(x, "e4m3fn", scale=s) for s in (scale, scale * jnp.float32(0.25)))
        return saturation(x, fresh), saturation(x, stale)

    fresh, stale = shares(X)
    assert fresh == 0
    wanted = (np.abs(X) > np.abs(X).max() / 4 * 464 / 448).mean()
    np.testing.assert_allclose(stale, wanted, atol=2 / X.size)


def test_underflow_is_the_share_of_nonzero_values_that_became_zero():
    x = np.array([0, 0, 1, 1e-3, -1e-3, 2e-3, np.nan], np.float32)
    q = quantize(x, "e4m3", scale=np.float32(4))
    assert underflow(x, q) == 0.75
    assert underflow(x, q.dequantize()) == 0.75
    assert underflow(np.zeros(3, np.float32), np.zeros(3, np.float32)) == 0
    # A float format loses far less to zero than an integer of as many bits.
    x = (X * np.exp(3 * np.random.default_rng(3).standard_normal(X.shape))).astype(np.float32)
    lost = jax.jit(lambda x: [underflow(x, quantize(x, name)) for name in ("e5m2", "e4m3fn", "int8")])(x)
    assert 0 <= lost[0] < lost[1] < lost[2] < 1


def test_shares_of_more_values_than_float32_counts():
    size = 2**24 + 2**10
    x = jnp.ones(size, jnp.bfloat16)
    assert jax.jit(underflow)(x, jnp.zeros(size, jnp.bfloat16)) == 1


def test_staleness_is_the_ratio_of_amaxes_of_each_group():
    rows = np.float32([[1, -0.5, np.nan], [0, 4, -2], [1.5, np.inf, 0], [0, 0, 0]])
    built_for = np.float32([[1], [2], [3], [3]])
    for margin in (0, 2):
        scale = scale_from_amax(built_for, "e5m2", margin=margin)
        found = staleness(rows, quantize(rows, "e5m2", scale=scale), margin=margin)
        np.testing.assert_allclose(found, [[1], [2], [0.5], [0]], rtol=1e-6)
    integers = quantize(rows, "int8", scale=jnp.float32(built_for / 127))
    np.testing.assert_allclose(staleness(rows, integers), [[np.nan], [2], [0.5], [0]], rtol=1e-6)


def test_a_fresh_scale_has_staleness_one_whatever_the_codes():
    options = [
        ("e4m3fn", {"tiled_axes": {1: 32}}),
        ("e4m3fn", {"channelwise_axes": (0,), "scale_format": "e8m0"}),
        ("uint8", {"calibration": "minmax", "channelwise_axes": (1,)}),
        ("uint4", {"codebook": normal_float(4)}),
    ]

    @jax.jit
    def both(x):
        quantized = [quantize(x, qtype, **ways) for qtype, ways in options]
        return [[staleness(factor * x, q) for q in quantized] for factor in (1, 4)]

    fresh, stale = both(X)
    assert [part.shape for part in fresh] == [(1, 4), (64, 1), (1, 128), (1, 1)]
    np.testing.assert_allclose(fresh[0], 1, rtol=1e-6)
    assert ((fresh[1] > 0.5) & (fresh[1] <= 1)).all()
    np.testing.assert_allclose(fresh[2], 1, atol=0.01)  # zero points are whole
    np.testing.assert_allclose(fresh[3], 1, rtol=1e-6)
    for now, once in zip(stale, fresh, strict=True):
        np.testing.assert_allclose(now, 4 * once, rtol=1e-6)
