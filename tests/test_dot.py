"""The quantized dot against a NumPy oracle and its float twin."""

import functools

import dot_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dot_cases import (
    DENSE,
    MATMUL,
    RECIPES,
    assert_close,
    data,
    gemms,
    normal,
    quick_jit,
    stacked,
    uniform,
)
from jax import lax

import q8jax
from q8jax import PRECISIONS, Gemm, Operand, Recipe, dot_general

# The oracle.


@pytest.mark.parametrize("name", RECIPES)
def test_all_three_gemms_are_those_of_numpy(name):
    recipe = RECIPES[name]
    lhs, rhs, grad = data()
    lhs[0, 3] *= 100
    rhs[:, 5] *= 0.01
    grad *= 1e-3
    scales = oracle.scales_of(recipe, lhs, rhs, grad, factor=0.7)  # what is beyond saturates
    for jit in (quick_jit, jax.jit) if name in ("fp8", "int8", "fp8-current") else (quick_jit,):
        found = gemms(recipe, DENSE, jit)(lhs, rhs, grad, stacked(recipe, scales))
        wanted = oracle.dot(lhs, rhs, grad, DENSE, recipe, scales)
        for gemm, expected in zip(found, wanted, strict=True):
            assert_close(gemm, expected)


@pytest.mark.parametrize("name", [n for n, p in PRECISIONS.items() if p.recipe.is_quantized])
def test_error_is_what_the_formats_imply(name):
    """Relative errors of products of normal data, by the coarser of the formats.

    An accidental bfloat16 path (0.002) is below each range, a broken scale above it.
    """
    bounds = {"int8": (0.006, 0.02), "e4m3fn": (0.03, 0.045), "e3m4": (0.014, 0.025)}
    bounds |= {"e5m2": (0.05, 0.07), "wide": (1e-3, 4e-3)}
    mixed = {frozenset(("e3m4", "e4m3fn")): (0.024, 0.034)}
    recipe = RECIPES[name]
    lhs, rhs, grad = data()
    scales = stacked(recipe, oracle.scales_of(recipe, lhs, rhs, grad))
    exact = lhs @ rhs, grad @ rhs.T, np.einsum("btd,btf->df", lhs, grad)
    for gemm, found, wanted in zip(
        (recipe.fwd, recipe.dlhs, recipe.drhs),
        gemms(recipe)(lhs, rhs, grad, scales),
        exact,
        strict=True,
    ):
        formats = [operand.qtype.removeprefix("float8_") for operand in gemm if operand] or ["wide"]
        low, high = mixed.get(frozenset(formats)) or max(bounds[qtype] for qtype in formats)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert low < error < high, (name, error)


def test_integers_are_exact_beyond_what_float32_sums():
    lhs, rhs, grad = normal(0, 2, 31, 1, 97), normal(1, 97, 31, 2), normal(2, 2, 1, 2)
    numbers = (((1, 3), (1, 0)), ((), ()))
    lhs[:, 0, 0, 0] = 3 * abs(lhs).max()
    for name in ("int8-row", "int8-tensor"):
        recipe = PRECISIONS[name].recipe
        found = gemms(recipe, numbers)(lhs, rhs, grad)
        for gemm, wanted in zip(found, oracle.dot(lhs, rhs, grad, numbers, recipe)):
            np.testing.assert_array_equal(gemm, wanted.value)


# The float twin: power-of-two scales commute with every rounding, so nothing may differ.


def _rounds_but_sums_exactly(seed: int, *shape: int) -> np.ndarray:
    """Data whose codes have few significant bits: sums of their products are exact in float32."""
    random = np.random.default_rng(seed)
    return (random.choice([-1, 1], shape) * random.uniform(1, 2, shape)).astype(np.float32)


E4M3 = ("e4m3fn", "e5m2")
INT8 = ("int8", "int8")
FP4 = ("e2m1fn", "e3m2fn")


