"""The quantized convolution against a NumPy oracle, and against JAX's own."""

import collections
import functools
import itertools
import re

import conv_oracle as oracle
import dot_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dot_cases import RECIPES, assert_close, normal, quick_jit, stacked, uniform
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from micro import quick_compiles  # noqa: F401
from shardings import AUTOMATIC

import q8jax
from q8jax import PRECISIONS, Gemm, Operand, Recipe, conv_general_dilated

NUMBERS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}
STRIDED = oracle.Geometry((2, 1), ((1, 2), (2, 0)), (1, 1), (1, 2))


def options(geometry: oracle.Geometry) -> dict:
    return {
        "window_strides": geometry.strides,
        "padding": geometry.padding,
        "lhs_dilation": geometry.lhs_dilation,
        "rhs_dilation": geometry.rhs_dilation,
        "dimension_numbers": NUMBERS[len(geometry.strides)],
    }


def three(recipe, geometry=STRIDED, **others):
    """A function of (lhs, rhs, grad, scale, key) that gives (out, dlhs, drhs)."""

    def run(lhs, rhs, grad, scale=None, key=None):
        keywords = options(geometry) | others
        conv = lambda lhs, rhs: conv_general_dilated(lhs, rhs, recipe=recipe, scale=scale, key=key, **keywords)
        out, vjp = jax.vjp(conv, lhs, rhs)
        return (out, *vjp(grad))

    return run


def exact(geometry=STRIDED, **others):
    def run(lhs, rhs, grad):
        out, vjp = jax.vjp(functools.partial(lax.conv_general_dilated, **options(geometry), **others), lhs, rhs)
        return (out, *vjp(grad))

    return run


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """lhs [3, 9, 6, 8], rhs [3, 2, 8, 16] and grad [3, 5, 6, 16] for STRIDED."""
    lhs, rhs, grad = normal(0, 3, 9, 6, 8), normal(1, 3, 2, 8, 16), normal(2, 3, 5, 6, 16)
    assert grad.shape[1:3] == STRIDED.outputs(lhs.shape[1:3], rhs.shape[:2])
    return lhs, rhs, grad


# The oracle.

PLAIN = ("fp32", "bf16", "weight-only", "activation-only", "int8-switchback")
QUANTIZED = ("fp8", "fp8-row", "fp6", "int8", "int4", "int8 × fp8", "static")


@pytest.mark.parametrize("name", PLAIN + QUANTIZED)
def test_all_three_products_are_those_of_numpy(name):
    recipe = RECIPES[name]
    lhs, rhs, grad = data()
    lhs[1] *= 100
    rhs[..., 5] *= 0.01
    grad *= 1e-3
    scales = dot_oracle.scales_of(recipe, lhs, rhs, grad, factor=0.7)  # what is beyond saturates
    found = quick_jit(three(recipe))(lhs, rhs, grad, stacked(recipe, scales))
    integers = all(all(op and op.qtype.startswith("int") for op in gemm) for gemm in (recipe.fwd, recipe.dlhs))
    for product, wanted in zip(found, oracle.conv(lhs, rhs, grad, STRIDED, recipe, scales), strict=True):
        assert_close(product, wanted)
        if integers and name != "int8-switchback":
            np.testing.assert_array_equal(product, wanted.value)


@pytest.mark.parametrize("name", ["fp8-current", "fp8-e3m4", "int8-row", "int8-tensor"])
def test_error_is_what_the_formats_imply(name):
    """Relative errors: an accidental bfloat16 path, 0.002, is below each range, a broken scale above it."""
    bounds = {"int8": (0.006, 0.02), "e4m3fn": (0.03, 0.045), "e3m4": (0.014, 0.034), "e5m2": (0.05, 0.07)}
    recipe = RECIPES[name]
    arrays = data()
    found = quick_jit(three(recipe))(*arrays, stacked(recipe, dot_oracle.scales_of(recipe, *arrays)))
    for gemm, product, wanted in zip((recipe.fwd, recipe.dlhs, recipe.drhs), found, exact()(*arrays), strict=True):
        low, high = max(bounds[operand.qtype.removeprefix("float8_")] for operand in gemm)
        error = np.linalg.norm(product - wanted) / np.linalg.norm(wanted)
        assert low < error < high, (name, error)


