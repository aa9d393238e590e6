"""One GEMM on codes: which dot runs on which backend, exact sums of any length, rescaling."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import q8jax
from q8jax import PRECISIONS, Gemm, QArray, Recipe, dot_general, quantize
from q8jax.contraction import contractions
from q8jax.gemm import cpu_dtype, gemm, rescale

MATMUL = (((1,), (0,)), ((), ()))

# What is lowered: for a GPU and a TPU, whether or not there is one.


def lowered_dots(recipe: Recipe, platform: str) -> list[tuple[str, str, str, str]]:
    """(first, second, result, precision) dtypes of each dot in a step's StableHLO."""

    def step(lhs, rhs, grad, scale):
        out, vjp = jax.vjp(lambda a, b: dot_general(a, b, MATMUL, recipe, scale), lhs, rhs)
        return out, vjp(grad)

    shapes = ((64, 128), (128, 32), (64, 32))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    scale = jax.ShapeDtypeStruct((len(recipe.slots),), jnp.float32)
    traced = jax.jit(step).trace(*arrays, scale)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    dtype = r"tensor<(?:\d+x)*(\w+)>"
    pattern = rf"dot_general.*?precision = \[(\w+).*?: \({dtype}, {dtype}\) -> {dtype}"
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    found = [re.search(pattern, line).groups() for line in lines]
    return [(first, second, result, precision) for precision, first, second, result in found]


E4M3, E5M2 = "f8E4M3FN", "f8E5M2"
FP8_DOTS = [
    (E4M3, E4M3, "f32", "DEFAULT"),
    (E5M2, E4M3, "f32", "HIGHEST"),
    (E4M3, E5M2, "f32", "HIGHEST"),
]
# By powers of two the library that multiplies may scale after it has rounded.
FP8_DOTS_ROUNDED = [(first, second, "bf16", precision) for first, second, _, precision in FP8_DOTS]
INT8_DOTS = [("i8", "i8", "i32", "DEFAULT")] * 3
BF16_DOTS = [("bf16", "bf16", "bf16", "DEFAULT")]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "name, dots",
    {
        "fp8-hybrid": FP8_DOTS_ROUNDED,
        "fp8": [(E4M3, E4M3, "bf16", p) for p in ("DEFAULT", "HIGHEST", "HIGHEST")],
        "fp8-hybrid/scales=float32": FP8_DOTS,
        "fp8-current": FP8_DOTS,
        "fp8-row": [(E4M3, E4M3, "f32", p) for p in ("DEFAULT", "HIGHEST", "HIGHEST")],
        "mxfp8": [(E4M3, E4M3, "f32", p) for p in ("DEFAULT", "HIGHEST", "HIGHEST")],
        "fp8-e3m4": [("bf16", "bf16", "f32", "DEFAULT")] * 3,
        "fwd=e5m2,e5m2": [("bf16", "bf16", "f32", "DEFAULT"), *BF16_DOTS * 2],
        "int8": INT8_DOTS,
        "int8-block": INT8_DOTS,
        "int8-tensor": INT8_DOTS,
        "int8-switchback": INT8_DOTS[:2] + BF16_DOTS,
        "bf16": BF16_DOTS * 3,
        "fp16": [("f16", "f16", "f32", "DEFAULT")] * 3,
        "fp32": [("f32", "f32", "f32", "HIGHEST")] * 3,
        "fwd=int4,int4/dlhs=int2,int8": [*INT8_DOTS[:2], *BF16_DOTS],
        "fwd=e2m1fn,e4m3fn": [("bf16", "bf16", "f32", "DEFAULT"), *BF16_DOTS * 2],
        "fwd=e2m3fn,int8": [("bf16", "bf16", "f32", "DEFAULT"), *BF16_DOTS * 2],
        "fwd=none,int8": [("bf16", "bf16", "f32", "DEFAULT"), *BF16_DOTS * 2],
        "fwd=none,int8/compute=float32": [("f32", "f32", "f32", "HIGHEST")] * 3,
    }.items(),
)
def test_accelerators_are_given_the_codes_themselves(name, dots, platform):
    assert lowered_dots(Recipe.parse(name), platform) == dots


@pytest.mark.parametrize("name", ["fp8", "int8", "bf16", "fp16", "fwd=none,int8"])
def test_a_cpu_multiplies_codes_upcast_to_what_holds_them(name):
    words = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
    codes, integers, wide = (words[cpu_dtype(kind).name] for kind in ("float", "int", "wide"))
    upcast = {"fp8": codes, "int8": integers, "fp16": "f32"}.get(name, wide)
    wanted = [(upcast, upcast, "f32")] * 3
    if upcast == "bf16":
        # Not along rows it is multiplied in float32.
        wanted[2] = ("f32", "f32", "f32")
    if name == "int8":
        # Along rows an integer dot is fast; the weight gradient sums along columns.
        wanted[:2] = [("i8", "i8", "i32")] * 2
    assert [dot[:3] for dot in lowered_dots(Recipe.parse(name), "cpu")] == wanted