@pytest.mark.parametrize(
    "formats, scaling",
    [
        *((E4M3, "delayed"), (E4M3, "current"), (E4M3, "static"), (E4M3, "row")),
        *((INT8, "delayed"), (INT8, "current"), (INT8, "row"), (FP4, "current"), (FP4, "row")),
    ],
)
def test_power_of_two_scales_make_the_dot_equal_to_its_float_twin(formats, scaling):
    by_row = scaling == "row"
    where = ("row", "current") if by_row else ("tensor", scaling)
    operand, gradient = (Operand(qtype, *where) for qtype in formats)
    recipe = uniform(operand, operand, gradient, scales="power_of_two")
    numbers = (((1, 3), (2, 0)), ((0,), (1,)))
    shapes = (3, 4, 5, 6), (6, 3, 4, 7), (3, 5, 7)
    arrays = lhs, rhs, grad = [_rounds_but_sums_exactly(seed, *shape) for seed, shape in enumerate(shapes)]
    scales = oracle.scales_of(recipe, *arrays, factor=0.5)

    def fake(tensor, x, kept):
        qtype = formats[tensor == "grad"]
        if by_row:
            options = {"channelwise_axes": kept, "scale_format": "power_of_two"}
        elif scaling == "current":
            options = {"scale_format": "power_of_two"}
        else:
            options = {"scale": jnp.float32(scales[tensor, Operand(qtype).qtype])}
        return q8jax.quantize(x, qtype, **options).dequantize()

    @quick_jit
    def twin(lhs, rhs, grad):
        wide = functools.partial(lax.dot_general, dimension_numbers=numbers, precision=lax.Precision.HIGHEST)
        out = wide(fake("lhs", lhs, (0, 2)), fake("rhs", rhs, (1, 3)))
        _, vjp = jax.vjp(wide, fake("lhs", lhs, (0, 1, 3)), fake("rhs", rhs, (0, 1, 2)))
        return out, vjp(fake("grad", grad, (0, 1)))[0], vjp(fake("grad", grad, (0, 2)))[1]

    found = gemms(recipe, numbers)(*arrays, stacked(recipe, scales))
    exact = jax.vjp(lambda a, b: lax.dot_general(a, b, numbers), lhs, rhs)
    for quantized, expected, unquantized in zip(
        found, twin(*arrays), (exact[0], *exact[1](jnp.asarray(grad))), strict=True
    ):
        np.testing.assert_array_equal(quantized, expected)
        assert not np.array_equal(quantized, unquantized)


# Extremes.

TINY = 2.0**-126  # the smallest normal float32


def _extremes() -> dict[str, tuple[np.ndarray, ...]]:
    """What may be fed to the operands of a dot and to its gradient."""
    cases = {}
    for position, name in enumerate(("lhs", "rhs", "grad")):
        for value in (np.nan, np.inf, -np.inf, 3e37):
            arrays = data()
            arrays[position][..., 3, 5] = value
            cases[f"one {value} in {name}"] = arrays
        for amax in (0, 1e-36, 3e38):
            arrays = data()
            for other in {0, 1, 2} - {position}:
                arrays[other][...] *= np.float32(1e-3 if amax > 1 else 1)
            arrays[position][...] *= np.float32(amax / abs(arrays[position]).max())
            cases[f"amax {amax} in {name}"] = arrays
    lhs, rhs, grad = data()
    cases["tiny times huge"] = lhs * np.float32(1e-35), rhs * np.float32(1e36), grad
    lhs, rhs, grad = data()
    lhs[:, 0], lhs[:, 1], rhs[:, 0], rhs[:, 1] = 1e30, 0, 1e30, 0
    cases["scales beyond float32 together, of which zeros have no use"] = lhs, rhs, grad
    for arrays in cases.values():
        for x in arrays:
            x[abs(x) < TINY] = 0  # as CPUs take it
    return cases


@pytest.mark.parametrize("name", ["fp8", "fp8-current", "mxfp8", "int8", "int8-tensor", "int8-block", "static"])
def test_extremes_give_what_the_contract_says(name):
    recipe = RECIPES[name]
    for what, arrays in _extremes().items():
        finite = [np.where(np.isfinite(x), x, np.float32(0)) for x in arrays]
        scales = oracle.scales_of(recipe, *finite)
        found = gemms(recipe)(*arrays, stacked(recipe, scales))
        for gemm, wanted in zip(found, oracle.dot(*arrays, DENSE, recipe, scales), strict=True):
            wanted.slack = wanted.slack + 4 * TINY  # CPUs flush what is smaller
            assert_close(gemm, wanted, what)
        bad = [not np.isfinite(gemm).all() for gemm in found]
        if "nan" in what:
            assert sum(bad) == 2, what
        elif "beyond" in what:
            assert not np.isnan(found[0]).any()
        else:
            assert not any(bad), what


