"""Layers of q8jax.nnx, and whole models quantized."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from micro import quick_compiles  # noqa: F401
from nnx_cases import (
    DELAYED_INT8,
    PATHS,
    STOCHASTIC,
    Net,
    forward,
    inputs,
    linear,
    loss_fn,
    normal,
    relative_error,
    states_of,
)

import q8jax
import q8jax.nnx as qnnx

# Whole models


def test_every_layer_is_found_by_its_path():
    states = qnnx.scaling_states(qnnx.quantize_model(Net(), "fp8"))
    assert sorted(path.rpartition("/")[0] for path in states) == PATHS
    assert {path.rpartition("/")[2] for path in states} == {"dot_general", "einsum_op"}


def test_parameters_stay_interchangeable_and_quantization_shows():
    x, plain, quantized = inputs(), Net(), qnnx.quantize_model(Net(1), "fp8-current")
    own, others = nnx.state(quantized, nnx.Param), nnx.state(plain, nnx.Param)
    assert jax.tree.structure(own) == jax.tree.structure(others)
    chex.assert_trees_all_equal_shapes_and_dtypes(own, others)
    own = jax.tree.map(jnp.copy, own)
    nnx.update(quantized, others)
    assert 1e-3 < relative_error(forward(quantized, x), forward(plain, x)) < 0.3
    nnx.update(plain, own)
    nnx.update(quantized, own)
    assert 1e-3 < relative_error(forward(quantized, x), forward(plain, x)) < 0.3


def test_a_policy_gives_each_layer_its_recipe_and_leaves_the_rest():
    model = qnnx.quantize_model(Net(), f"attention/(query|key)->fp8;attention/.*->int8;linear->{DELAYED_INT8}")
    recipes = {path.rpartition("/")[0]: state.recipe for path, state in qnnx.scaling_states(model).items()}
    fp8, int8 = q8jax.PRECISIONS["fp8"].recipe, q8jax.PRECISIONS["int8"].recipe
    assert recipes == {
        "attention/query": fp8,
        "attention/key": fp8,
        "attention/value": int8,
        "attention/out": int8,
        "linear": q8jax.Recipe.parse(DELAYED_INT8),
    }
    assert model.general.dot_general in (None, lax.dot_general)


def test_policies_recipes_and_strings_are_the_same():
    recipe = q8jax.Recipe.parse("fp8")
    expected = states_of(qnnx.quantize_model(Net(), "fp8"))
    for policy in (recipe, q8jax.Policy(((".*", recipe),)), f".*->{recipe}"):
        chex.assert_trees_all_equal(states_of(qnnx.quantize_model(Net(), policy)), expected)


def test_what_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'decoder/\.\*' matches no layer: the layers are attention/key, "):
        qnnx.quantize_model(Net(), "decoder/.*->fp8;.*->int8")
    with pytest.raises(ValueError, match="found no layer: give it a model with nnx.Linear"):
        qnnx.quantize_model(nnx.LayerNorm(8, rngs=nnx.Rngs(0)), "fp8")
    with pytest.raises(ValueError, match="did you mean 'fp8'"):
        qnnx.quantize_model(Net(), "fp9")


def test_a_second_call_replaces_the_first():
    model = qnnx.quantize_model(qnnx.quantize_model(Net(), "fp8"), "int8")
    states = qnnx.scaling_states(model)
    assert sorted(path.rpartition("/")[0] for path in states) == PATHS
    assert {state.recipe for state in states.values()} == {q8jax.PRECISIONS["int8"].recipe}


def test_a_layer_at_two_paths_is_one_layer():
    class Tied(nnx.Module):
        def __init__(self):
            self.z = nnx.List([linear()])
            self.a = nnx.List([nnx.List([self.z[0]])])

        def __call__(self, x):
            return self.a[0][0](self.z[0](x))

    model = qnnx.quantize_model(Tied(), "fp8")
    assert list(qnnx.scaling_states(model)) == ["a/0/0/dot_general"]
    _, grads, amaxes = qnnx.value_and_grad(loss_fn)(model, inputs())
    qnnx.update_scaling(model, amaxes)
    chex.assert_trees_all_equal(model.z[0].dot_general.history[...], model.a[0][0].dot_general.history[...])
    assert len(jax.tree.leaves(grads)) == 2 and (model.z[0].dot_general.history[:, 0] > 0).all()


def test_stacks_have_state_per_layer():
    @nnx.vmap
    def stack(rngs):
        return Net(rngs=rngs)

    model = qnnx.quantize_model(stack(nnx.Rngs(0).split(3)), f"linear->{STOCHASTIC};.*->fp8", rngs=nnx.Rngs(rounding=7))
    for path, state in qnnx.scaling_states(model).items():
        assert state.scale.shape == (3, len(state.recipe.slots)), path
        assert state.history.shape == (3, len(state.recipe.slots), state.recipe.history), path
    assert model.linear.dot_general.rounding_key.shape == (3, 2)


class Product(nnx.Module):
    """A layer of another kind: no parameters, two activations, and a stack by its own account."""

    def __init__(self, stack: tuple[int, ...] = ()):
        self.einsum_op = jnp.einsum
        self.stack = stack

    def __call__(self, x):
        return self.einsum_op("ij,kj->ik", x, x)


def test_any_module_with_an_operation_of_its_own_is_a_layer():
    model = nnx.Dict(scores=Product(stack=(2, 3)), plain=Product(), linear=linear())
    qnnx.quantize_model(model, "scores|plain->fp8-current")
    states = qnnx.scaling_states(model)
    assert {path: state.scale.shape for path, state in states.items()} == {
        "scores/einsum_op": (2, 3, 3),
        "plain/einsum_op": (3,),
    }
    x = inputs()
    assert 1e-3 < relative_error(forward(model.plain, x), x @ x.T) < 0.1


BLOCKS = "fp8-block"  # of 128


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda cls: cls.Linear(100, 128), "tile128 of lhs in fwd .* contracting size 100: choose K from 1, 2, 4, 5"),
        (lambda cls: cls.Linear(128, 192), "block128 of rhs in fwd .* free size 192: choose K from 8, 16, 32, 64, or"),
        (lambda cls: cls.LinearGeneral((2, 64), (3, 64), axis=(-2, -1)), "block128 of rhs in fwd .* free size 192"),
        (lambda cls: cls.LinearGeneral(64, 128, batch_axis={0: 2}), "tile128 of lhs in fwd .* contracting size 64"),
        (lambda cls: cls.Einsum("...hd,hdk->...k", (3, 64, 128)), "tile128 of lhs in fwd .* contracting size 192"),
        (lambda cls: cls.Einsum("td,hdk->thk", (2, 128, 32)), "block128 of rhs in fwd .* free size 64"),
    ],
)
def test_a_tile_that_does_not_divide_the_kernel_is_an_error_at_construction(build, message):
    class Ours:
        Linear, LinearGeneral, Einsum = (
            functools.partial(layer, recipe=BLOCKS, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
            for layer in (qnnx.Linear, qnnx.LinearGeneral, qnnx.Einsum)
        )

    class Plain:
        Linear, LinearGeneral, Einsum = (
            functools.partial(layer, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
            for layer in (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
        )

    with pytest.raises(ValueError, match=message):
        build(Ours)
    model = nnx.Dict(first=Plain.Linear(128, 128), second=build(Plain))
    with pytest.raises(ValueError, match=f"Layer 'second': {message}"):
        qnnx.quantize_model(model, BLOCKS)
    assert model.first.dot_general in (None, lax.dot_general)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nnx.LinearGeneral((2, 8), (4, 8), axis=(-2, -1), rngs=nnx.Rngs(0)), (16, 2, 8)),
        (lambda: nnx.LinearGeneral(16, 16, batch_axis={0: 3}, rngs=nnx.Rngs(0)), (3, 16, 16)),
        (lambda: nnx.Einsum("...hd,hdk->...k", (2, 8, 16), (16,), rngs=nnx.Rngs(0)), (2, 8, 2, 8)),
        (lambda: nnx.Einsum("th,...hd->...td", (3, 16, 16), rngs=nnx.Rngs(0)), (16, 16)),
        (lambda: nnx.Einsum("...bth,...bhk->...btk", (3, 1, 16, 16), rngs=nnx.Rngs(0)), (2, 3, 5, 16, 16)),
    ],
)
def test_tiles_that_divide_pass_at_construction_and_in_calls(build, shape):
    layer = qnnx.quantize_model(
        build(), "int8-block/fwd=int8:tile16,int8:block16/dlhs=int8:block8,int8:tile16/drhs=none,none"
    )
    gradient = nnx.grad(lambda layer, x: jnp.sum(layer(x)))
    assert jax.tree.leaves(nnx.eval_shape(gradient, layer, jnp.zeros(shape)))


def test_a_stack_on_other_than_the_leading_axes_is_refused():
    @functools.partial(nnx.vmap, out_axes=1)
    def stack(rngs):
        return nnx.Dict(linear=nnx.Linear(8, 8, use_bias=False, rngs=rngs))

    message = r"Layer 'linear': its kernel of shape \(8, 3, 8\) is no stack .* \(8, 8\) .* give nnx.vmap out_axes=0"
    model = stack(nnx.Rngs(0).split(3))
    with pytest.raises(ValueError, match=message):
        qnnx.quantize_model(model, "fp8")
    assert not qnnx.scaling_states(qnnx.quantize_model(model, "bf16"))["linear/dot_general"].scale.size


def test_a_dot_general_cls_does_not_outrank_the_policy():
    layer = nnx.LinearGeneral(8, 8, dot_general_cls=lambda: lax.dot_general, rngs=nnx.Rngs(0))
    qnnx.quantize_model(layer, "fp8-current")
    assert relative_error(forward(layer, inputs()), inputs() @ layer.kernel[...]) > 1e-3


# Layers


@pytest.mark.parametrize(
    ("layer", "plain", "shape"),
    [
        (functools.partial(qnnx.Linear, 8, 4), functools.partial(nnx.Linear, 8, 4), (3, 5, 8)),
        (
            functools.partial(qnnx.LinearGeneral, (2, 4), (3, 2), axis=(-2, -1)),
            functools.partial(nnx.LinearGeneral, (2, 4), (3, 2), axis=(-2, -1)),
            (5, 2, 4),
        ),
        (
            functools.partial(qnnx.Einsum, "bhd,hdk->bk", (2, 4, 6), (6,)),
            functools.partial(nnx.Einsum, "bhd,hdk->bk", (2, 4, 6), (6,)),
            (5, 2, 4),
        ),
    ],
    ids=["Linear", "LinearGeneral", "Einsum"],
)
def test_layers_have_the_parameters_and_arguments_of_their_namesakes(layer, plain, shape):
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32, "kernel_init": normal(0)}
    quantized, plain = layer(recipe="fp8-current", rngs=nnx.Rngs(0), **options), plain(rngs=nnx.Rngs(0), **options)
    chex.assert_trees_all_equal(nnx.state(quantized, nnx.Param), nnx.state(plain, nnx.Param))
    x = jax.random.normal(jax.random.key(0), shape)
    out, exact = forward(quantized, x), plain(x)
    assert out.dtype == exact.dtype == jnp.bfloat16
    assert 5e-3 < relative_error(out.astype(jnp.float32), exact.astype(jnp.float32)) < 0.1


def test_a_recipe_that_quantizes_nothing_keeps_nothing():
    layer = qnnx.Linear(8, 8, recipe="bf16", rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))
    loss, _, amaxes = qnnx.value_and_grad(loss_fn)(layer, inputs())
    qnnx.update_scaling(layer, amaxes)
    qnnx.calibrate(layer, loss_fn, inputs())
    assert jnp.isfinite(loss) and not jax.tree.leaves(amaxes)
