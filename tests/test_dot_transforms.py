"""The quantized dot under JAX's transforms, and the stochastic rounding that must differ among them."""

import dataclasses
import functools

import dot_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dot_cases import DENSE, MATMUL, RECIPES, data, gemms, normal, plain, quick_jit, stacked, uniform
from jax import lax
from micro import quick_compiles  # noqa: F401

from q8jax import PRECISIONS, Gemm, Operand, Recipe, dot_general

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
    recipe = PRECISIONS["int8-row"].recipe
    sharded = [jax.device_put(x, jax.sharding.NamedSharding(mesh, s)) for x, s in zip(arrays, specs)]
    for found, wanted in zip(gemms(recipe)(*sharded), gemms(recipe)(*arrays), strict=True):
        np.testing.assert_array_equal(found, wanted)


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