@pytest.mark.parametrize("formats", [("e4m3fn", "e5m2"), ("int8", "int8")])
def test_power_of_two_scales_make_it_equal_to_its_float_twin(formats):
    """The gradients too: those that JAX has of the convolution of what the codes mean."""
    operand, gradient = (Operand(qtype, "tensor", "delayed") for qtype in formats)
    recipe = uniform(operand, operand, gradient, scales="power_of_two")
    random = np.random.default_rng(0)
    arrays = [(random.choice([-1, 1], x.shape) * random.uniform(1, 2, x.shape)).astype(np.float32) for x in data()]
    scales = dot_oracle.scales_of(recipe, *arrays, factor=0.5)
    meant = [
        q8jax.quantize(x, qtype, scale=jnp.float32(scales[tensor, Operand(qtype).qtype])).dequantize()
        for tensor, x, qtype in zip(("lhs", "rhs", "grad"), map(jnp.asarray, arrays), (formats[0], *formats))
    ]
    found = quick_jit(three(recipe))(*arrays, stacked(recipe, scales))
    for product, twin, wide in zip(found, exact()(*meant), exact()(*arrays), strict=True):
        np.testing.assert_array_equal(product, twin)
        assert not np.array_equal(product, wide)


def test_sums_of_integers_are_exact_beyond_what_float32_sums():
    lhs, rhs, grad = normal(0, 2, 5, 300), normal(1, 3, 300, 2), normal(2, 2, 5, 2)
    lhs[0, 0, 0], rhs[0, 0, 0] = 3 * abs(lhs).max(), 3 * abs(rhs).max()
    geometry = oracle.Geometry((1,), ((1, 1),), (1,), (1,))
    recipe = PRECISIONS["int8-tensor"].recipe
    lhs, rhs = abs(lhs) + 2, abs(rhs) + 2  # sums of 900 products of up to 127²
    found = quick_jit(three(recipe, geometry))(lhs, rhs, grad)
    wanted = oracle.conv(lhs, rhs, grad, geometry, recipe)
    for product, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(product, expected.value)


# Geometry: whole numbers, which INT8 and FP8 hold, so that JAX's own convolution is the same number.

WHOLE = {
    "int8": uniform(*(Operand("int8", scaling="unit"),) * 3),
    "e4m3fn": uniform(*(Operand("e4m3fn", scaling="unit"),) * 3),
}


SEEDS = {"int8": 0, "e4m3fn": 1}


