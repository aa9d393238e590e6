"""The quantized dot against a NumPy oracle, its float twin, and itself under JAX's transforms."""

import dataclasses
import functools
import math

import dot_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import q8jax
from q8jax import PRECISIONS, Gemm, Operand, Recipe, dot_general
from q8jax.contraction import Contraction, contractions

MATMUL = (((1,), (0,)), ((), ()))
DENSE = (((2,), (0,)), ((), ()))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def uniform(first: Operand | None, second: Operand | None, grad: Operand | None, **options) -> Recipe:
    """A recipe that quantizes lhs, rhs and grad alike in every GEMM."""
    return Recipe(Gemm(first, second), Gemm(grad, second), Gemm(first, grad), **options)


# Compiles twice as fast; what is timed and trained with is also tested as users compile it.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def gemms(recipe: Recipe, dimension_numbers=DENSE, jit=quick_jit):
    """A function of (lhs, rhs, grad, scale, key) that gives (out, dlhs, drhs)."""
    return _gemms(recipe, dimension_numbers, jit)


@functools.cache
def _gemms(recipe, dimension_numbers, jit):
    def three(lhs, rhs, grad, scale=None, key=None):
        dot = lambda lhs, rhs: dot_general(lhs, rhs, dimension_numbers, recipe, scale, key=key)
        out, vjp = jax.vjp(dot, lhs, rhs)
        return (out, *vjp(grad))

    return jit(three)


def plain(function):
    return function


def stacked(recipe: Recipe, scales: dict) -> jax.Array:
    return jnp.array([scales[slot.tensor, slot.qtype] for slot in recipe.slots], jnp.float32)


def assert_close(found, wanted: oracle.Product, what: str = "") -> None:
    """Equal but for the order of float32 sums, which `slack` bounds; NaN and Inf in their places."""
    found, value = np.asarray(found, np.float64), wanted.value.astype(np.float64)
    assert found.shape == value.shape
    np.testing.assert_array_equal(np.where(np.isfinite(found), 0, found), np.where(np.isfinite(value), 0, value), what)
    finite = np.isfinite(value)
    excess = np.abs(found[finite] - value[finite]) - wanted.slack[finite]
    assert excess.max(initial=0) <= 0, f"{what}: {excess.max()} off"


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """lhs [2, 32, 96], rhs [96, 64] and grad [2, 32, 64] for DENSE."""
    return normal(0, 2, 32, 96), normal(1, 96, 64), normal(2, 2, 32, 64)


# The oracle: every preset, and formats and settings that no preset has.

RECIPES = {
    **{name: precision.recipe for name, precision in PRECISIONS.items()},
    "fp8-block": Recipe.parse(str(PRECISIONS["fp8-block"].recipe).replace("128", "32")),
    "fp6": uniform(*map(Operand, ("e2m3fn", "e2m3fn", "e3m2fn"))),
    "fp4": uniform(*(Operand("e2m1fn", "tile32"),) * 3, scales="e8m0"),
    "int4": uniform(*(Operand("int4", "row"),) * 3),
    "int2": uniform(*(Operand("int2", "row"),) * 3),
    "fnuz": uniform(*map(Operand, ("e4m3fnuz", "e4m3b11fnuz", "e5m2fnuz"))),
    "ieee": uniform(*map(Operand, ("e4m3", "e3m4", "e5m2")), margin=3),
    "int8 × fp8": uniform(Operand("int8", "row"), Operand("e4m3fn"), Operand("e5m2")),
    "block × row": uniform(*(Operand("int8", word) for word in ("block32", "row", "tile16"))),
    "tiles of 16 × 24": Recipe(Gemm(Operand("int8", "tile16"), Operand("e4m3fn", "tile24"))),
    "weight-only": Recipe(Gemm(None, Operand("int8", "row")), Gemm(None, Operand("int8", "row"))),
    "weight-only int4 tiles": Recipe(Gemm(None, Operand("int4", "tile32")), compute="float32"),
    "activation-only": uniform(Operand("e4m3fn"), None, None, scales="power_of_two"),
    "forward-only": Recipe(Gemm(Operand("int8"), Operand("int8")), compute="float16"),
    "gradient-only": Recipe(dlhs=Gemm(Operand("e5m2"), None), drhs=Gemm(None, Operand("e5m2")), compute="float32"),
    "static": uniform(*(Operand("int8", scaling="static"),) * 3),
}


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
        low, high = max(bounds[qtype] for qtype in formats)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert low < error < high, (name, error)