@pytest.mark.parametrize("name", ["fp8", "int8", "int8-block", "mxfp8", "weight-only", "activation-only"])
def test_tiny_and_huge_operands_keep_their_product(name):
    """Neither 1e-36 times 1 nor 3e38 times 1e-3 is lost, also where one operand stays wide."""
    recipe = RECIPES[name]
    # Wide operands have float32's range, and a sum of 96 products with the largest would leave it.
    huge = 3e36 if "only" in name else 3e38
    lhs, rhs, grad = (abs(x) + 1 for x in data())
    lhs, rhs = lhs / lhs.max(), rhs / rhs.max()
    for amax, other in ((1e-36, 1), (huge, 1e-3), (1, 1e-36), (1e-3, huge)):
        arrays = (lhs * amax).astype(np.float32), (rhs * other).astype(np.float32)
        exact = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64)
        scale = stacked(recipe, oracle.scales_of(recipe, *arrays, grad))
        out = gemms(recipe)(*arrays, grad, scale)[0]
        # Below 2^-126 of a format's max fewer codes are left.
        np.testing.assert_allclose(out, exact, rtol=0.05)


@pytest.mark.parametrize("name", ["fp8", "fp8-current", "int8", "int8-block", "columns", "wide"])
def test_observed_amaxes_leave_through_the_scale_and_show_what_is_not_finite(name):
    rows = Gemm(Operand("int8", "row"), Operand("int8", "row"))  # of rhs, its columns
    recipe = {"columns": Recipe(rows), "wide": Recipe()}.get(name) or RECIPES[name]

    @quick_jit
    def observed(lhs, rhs, grad):
        scale = jnp.ones(len(recipe.slots), jnp.float32)
        return jax.vjp(lambda scale: dot_general(lhs, rhs, DENSE, recipe, scale), scale)[1](grad)[0]

    def expected(arrays):
        largest = {name: np.abs(x).max() for name, x in zip(("lhs", "rhs", "grad"), arrays)}
        return [largest[slot.tensor] for slot in recipe.slots]

    np.testing.assert_array_equal(observed(*data()), expected(data()))
    for position, value in ((0, np.nan), (1, np.inf), (1, np.nan), (2, -np.inf), (2, np.nan)):
        arrays = data()
        arrays[position].flat[7] = value
        np.testing.assert_array_equal(observed(*arrays), expected(arrays))


# What is kept for the backward pass.


def residuals(recipe: Recipe, lhs, rhs, scale=None) -> list[jax.Array]:
    dot = lambda lhs, rhs: dot_general(lhs, rhs, DENSE, recipe, scale)
    return [leaf for leaf in jax.tree.leaves(jax.vjp(dot, lhs, rhs)[1]) if leaf.size]