def _geometries(seed: int, count: int):
    random = np.random.default_rng(seed)
    pick = lambda low, high, n: tuple(int(x) for x in random.integers(low, high, n))
    while count:
        n = int(random.integers(1, 4))
        sizes, kernel = pick(3, 8 - n, n), pick(1, 4, n)
        padding = tuple(zip(pick(-1, 4, n), pick(-1, 4, n), strict=True))
        geometry = oracle.Geometry(pick(1, 4, n), padding, pick(1, 3, n), pick(1, 3, n))
        if min(geometry.outputs(sizes, kernel)) < 1:
            continue
        if not any(all(map(len, ys)) for _, ys, _ in geometry.meetings(sizes, kernel)):
            continue
        groups = int(random.choice([1, 1, 1, 2, 4]))
        yield geometry, (2, *sizes, 4), (*kernel, 4 // groups, 8), groups
        count -= 1


def _whole(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_geometries_are_those_of_jax(name):
    cases = []
    for geometry, lhs, rhs, groups in _geometries(SEEDS[name], 5):
        arrays = _whole(lhs, 0), _whole(rhs, 1)
        plain = functools.partial(lax.conv_general_dilated, **options(geometry), feature_group_count=groups)
        cases.append((geometry, groups, (*arrays, _whole(jax.eval_shape(plain, *arrays).shape, 2))))

    @quick_jit
    def both(arrays):
        return [
            (three(WHOLE[name], g, feature_group_count=n)(*own), exact(g, feature_group_count=n)(*own))
            for (g, n, _), own in zip(cases, arrays, strict=True)
        ]

    for found, wanted in both([arrays for *_, arrays in cases]):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert all(np.any(product) for product in wanted)


@pytest.mark.parametrize(
    ("padding", "numbers"), [("SAME", None), ("VALID", ("NCHW", "OIHW", "CNHW")), ("SAME_LOWER", "as a tuple")]
)
def test_paddings_and_layouts_have_their_names(padding, numbers):
    lhs, rhs = _whole((2, 4, 7, 6), 0), _whole((8, 4, 3, 2), 1)
    if numbers == "as a tuple":
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, None)
    named = {"window_strides": (2, 3), "padding": padding, "rhs_dilation": (1, 2), "dimension_numbers": numbers}

    @quick_jit
    def both(lhs, rhs):
        results = []
        for conv in (functools.partial(conv_general_dilated, recipe=WHOLE["int8"]), lax.conv_general_dilated):
            out, vjp = jax.vjp(functools.partial(conv, **named), lhs, rhs)
            results.append((out, *vjp(jnp.round(out / 8))))
        return results

    jax.tree.map(np.testing.assert_array_equal, *both(lhs, rhs))


def test_groups_have_scales_of_their_own_by_row():
    lhs, rhs, grad = data()
    lhs[..., 4:] *= 64
    halves = lambda x, axis: np.split(x, 2, axis)
    recipe = PRECISIONS["int8-row"].recipe
    rhs = rhs[:, :, :4]
    found = quick_jit(three(recipe, feature_group_count=2))(lhs, rhs, grad)
    parts = [oracle.conv(*own, STRIDED, recipe) for own in zip(halves(lhs, -1), halves(rhs, -1), halves(grad, -1))]
    for i, product in enumerate(found):
        np.testing.assert_array_equal(product, np.concatenate([part[i].value for part in parts], axis=-1))


@pytest.mark.parametrize("name", ["int8 tiles", "mxfp8", "int8-block"])
def test_tiles_are_of_patches(name):
    recipe = Recipe.parse("int8-block")
    recipe = {
        "int8 tiles": uniform(*(Operand("int8", "tile4"),) * 3),
        "mxfp8": Recipe.parse(str(PRECISIONS["mxfp8"].recipe).replace("tile32", "tile8")),
        "int8-block": Recipe.parse(str(recipe).replace("block32", "block2")),
    }[name]
    lhs, rhs, grad = normal(0, 4, 5, 4, 8), normal(1, 3, 3, 8, 16), normal(2, 4, 5, 4, 16)
    geometry = oracle.Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    padded = np.pad(lhs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + 5, j : j + 4] for i, j in itertools.product(range(3), range(3))], 3)
    found = quick_jit(three(recipe, geometry))(lhs, rhs, grad)
    numbers = (((3, 4, 5), (0, 1, 2)), ((), ()))
    out, dpatches, drhs = dot_oracle.dot(patches.reshape(4, 5, 4, 3, 3, 8), rhs, grad, numbers, recipe)
    assert_close(found[0], out)
    assert_close(found[2], drhs)
    dlhs = np.zeros(padded.shape)
    for i, j in itertools.product(range(3), range(3)):
        dlhs[:, i : i + 5, j : j + 4] += dpatches.value[:, :, :, i, j]
    np.testing.assert_allclose(found[1], dlhs[:, 1:-1, 1:-1], rtol=1e-5, atol=1e-5)


# What is not finite.


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_what_is_not_finite_stays_so_or_saturates(name):
    recipe = RECIPES[name]
    run = quick_jit(three(recipe))
    scales = dot_oracle.scales_of(recipe, *data())
    for position, value in itertools.product(range(3), (np.nan, np.inf, -np.inf)):
        arrays = data()
        arrays[position][1, 1, 1, 3] = value
        found = run(*arrays, stacked(recipe, scales))
        wanted = oracle.conv(*arrays, STRIDED, recipe, scales)
        for product, expected in zip(found, wanted, strict=True):
            if np.isnan(value):
                # Where a NaN of the kernel, or of what is one for a gradient, lies on padding, nothing times it may be
                # NaN as well; what never meets it is not.
                bad, must = np.isnan(product), np.isnan(expected.value)
                assert (bad >= must).all() and (position > 0 or (bad == must).all())
                others = tuple(range(bad.ndim - 1))
                np.testing.assert_array_equal(bad.any(others), must.any(others))
            else:
                assert_close(product, expected)
        assert sum(bool(np.isnan(product).any()) for product in found) == 2 * np.isnan(value)


