"""Formats against ml_dtypes: the table, the cast to nearest even bit for bit, and decoding."""

import functools

import format_oracle as oracle
import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from q8jax import formats
from q8jax.formats import FORMATS, cast, decode, get_format


def codes_as_bits(codes: jax.Array, name: str) -> np.ndarray:
    return np.asarray(codes).view(oracle.code_dtype(name))


def assert_codes_match(codes: jax.Array, x: np.ndarray, name: str) -> None:
    """Bit for bit, but for NaN: any NaN code will do."""
    found, wanted = codes_as_bits(codes, name), oracle.nearest_even(x, name)
    both_nan = np.isnan(oracle.values_of(found, name)) & np.isnan(oracle.values_of(wanted, name))
    wrong = (found != wanted) & ~both_nan
    assert not wrong.any(), (name, np.asarray(x)[wrong][:5], found[wrong][:5], wanted[wrong][:5])
    assert np.isnan(x.astype(np.float32)).any()
    assert both_nan.any() == FORMATS[name].has_nan


def test_the_table_holds_every_format():
    assert set(FORMATS) == set(oracle.ALL)


@pytest.mark.parametrize("name", [name for name in oracle.ALL if name not in oracle.INTEGERS])
def test_float_attributes_are_those_of_ml_dtypes(name):
    fmt, info = FORMATS[name], ml_dtypes.finfo(oracle.dtype_of(name))
    assert fmt.bits == info.bits
    assert (fmt.max, fmt.min) == (float(info.max), float(info.min))
    assert fmt.smallest_normal == float(info.smallest_normal)
    with np.errstate(all="ignore"):
        assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.mantissa_bits == info.nmant
    assert fmt.bits == fmt.exponent_bits + fmt.mantissa_bits + (fmt.kind == "float")
    if name != "float32":
        values = oracle.values_of(np.arange(2**fmt.bits), name)
        assert fmt.has_nan == np.isnan(values).any()
        assert fmt.has_inf == np.isinf(values).any()


@pytest.mark.parametrize("name", oracle.INTEGERS)
def test_integer_attributes_are_those_of_ml_dtypes(name):
    fmt, info = FORMATS[name], ml_dtypes.iinfo(oracle.dtype_of(name))
    assert (fmt.bits, fmt.max, fmt.min) == (info.bits, float(info.max), float(info.min))
    assert fmt.narrow_min == (-fmt.max if fmt.signed else 0)
    assert not fmt.has_inf
    assert not fmt.has_nan


@pytest.mark.parametrize("name", oracle.ALL)
def test_names_short_names_and_dtypes_find_the_format(name):
    fmt = FORMATS[name]
    assert get_format(fmt) is fmt
    assert get_format(name) is fmt
    assert get_format(oracle.dtype_of(name)) is fmt
    if "_" in name:
        assert get_format(name.partition("_")[2]) is fmt


def test_e4m3_alone_is_the_ieee_format():
    assert get_format("e4m3").max == 240
    assert get_format("e4m3fn").max == 448
    assert get_format(jnp.float8_e4m3fn).name == "float8_e4m3fn"


def test_unknown_formats_are_refused_with_the_nearest_match():
    with pytest.raises(ValueError, match=r"Unknown format 'float8_e4m3n'.*did you mean 'float8_e4m3fn'.*int8"):
        get_format("float8_e4m3n")
    with pytest.raises(ValueError, match="Unknown format 'int32'"):
        get_format(jnp.int32)


@pytest.mark.parametrize("name", oracle.ALL)
def test_nearest_even_agrees_with_ml_dtypes_bit_for_bit(name):
    to_codes = jax.jit(functools.partial(cast, qtype=name))
    critical = oracle.critical_float32(name if name != "float32" else "bfloat16")
    for x in (oracle.every_bfloat16(), np.concatenate([oracle.random_float32(1_000_000), critical])):
        codes = to_codes(jnp.asarray(x))
        assert codes.dtype == FORMATS[name].dtype
        assert_codes_match(codes, x, name)


@pytest.mark.parametrize("name", oracle.FP8)
def test_xla_convert_behind_accelerators_agrees_too(name):
    convert = jax.jit(functools.partial(formats._clip_and_convert, fmt=FORMATS[name]))
    for x in (oracle.every_bfloat16(), oracle.critical_float32(name)):
        assert_codes_match(convert(jnp.asarray(x)), x, name)


def test_accelerators_convert_natively_and_cpus_do_not():
    x = jax.ShapeDtypeStruct((64,), jnp.bfloat16)

    def lowered(platform: str) -> str:
        exported = jax.export.export(jax.jit(lambda x: cast(x, "e4m3fn")), platforms=[platform])(x)
        return exported.mlir_module()

    for platform in ("tpu", "cuda"):
        assert "stablehlo.convert %" in lowered(platform)
        assert "bitcast_convert" not in lowered(platform)
    assert "bitcast_convert" in lowered("cpu")