@pytest.mark.parametrize(
    "name, bytes_per_element",
    {
        **dict.fromkeys(("fp8", "fp8-current", "int8", "int8-tensor", "static"), (1, 1)),
        **{"int8-block": (1, 1), "mxfp8": (1 + 1 / 32, 1 + 1 / 32), "fp6": (1, 1)},
        **{"int8-switchback": (2, 1), "forward-only": (2, 2), "weight-only": (2, 1)},
        **{"activation-only": (1, 2), "bf16": (2, 2), "fp32": (4, 4)},
    }.items(),
)
def test_codes_are_all_that_is_kept(name, bytes_per_element):
    recipe = RECIPES[name]
    lhs, rhs, _ = map(jnp.asarray, data())
    scale = jnp.ones(len(recipe.slots), jnp.float32)
    kept = jax.eval_shape(functools.partial(residuals, recipe), lhs, rhs, scale)
    per_lhs, per_rhs = bytes_per_element
    # Scales of rows are few, and so are the slots' scales and the amaxes of rows.
    amaxes = 4 * sum(x.size // x.shape[-1] for x in (lhs, rhs)) if recipe.slots else 0
    few = 4 * (sum(lhs.shape) + sum(rhs.shape)) if name in ("int8", "weight-only") else 128 + amaxes
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    assert 0 <= total - per_lhs * lhs.size - per_rhs * rhs.size <= few
    # XLA:CPU would widen a whole scan's stack of FP8 arrays at every step.
    assert not [leaf.dtype for leaf in kept if leaf.dtype.name.startswith("float8")]


# Dtypes.


@pytest.mark.parametrize(
    "name, dtypes",
    [
        ("int8-row", ("bfloat16", "bfloat16", None)),
        ("fp8-current", ("float16", "float16", None)),
        ("int8-row", ("bfloat16", "float32", "float16")),
    ],
)
def test_results_and_gradients_have_the_dtypes_of_their_tensors(name, dtypes):
    one, other, preferred = dtypes
    out = preferred or one
    recipe = PRECISIONS[name].recipe
    arrays = [jnp.asarray(x).astype(d) for x, d in zip(data(), (one, other, out), strict=True)]

    def three(lhs, rhs, grad):
        options = {"recipe": recipe, "preferred_element_type": preferred}
        dot = functools.partial(dot_general, dimension_numbers=DENSE, **options)
        result, vjp = jax.vjp(dot, lhs, rhs)
        return result, *vjp(grad)

    found = quick_jit(three)(*arrays)
    assert [x.dtype.name for x in found] == [out, one, other]
    for gemm, wanted in zip(found, oracle.dot(*map(np.asarray, arrays), DENSE, recipe), strict=True):
        if name == "int8-row":
            np.testing.assert_array_equal(gemm, jnp.asarray(wanted.value).astype(gemm.dtype))
        else:
            info = jnp.finfo(gemm.dtype)
            half_a_unit = float(info.eps) / 2 * np.abs(wanted.value) + float(info.smallest_subnormal)
            wanted.slack = wanted.slack + half_a_unit
            assert_close(gemm.astype(jnp.float32), wanted)


def test_mixed_dtypes_promote():
    lhs, rhs = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.float32)
    assert dot_general(lhs, rhs, MATMUL, "bf16").dtype == jnp.float32
    assert dot_general(lhs, rhs.astype(jnp.float16), MATMUL, "bf16").dtype == jnp.float32


# What it refuses.


def test_refusals_name_what_to_do():
    x, w = jnp.ones((4, 12)), jnp.ones((12, 6))
    dot = functools.partial(dot_general, x, w, MATMUL)
    for call, message in (
        (lambda: dot("fp8"), "pass scale="),
        (lambda: dot("int8", jnp.ones(2)), r"scale is float32 of shape \(2,\).*3 slots"),
        (lambda: dot("int8", jnp.ones(3, jnp.bfloat16)), r"scale is bfloat16.*float32 \[3\]"),
        (lambda: dot("fwd=int8:row:current:stochastic,none"), "needs key="),
        (
            lambda: dot("mxfp8"),
            "tile32 of lhs in fwd does not divide its contracting size 12: choose K from 1, 2, 3, 4, 6, 12, or gran",
        ),
        (
            lambda: dot("fwd=none,none/dlhs=int8:tile4,none"),
            "of grad in dlhs .* contracting size 6",
        ),
        (lambda: dot("drhs=none,int8:block4"), "block4 of grad in drhs .* free size 6"),
        (lambda: dot("int9"), "Unknown precision 'int9'"),
        (lambda: dot_general(x.astype(jnp.int8), w, MATMUL, "int8"), "lhs is int8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_second_derivatives_raise_where_codes_have_none():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 4))
    curved = lambda recipe, x: jnp.sum(dot_general(x, w, MATMUL, recipe) ** 2)
    second = lambda recipe: jax.grad(lambda x: jnp.sum(jax.grad(functools.partial(curved, recipe))(x)))
    for recipe in ("int8-row", "fp8-current"):
        with pytest.raises(ValueError, match="differentiable once"):
            second(recipe)(x)
    np.testing.assert_allclose(second("fp32")(x), 2 * jnp.ones((4, 8)) @ w @ w.T)