@pytest.mark.parametrize("name", ["fp8", "int8-row"])
def test_observed_amaxes_leave_through_the_scale(name):
    recipe = RECIPES[name]

    @quick_jit
    def observed(lhs, rhs, grad):
        conv = functools.partial(conv_general_dilated, lhs, rhs, recipe=recipe, **options(STRIDED))
        return jax.vjp(lambda scale: conv(scale=scale), jnp.ones(len(recipe.slots), jnp.float32))[1](grad)[0]

    for position, value in ((0, 40), (1, np.inf), (2, np.nan)):
        arrays = data()
        arrays[position].flat[0] = value
        largest = {tensor: np.abs(x).max() for tensor, x in zip(("lhs", "rhs", "grad"), arrays)}
        np.testing.assert_array_equal(observed(*arrays), [largest[slot.tensor] for slot in recipe.slots])


@pytest.mark.parametrize(
    ("name", "bytes_per_element"),
    [("fp8", (1, 1)), ("int8", (1, 1)), ("int8-row", (1, 1)), ("int8-switchback", (2, 1)), ("bf16", (2, 2))],
)
def test_codes_are_all_that_is_kept_and_no_patches(name, bytes_per_element):
    recipe = RECIPES[name]
    lhs, rhs, _ = map(jnp.asarray, data())

    def residuals(lhs, rhs, scale):
        conv = lambda lhs, rhs: conv_general_dilated(lhs, rhs, recipe=recipe, scale=scale, **options(STRIDED))
        return [leaf for leaf in jax.tree.leaves(jax.vjp(conv, lhs, rhs)[1]) if leaf.size]

    kept = jax.eval_shape(residuals, lhs, rhs, jnp.ones(len(recipe.slots), jnp.float32))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    scales = 4 * sum(x.size // x.shape[-1] for x in (lhs, rhs)) + 128
    codes = bytes_per_element[0] * lhs.size + bytes_per_element[1] * rhs.size
    assert codes <= total <= codes + scales
    assert not [leaf.dtype for leaf in kept if leaf.dtype.name.startswith("float8")]


# Transforms.


@pytest.mark.parametrize(("name", "axes"), [("fp8", (0, None)), ("int8-row", (0, 0))])
def test_vmap_is_the_loop(name, axes):
    recipe = RECIPES[name]
    scale = stacked(recipe, dot_oracle.scales_of(recipe, *data()))
    arrays = [np.stack([x, 4 * x, -x / 2]) if axis == 0 else x for x, axis in zip(data(), (*axes, 0), strict=True)]
    together = quick_jit(jax.vmap(three(recipe), (*axes, 0, None)))(*arrays, scale)
    one = quick_jit(three(recipe))
    for i in range(3):
        own = [x if axis is None else x[i] for x, axis in zip(arrays, (*axes, 0), strict=True)]
        for found, wanted in zip(together, one(*own, scale), strict=True):
            tolerance = 0 if name.startswith("int8") else 1e-6 * np.abs(wanted).max()
            np.testing.assert_allclose(found[i], wanted, rtol=0, atol=tolerance)


def test_jit_checkpoint_and_scan_change_nothing():
    recipe = PRECISIONS["int8-row"].recipe
    lhs, rhs, _ = map(jnp.asarray, data())
    conv = functools.partial(conv_general_dilated, recipe=recipe, **options(STRIDED))
    loss = lambda lhs, rhs: jnp.sum(conv(lhs, rhs) ** 2)

    def scanned(lhs, rhs):
        step = lambda total, x: (total + loss(lhs + x, rhs), None)
        return lax.scan(step, jnp.float32(0), jnp.zeros(1))[0]

    plain, *others = (jax.grad(function, argnums=(0, 1)) for function in (loss, jax.checkpoint(loss), scanned))
    expected = plain(lhs, rhs)
    exactly = jax.grad(lambda x: jnp.sum(lax.conv_general_dilated(x, rhs, **options(STRIDED)) ** 2))(lhs)
    assert np.abs(expected[0] - exactly).max() > 1e-3
    for grads in quick_jit(lambda *args: [function(*args) for function in others])(lhs, rhs):
        jax.tree.map(np.testing.assert_array_equal, grads, expected)


def test_a_batch_on_eight_devices_is_that_on_one_and_stays_where_it_is():
    recipe = PRECISIONS["int8-row"].recipe
    lhs, rhs, grad = normal(0, 8, 9, 6, 8), normal(1, 3, 2, 8, 16), normal(2, 8, 5, 6, 16)
    split, whole = (NamedSharding(AUTOMATIC, spec) for spec in (P("data"), P()))
    compiled = quick_jit(three(recipe), out_shardings=(split, split, whole))
    placed = [jax.device_put(x, where) for x, where in zip((lhs, rhs, grad), (split, whole, split), strict=True)]
    for found, wanted in zip(compiled(*placed), quick_jit(three(recipe))(lhs, rhs, grad), strict=True):
        np.testing.assert_array_equal(found, wanted)
    text = compiled.lower(*placed).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


def test_stochastic_rounding_draws_for_each_element():
    half = jnp.full((1, 64, 64, 1), 0.5)
    noisy = Operand("int8", "tensor", "static", "stochastic")
    recipe = Recipe(Gemm(noisy, None), compute="float32")
    one = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": NUMBERS[2]}
    draw = lambda seed: conv_general_dilated(
        half, jnp.ones((1, 1, 1, 1)), recipe=recipe, scale=jnp.ones(1), key=jax.random.key(seed), **one
    )
    first, again, other = map(draw, (0, 0, 1))
    assert set(np.unique(first)) == {0, 1} and abs(np.mean(first) - 0.5) < 4 * 0.5 / 64
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.4


# Other backends, as far as the program before XLA's passes tells.


@pytest.mark.parametrize(
    ("platform", "recipe", "expected"),
    [
        ("tpu", "int8-row", {("convolution", "i8", "i8"): 3}),
        ("tpu", "fp8-current/dlhs=e4m3fn,e4m3fn/drhs=e4m3fn,e4m3fn", {("convolution", "f8E4M3FN", "f8E4M3FN"): 3}),
        ("tpu", "fp8-current", {("convolution", "f8E4M3FN", "f8E4M3FN"): 1, ("convolution", "bf16", "bf16"): 2}),
        ("cuda", "int8-row", {("dot_general", "i8", "i8"): 3}),
        ("cuda", "fp8-row", {("dot_general", "f8E4M3FN", "f8E4M3FN"): 3}),
        ("cuda", "fp8-current/fwd=e3m4,e3m4/drhs=none,none", {("convolution", "bf16", "bf16"): 3}),
        ("cuda", "bf16", {("convolution", "bf16", "bf16"): 3}),
    ],
)
def test_codes_are_what_other_backends_multiply(platform, recipe, expected):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in data()]
    program = three(Recipe.parse(recipe))
    lowered = jax.jit(program).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    types = re.findall(
        r"stablehlo\.(convolution|dot_general).*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", lowered
    )
    found = collections.Counter(types)
    if "e3m4" in recipe:  # the gradient of the input, E5M2 by E4M3, is one of patches
        assert found.pop(("dot_general", "f8E5M2", "f8E4M3FN")) == 1
        expected = {("convolution", "bf16", "bf16"): 2}
    assert found == expected


# What it refuses.


def test_refusals_name_what_to_do():
    x, w = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8))
    conv = functools.partial(conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=NUMBERS[2])
    for call, message in (
        (lambda: conv(x, w, recipe="fp8"), "pass scale="),
        (lambda: conv(x, w, recipe="int9"), "Unknown precision 'int9'"),
        (lambda: conv(x.astype(jnp.int8), w, recipe="int8"), "lhs is int8"),
        (lambda: conv(x[..., :3], w, recipe="int8-row"), "feature"),
        (lambda: conv(x, w, recipe="int8-row", feature_group_count=3), "feature_group_count"),
        (
            lambda: conv(x[:, :2], w, recipe="int8-row"),
            r"spans \(3, 3\) has no place on spatial axes of sizes \(2, 6\)",
        ),
        (lambda: conv(x, w, recipe="mxfp8"), "tile32 of lhs in fwd does not divide its contracting size 36"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    loss = lambda x: jnp.sum(conv(x, w, recipe="int8-row") ** 2)
    with pytest.raises(ValueError, match="differentiable once"):
        jax.grad(lambda x: jnp.sum(jax.grad(loss)(x)))(x)
