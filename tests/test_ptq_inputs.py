"""Statistics of inputs, smoothing, the outlier path and targets, against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptq_oracle import correlated

from q8jax import dot_general, ptq
from q8jax.ptq import Target

IN, OUT = 24, 16
WEIGHTS = Target("int8", "channel")
STATIC, DYNAMIC = Target("int8"), Target("int8", "row")
DOT = (((1,), (0,)), ((), ()))

update = jax.jit(ptq.inputs.update)


def rounded(target, x):
    return jax.jit(target.quantize)(jnp.asarray(x))


def data(outliers=(3, 10), size=40.0):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, IN)), rng.standard_normal((IN, OUT))
    x[:, list(outliers)] *= size
    return x.astype(np.float32), w.astype(np.float32)


def distance(x, w, product):
    exact = x.astype(np.float64) @ w.astype(np.float64)
    return float(np.sum((exact - np.asarray(product, np.float64)) ** 2))


def test_inputs_are_sums_over_rows_in_any_batches():
    x = correlated(60, IN)
    whole = update(ptq.inputs.init(IN), jnp.asarray(x))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(whole.gram, wide.T @ wide, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(whole.mean, wide.mean(0), atol=1e-5)
    np.testing.assert_allclose(whole.mean_magnitude, np.abs(wide).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(whole.amax, np.abs(x).max(0))
    halves = [update(ptq.inputs.init(IN), jnp.asarray(part)) for part in x.reshape(2, 5, 6, IN)]
    merged = ptq.inputs.merge(*halves)
    assert (int(merged.rows), int(merged.skipped)) == (60, 0)
    for name in ("gram", "total", "magnitude", "amax"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-4, atol=1e-3)


def test_rows_that_are_not_finite_are_skipped_and_counted():
    x = correlated(60, IN)
    dirty = x.copy()
    dirty[[5, 9], [0, 3]] = np.nan, -np.inf
    got = update(ptq.inputs.init(IN), jnp.asarray(dirty))
    clean = update(ptq.inputs.init(IN), jnp.asarray(np.delete(x, [5, 9], 0)))
    assert (int(got.rows), int(got.skipped)) == (58, 2)
    np.testing.assert_allclose(got.gram, clean.gram, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(got.amax, clean.amax)
    nothing = ptq.inputs.init(3)
    np.testing.assert_array_equal(nothing.mean, 0)


def test_errors_of_outputs_come_from_the_gram_matrix():
    x, w = data()
    other = w + np.float32(0.1) * np.sin(np.arange(w.size, dtype=np.float32)).reshape(w.shape)
    gram = update(ptq.inputs.init(IN), jnp.asarray(x)).gram
    exact, changed = (x.astype(np.float64) @ values for values in (w, other))
    squared = np.sum((exact - changed) ** 2)
    assert float(ptq.squared_error(gram, jnp.asarray(w - other))) == pytest.approx(squared, rel=1e-4)
    relative = np.sqrt(squared / np.sum(exact**2))
    assert float(ptq.relative_error(gram, jnp.asarray(w), jnp.asarray(other))) == pytest.approx(relative, rel=1e-4)
    assert float(ptq.relative_error(gram, jnp.asarray(w), jnp.asarray(w))) == 0


def test_smoothing_leaves_the_product_as_it_is():
    x, w = data()
    amaxes = np.abs(x).max(0), np.abs(w).max(1)
    factors = ptq.smoothing_factors(*map(jnp.asarray, amaxes), 0.7)
    np.testing.assert_allclose(factors, amaxes[0] ** 0.7 / amaxes[1] ** 0.3, rtol=1e-5)
    left, right = ptq.smooth_inputs(jnp.asarray(x), factors), ptq.smooth_weights(jnp.asarray(w), factors)
    product = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    np.testing.assert_allclose(product, x.astype(np.float64) @ w, rtol=1e-5, atol=1e-4)

    powers = ptq.smoothing_factors(*map(jnp.asarray, amaxes), 0.7, power_of_two=True)
    np.testing.assert_array_equal(np.frexp(np.asarray(powers))[0], 0.5)
    np.testing.assert_array_less(np.abs(np.log2(powers / factors)), 0.5001)
    for dtype in (jnp.float32, jnp.bfloat16):
        narrow_x, narrow_w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
        left, right = ptq.smooth_inputs(narrow_x, powers), ptq.smooth_weights(narrow_w, powers)
        assert left.dtype == right.dtype == dtype
        exact = np.asarray(narrow_x, np.float64) @ np.asarray(narrow_w, np.float64)
        np.testing.assert_array_equal(np.asarray(left, np.float64) * np.asarray(powers), np.asarray(narrow_x))
        np.testing.assert_allclose(np.asarray(left, np.float64) @ np.asarray(right, np.float64), exact, rtol=1e-12)


def test_smoothing_factors_of_channels_without_values_are_one_and_others_bounded():
    x = jnp.array([0, 1, 0, 1e30, 1e-30, 2], jnp.float32)
    w = jnp.array([1, 0, 0, 1e-6, 1e6, 1], jnp.float32)
    for strength in (0.0, 0.5, 1.0):
        got = np.asarray(ptq.smoothing_factors(x, w, strength))
        np.testing.assert_array_equal(got[:3], 1)
        assert (got >= 2.0**-16).all() and (got <= 2.0**16).all()
    np.testing.assert_allclose(ptq.smoothing_factors(x, w, 1.0)[-1], 2)


@pytest.mark.parametrize("inputs", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_search_of_smoothing_finds_the_best_strength(inputs):
    x, w = data()
    strengths = (0.0, 0.4, 0.6, 0.8, 1.0)
    got = ptq.search_smoothing(jnp.asarray(x), jnp.asarray(w), inputs, WEIGHTS, strengths=strengths)
    losses = []
    for strength in (None, *strengths):
        s = np.ones(IN)
        if strength is not None:
            s = np.abs(x).max(0).astype(np.float64) ** strength / np.abs(w).max(1).astype(np.float64) ** (1 - strength)
        left, right = x / s, w * s[:, None]
        step_left = np.abs(left).max(None if inputs is STATIC else 1, keepdims=True) / 127
        step_right = np.abs(right).max(0, keepdims=True) / 127
        product = (np.rint(left / step_left) * step_left) @ (np.rint(right / step_right) * step_right)
        losses.append(distance(x, w, product))
    assert float(got.strength) == pytest.approx(strengths[int(np.argmin(losses)) - 1])
    np.testing.assert_allclose([got.error, got.unsmoothed_error], [min(losses), losses[0]], rtol=0.02)
    assert 0 < float(got.error) < 0.25 * float(got.unsmoothed_error)


def test_search_of_smoothing_may_find_that_none_is_best():
    x = np.ones((8, IN), np.float32)
    x[:, ::2] = -127
    # Rows of weights that are codes as they are: factors could only make them worse.
    w = np.tile(np.arange(OUT, dtype=np.float32), (IN, 1))
    w[0] = 127
    w[1] = 0
    x[3, 4] = np.nan
    got = ptq.search_smoothing(jnp.asarray(x), jnp.asarray(w), STATIC, WEIGHTS)
    assert np.isnan(got.strength) and float(got.error) == 0
    np.testing.assert_array_equal(got.factors, 1)


def test_outlier_path_loses_less_where_there_are_outliers():
    x, w = data()
    amax = np.abs(x).max(0)
    channels = ptq.channels_above(jnp.asarray(amax), 6.0)
    np.testing.assert_array_equal(channels, [3, 10])
    parts = ptq.split(jnp.asarray(w), channels, WEIGHTS)
    np.testing.assert_array_equal(parts.outliers, w[[3, 10]])
    np.testing.assert_array_equal(parts.rest_channels, np.delete(np.arange(IN), [3, 10]))
    rest, outliers = ptq.split_inputs(jnp.asarray(x), parts)
    left = rounded(DYNAMIC, rest).dequantize()
    product = np.asarray(left) @ np.asarray(parts.rest.dequantize()) + np.asarray(outliers) @ w[[3, 10]]
    recipe = "fwd=int8:row,int8:row/dlhs=none,none/drhs=none,none"
    dot = jax.jit(lambda x, w: dot_general(x, w, DOT, recipe))
    plain = distance(x, w, dot(jnp.asarray(x), jnp.asarray(w)))
    assert 0 < distance(x, w, product) < 0.02 * plain
    # The quantized half is what the dot makes of the same rows of the weights.
    quantized = dot(rest, jnp.asarray(w)[parts.rest_channels])
    np.testing.assert_allclose(quantized, np.asarray(left) @ np.asarray(parts.rest.dequantize()), atol=1e-4)


def test_outlier_channels_are_chosen_by_amax():
    amax = jnp.array([5, 9, 1, 9, 7, 0], jnp.float32)
    np.testing.assert_array_equal(ptq.largest_channels(amax, 3), [1, 3, 4])
    np.testing.assert_array_equal(ptq.largest_channels(amax, 1), [1])
    assert ptq.channels_above(amax, 100.0).size == 0
    np.testing.assert_array_equal(ptq.channels_above(amax, 8.0, 4), [0, 1, 3, 4])
    assert ptq.channels_above(amax, 4.0, 5).size == 5 and ptq.channels_above(amax, -1.0, 4).size == 6


def test_split_without_outliers_and_what_it_refuses():
    x, w = data()
    parts = ptq.split(jnp.asarray(w), np.array([], np.int32), WEIGHTS)
    np.testing.assert_array_equal(parts.rest.dequantize(), rounded(WEIGHTS, w).dequantize())
    rest, outliers = ptq.split_inputs(jnp.asarray(x)[None], parts)
    assert (rest.shape, outliers.shape, parts.outliers.shape) == ((1, 64, IN), (1, 64, 0), (0, OUT))
    for channels in ([1, 1], [IN], [-1]):
        with pytest.raises(ValueError, match="channels must be different ones from 0 to 23"):
            ptq.split(jnp.asarray(w), np.array(channels), WEIGHTS)
    with pytest.raises(ValueError, match="a tile of 8 does not divide"):
        ptq.split(jnp.asarray(w), np.array([2]), Target("int8", "group", 8))


def test_target_refuses_contradictions():
    for message, arguments in {
        "group_size goes with": {"granularity": "group"},
        "group_size goes with granularity": {"group_size": 32},
        "is_affine needs an integer qtype": {"qtype": "e4m3fn", "is_affine": True},
        "uint8 has no negative codes": {"qtype": "uint8"},
        "granularity": {"granularity": "chanel"},
        "scale_format": {"scale_format": "e8m1"},
    }.items():
        with pytest.raises(ValueError, match=message):
            Target(**{"qtype": "int8", **arguments})


@pytest.mark.parametrize("is_affine", [False, True])
def test_target_finds_the_same_scales_as_quantize(is_affine):
    _, w = data()
    for granularity in ("tensor", "group") if is_affine else ("channel", "row"):
        size = 8 if granularity == "group" else None
        target = Target("uint4" if is_affine else "int4", granularity, size, is_affine=is_affine)
        expected = rounded(target, w)
        scale, zero_point = jax.jit(functools.partial(target.scales, shrink=1))(jnp.asarray(w))
        shape = {"tensor": (1, 1), "channel": (1, OUT), "row": (IN, 1), "group": (3, OUT)}[granularity]
        assert scale.shape == expected.scale.shape == shape
        np.testing.assert_array_equal(scale, expected.scale)
        if is_affine:
            np.testing.assert_array_equal(zero_point, expected.zero_point)