@pytest.mark.parametrize("name", ["float8_e5m2", "float16", "bfloat16", "int16", "float6_e2m3fn"])
def test_float16_input(name):
    x = np.arange(65536, dtype=np.uint16).view(np.float16)
    assert_codes_match(cast(jnp.asarray(x), name), x, name)


@pytest.mark.parametrize("name", [name for name in oracle.INTEGERS if FORMATS[name].signed])
def test_integers_clip_symmetrically_unless_the_full_range_is_asked_for(name):
    fmt = FORMATS[name]
    x = jnp.array([-1e9, -jnp.inf, fmt.min, fmt.max, jnp.inf], jnp.float32)
    assert decode(cast(x, name), name).tolist() == [-fmt.max, -fmt.max, -fmt.max, fmt.max, fmt.max]
    full = decode(cast(x, name, full_range=True), name)
    assert full.tolist() == [fmt.min, fmt.min, fmt.min, fmt.max, fmt.max]


def test_infinities_saturate_also_where_the_format_has_them():
    x = jnp.array([jnp.inf, -jnp.inf], jnp.float32)
    for name in ("float32", "bfloat16", "float16", "float8_e5m2", "float8_e3m4"):
        assert decode(cast(x, name), name).tolist() == [FORMATS[name].max, FORMATS[name].min]


@pytest.mark.parametrize("name", [name for name in oracle.ALL if name not in ("float32",)])
def test_decode_is_exact_for_every_code(name):
    fmt = FORMATS[name]
    codes = np.arange(2**fmt.bits).astype(oracle.code_dtype(name))
    if name in oracle.INTEGERS:
        codes = np.arange(fmt.min, fmt.max + 1).astype(np.int32).astype(oracle.dtype_of(name)).view(codes.dtype)
    wanted = oracle.values_of(codes, name)
    given = jnp.asarray(codes.view(np.uint8 if name in oracle.FP6 else oracle.dtype_of(name)))
    found = np.asarray(jax.jit(lambda c: decode(c, name))(given))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found)[wanted == 0], np.signbit(wanted)[wanted == 0])
    if fmt.bits <= 8:
        narrow = jax.jit(lambda c: decode(c, name, jnp.bfloat16))(given)
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(narrow).astype(np.float32), wanted)
    if fmt.bits <= 8 and fmt.kind == "float":
        half = jax.jit(lambda c: decode(c, name, jnp.float16))(given)
        np.testing.assert_array_equal(np.asarray(half).astype(np.float32), wanted)


def test_decode_refuses_codes_of_another_format():
    with pytest.raises(ValueError, match=r"Codes of float6_e2m3fn are uint8, not int8: use cast"):
        decode(jnp.zeros(3, jnp.int8), "e2m3fn")


def test_cast_refuses_integers_and_misspelt_or_keyless_roundings():
    x = jnp.ones(3, jnp.float32)
    with pytest.raises(ValueError, match="cast takes floating-point values, not int32"):
        cast(jnp.ones(3, jnp.int32), "int8")
    with pytest.raises(ValueError, match=r"Unknown rounding 'stocastic' \(did you mean 'stochastic'"):
        cast(x, "int8", rounding="stocastic")
    with pytest.raises(ValueError, match="rounding='stochastic' needs key="):
        cast(x, "int8", rounding="stochastic")


def test_scales_round_up_to_e8m0():
    x = np.abs(oracle.random_float32(100_000))
    x = np.concatenate([x, np.float32(2.0) ** np.arange(-149, 128, dtype=np.float32), [np.float32(0)]])
    scale = formats.scale_to_e8m0(jnp.asarray(x))
    assert scale.dtype == jnp.float8_e8m0fnu
    found = np.asarray(scale).astype(np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
    kept = (x <= 2.0**127) & (x >= 2.0**-126)
    assert (found[kept] >= x[kept]).all()
    assert (found[kept] < 2 * x[kept].astype(np.float64)).all()
    assert (found[x < 2.0**-126] == 2.0**-126).all()
    assert (found[x > 2.0**127] == 2.0**127).all()


def test_casts_work_under_vmap_scan_checkpoint_and_a_sharded_mesh():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    wanted = decode(cast(x, "e4m3fn"), "e4m3fn")

    def cast_and_decode(x):
        return decode(cast(x, "e4m3fn"), "e4m3fn")

    scanned = jax.lax.scan(lambda c, row: (c, cast_and_decode(row)), None, x)[1]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    for found in (
        jax.vmap(cast_and_decode)(x),
        scanned,
        jax.checkpoint(cast_and_decode)(x),
        jax.jit(cast_and_decode)(sharded),
    ):
        np.testing.assert_array_equal(found, wanted)
