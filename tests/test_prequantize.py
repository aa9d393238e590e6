"""Weights whose codes are made once give what weights that are quantized in every dot give, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dot_cases import DENSE, normal, quick_jit
from flax import nnx
from jax.sharding import AxisType
from micro import quick_compiles  # noqa: F401
from nnx_cases import normal as initializer

import q8jax.nnx as qnnx
from q8jax import Recipe, dot_general, einsum, prequantize, scaling
from q8jax.recipe import GEMMS

BATCHED = (((1, 3), (2, 0)), ((0,), (1,)))
WEIGHT_ONLY = "fwd=none,e4m3fn:row:current"
OPERANDS = "e4m3fn:tensor:delayed:stochastic,e5m2:row:current:stochastic"
STOCHASTIC = "/".join(f"{gemm}={OPERANDS}" for gemm in ("fwd", "dlhs"))
TILED = [
    f"{name}/" + "/".join(f"{gemm}=e4m3fn:tile8,e4m3fn:{second}" for gemm, second in zip(GEMMS, seconds, strict=True))
    for name, seconds in {"fp8-block": ("block8", "block8", "tile8"), "mxfp8": ("tile8",) * 3}.items()
]
SLOW = ["int8", STOCHASTIC]
RECIPES = ["fp8", "fp8-current", "fp8-row", "int8", "int8-switchback", *TILED, WEIGHT_ONLY, STOCHASTIC, "bf16"]


def observed(product, recipe, lhs, rhs, scale, key):
    """What a dot gives: result, gradients and observed amaxes."""

    def loss(lhs, rhs, scale):
        out = product(lhs, rhs, recipe=recipe, scale=scaling.observing(scale), key=key)
        return jnp.sum(
            out.astype(jnp.float32) * jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        ), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(lhs, rhs, scale)
    gradients = gradients[0], getattr(gradients[1], "value", gradients[1]), gradients[2]
    return out, gradients


def assert_same_bits(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def of_values(product, made):
    """A product of the values of a Prequantized, so that it can be differentiated by them."""
    return lambda lhs, value, **kwargs: product(lhs, dataclasses.replace(made, value=value), **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("numbers", [DENSE, pytest.param(BATCHED, marks=pytest.mark.slow)], ids=["dense", "batched"])
def test_a_dot_does_not_notice(name, numbers):
    recipe = Recipe.parse(name)
    shapes = ((2, 16, 8), (8, 24)) if numbers is DENSE else ((2, 4, 8, 4), (4, 2, 4, 16))
    if numbers is not DENSE and name in TILED:
        numbers, shapes = (((2, 3), (0, 1)), ((), ())), ((2, 4, 4, 4), (4, 4, 16))
    lhs, rhs = (jnp.asarray(normal(i, *shape), jnp.bfloat16) for i, shape in enumerate(shapes))
    scale = jnp.asarray(2.0 ** -np.arange(5, 5 + len(recipe.slots)), jnp.float32)
    key = jax.random.key(3) if recipe.needs_key else None

    @quick_jit
    def both(lhs, rhs, scale):
        product = lambda lhs, rhs, **kwargs: dot_general(lhs, rhs, numbers, **kwargs)
        made = prequantize(rhs, numbers, recipe, scale, key=key)
        again = observed(of_values(product, made), recipe, lhs, rhs, scale, key)
        return again, observed(product, recipe, lhs, rhs, scale, key), made.codes

    found, expected, codes = both(lhs, rhs, scale)
    assert_same_bits(found, expected)
    assert bool(codes) == (name != "bf16")


def test_the_codes_are_what_is_multiplied():
    lhs, rhs = jnp.asarray(normal(0, 4, 8)), jnp.asarray(normal(1, 8, 16))
    made = prequantize(rhs, (((1,), (0,)), ((), ())), "fp8-current")
    product = lambda rhs: einsum("td,df->tf", lhs, rhs, "fp8-current")
    moved = dataclasses.replace(made, value=made.value * jnp.float32(3))
    np.testing.assert_array_equal(product(moved), product(rhs))
    assert not np.array_equal(product(moved.value), product(rhs))


def test_codes_for_another_use_are_not_taken():
    lhs, rhs = jnp.asarray(normal(0, 4, 8)), jnp.asarray(normal(1, 8, 16))
    by_row = prequantize(rhs, (((1,), (0,)), ((), ())), "int8-row")
    product = lambda rhs: einsum("td,df->tf", lhs, rhs, "int8-tensor")
    np.testing.assert_array_equal(product(by_row), product(rhs))


def test_codes_of_another_recipe_are_not_taken():
    lhs, rhs = jnp.asarray(normal(0, 4, 8)), jnp.asarray(normal(1, 8, 16))
    coarse = prequantize(rhs, (((1,), (0,)), ((), ())), "fp8-current/margin=9")
    product = lambda rhs: einsum("td,df->tf", lhs, rhs, "fp8-current")
    np.testing.assert_array_equal(product(coarse), product(rhs))


def test_an_operand_that_is_not_floating_point_is_refused():
    with pytest.raises(ValueError, match="rhs is int32"):
        prequantize(jnp.ones((8, 8), jnp.int32), (((1,), (0,)), ((), ())), "int8")


class Block(nnx.Module):
    def __init__(self, rngs):
        options = {"dtype": jnp.bfloat16, "kernel_init": initializer(0), "rngs": rngs}
        self.linear = nnx.Linear(8, 8, **options)
        self.general = nnx.LinearGeneral(8, (2, 4), **options)
        self.mixed = nnx.Einsum("bhd,hdk->bk", (2, 4, 8), (8,), **options)

    def __call__(self, x):
        return x + self.mixed(self.general(nnx.relu(self.linear(x))))


class Stack(nnx.Module):
    """Blocks under a scan, each with an Einsum as well, and a layer that finds its dtype when it is called."""

    def __init__(self):
        build = nnx.vmap(Block, in_axes=(0,), out_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(build)(nnx.Rngs(0))
        self.head = nnx.Linear(8, 8, kernel_init=initializer(1), rngs=nnx.Rngs(0))

    def __call__(self, x):
        graphdef, state = nnx.split(self.blocks)
        body = jax.checkpoint(lambda x, layer: (nnx.merge(graphdef, layer)(x), None), prevent_cse=False)
        return self.head(jax.lax.scan(body, x, state)[0].astype(jnp.float32))


def step(model, x):
    loss = lambda model, x: jnp.mean(jnp.square(model(x).astype(jnp.float32)))
    value, gradients, amaxes = qnnx.value_and_grad(loss)(model, x)
    return value, nnx.to_pure_dict(gradients), nnx.to_pure_dict(amaxes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fp8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", STOCHASTIC))]
)
def test_a_stacked_model_does_not_notice(name):
    model = qnnx.quantize_model(Stack(), name, rngs=nnx.Rngs(rounding=0))
    x = jnp.asarray(normal(0, 16, 8), jnp.bfloat16)

    @nnx.jit
    def both(model, x):
        twin = qnnx.prequantize(qnnx.prequantize(model))
        codes = nnx.to_pure_dict(nnx.state(twin, qnnx.KernelCodes))
        return step(twin, x), step(model, x), codes

    found, expected, codes = both(model, x)
    assert_same_bits(found, expected)
    assert list(codes["blocks"]) == ["general", "linear"] and list(codes) == ["blocks"]
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(codes))
    assert not nnx.to_flat_state(nnx.state(model, qnnx.KernelCodes))


def test_a_layer_multiplies_the_codes_it_was_given_and_any_other_array_as_ever():
    layer = nnx.Linear(8, 8, dtype=jnp.bfloat16, kernel_init=initializer(0), rngs=nnx.Rngs(0))
    model = qnnx.quantize_model(nnx.Sequential(layer), "fp8-current")
    twin = qnnx.prequantize(model)
    x, other = jnp.asarray(normal(1, 4, 8), jnp.bfloat16), jnp.asarray(normal(2, 8, 8), jnp.bfloat16)
    before = model(x)
    twin.layers[0].kernel.set_value(jnp.zeros((8, 8), jnp.float32))
    np.testing.assert_array_equal(twin(x), before)
    np.testing.assert_array_equal(
        twin.layers[0].dot_general(x, other, (((1,), (0,)), ((), ()))),
        dot_general(x, other, (((1,), (0,)), ((), ())), "fp8-current"),
    )


def test_on_explicit_axes_layers_quantize_as_before():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        layer = nnx.Linear(8, 8, dtype=jnp.bfloat16, kernel_init=initializer(0), rngs=nnx.Rngs(0))
        model = qnnx.quantize_model(nnx.Sequential(layer), "fp8-current")
        kernel = jax.sharding.reshard(layer.kernel[...], jax.P("data", None))
        layer.kernel.set_value(kernel)
        assert not nnx.to_flat_state(nnx.state(qnnx.prequantize(model), qnnx.KernelCodes))
