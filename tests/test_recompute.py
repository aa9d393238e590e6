"""What is computed again in the backward pass: the same numbers, and on GPUs less that is kept."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from micro import quick_compiles  # noqa: F401

import q8jax
import q8jax.linen as qlinen
import q8jax.nnx as qnnx
import q8jax.scaling as qscaling
from q8jax.recompute import recomputing

ROWS, WIDTH, HIDDEN = 32, 16, 64


def swiglu(x):
    gate, up = jnp.split(x, 2, axis=-1)
    return nnx.silu(gate) * up


def sigmoid_gated(x):
    gate, up = jnp.split(x, 2, axis=-1)
    return gate * jax.lax.logistic(gate) * up


GATED = swiglu, sigmoid_gated
ACTIVATIONS = {
    "sigmoid": sigmoid_gated,
    "gelu": nnx.gelu,
    "exact gelu": lambda x: nnx.gelu(x, approximate=False),
    "swiglu": swiglu,
}


def network(activation, recipe):
    """A loss of two products with an activation function between them, and its arguments."""

    def loss(x, up, down, scales):
        product = lambda x, w, scale: q8jax.einsum("td,df->tf", x, w, recipe, scale)
        hidden = product(x, up, scales[0])
        out = product(activation(hidden), down, scales[1])
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (ROWS, WIDTH), (WIDTH, HIDDEN), (HIDDEN // (2 if activation in GATED else 1), WIDTH)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)]
    slots = len(q8jax.Recipe.parse(recipe).slots)
    return loss, (*arrays, jnp.full((2, slots), 2.0**-5))


def operations(function, args, platform):
    """How often operations stand in a program as it is lowered for a platform that need not be there."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    return lambda name: len(re.findall(rf"\b(?:stablehlo|chlo)\.{name}\b", lowered.as_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "recipe"),
    [
        *((activation, "fp8") for activation in ACTIVATIONS),
        *(("gelu", name) for name in ("int8", "fp8-current", "bf16")),
    ],
)
def test_losses_gradients_and_amaxes_are_those_without_bit_for_bit(activation, recipe):
    loss, args = network(ACTIVATIONS[activation], recipe)
    differentiate = lambda function: jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3)))
    jax.tree.map(np.testing.assert_array_equal, differentiate(recomputing(loss))(*args), differentiate(loss)(*args))


@pytest.mark.parametrize(
    ("activation", "operation"), [("gelu", "tanh"), ("exact gelu", "erfc?"), ("sigmoid", "exponential")]
)
def test_a_gpu_computes_an_activation_for_codes_for_its_amax_and_in_the_backward_pass(activation, operation):
    loss, args = network(ACTIVATIONS[activation], "fp8")
    gradient, plain = jax.grad(recomputing(loss), argnums=(1, 3)), jax.grad(loss, argnums=(1, 3))
    assert operations(plain, args, "cuda")(operation) == 1
    assert operations(gradient, args, "cuda")(operation) == 3


def test_elsewhere_an_activation_is_computed_once():
    loss, args = network(nnx.gelu, "fp8")
    programs = (jax.jit(jax.grad(function, argnums=(1, 3))) for function in (recomputing(loss), loss))
    counts = [len(re.findall(r" tanh\(", program.lower(*args).compile().as_text())) for program in programs]
    assert counts == [1, 1]


def test_of_what_is_kept_the_activation_is_no_more():
    loss, args = network(nnx.gelu, "fp8")
    kept = lambda function: [
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))
        if leaf.dtype == jnp.bfloat16 and leaf.size == ROWS * HIDDEN
    ]
    # The result of the first product alone; without, what gelu's derivative needs as well.
    assert len(kept(recomputing(loss))) == 1
    assert len(kept(loss)) > 1


