"""Directed and stochastic rounding against exact grids, and powers of two."""

import functools

import format_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q8jax.formats import FORMATS, cast, decode
from q8jax.rounding import ceil_power_of_two

KEY = jax.random.key(7)
NARROW = (*oracle.FP8, *oracle.FP6, *oracle.FP4, *oracle.INTEGERS)


@functools.partial(jax.jit, static_argnums=(1, 2))
def rounded(x: jax.Array, name: str, rounding: str, key: jax.Array | None = None) -> jax.Array:
    return decode(cast(x, name, rounding=rounding, key=key), name)


def values(x: np.ndarray, name: str, rounding: str, seed: int = 0) -> np.ndarray:
    key = jax.random.key(seed) if rounding == "stochastic" else None
    return np.asarray(rounded(jnp.asarray(x), name, rounding, key)).astype(np.float64)


@pytest.mark.parametrize("name", [*NARROW, "bfloat16", "float16", oracle.E8M0])
def test_directed_rounding_is_exact(name):
    x = np.concatenate([oracle.random_float32(50_000), oracle.critical_float32(name)])
    both = jax.jit(lambda x: [rounded(x, name, rounding) for rounding in ("nearest_away", "truncate")])
    for found, rounding in zip(both(jnp.asarray(x)), ("nearest_away", "truncate"), strict=True):
        wanted = oracle.directed(x, name, rounding)
        if not FORMATS[name].has_nan:
            wanted = np.where(np.isnan(wanted), 0, wanted)
        np.testing.assert_array_equal(found, wanted.astype(np.float32), err_msg=f"{name} {rounding}")