def test_casts_that_a_gpu_must_not_undo_are_behind_a_barrier():
    """XLA:GPU takes a cast to 8 bits and back for the identity."""
    for name in ("fwd=none,e4m3fn", "fwd=e4m3fn,none", "fwd=e2m1fn,e4m3fn", "fwd=e4m3fn,int8", "fwd=e3m4,e3m4"):
        recipe = Recipe.parse(name)
        dot = functools.partial(dot_general, dimension_numbers=MATMUL, recipe=recipe)
        traced = jax.jit(dot).trace(jnp.ones((8, 8)), jnp.ones((8, 8)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.index("stablehlo.optimization_barrier") < text.index("stablehlo.dot_general")


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["fp8", "fp8-row", "fp8-e3m4", "int8"])
def test_the_branches_for_accelerators_compute_what_a_cpu_does(name, platform, monkeypatch):
    """Up to the order of sums and one rounding to bfloat16; the operands leave every layout to the branch."""

    def products(lhs, rhs, weights):
        scale = jnp.exp2(jnp.asarray([-6.0, -7.0, -12.0])[: len(recipe.slots)])
        product = lambda lhs, rhs: q8jax.einsum("bik,bkj->bij", lhs, rhs, recipe, scale)
        out, pullback = jax.vjp(product, lhs, rhs)
        return out, *pullback(weights)

    recipe = Recipe.parse(name)
    draw = np.random.default_rng(0).standard_normal
    arrays = [jnp.asarray(draw(shape), jnp.bfloat16) for shape in ((2, 16, 32), (2, 32, 48), (2, 16, 48))]
    expected = jax.jit(products)(*arrays)
    jax.clear_caches()
    chosen = lambda *args, default, **branches: branches.get(platform, default)(*args)
    monkeypatch.setattr(lax, "platform_dependent", chosen)
    for found, wanted in zip(jax.jit(products)(*arrays), expected, strict=True):
        assert found.dtype == wanted.dtype == jnp.bfloat16
        found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
        np.testing.assert_allclose(found, wanted, rtol=2.0**-7, atol=2.0**-9 * abs(wanted).max())
        assert abs(wanted).max() > 0


# Sums of integers.


def _multiply(lhs: np.ndarray, rhs: np.ndarray, qtype: str = "int8") -> np.ndarray:
    """The float32 GEMM of codes [M, *K] and [N, *K] with scale 1."""
    axes = tuple(range(1, lhs.ndim))
    contraction = contractions(lhs.shape, rhs.shape, ((axes, axes), ((), ())))["fwd"]

    @jax.jit
    def run(lhs, rhs):
        one = jnp.ones((1,) * lhs.ndim)
        first, second = (QArray(x.astype(qtype), one, qtype=qtype) for x in (lhs, rhs))
        return gemm(first, second, contraction, jnp.float32, accurate=False)

    return np.asarray(run(lhs, rhs))


@pytest.mark.parametrize(
    "qtype, length",
    [
        *(("int8", (k,)) for k in (1, 1040, 1041, 2081, 16640, 16641, 140_000)),
        *(("int8", lengths) for lengths in ((3, 701), (41, 53), (2, 2, 521))),
        *(("int4", (k,)) for k in (1041, 342_393)),
    ],
)
def test_integer_sums_are_exact_at_every_length(qtype, length):
    """Beyond 2^24, what float32 sums exactly; beyond 16 pieces; beyond 2^31."""
    random = np.random.default_rng(0)
    top = {"int8": 127, "int4": 7}[qtype]
    lhs = random.integers(-top, top + 1, (2, *length)).astype(np.int8)
    rhs = random.integers(-top, top + 1, (3, *length)).astype(np.int8)
    lhs[0], rhs[0] = top, top  # the largest sum there is; in float32 alone it goes wrong
    lhs[0].flat[0] = 1
    exact = np.tensordot(lhs.astype(np.int64), rhs.astype(np.int64), (range(1, lhs.ndim), range(1, rhs.ndim)))
    found = _multiply(lhs, rhs, qtype)
    if abs(exact).max() < 2**31:
        np.testing.assert_array_equal(found, exact.astype(np.float32))
    else:
        np.testing.assert_allclose(found, exact, rtol=2.0**-23)


def test_accelerators_sum_integers_beyond_int32_in_pieces():
    """2^31 / 127^2 products are the most that int32 holds."""
    shapes = {133_144: 1, 133_145: 2, 400_000: 4}
    for length, pieces in shapes.items():
        lhs = jax.ShapeDtypeStruct((2, length), jnp.float32)
        rhs = jax.ShapeDtypeStruct((length, 3), jnp.float32)
        dot = functools.partial(dot_general, dimension_numbers=MATMUL, recipe="int8-row")
        text = jax.jit(dot).trace(lhs, rhs).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("stablehlo.dot_general") == pieces


@pytest.mark.parametrize("recipe", ["bf16", "fp8-current", "int8-row", "fwd=none,e4m3fn", "fwd=e4m3fn,none"])
def test_cpus_multiply_whatever_axes_the_operands_have(recipe, monkeypatch):
    """In bfloat16 too, as on a CPU that has instructions for it."""
    monkeypatch.setattr("q8jax.gemm._multiplies_bfloat16", lambda: True)
    keys = jax.random.split(jax.random.key(0), 2)
    for shapes, numbers, subscripts in (
        (((16, 8), (16, 2, 4)), (((0,), (0,)), ((), ())), "bi,bjk->ijk"),
        (((16, 3, 8), (16, 2, 3, 4)), (((0,), (0,)), ((1,), (2,))), "bhi,bjhk->hijk"),
    ):
        lhs, rhs = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes))
        found = np.asarray(dot_general(lhs, rhs, numbers, recipe), np.float32)
        exact = np.einsum(subscripts, *(np.asarray(x, np.float32) for x in (lhs, rhs)))
        assert found.shape == exact.shape
        assert np.linalg.norm(found - exact) < 0.06 * np.linalg.norm(exact)


