"""Quantizing, against NumPy: scales and codes bit for bit, error bounds and extremes."""

import functools

import format_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantize_cases import data, jitted

from q8jax.calibration import scale_from_amax
from q8jax.codebook import normal_float
from q8jax.formats import FORMATS
from q8jax.groups import GRANULARITIES, amax, granularity, scale_shape
from q8jax.qarray import QArray, encode, quantize
from q8jax.stats import sqnr

QTYPES = (*oracle.FP8, *oracle.FP6, *oracle.FP4, "float16", "int16", "int8", "int4", "int2")


def spread(groups: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales repeated to the shape of the values."""
    for axis, n in enumerate(shape):
        groups = np.repeat(groups, n // groups.shape[axis], axis) if groups.shape[axis] else groups
    return groups


def group_amax(x: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    result = np.zeros(groups, np.float32)
    for index in np.ndindex(*groups):
        pick = tuple(slice(i * (n // g), (i + 1) * (n // g)) for i, n, g in zip(index, x.shape, groups, strict=True))
        part = np.abs(x[pick].astype(np.float32))
        part = part[np.isfinite(part)]
        result[index] = part.max() if part.size else 0
    return result


def expected_scale(found_amax: np.ndarray, top: float, margin: float = 0, power_of_two: bool = False) -> np.ndarray:
    scale = found_amax * (np.float32(1) / np.float32(top) * np.float32(2.0**margin))
    if power_of_two:
        mantissa, exponent = np.frexp(scale.astype(np.float64))
        scale = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)
    scale = np.clip(scale, np.float32(2.0**-126), np.float32(2.0**126))
    return np.where(found_amax == 0, np.float32(1), scale).astype(np.float32)


def expected_codes(x: np.ndarray, scale: np.ndarray, name: str, full_range: bool = False) -> np.ndarray:
    scaled = x.astype(np.float32) * (np.float32(1) / spread(scale, x.shape))
    return oracle.nearest_even(scaled, name, full_range)


def bits_of(q: QArray) -> np.ndarray:
    return np.asarray(q.qvalue).view(oracle.code_dtype(q.qtype))


# Quantization bit for bit.


def assert_matches_numpy(q: QArray, value: jax.Array, x: jax.Array) -> None:
    x = np.asarray(x)
    scale = expected_scale(group_amax(x, q.scale.shape), FORMATS[q.qtype].max)
    np.testing.assert_array_equal(q.check().scale, scale)
    np.testing.assert_array_equal(bits_of(q), expected_codes(x, scale, q.qtype))
    wanted = oracle.values_of(bits_of(q), q.qtype).astype(np.float32) * spread(scale, x.shape)
    np.testing.assert_array_equal(value, wanted.astype(value.dtype))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "int4"])
def test_codes_and_scales_are_those_of_numpy_for_every_granularity(name):
    def all_ways(x):
        found = [quantize(x, name, **granularity(word, 2, 16)) for word in GRANULARITIES]
        return found, [q.dequantize() for q in found]

    x = jnp.asarray(data((32, 48)), jnp.float32 if name == "int4" else jnp.bfloat16)
    for q, value in zip(*jax.jit(all_ways)(x), strict=True):
        assert_matches_numpy(q, value, x)


def test_eager_and_jitted_agree():
    x = data((32, 48))
    eager = quantize(jnp.asarray(x), "float8_e4m3fn", channelwise_axes=(0,)).check()
    compiled = jitted(x, "float8_e4m3fn", channelwise_axes=(0,))
    np.testing.assert_array_equal(eager.scale, compiled.scale)
    np.testing.assert_array_equal(bits_of(eager), bits_of(compiled))


def test_shapes_of_scales():
    shapes = {word: scale_shape((2, 32, 64), **granularity(word, 3, 16)) for word in GRANULARITIES}
    assert shapes == {
        "tensor": (1, 1, 1),
        "channel": (1, 1, 64),
        "row": (2, 32, 1),
        "tile": (2, 32, 4),
        "block": (2, 2, 4),
    }
    assert scale_shape((4, 6), channelwise_axes=(-1,), tiled_axes={-2: 2}) == (2, 6)
    assert scale_shape(()) == ()
    assert scale_shape((0, 5), channelwise_axes=(1,)) == (1, 5)


@pytest.mark.parametrize("scale_format", ["power_of_two", "e8m0"])
def test_power_of_two_scales_round_up(scale_format):
    x = data()
    q = jitted(x, "e4m3fn", **granularity("tile", 2, 32), scale_format=scale_format)
    found = group_amax(x, (48, 2))
    np.testing.assert_array_equal(q.scale.astype(jnp.float32), expected_scale(found, 448, power_of_two=True))
    assert q.scale.dtype == (jnp.float8_e8m0fnu if scale_format == "e8m0" else jnp.float32)
    np.testing.assert_array_equal(bits_of(q), expected_codes(x, np.asarray(q.scale, np.float32), q.qtype))
    # Rounded up, the largest value of a group is at most the largest of the format, and above its half.
    largest = found / np.asarray(q.scale, np.float32)
    assert (largest <= 448).all()
    assert (largest > 224).all()


def test_margin_leaves_headroom_in_bits():
    x = data()
    plain, wide = jitted(x, "e5m2"), jitted(x, "e5m2", margin=2)
    np.testing.assert_array_equal(wide.scale, 4 * plain.scale)
    np.testing.assert_array_equal(wide.scale, expected_scale(group_amax(x, (1, 1)), 57344, margin=2))


def test_narrow_and_full_range():
    x = np.concatenate([np.linspace(-8, 8, 4097), [-8.0, 8.0]]).astype(np.float32)
    for name, narrow, lowest in (("int8", 127, -128), ("int4", 7, -8), ("int2", 1, -2), ("int16", 32767, -32768)):
        codes = np.asarray(jitted(x, name).qvalue).astype(np.int32)
        assert (codes.min(), codes.max()) == (-narrow, narrow)
        unit = jitted(lowest * np.array([1, 2], np.float32), name, full_range=True, scale=jnp.float32(1))
        assert (np.asarray(unit.qvalue).astype(np.int32) == lowest).all()
        q = jitted(x, name, full_range=True)
        np.testing.assert_array_equal(q.scale, expected_scale(np.full(1, 8, np.float32), narrow + 0.5))
        # The middle of the range is the top of the data, so neither end is off by more than half a step.
        codes = np.asarray(q.qvalue).astype(np.int32)
        assert (codes.min(), codes.max()) in ((lowest, narrow), (-narrow, narrow))
        assert np.abs(codes * np.asarray(q.scale) - x).max() <= float(q.scale[0]) * 0.502


# Affine quantization.


@pytest.mark.parametrize(
    ("name", "full_range"),
    [*((name, False) for name in oracle.INTEGERS), ("int8", True), ("int4", True), ("int2", True)],
)
def test_affine_quantization_holds_zero_exactly_and_errs_by_half_a_step(name, full_range):
    lowest, highest = oracle.limits(name, full_range)
    x = data((6, 200)) + np.array([[0], [5], [-5], [40], [-40], [0.3]], np.float32)
    x[:, 7] = 0
    q = jitted(x, name, calibration="minmax", full_range=full_range, channelwise_axes=(0,))
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    span = high * np.float32(0.5) - low * np.float32(0.5)
    scale = span * (np.float32(2) / np.float32(highest - lowest))
    np.testing.assert_array_equal(q.scale, scale)
    zero_point = np.float32(lowest) - np.rint(low * (np.float32(1) / scale))
    np.testing.assert_array_equal(q.zero_point, zero_point)
    assert q.zero_point.dtype == jnp.int32
    codes = np.asarray(q.qvalue).astype(np.int32)
    wanted = np.clip(np.rint(x * (np.float32(1) / scale)) + zero_point, lowest, highest)
    np.testing.assert_array_equal(codes, wanted)
    value = np.asarray(q.dequantize())
    assert (value[:, 7] == 0).all()
    np.testing.assert_array_equal(value, ((codes - zero_point) * scale).astype(np.float32))
    step = np.broadcast_to(scale, x.shape)
    slack = 1e-6 * np.abs(x) + 1e-4 * step
    assert (np.abs(value - x) <= 0.5 * step + slack).all()
    assert np.abs(value - x).max() > 0.3 * scale.min()


def test_affine_beats_symmetric_on_shifted_data_by_a_bit():
    x = jnp.abs(jnp.asarray(data((256, 64))))
    affine = functools.partial(quantize, qtype="uint8", calibration="minmax")
    gain = jax.jit(lambda x: sqnr(x, affine(x)) - sqnr(x, quantize(x, "int8")))(x)
    assert 5.5 < gain < 6.5


def test_affine_stochastic_rounding_is_unbiased():
    x = jnp.full((1 << 14,), 0.3, jnp.float32).at[0].set(-1).at[1].set(2)
    q = jitted(x, "uint4", calibration="minmax", rounding="stochastic", key=jax.random.key(0))
    value = np.asarray(q.dequantize())[2:]
    assert len(np.unique(value)) == 2
    assert abs(value.mean() - 0.3) < 4 * value.std() / 128


# Extremes.


def decibels(x: np.ndarray, value: np.ndarray) -> float:
    x, value = x.astype(np.float64), value.astype(np.float64)
    return 10 * np.log10((x**2).sum() / ((x - value) ** 2).sum())


@pytest.mark.parametrize("name", QTYPES)
def test_every_format_on_ordinary_and_extreme_rows(name):
    """One row each: zeros; magnitudes from 3e-36 to 3e38; infinities; one NaN; nothing but NaN."""
    fmt = FORMATS[name]
    base = np.clip(data((1, 256)) / 3, -2.9, 2.9)
    base[0, 0] = 3
    magnitudes = np.array([0, 1e-36, 1e-20, 1, 1e20, 1e38, 1, 1, np.nan], np.float32)[:, None]
    x = (base * magnitudes).astype(np.float32)
    x[6, [3, 4]] = np.inf, -np.inf
    x[7, 5] = np.nan
    clean = np.where(np.isfinite(x), x, 0)
    by_row = jax.jit(lambda x: (q := quantize(x, name, channelwise_axes=(0,)), q.dequantize()))
    q, value = by_row(x)
    healthy = np.asarray(by_row(clean)[1])
    q.check()
    value, scale = np.asarray(value), np.asarray(q.scale)

    assert scale[0] == 1
    assert (value[0] == 0).all()
    # But for 3e-36, where XLA flushes subnormals and NumPy does not.
    ordinary = [0, 2, 3, 4, 5]
    assert_matches_numpy(
        QArray(*jax.tree.map(lambda a: np.asarray(a)[ordinary], (q.qvalue, q.scale)), qtype=name),
        value[ordinary],
        x[ordinary],
    )

    assert np.isfinite(value[:6]).all()
    reference = decibels(x[3], value[3])
    for row in (2, 4, 5):
        if name != "int2" or row != 5:  # 3e38 is beyond 2^126 · 1, so int2 saturates
            assert abs(decibels(x[row], value[row]) - reference) < 0.2
    # 3e-36 is 255 times the smallest scale: no more codes than that are left to wide integers.
    assert decibels(x[1], value[1]) > min(reference - 3, 45)

    # Infinities neither enter the scale nor become anything but the largest value.
    assert (value[6, [3, 4]] == np.float32(fmt.max) * scale[6] * [1, -1]).all()
    np.testing.assert_array_equal(np.delete(value[6], [3, 4]), np.delete(healthy[6], [3, 4]))

    assert np.isnan(value[7, 5])
    assert np.isnan(value[8]).all()
    if fmt.has_nan:
        assert np.isfinite(scale).all()
        np.testing.assert_array_equal(np.delete(value[7], 5), np.delete(healthy[7], 5))
    else:
        assert np.isnan(value[7]).all()
        assert np.isfinite(scale[:7]).all()


def test_one_nan_in_a_large_array_is_never_lost():
    # XLA's float maximum on CPUs loses NaN in large reductions, and finds it in small ones.
    ways = {word: {"qtype": "int8", **granularity(word, 2)} for word in GRANULARITIES}
    ways["affine"] = {"qtype": "uint8", "calibration": "minmax"}
    ways["codebook"] = {"qtype": "uint4", "codebook": normal_float(4)}
    ways["given"] = {"qtype": "int4", "scale": jnp.float32(0.1)}

    @jax.jit
    def scales(x):
        return [quantize(x, **options).scale for options in ways.values()]

    for place in ((0, 0), (255, 511), (100, 300)):
        x = data((256, 512))
        x[place] = np.nan
        x[3, 7] = np.inf
        for word, scale in zip(ways, scales(x), strict=True):
            assert np.isnan(scale).sum() == 1, (word, place)
            index = tuple(i * g // n for i, n, g in zip(place, x.shape, scale.shape, strict=True))
            assert np.isnan(scale[index]), (word, place)


def test_affine_extremes():
    x = np.array([[0, 0, 0], [3e38, -3e38, 1e38], [1e-36, -1e-36, 0], [np.inf, 1, -1], [np.nan, 1, 2]], np.float32)
    q = jitted(x, "uint8", calibration="minmax", channelwise_axes=(0,))
    value = np.asarray(q.dequantize())
    assert (value[0] == 0).all()
    np.testing.assert_allclose(value[1], x[1], rtol=1e-6, atol=0.51 * 6e38 / 255)
    np.testing.assert_allclose(value[2], x[2], rtol=0.01, atol=1e-38)
    np.testing.assert_allclose(value[3, 1:], x[3, 1:], rtol=0.01)
    assert value[3, 0] == (255 - int(q.zero_point[3, 0])) * q.scale[3, 0]
    assert np.isnan(value[4]).all()


@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 0, 3)])
def test_empty_axes(shape):
    def all_ways(x):
        found = [quantize(x, "int8", **granularity(word, x.ndim, 1)) for word in ("tensor", "channel", "row", "tile")]
        found.append(quantize(x, "uint8", calibration="minmax"))
        return found, [q.dequantize() for q in found]

    for q, value in zip(*jax.jit(all_ways)(np.zeros(shape, np.float32)), strict=True):
        assert q.check().shape == value.shape == shape
        assert (np.asarray(q.scale) == 1).all()


def test_scalars_quantize():
    q = jitted(np.float32(-2.5), "int8")
    assert (q.shape, q.scale.shape) == ((), ())
    np.testing.assert_allclose(q.dequantize(), -2.5, rtol=1e-6)


def test_scale_of_any_amax_is_finite_and_positive_with_a_normal_reciprocal():
    x = np.abs(oracle.random_float32(20_000))
    x = np.concatenate([x[np.isfinite(x)], np.array([0, 1e-45, 1e-36, 3.4028235e38, np.inf], np.float32)])
    words = ("float32", "power_of_two", "e8m0")
    scales = jax.jit(
        lambda x: [scale_from_amax(x, name, margin=1, scale_format=word) for name in QTYPES for word in words]
    )
    for scale in scales(x):
        assert scale.dtype == jnp.float32
        assert (np.asarray(scale) >= 2.0**-126).all()
        assert (np.asarray(scale) <= 2.0**126).all()
    assert np.isnan(scale_from_amax(jnp.float32(np.nan), "int8"))


def test_amax_skips_what_is_not_finite_and_keeps_nan_on_request():
    x = np.array([[1, -3, np.inf], [np.nan, -2, 1], [np.nan, np.inf, -np.inf], [0, -0.0, 0]], np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        given = jnp.asarray(x, dtype)
        assert amax(given, channelwise_axes=(0,)).ravel().tolist() == [3, 2, 0, 0]
        kept = np.asarray(amax(given, channelwise_axes=(0,), keep_nan=True)).ravel()
        np.testing.assert_array_equal(kept, [3, np.nan, np.nan, 0])
        assert amax(given).dtype == jnp.float32


# The error is bounded from above, and quantization is visible.


def test_quantization_error_of_normal_data_has_both_bounds():
    x = jnp.asarray(data((256, 512)))
    bounds = {"float8_e4m3fn": (31.3, 31.8), "float8_e5m2": (25.3, 25.9), "int8": (38.5, 41), "int4": (13, 16)}
    # Under jit with the cast back next to it, where a compiler could take the pair for the identity.
    found = jax.jit(lambda x: [sqnr(x, quantize(x, name)) for name in bounds])(x)
    for (name, (low, high)), value in zip(bounds.items(), found, strict=True):
        assert low < value < high, name


def test_element_errors_are_at_most_half_a_step():
    x = data()
    for name in ("int8", "int4"):
        q = jitted(x, name, channelwise_axes=(0,))
        assert (np.abs(np.asarray(q.dequantize()) - x) <= 0.50001 * np.asarray(q.scale)).all()
    for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"):
        fmt = FORMATS[name]
        q = jitted(x, name, channelwise_axes=(0,))
        half_step = np.maximum(
            np.abs(x) * 2.0 ** -(fmt.mantissa_bits + 1), np.asarray(q.scale) * fmt.smallest_subnormal / 2
        )
        error = np.abs(np.asarray(q.dequantize()) - x)
        assert (error <= half_step * 1.0001).all()
        assert error.max() > 0.3 * half_step.max()


# Given scales and code books.


def test_given_scales_are_used_as_they_are():
    x = jnp.asarray(data())
    for scale in (jnp.float32(0.07), jnp.full((48, 1), 0.07, jnp.float32), jnp.full((3, 4), 0.07, jnp.float32)):
        q = jitted(x, "int8", scale=scale)
        np.testing.assert_array_equal(bits_of(q), expected_codes(data(), np.full((1, 1), 0.07, np.float32), "int8"))
        assert q.scale.shape == (scale.shape or (1, 1))
    q = jitted(jnp.abs(x), "uint8", scale=jnp.float32(0.05), zero_point=jnp.int32(3))
    scaled = np.abs(data()) * (np.float32(1) / np.float32(0.05))
    np.testing.assert_array_equal(q.qvalue, np.clip(np.rint(scaled) + 3, 0, 255))
    q = jitted(x, "e4m3fn", scale=jnp.full((48, 2), 0.25, jnp.float8_e8m0fnu))
    assert q.scale.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(bits_of(q), oracle.nearest_even(data() * np.float32(4), "float8_e4m3fn"))


def test_nan_shows_under_given_scales_too():
    x = data((3, 32))
    x[1, 4] = np.nan
    for options in (
        {"name": "int8", "scale": jnp.full((3, 1), 0.1, jnp.float32)},
        {"name": "float6_e2m3fn", "scale": jnp.full((3, 1), 0.5, jnp.float8_e8m0fnu)},
        {"name": "uint8", "scale": jnp.full((3, 1), 0.1, jnp.float32), "zero_point": jnp.full((3, 1), 9, jnp.int32)},
        {"name": "uint8", "scale": jnp.full((3, 1), 9, jnp.float32), "codebook": normal_float(5)},
    ):
        q = jitted(x, **options)
        assert q.scale.dtype == options["scale"].dtype
        assert np.isnan(q.dequantize()).all(axis=1).tolist() == [False, True, False]
        assert np.isnan(q.dequantize()).any(axis=1).tolist() == [False, True, False]
    q = jitted(x, "e4m3fn", scale=jnp.float32(0.1))
    assert np.isnan(q.dequantize()).sum() == 1


def test_encode_is_the_codes_of_quantize():
    x = jnp.asarray(data())
    q = jitted(x, "e5m2", **granularity("block", 2, 16))
    codes = jax.jit(functools.partial(encode, qtype="e5m2"))(x, q.scale)
    np.testing.assert_array_equal(bits_of(q), np.asarray(codes).view(np.uint8))


def test_code_books_quantize_to_the_nearest_value():
    book, x = normal_float(4), data()
    q = jitted(x, "uint4", **granularity("tile", 2, 16), codebook=book)
    scale = group_amax(x, (48, 4))
    np.testing.assert_array_equal(q.scale, scale)
    scaled = x * (np.float32(1) / spread(scale, x.shape))
    distance = np.abs(scaled[..., None].astype(np.float64) - np.asarray(book, np.float64))
    codes = np.asarray(q.qvalue).astype(np.int32)
    np.testing.assert_array_equal(np.take_along_axis(distance, codes[..., None], -1)[..., 0], distance.min(-1))
    np.testing.assert_array_equal(q.dequantize(), np.asarray(book)[codes] * spread(scale, x.shape))
    assert q.nbytes == 48 * 64 // 2 + 48 * 4 * 4 + 16 * 4


def test_code_books_keep_nan_saturate_infinities_and_take_e8m0_scales():
    x = data((3, 32))
    x[1, 2], x[2, 3] = np.inf, np.nan
    q = jitted(x, "uint8", codebook=normal_float(5), channelwise_axes=(0,), scale_format="e8m0")
    value = np.asarray(q.dequantize())
    assert np.isfinite(value[:2]).all()
    assert value[1, 2] == np.float32(q.scale[1, 0])
    assert np.isnan(value[2]).all()