def test_stochastic_rounding_keeps_values_of_the_format_and_saturates():
    size = 1024
    given = np.empty((len(oracle.ALL), size), np.float32)
    for row, name in zip(given, oracle.ALL, strict=True):
        grid = oracle.grid(name if name != "float32" else "bfloat16")
        grid = np.concatenate([grid, -grid if FORMATS[name].signed and name != oracle.E8M0 else grid])
        row[:] = np.resize(grid[:: max(1, len(grid) // size)], size)
        row[-3:] = np.inf, -np.inf, np.nan
    # All in one program with one key, so that the noise is compiled once.
    found = jax.jit(lambda x: [rounded(x[i], name, "stochastic", KEY) for i, name in enumerate(oracle.ALL)])(given)
    for name, x, value in zip(oracle.ALL, given, found, strict=True):
        fmt = FORMATS[name]
        np.testing.assert_array_equal(value[:-3], x[:-3], err_msg=name)
        assert value[-3] == np.float32(fmt.max), name
        assert value[-2] == np.float32(fmt.narrow_min if fmt.kind != "scale" else fmt.min), name
        assert np.isnan(value[-1]) if fmt.has_nan else value[-1] == 0, name


def points_of_every_binade(name: str) -> np.ndarray:
    """Ten points in each binade of the format, and in five below its smallest value; both signs by turns."""
    fmt = FORMATS[name]
    if name in oracle.INTEGERS:
        # A binade of integers has one spacing throughout; what matters is the fraction.
        binades = np.arange(-5, fmt.mantissa_bits)
    else:
        binades = np.arange(np.log2(fmt.smallest_subnormal) - 5, np.floor(np.log2(fmt.max)) + 1)
    points = (2.0 ** binades[:, None] * (1 + (np.arange(10) + 0.37) / 10)).ravel()
    points = points[points < fmt.max].astype(np.float32)
    if fmt.signed:
        points[1::2] *= -1
    return points


def test_stochastic_rounding_is_unbiased_at_ten_points_of_every_binade():
    draws = 2**12
    points = {name: points_of_every_binade(name) for name in NARROW}
    size = max(map(len, points.values()))
    given = np.stack([np.resize(x, size) for x in points.values()])

    @jax.jit
    def draw(given):
        results = []
        for i, name in enumerate(points):
            x = jnp.broadcast_to(given[i], (draws, size))
            value = rounded(x, name, "stochastic", KEY)
            results.append((jnp.sum(jnp.abs(value) > jnp.abs(x), axis=0), jnp.min(value, 0), jnp.max(value, 0)))
        return results

    for (name, x), result in zip(points.items(), draw(given), strict=True):
        up, smallest, largest = (np.asarray(a)[: len(x)].astype(np.float64) for a in result)
        low, high = oracle.neighbours(x, name)
        # Both neighbours and nothing else, so the share of draws that went up gives the mean.
        np.testing.assert_array_equal(np.sort(np.abs([smallest, largest]), axis=0), [low, high], err_msg=name)
        share = (np.abs(x.astype(np.float64)) - low) / (high - low)
        mean = low + (high - low) * up / draws
        standard_error = (high - low) * np.sqrt(share * (1 - share) / draws)
        z = (mean - np.abs(x.astype(np.float64))) / standard_error
        assert (np.abs(z) < 4).all(), (name, x[np.abs(z) >= 4], z[np.abs(z) >= 4])
        # Together the points see a bias far below what one of them would.
        assert abs(z.mean()) * np.sqrt(len(z)) < 4, name
        assert 0.5 < (z**2).mean() < 1.6, name


def test_stochastic_rounding_is_unbiased_far_below_the_smallest_value():
    draws, names = 2**19, ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8")
    for shift in (7, 10):
        given = np.array([FORMATS[name].smallest_subnormal * 2.0**-shift for name in names], np.float32)
        found = count_ups(given, draws, names)
        wanted = draws * 2.0**-shift
        assert (np.abs(np.asarray(found) - wanted) < 4 * np.sqrt(wanted)).all()


@functools.partial(jax.jit, static_argnums=(1, 2))
def count_ups(given: jax.Array, draws: int, names: tuple[str, ...]) -> list[jax.Array]:
    values = [rounded(jnp.broadcast_to(given[i], draws), name, "stochastic", KEY) for i, name in enumerate(names)]
    return [jnp.sum(value == FORMATS[name].smallest_subnormal) for name, value in zip(names, values, strict=True)]


def test_stochastic_rounding_of_scales_is_unbiased():
    points = np.array([2.0**-126 * 0.7, 1.25, 1.9, 3e20], np.float32)
    found = values(np.broadcast_to(points, (2**13, 4)), oracle.E8M0, "stochastic")
    low, high = oracle.neighbours(points, oracle.E8M0)
    assert np.isin(found, [low, high]).all()
    share = (points.astype(np.float64) - low) / (high - low)
    error = (high - low) * np.sqrt(share * (1 - share) / 2**13)
    assert (np.abs(found.mean(0) - points) < 4 * error).all()


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_every_element_draws_for_itself(name):
    # 0.3 of the way from one value of the format to the next.
    x = np.full((64, 64), 1 + 0.3 * 2.0 ** -(0 if name == "int8" else FORMATS[name].mantissa_bits), np.float32)
    first, again, other = (values(x, name, "stochastic", seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3
    # Noise shared along an axis would make neighbours agree always; independent draws do with
    # chance 0.3² + 0.7².
    for axis in (0, 1):
        agree = (first == np.roll(first, 1, axis)).mean()
        assert abs(agree - 0.58) < 6 * np.sqrt(0.58 * 0.42 / 64**2)
        assert len(np.unique(first, axis=axis)) > 60


def test_ceil_power_of_two_is_exact():
    exact = np.float32(2.0) ** np.arange(-126, 128, dtype=np.float32)
    np.testing.assert_array_equal(ceil_power_of_two(jnp.asarray(exact)), exact)
    above = np.nextafter(exact[:-1], np.float32(np.inf))
    np.testing.assert_array_equal(ceil_power_of_two(jnp.asarray(above)), exact[1:])
    below = np.nextafter(exact[1:], np.float32(0))
    np.testing.assert_array_equal(ceil_power_of_two(jnp.asarray(below)), exact[1:])

    x = np.abs(oracle.random_float32(200_000))
    x = x[np.isfinite(x) & (x >= 2.0**-126) & (x <= 2.0**127)]
    mantissa, exponent = np.frexp(x.astype(np.float64))
    wanted = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
    np.testing.assert_array_equal(np.asarray(ceil_power_of_two(jnp.asarray(x))).astype(np.float64), wanted)


def test_ceil_power_of_two_is_finite_and_positive_at_the_ends():
    subnormal = np.array([0, 1e-45, 1e-40, 1.1754942e-38], np.float32)
    assert (np.asarray(ceil_power_of_two(jnp.asarray(subnormal))) == np.float32(2.0**-126)).all()
    huge = np.array([2.0**127, 3e38, np.inf], np.float32)
    assert (np.asarray(ceil_power_of_two(jnp.asarray(huge))) == np.float32(2.0**127)).all()
    assert np.isnan(ceil_power_of_two(jnp.float32(np.nan)))


def test_vmap_with_one_key_per_example_equals_separate_casts():
    x = jax.random.normal(jax.random.key(0), (4, 32))
    keys = jax.random.split(jax.random.key(1), 4)
    batched = jax.vmap(lambda x, key: rounded(x, "float8_e4m3fn", "stochastic", key))(x, keys)
    for i in range(4):
        np.testing.assert_array_equal(batched[i], rounded(x[i], "float8_e4m3fn", "stochastic", keys[i]))