# Rescaling.


def test_rescaling_loses_nothing_to_the_range_of_a_product_of_scales():
    random = np.random.default_rng(0)
    exponents = random.uniform(-126, 126, (2, 20_000))
    sums = np.append(random.standard_normal(19_000) * 1e5, np.zeros(1000)).astype(np.float32)
    first, second = np.exp2(exponents).astype(np.float32)
    # In float64 and with one rounding of the product of scales, as in float32 without bounds.
    mantissa, exponent = np.frexp(first.astype(np.float64) * second)
    product = np.ldexp(mantissa.astype(np.float32).astype(np.float64), exponent)
    with np.errstate(over="ignore"):
        exact = (sums * product).astype(np.float32)
    found = np.asarray(jax.jit(rescale)(sums, first, second))
    normal = (abs(exact) >= 2.0**-126) | (exact == 0)
    np.testing.assert_array_equal(found[normal], exact[normal])
    assert np.abs(found[~normal]).max() <= 2.0**-126
    assert 0.2 < np.mean(abs(exponents.sum(axis=0)) > 127) < 0.5
    assert np.isnan(rescale(jnp.float32(0), jnp.float32(np.nan), jnp.float32(1)))


def test_rescaling_whole_numbers_is_the_same_to_the_last_bit():
    """Also where the scales alone, or all but the largest sums with them, leave the range."""
    random = np.random.default_rng(0)
    scales = np.exp2(random.uniform(-126, 126, (2, 200_000))).astype(np.float32)
    scales[0, :6], scales[1, :6] = [2.0**-126, 2.0**126] * 3, np.repeat([2.0**-126, 2.0**126, np.nan], 2)
    sums = (random.integers(-(2**31), 2**31, 200_000) >> random.integers(0, 33, 200_000)).astype(np.float32)
    sums[::10] = 0
    halved, whole = (np.asarray(jax.jit(functools.partial(rescale, whole=w))(sums, *scales)) for w in (False, True))
    np.testing.assert_array_equal(whole, halved)
    large = np.log2(scales).sum(axis=0) > 128
    assert (whole[large & (sums == 0)] == 0).all() and np.isinf(whole[large & (sums != 0)]).all()
    assert np.count_nonzero(large & (sums == 0)) > 1000


def test_nan_reaches_every_scale_whatever_the_size():
    """XLA:CPU's float maximum loses NaN in vectorized reductions."""
    for shape in ((3, 5), (64, 96), (7, 1024)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        x[2, 3] = np.nan
        for axes, wanted in (((), [0]), ((0,), [2]), ((1,), [3])):
            for calibration in ("absmax", "minmax"):
                quantized = functools.partial(quantize, qtype="int8", channelwise_axes=axes, calibration=calibration)
                scale = np.asarray(jax.jit(quantized)(x).scale)
                assert list(np.flatnonzero(np.isnan(scale))) == wanted


def test_no_gemm_of_a_preset_slips_back_to_16_bits():
    for name, precision in PRECISIONS.items():
        recipe = Recipe.parse(str(precision.recipe).replace("128", "32"))
        if recipe.is_quantized and name != "fp8-e3m4":  # which no GPU multiplies
            dots = lowered_dots(recipe, "cuda")
            unquantized = [(recipe.fwd, recipe.dlhs, recipe.drhs).count(Gemm())]
            assert [len(dots), sum("bf16" in dot[:2] for dot in dots)] == [3, *unquantized]
