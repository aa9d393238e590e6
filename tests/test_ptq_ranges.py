"""Calibrators against NumPy on all the values at once: any batches, any order, any scale."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ptq_oracle import divergence, migacz

from q8jax import ptq
from q8jax.ptq import Target, histogram, thresholds

INT8 = Target("int8")
UINT8 = Target("uint8", is_affine=True)

_update = jax.jit(histogram.update)
_merge = jax.jit(histogram.merge)


def heavy(size=20_000, seed=0):
    return np.random.default_rng(seed).standard_t(3, size).astype(np.float32)


def seen(x, parts=1):
    state = histogram.init()
    for part in np.split(x, parts):
        state = _update(state, jnp.asarray(part))
    return state


def finish(calibrator, x):
    return calibrator.finish(seen(x))


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def test_histogram_counts_what_numpy_counts():
    x = heavy()
    state = seen(x)
    top = 2.0 ** np.ceil(np.log2(np.abs(x).max()))
    expected, _ = np.histogram(x.astype(np.float64), bins=8192, range=(-top, top))
    np.testing.assert_array_equal(state.counts, expected)
    assert (state.width, float(state.smallest), float(state.largest)) == (top / 4096, x.min(), x.max())
    assert not state.nonfinite


def test_histogram_does_not_depend_on_batches_or_their_order():
    x = heavy() * np.repeat(np.float32(2.0) ** np.arange(-12, 8), 1000)
    x[0], x[1], x[-1] = 1e-30, -4.0, 8.0  # tiny ones, and powers of two, which are edges of bins
    whole = as_numpy(seen(x))
    for values in (x, x[::-1].copy()):
        jax.tree.map(np.testing.assert_array_equal, as_numpy(seen(values, 20)), whole)
    merged = _merge(seen(x[12_000:]), seen(x[:12_000], 3))
    jax.tree.map(np.testing.assert_array_equal, as_numpy(merged), whole)


def test_histogram_takes_every_magnitude_and_more_than_32_bits_of_counts():
    x = np.array([-3.4e38, 1e-45, -1e-37, 1e20, 0, 3.4e38], np.float32)
    assert seen(x).counts.sum() == 6 and int(seen(x).exponent) == 128
    state = seen(np.ones(4, np.float32))
    for _ in range(34):
        state = _merge(state, state)
    assert state.counts.sum() == state.counts.max() == 2.0**36


def test_values_that_are_not_finite_are_seen_and_not_counted():
    x = heavy(1000)
    dirty = np.append(x, np.array([np.nan, np.inf, -np.inf], np.float32))
    clean, got = seen(x), seen(dirty)
    np.testing.assert_array_equal(got.counts, clean.counts)
    assert got.nonfinite and got.largest == clean.largest
    for calibrator in (ptq.min_max(INT8), ptq.min_max(UINT8), ptq.moving_average(UINT8)):
        states = [jax.jit(calibrator.update)(calibrator.init(), jnp.asarray(values)) for values in (x, dirty)]
        assert [bool(state.nonfinite) for state in states] == [False, True]
        for a, b in zip(*map(calibrator.finish, states)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("calibrator", [ptq.min_max, ptq.moving_average, ptq.mean_squared_error, ptq.entropy])
def test_nothing_and_zeros_give_scale_one(calibrator):
    calibrator = calibrator(INT8)
    state = calibrator.init()
    for x in (np.zeros(0, np.float32), np.zeros(20_000, np.float32)):
        state = jax.jit(calibrator.update)(state, jnp.asarray(x))
        assert float(calibrator.finish(state)[0]) == 1


@pytest.mark.parametrize("channels", [None, 5])
def test_min_max_is_that_of_all_batches(channels):
    x = heavy(4 * 3 * 10 * 5).reshape(4, 3, 10, 5) + np.arange(5, dtype=np.float32)
    axes = None if channels is None else (0, 1, 2)
    low, high = np.minimum(x.min(axes), 0), np.maximum(x.max(axes), 0)
    for target in (INT8, UINT8, Target("e4m3fn")):
        calibrator = ptq.min_max(target, channels)
        step = lambda state, x, update=calibrator.update: (update(state, x), None)
        state, _ = jax.lax.scan(step, calibrator.init(), jnp.asarray(x))
        scale, zero_point = calibrator.finish(state)
        if target.is_affine:
            np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-6)
            np.testing.assert_array_equal(zero_point, np.rint(-low / ((high - low) / 255)))
        else:
            top = {"int8": 127, "float8_e4m3fn": 448}[target.qtype]
            np.testing.assert_allclose(scale, np.maximum(-low, high) / top, rtol=1e-6)
        halves = [
            functools.reduce(calibrator.update, map(jnp.asarray, part), calibrator.init()) for part in (x[:1], x[1:])
        ]
        jax.tree.map(np.testing.assert_array_equal, calibrator.finish(calibrator.merge(*halves)), (scale, zero_point))


def test_moving_average_weighs_batches_by_age():
    x = heavy(60).reshape(4, 15)
    x[2] = 0  # says nothing
    calibrator = ptq.moving_average(UINT8, 0.75)
    state = functools.reduce(calibrator.update, map(jnp.asarray, x), calibrator.init())
    weights = np.array([0.75**2, 0.75, 1])
    low, high = (np.average(ends, weights=weights) for ends in (x[[0, 1, 3]].min(1), x[[0, 1, 3]].max(1)))
    scale, zero_point = calibrator.finish(state)
    np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-5)
    assert int(zero_point) == np.rint(-low / ((high - low) / 255))
    other = functools.reduce(calibrator.update, map(jnp.asarray, 3 * x), calibrator.init())
    np.testing.assert_allclose(calibrator.finish(calibrator.merge(state, other))[0], 2 * scale, rtol=1e-5)
    with pytest.raises(ValueError, match="decay must be"):
        ptq.moving_average(INT8, 1.0)


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
def test_percentile_is_numpys_to_a_width(percent):
    x = heavy(19_997)  # no percentile falls between two values
    width = seen(x).width
    assert width <= np.abs(x).max() / 2048
    exact = np.percentile(np.abs(x), percent, method="inverted_cdf")
    got = float(finish(ptq.percentile(INT8, percent), x)[0]) * 127
    assert -1e-5 <= got - exact <= width * 1.001
    scale, zero_point = finish(ptq.percentile(UINT8, percent), x)
    ends = np.percentile(x, [50 - percent / 2, 50 + percent / 2], method="inverted_cdf")
    assert float(scale) * 255 == pytest.approx(ends[1] - ends[0], abs=2 * width)
    assert float(scale) * -float(zero_point) == pytest.approx(ends[0], abs=width + float(scale) / 2)


def root_mean_square_error(x, scale, zero_point, target):
    low, high = (0, 255) if target.is_affine else (-127, 127)
    x, scale, zero = x.astype(np.float64), float(scale), 0 if zero_point is None else int(zero_point)
    if target.format.kind == "int":
        values = (np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale
    else:
        top = float(ml_dtypes.finfo(target.format.dtype).max)
        values = np.clip(x / scale, -top, top).astype(np.float32).astype(target.format.dtype).astype(np.float64) * scale
    return np.sqrt(np.mean((x - values) ** 2))


@pytest.mark.parametrize("target", [INT8, UINT8, Target("e2m1fn")], ids=lambda target: target.qtype)
def test_mean_squared_error_is_the_least_there_is(target):
    x = heavy()
    x = np.maximum(x, -1) if target.is_affine else x
    scale, zero_point = finish(ptq.mean_squared_error(target), x)
    got = root_mean_square_error(x, scale, zero_point, target)
    tried = []
    for share in np.geomspace(0.01, 1, 150):
        low, high = (np.float32(end * share) for end in (x.min(), x.max()))
        low = x.min() if target.is_affine else low
        found = target.scales_of_range(jnp.float32(low), jnp.float32(high))
        tried.append(root_mean_square_error(x, *found, target))
    whole = tried[-1]
    # Half a width is what the histogram may be wrong by, on either side; and the grid has gaps.
    assert got <= min(tried) * 1.02 + seen(x).width
    assert got < 0.97 * whole


def test_divergence_is_that_of_the_direct_way():
    rng = np.random.default_rng(0)
    counts = np.floor(400 * np.exp(-np.arange(300) / 40) * rng.random(300))
    counts[-1] = 3
    for target, top in ((Target("int4"), 7), (INT8, 127)):
        code_of = lambda share, top=top: int(np.floor(share * top + 0.5 - 1e-12))
        tried = {kept: divergence(counts, kept, code_of) for kept in range(min(top + 1, 300), 301)}
        assert np.isfinite(list(tried.values())).any() and min(tried.values()) > 0
        assert thresholds.kl_threshold(counts, target) == min(tried, key=tried.get)


def test_divergence_of_the_slides_example():
    # Eight bins to two codes: empty bins stay empty, and the others of a code share its counts.
    counts = [1, 0, 2, 3, 5, 3, 1, 7]
    p, q = np.array([1, 2, 3, 5, 3, 1, 7]) / 22, np.array([2, 2, 2, 4, 4, 4, 4]) / 22
    expected = np.sum(p * np.log(p / q))
    assert divergence(counts, 8, lambda share: int(share * 2)) == pytest.approx(expected)
    halves = np.repeat([0, 1], 4)
    assert thresholds._divergence(np.array(counts, float), halves) == pytest.approx(expected)
    # What is beyond the last bin that is kept is in P and not in Q.
    p, q = np.array([1, 2, 3, 5 + 11]) / 22, np.array([1.5, 1.5, 4, 4]) / 11
    clipped = thresholds._divergence(np.array(counts, float), np.array([0, 0, 0, 1, 1]))
    assert clipped == pytest.approx(np.sum(p * np.log(p / q)))


def test_entropy_cuts_where_the_slides_do():
    x = np.random.default_rng(1).laplace(size=50_000).astype(np.float32)
    x[0] = 40
    scale, zero_point = finish(ptq.entropy(INT8), x)
    counts, edges = np.histogram(np.abs(x), 1024, (0, np.abs(x).max()))
    _, by_kept = migacz(counts[:420].tolist())
    reach = float(scale) * 127
    assert zero_point is None and edges[128] <= reach < 0.5 * 40
    # As good, by their measure, as their own choice.
    kept = int(np.clip(round(reach / edges[1]), 128, 420))
    assert by_kept[kept] <= min(by_kept.values()) * 1.5
    assert by_kept[420] > 1.5 * min(by_kept.values())


def test_entropy_refuses_what_it_is_not_defined_for():
    for target in (UINT8, Target("int16")):
        with pytest.raises(ValueError, match="entropy takes symmetric targets"):
            ptq.entropy(target)
    with pytest.raises(ValueError, match="percent must be"):
        ptq.percentile(INT8, 0)
    scale, _ = finish(ptq.entropy(Target("e4m3fn")), heavy())
    assert 0 < float(scale) <= np.abs(heavy()).max() / 448 * 1.0001