def test_integers_are_exact_beyond_what_float32_sums():
    lhs, rhs, grad = normal(0, 2, 31, 1, 97), normal(1, 97, 31, 2), normal(2, 2, 1, 2)
    numbers = (((1, 3), (1, 0)), ((), ()))
    lhs[:, 0, 0, 0] = 3 * abs(lhs).max()
    for name in ("int8", "int8-tensor"):
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
        *((INT8, "delayed"), (INT8, "row"), (FP4, "current")),
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


# Every legal dimension_numbers.


def _legal_numbers(seed: int = 0):
    """(numbers, lhs shape, rhs shape) for 0 to 2 batch, contracting and free axes, shuffled."""
    random = np.random.default_rng(seed)
    sizes = {"b": (2, 3), "c": (4, 6), "l": (6, 2), "r": (2, 4)}
    cases = []
    for count in np.ndindex(3, 3, 3, 3):
        groups = {kind: [(kind, i) for i in range(n)] for kind, n in zip("bclr", count)}
        sides = [groups["b"] + groups["c"] + groups[own] for own in "lr"]
        for axes in (*sides, groups["b"], groups["c"]):
            random.shuffle(axes)
        pairs = [tuple(tuple(s.index(axis) for axis in groups[kind]) for s in sides) for kind in "cb"]
        cases.append((tuple(pairs), *(tuple(sizes[k][i] for k, i in side) for side in sides)))
    return cases


EMPTY = [
    ((((1,), (0,)), ((), ())), (0, 4), (4, 2)),
    ((((1,), (0,)), ((), ())), (2, 0), (0, 4)),
    ((((1,), (0,)), ((), ())), (2, 4), (4, 0)),
    ((((2,), (1,)), ((0,), (0,))), (0, 2, 4), (0, 4, 6)),
]


def _whole_numbers(case, seed: int = 0) -> list[np.ndarray]:
    numbers, lhs_shape, rhs_shape = case
    random = np.random.default_rng(seed)
    lhs, rhs = (random.integers(-3, 4, shape).astype(np.float32) for shape in (lhs_shape, rhs_shape))
    out = jax.eval_shape(functools.partial(lax.dot_general, dimension_numbers=numbers), lhs, rhs)
    return [lhs, rhs, random.integers(-3, 4, out.shape).astype(np.float32)]