def losses(product, x, w, v):
    """Losses of a product with w, an activation and products with v, put together in several ways."""
    total = lambda *parts: sum(jnp.sum(jnp.square(part.astype(jnp.float32))) for part in parts)
    dropped = jax.random.bernoulli(jax.random.key(1), 0.5, (ROWS, HIDDEN))
    activated = lambda: nnx.gelu(product(x, w))

    def two_products():
        hidden = activated()
        return total(product(hidden, v), product(hidden, 2 * v))

    def argument_used_again():
        hidden = product(x, w)
        return total(product(nnx.gelu(hidden), v), hidden)

    def result_used_again():
        hidden = activated()
        return total(product(hidden, v), hidden)

    return {
        "two products": two_products,
        "argument used again": argument_used_again,
        "result used again": result_used_again,
        "dropout": lambda: total(product(jnp.where(dropped, activated(), jnp.bfloat16(0)), v)),
        "jitted": jax.jit(lambda: total(product(activated(), v))),
        "debugged": lambda: (jax.debug.callback(lambda x: None, x[0, 0]), total(product(activated(), v)))[1],
        "vmapped": lambda: total(jax.vmap(lambda v: product(activated(), v))(jnp.stack([v, 2 * v]))),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "times"),
    [
        ("two products", 3),
        ("argument used again", 3),
        ("result used again", 1),  # it is kept anyway
        ("dropout", 3),
        ("jitted", 3),
        ("debugged", 3),
        ("vmapped", 3),
    ],
)
def test_whatever_else_is_there(way, times):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (ROWS, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)]

    def loss(x, w, v, scale):
        product = lambda x, w: q8jax.einsum("td,df->tf", x, w, "fp8", qscaling.observing(scale))
        return losses(product, x, w, v)[way]()

    args = (*arrays, jnp.full(3, 2.0**-5, jnp.float32))
    differentiate = lambda function: jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3)))
    found, expected = (differentiate(function)(*args) for function in (recomputing(loss), loss))
    if way in ("argument used again", "jitted"):
        # The cotangents of the argument are added in another order; and XLA:CPU rounds bfloat16 as it fuses.
        norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))
        assert all(norm(x - y) < 0.02 * norm(y) for x, y in zip(found[1], expected[1], strict=True))
    else:
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    if way == "debugged":
        assert len(re.findall(" tanh ", str(jax.make_jaxpr(differentiate(recomputing(loss)))(*args)))) == times
        return
    assert operations(differentiate(loss), args, "cuda")("tanh") == 1
    assert operations(differentiate(recomputing(loss)), args, "cuda")("tanh") == times


@pytest.mark.slow
def test_inside_a_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    loss, (x, up, down, scales) = network(nnx.gelu, "fp8")
    rows, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def step(function, x, up, down):
        vary = lambda x: jax.lax.pcast(x, ("data",), to="varying")
        local = lambda x, *w: jax.lax.pmean(function(x, *map(vary, w), vary(scales)), "data")
        gradient = jax.grad(recomputing(local) if function is not plain else local, argnums=(1, 2))
        return jax.shard_map(gradient, mesh=mesh, in_specs=(rows, same, same), out_specs=same)(x, up, down)

    plain = loss
    mine, theirs = (jax.jit(functools.partial(step, f)) for f in (lambda *args: loss(*args), plain))
    jax.tree.map(np.testing.assert_array_equal, mine(x, up, down), theirs(x, up, down))
    assert operations(theirs, (x, up, down), "cuda")("tanh") == 1
    assert operations(mine, (x, up, down), "cuda")("tanh") == 2  # nothing observes


def test_a_checkpoint_policy_sees_no_names_of_ours():
    loss, args = network(nnx.gelu, "fp8")
    policy = jax.checkpoint_policies.save_any_names_but_these("other")
    block = jax.checkpoint(loss, policy=policy)
    kept = jax.eval_shape(lambda *args: jax.vjp(block, *args)[1], *args)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(kept))
    assert shapes == sorted(arg.shape for arg in args)


@pytest.mark.parametrize("function", [jnp.tanh, nnx.relu, lambda x: x * jnp.bfloat16(2), lambda x: x], ids=range(4))
def test_what_would_not_keep_less_is_left_as_it_is(function):
    loss, args = network(function, "fp8")
    names = "tanh", "optimization_barrier"
    counts = [
        [operations(jax.grad(f, argnums=(1, 3)), args, "cuda")(name) for name in names]
        for f in (recomputing(loss), loss)
    ]
    assert counts[0] == counts[1]


def test_effects_happen_once_and_results_keep_their_structure():
    seen = []

    def function(x):
        jax.debug.callback(lambda x: seen.append(float(x)), x[0])
        return {"sum": jnp.sum(x), "twice": (x * 2, 3.0)}

    x = jnp.arange(3.0)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(recomputing(function))(x), jax.jit(function)(x))
    jax.effects_barrier()
    assert seen == [0.0, 0.0]


def test_value_and_grad_of_linen_and_nnx_recompute():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = lambda features: nn.Dense(features, dtype=jnp.bfloat16, dot_general_cls=fp8)
            return dense(WIDTH)(nn.gelu(dense(HIDDEN)(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(WIDTH, HIDDEN, dtype=jnp.bfloat16, rngs=rngs)
            self.down = nnx.Linear(HIDDEN, WIDTH, dtype=jnp.bfloat16, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.gelu(self.up(x)))

    fp8 = qlinen.dot_general_cls("fp8")
    x = jnp.ones((ROWS, WIDTH), jnp.bfloat16)
    squared = lambda out: jnp.mean(jnp.square(out.astype(jnp.float32)))
    variables = jax.jit(Linen().init)(jax.random.key(0), x)
    linen = qlinen.value_and_grad(lambda variables, x: squared(Linen().apply(variables, x)))
    assert operations(linen, (variables, x), "cuda")("tanh") == 3
    graphdef, state = nnx.split(qnnx.quantize_model(Nnx(nnx.Rngs(0)), "fp8"))
    differentiate = qnnx.value_and_grad(lambda model, x: squared(model(x)))
    assert (
        operations(lambda state, x: differentiate(nnx.merge(graphdef, state), x)[1:], (state, x), "cuda")("tanh") == 3
    )