def _run(contraction: Contraction, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The dot that a Contraction says, in NumPy."""
    a, b = contraction.first, contraction.second
    left = first.transpose(a.batch + a.free + a.contracting)
    right = second.transpose(b.batch + b.free + b.contracting)
    shape = contraction.dot_shape(first.shape, second.shape)
    batch, length = left.shape[: len(a.batch)], left.shape[len(a.kept) :]
    assert (batch, length) == (right.shape[: len(b.batch)], right.shape[len(b.kept) :])
    size = math.prod(batch), -1, math.prod(length)
    sizes = [math.prod(x.shape[i] for i in s.free) for x, s in ((first, a), (second, b))]
    flat = [x.reshape(size[0], n, size[2]) for x, n in zip((left, right), sizes)]
    return np.einsum("bmk,bnk->bmn", *flat).reshape(shape).transpose(contraction.permutation)


@pytest.mark.parametrize("seed", range(3))
def test_contractions_are_right_for_every_count_of_axes(seed):
    cases = _legal_numbers(seed) + EMPTY
    assert len({case[0] for case in cases}) > 60
    for case in cases:
        lhs, rhs, grad = _whole_numbers(case, seed)
        numbers = case[0]
        found = contractions(lhs.shape, rhs.shape, numbers)
        assert found["fwd"].dimension_numbers == numbers
        assert _run(found["fwd"], lhs, rhs).shape == grad.shape
        # A gradient is linear in grad and adjoint to the dot: <dot(x, rhs), grad> = <x, dlhs>.
        for _ in range(2):
            x, y = _whole_numbers(case, seed + 10)[:2]
            dlhs, drhs = _run(found["dlhs"], grad, rhs), _run(found["drhs"], lhs, grad)
            assert (dlhs.shape, drhs.shape) == (lhs.shape, rhs.shape)
            assert np.sum(_run(found["fwd"], x, rhs) * grad) == np.sum(x * dlhs)
            assert np.sum(_run(found["fwd"], lhs, y) * grad) == np.sum(y * drhs)


def test_dimension_numbers_agree_with_lax_and_its_gradients():
    cases = _legal_numbers()[2::8] + EMPTY
    results = []

    @quick_jit
    def both(arrays):
        for case, (lhs, rhs, grad) in zip(cases, arrays, strict=True):
            dot = functools.partial(lax.dot_general, dimension_numbers=case[0])
            out, vjp = jax.vjp(dot, lhs, rhs)
            ours = gemms(PRECISIONS["fp32"].recipe, case[0], plain)(lhs, rhs, grad)
            results.append((ours, (out, *vjp(grad))))
        return results

    for ours, expected in both([_whole_numbers(case) for case in cases]):
        jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile2", "block2"])
def test_dimension_numbers_of_quantized_dots_agree_with_numpy(granularity):
    cases = _legal_numbers(1)
    if granularity in ("tile2", "block2"):
        cases = [case for case in cases if _sizes_are_even(case)]
    cases = cases[1 :: len(cases) // 2] + EMPTY[1:2]
    recipe = uniform(*(Operand("int8", granularity),) * 3)

    @quick_jit
    def ours(arrays):
        return [gemms(recipe, case[0], plain)(*own) for case, own in zip(cases, arrays, strict=True)]

    arrays = [_whole_numbers(case) for case in cases]
    for case, found, own in zip(cases, ours(arrays), arrays, strict=True):
        for gemm, wanted in zip(found, oracle.dot(*own, case[0], recipe), strict=True):
            assert_close(gemm, wanted)


def _sizes_are_even(case) -> bool:
    """Whether tiles of 2 divide what they may run along, in the dot and in its gradients."""
    _, lhs, rhs = case
    fwd = contractions(lhs, rhs, case[0])["fwd"]
    groups = (lhs, fwd.first.contracting), (lhs, fwd.first.free), (rhs, fwd.second.free)
    return all(math.prod(shape[i] for i in axes) % 2 == 0 for shape, axes in groups)


@pytest.mark.parametrize(
    "numbers",
    [
        (((-1,), (0,)), ((), ())),
        (((1,), (0, 1)), ((), ())),
        (((2,), (0,)), ((), ())),
        (((1,), (1,)), ((), ())),
        (((1, 1), (0, 0)), ((), ())),
        (((1,), (0,)), ((1,), (0,))),
    ],
)
def test_illegal_dimension_numbers_raise(numbers):
    with pytest.raises(TypeError):
        lax.dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), numbers)
    with pytest.raises(ValueError, match=r"dimension_numbers .* do not fit .* \(2, 3\) and \(3, 4\)"):
        dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), numbers, "int8")


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
    # Scales of rows are few, and so are the slots' scales and amaxes.
    few = 4 * (sum(lhs.shape) + sum(rhs.shape)) if name in ("int8", "weight-only") else 128
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    assert 0 <= total - per_lhs * lhs.size - per_rhs * rhs.size <= few
    # XLA:CPU would widen a whole scan's stack of FP8 arrays at every step.
    assert not [leaf.dtype for leaf in kept if leaf.dtype.name.startswith("float8")]


# Transforms.

NOISY = Operand("int8", "tensor", "static", "stochastic")


@pytest.mark.parametrize(
    "name, axes",
    [
        *(("fp8", (0, None)), ("fp8", (0, 0)), ("fp8-current", (None, 0)), ("int8", (0, None))),
        *(("int8", (None, 0)), ("mxfp8", (0, 0))),
    ],
)
def test_vmap_is_the_loop(name, axes):
    """Also of gradients. Current scales are each example's own."""
    recipe = RECIPES[name]
    count = 3
    arrays = [
        np.stack([x * 4**i for i, x in enumerate([x] * count)]) if axis == 0 else x
        for x, axis in zip(data(), (*axes, 0), strict=True)
    ]
    scale = stacked(recipe, oracle.scales_of(recipe, *data()))
    together = quick_jit(jax.vmap(gemms(recipe, DENSE, plain), (*axes, 0, None)))(*arrays, scale)
    for i in range(count):
        own = [x if axis is None else x[i] for x, axis in zip(arrays, (*axes, 0), strict=True)]
        for found, wanted in zip(together, gemms(recipe)(*own, scale), strict=True):
            exact = name.startswith("int8")
            scale_of_sums = 0 if exact else 1e-6 * np.abs(wanted).max()
            np.testing.assert_allclose(found[i], wanted, rtol=0, atol=scale_of_sums)


def test_jit_checkpoint_and_scan_change_nothing():
    recipe = PRECISIONS["int8-tensor"].recipe
    loss = lambda lhs, rhs: jnp.sum(dot_general(lhs, rhs, MATMUL, recipe) ** 2)
    eager = jax.grad(loss, argnums=(0, 1))

    @quick_jit
    def others(lhs, rhs):
        step = lambda total, x: (jax.tree.map(jnp.add, total, eager(lhs + x, rhs)), None)
        zeros = jnp.zeros_like(lhs), jnp.zeros_like(rhs)
        scanned, _ = lax.scan(step, zeros, jnp.zeros(1))
        rematerialized = jax.grad(jax.checkpoint(loss), argnums=(0, 1))
        return eager(lhs, rhs), rematerialized(lhs, rhs), scanned

    lhs, rhs = jnp.asarray(normal(0, 8, 8)), jnp.asarray(normal(1, 8, 8))
    expected = eager(lhs, rhs)
    exact = jax.grad(lambda x: jnp.sum((x @ rhs) ** 2))(lhs)
    assert np.abs(expected[0] - exact).max() > 1e-3
    for grads in others(lhs, rhs):
        jax.tree.map(np.testing.assert_array_equal, grads, expected)


def test_checkpoint_rounds_stochastically_as_the_first_time():
    half, scale = jnp.full(512, 0.5), jnp.ones(1)
    recipe = Recipe(drhs=Gemm(NOISY, None), compute="float32")
    key = jax.random.key(0)
    dot = lambda w: dot_general(half, w, (((), ()), ((0,), (0,))), recipe, scale, key=key)
    gradient = lambda function: jax.grad(lambda w: jnp.sum(function(w)))
    ones = jnp.ones(512)
    plainly, again = quick_jit(lambda w: (gradient(dot)(w), gradient(jax.checkpoint(dot))(w)))(ones)
    assert set(np.unique(plainly)) == {0, 1}
    np.testing.assert_array_equal(plainly, again)


def test_a_sharded_batch_changes_nothing():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    spec = jax.sharding.PartitionSpec
    specs = spec("data", "model"), spec(None, "model"), spec("data", None, "model")
    arrays = normal(0, 4, 8, 96), normal(1, 96, 64), normal(2, 4, 8, 64)
    recipe = PRECISIONS["int8"].recipe
    sharded = [jax.device_put(x, jax.sharding.NamedSharding(mesh, s)) for x, s in zip(arrays, specs)]
    for found, wanted in zip(gemms(recipe)(*sharded), gemms(recipe)(*arrays), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "name, dtypes",
    [
        ("int8", ("bfloat16", "bfloat16", None)),
        ("fp8-current", ("float16", "float16", None)),
        ("int8", ("bfloat16", "float32", "float16")),
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
        if name == "int8":
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


# Stochastic rounding.


def test_stochastic_rounding_draws_per_element_operand_and_gemm():
    n = 4096
    half = jnp.full(n, 0.5)
    scale = jnp.ones(3)
    elementwise = (((), ()), ((0,), (0,)))
    recipe = uniform(NOISY, NOISY, NOISY)
    three = quick_jit(functools.partial(gemms(recipe, elementwise, plain), scale=scale))
    for product in three(half, half, half, key=jax.random.key(0)):
        # Each code is 0 or 1. The products' mean is 1/4 if their factors are independent, else 1/2 or 0.
        assert set(np.unique(product)) == {0, 1}
        assert abs(np.mean(product) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    out, again, other = (three(half, half, half, key=jax.random.key(seed))[0] for seed in (1, 1, 0))
    np.testing.assert_array_equal(out, again)
    assert np.mean(out != other) > 0.2


def test_stochastic_rounding_draws_anew_for_each_quantization_of_a_tensor():
    recipe = Recipe.parse("fwd=int8:row:current:stochastic,none/drhs=int8:row:current:stochastic,none")
    recipe = dataclasses.replace(recipe, compute="float32")
    n = 64
    lhs = np.full((n, n), 0.5, np.float32)
    lhs[0], lhs[:, 0] = 127, 127  # every row and every column has scale 1
    eye = jnp.eye(n)
    out, _, drhs = gemms(recipe, MATMUL)(lhs, eye, eye, key=jax.random.key(0))
    by_row, by_column = out[1:, 1:], drhs.T[1:, 1:]
    assert set(np.unique(by_row)) == set(np.unique(by_column)) == {0, 1}
    assert abs(np.mean(by_row == by_column) - 0.5) < 4 * 0.5 / n


def test_stochastic_rounding_is_independent_across_examples_of_vmap():
    recipe = dataclasses.replace(uniform(NOISY, None, None), compute="float32")
    half, ones, scale = jnp.full((8, 512), 0.5), jnp.ones(512), jnp.ones(1)
    elementwise = (((), ()), ((0,), (0,)))
    rest = elementwise, recipe, scale
    dot = lambda x, key: dot_general(x, ones, *rest, key=key)

    @quick_jit
    def draws(x):
        key = jax.random.key(0)
        shared = jax.vmap(dot, (0, None))
        own = jax.vmap(dot)(x, jax.random.split(key, 8))
        return shared(x, key), own, jax.vmap(shared, (0, None))(x.reshape(2, 4, 512), key)

    for codes in (np.asarray(x).reshape(8, 512) for x in draws(half)):
        agreement = np.mean(codes[:, None] == codes[None], axis=-1)
        others = agreement[~np.eye(8, dtype=bool)]
        assert np.all(abs(others - 0.5) < 5 * 0.5 / np.sqrt(512))
    # An operand that all examples share is one tensor, and is rounded once.
    codes = quick_jit(jax.vmap(lambda w: dot_general(half[0], w, *rest, key=jax.random.key(0))))
    first, second = codes(jnp.ones((2, 512)))
    np.testing.assert_array_equal(first, second)


def test_stochastic_rounding_is_unbiased():
    lhs, rhs, grad = data()
    recipe = Recipe.parse(str(PRECISIONS["fp8-current"].recipe).replace("current", "current:stochastic"))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 200)
    three = gemms(recipe, DENSE, plain)

    @quick_jit
    def moments(keys):
        draws = lax.map(lambda key: three(lhs[:1], rhs[:, :8], grad[:1, :, :8], key=key), keys)
        return [(jnp.mean(x, 0), jnp.std(x, 0)) for x in draws]

    exact = jax.vjp(lambda a, b: a @ b, lhs[:1], rhs[:, :8])
    for (mean, deviation), wanted in zip(
        moments(keys), (exact[0], *exact[1](jnp.asarray(grad[:1, :, :8]))), strict=True
    ):
        error = (np.asarray(mean) - wanted) / (np.asarray(deviation) / np.sqrt(len(keys)))
        assert np.abs(error).max() < 5.5  # of up to 3000 entries
        assert 0.8 < np.mean(np.square(error)) < 1.2


# What it refuses.


def test_refusals_name_what_to_do():
    x, w = jnp.ones((4, 12)), jnp.ones((12, 6))
    dot = functools.partial(dot_general, x, w, MATMUL)
    for call, message in (
        (lambda: dot("fp8"), "pass scale="),
        (lambda: dot("int8", jnp.ones(2)), r"scale is float32 of shape \(2,\).*3 slots"),
        (lambda: dot("int8", jnp.ones(3, jnp.bfloat16)), r"scale is bfloat16.*float32 \[3\]"),
        (lambda: dot("fwd=int8:row:current:stochastic,none"), "needs key="),
        (lambda: dot("mxfp8"), "tile32 of lhs in fwd does not divide its contracting size 12"),
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
    for recipe in ("int8", "fp8-current"):
        with pytest.raises(ValueError, match="differentiable once"):
            second(recipe)(x)
    np.testing.assert_allclose(second("fp32")(x), 2 * jnp.ones((4, 8)) @ w @ w.T)
