"""Layers with stored codes: against NumPy, and against the training forward pass that they were frozen from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from micro import SHAPES, make_tokens, quick_compiles  # noqa: F401
from nnx_cases import Net, forward, inputs, normal

import q8jax.nnx as qnnx
from experiments.models.config import TransformerConfig
from experiments.models.transformer import Transformer
from q8jax import Policy, Recipe, quantize
from q8jax.stored import Stored

FLOAT32 = "compute=float32"
ROW = Recipe.parse(f"fwd=int8:row,int8:row/{FLOAT32}")
WEIGHTS = Recipe.parse(f"fwd=none,int8:row/{FLOAT32}")
STATIC = Recipe.parse(f"fwd=int8:tensor:static,int8:row/{FLOAT32}")


def int8(matrix) -> Stored:
    return Stored.of(quantize(matrix, "int8", channelwise_axes=(*range(matrix.ndim - 2), matrix.ndim - 1)))


def frozen(layer, recipe=WEIGHTS, **extras):
    codes = int8(qnnx.kernel_matrix(layer))
    qnnx.freeze_layer(layer, codes, recipe, qnnx.Extras(**extras))
    return codes


LAYERS = {
    "linear": (lambda **o: nnx.Linear(8, 6, **o), (3, 5, 8), "abc,cd->abd"),
    "general": (lambda **o: nnx.LinearGeneral((2, 4), (3, 2), axis=(-2, -1), **o), (5, 2, 4), "abc,bcde->ade"),
    "batched": (lambda **o: nnx.LinearGeneral(8, 6, batch_axis={0: 3}, **o), (3, 5, 8), "abc,acd->abd"),
    "einsum": (lambda **o: nnx.Einsum("bhd,kdh->bk", (6, 4, 2), (6,), **o), (5, 2, 4), "abc,dcb->ad"),
    "conv 1×1": (lambda **o: nnx.Conv(8, 6, (1, 1), **o), (2, 3, 3, 8), "abcd,xyde->abce"),
}


@pytest.mark.parametrize("recipe", [WEIGHTS, ROW], ids=["weight-only", "8 by 8 bits"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_multiplies_its_codes(kind, recipe):
    make, shape, subscripts = LAYERS[kind]
    bias = lambda key, shape, dtype, out_sharding=None: normal(3)(key, shape, dtype)
    layer = make(kernel_init=normal(2), bias_init=bias, rngs=nnx.Rngs(0))
    x = normal(4)(None, shape, jnp.float32)
    plain, kernel_shape = layer(x), layer.kernel[...].shape
    codes = frozen(layer, recipe)
    found = forward(layer, x)
    values = np.asarray(codes.dequantize())
    if kind == "einsum":  # stored as [in, out]
        values = values.reshape(2, 4, 6).transpose(2, 1, 0)
    axes = {"linear": (0, 1), "general": (0,), "batched": (0, 1), "einsum": (0,), "conv 1×1": (0,)}[kind]
    left = x if recipe is WEIGHTS else quantize(x, "int8", channelwise_axes=axes).dequantize()
    wanted = np.einsum(subscripts, np.asarray(left), values.reshape(kernel_shape))
    wanted += np.asarray(layer.bias[...]).reshape(
        (3, 1, 6) if kind == "batched" else (-1, 6) if kind != "general" else (3, 2)
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert float(jnp.max(jnp.abs(found - plain))) > 1e-3
    assert list(nnx.state(layer, nnx.Param)) == ["bias"]


def test_a_convolution_slides_its_codes():
    layer = nnx.Conv(4, 6, (3, 3), strides=2, kernel_init=normal(2), rngs=nnx.Rngs(0))
    x = normal(4)(None, (2, 7, 7, 4), jnp.float32)
    twin = nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0))
    codes = frozen(layer)
    twin.kernel.set_value(codes.dequantize().reshape(3, 3, 4, 6))
    np.testing.assert_allclose(forward(layer, x), twin(x), rtol=0, atol=1e-5)
    layer = nnx.Conv(4, 6, (3, 3), strides=2, kernel_init=normal(2), rngs=nnx.Rngs(0))
    frozen(layer, ROW)
    error = jnp.abs(forward(layer, x) - twin(x))
    assert 1e-3 < float(jnp.max(error)) < 0.1


def test_inputs_are_static_smoothed_shifted_or_take_the_path_of_outliers():
    x = normal(5)(None, (7, 8), jnp.float32) * jnp.array([[1, 1, 40, 1, 1, 1, 1, 1]], jnp.float32)
    make = functools.partial(nnx.Linear, 8, 6, kernel_init=normal(2), use_bias=False, rngs=nnx.Rngs(0))
    kernel = np.asarray(make().kernel[...])
    wanted = np.asarray(x) @ kernel
    off = lambda found: np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    amax = jnp.max(jnp.abs(x))

    layer = make()
    codes = frozen(layer, STATIC, scale=jnp.array([amax / 127, 1]))
    plain = forward(layer, x)
    values = np.asarray(quantize(x, "int8", scale=amax / 127).dequantize()) @ np.asarray(codes.dequantize())
    np.testing.assert_allclose(plain, values, rtol=0, atol=1e-4)

    layer, factors = make(), np.array([1, 1, 8, 1, 1, 1, 1, 1], np.float32)
    smooth = int8(jnp.asarray(kernel * factors[:, None]))
    extras = qnnx.Extras(
        scale=jnp.array([jnp.max(jnp.abs(x / factors[None])) / 127, 1]), inverse=jnp.asarray(1 / factors)
    )
    qnnx.freeze_layer(layer, smooth, STATIC, extras)
    assert off(forward(layer, x)) < 0.5 * off(plain)

    layer, zero_point = make(), jnp.int32(-100)
    codes = frozen(layer, WEIGHTS, scale=jnp.float32(0.5), zero_point=zero_point, affine="int8")
    values = quantize(x, "int8", scale=0.5, zero_point=-100, full_range=True).dequantize()
    np.testing.assert_allclose(
        forward(layer, x), np.asarray(values) @ np.asarray(codes.dequantize()), rtol=0, atol=1e-4
    )

    layer, rest = make(), np.ones(8, np.float32)
    rest[2] = 0
    small = jnp.max(jnp.abs(x * rest[None]))
    extras = qnnx.Extras(
        scale=jnp.array([small / 127, 1]),
        inverse=jnp.asarray(rest),
        outliers=jnp.array([2], jnp.int32),
        outlier_kernel=jnp.asarray(kernel[2:3]),
    )
    qnnx.freeze_layer(layer, int8(jnp.asarray(kernel * rest[:, None])), STATIC, extras)
    assert off(forward(layer, x)) < 0.2 * off(plain)


LONG = ["fp8-current", "int8-row", "mxfp8", "fp8-block", "fwd=none,int4:tile8", "fwd=int8:row,none"]
RECIPES = ["fp8", "int8", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]


@pytest.mark.parametrize("precision", RECIPES)
def test_a_frozen_model_gives_the_bits_of_the_training_forward(precision):
    precision = precision.replace("mxfp8", "mxfp8/fwd=e4m3fn:tile8,e4m3fn:tile8/dlhs=none,none/drhs=none,none")
    precision = precision.replace("fp8-block", "fwd=e4m3fn:tile8,e4m3fn:block8")
    model = qnnx.quantize_model(Net(rngs=nnx.Rngs(0)), f"attention/.*|general|linear->{precision}")
    x = 3 * inputs()
    for product in (module for _, module in nnx.iter_modules(model) if isinstance(module, qnnx.QuantizedDot)):
        if product.recipe.slots:
            product.scale.set_value(product.scale[...] * jnp.float32(0.0625))
    trained = forward(model, x)
    assert float(jnp.max(jnp.abs(trained - forward(Net(), x)))) > 1e-4
    np.testing.assert_array_equal(forward(qnnx.freeze(model), x), trained)


def test_a_stack_of_layers_is_frozen_and_scanned_over():
    config = TransformerConfig(**SHAPES, tied=True)
    model = Transformer(
        config, Policy.parse("blocks/attention/(qkv|out)|blocks/mlp/.*|head->fp8"), jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    tokens = jnp.asarray(make_tokens(rows=2)[0][:, :-1])
    trained = forward(model, tokens)
    qnnx.freeze(model)
    kernel = model.blocks.mlp.up.kernel
    assert isinstance(kernel, qnnx.StoredKernel) and kernel[...].shape == (2, 32, 128)
    graphdef, state = nnx.split(model)
    np.testing.assert_array_equal(jax.jit(lambda s, t: nnx.merge(graphdef, s)(t))(state, tokens), trained)


def test_embeddings_are_looked_up_as_codes():
    model = nnx.Dict(table=nnx.Embed(20, 8, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    table = quantize(model.table.embedding[...], "int4", channelwise_axes=(0,))
    qnnx.freeze_embedding(model, "table", Stored.of(table, axis=-1))
    ids = jnp.array([[3, 19], [0, 3]])
    found = jax.jit(lambda model, ids: model.table(ids))(model, ids)
    np.testing.assert_array_equal(found, table.dequantize(jnp.bfloat16)[ids])
    with pytest.raises(ValueError, match="is no nnx.Embed"):
        qnnx.freeze_embedding(model, "other", Stored.of(table, axis=-1))


def test_what_cannot_be_is_said():
    layer = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="are not of a kernel of shape"):
        qnnx.freeze_layer(layer, int8(jnp.ones((6, 8), jnp.float32)), WEIGHTS)
    with pytest.raises(ValueError, match="goes with a recipe that keeps scales"):
        frozen(layer, STATIC)
    with pytest.raises(ValueError, match="forward product alone"):
        frozen(layer, Recipe.parse("int8-row"))
    with pytest.raises(ValueError, match="takes inputs as they are"):
        frozen(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), inverse=jnp.ones(36, jnp.float32))
    stochastic = "fwd=none,e4m3fn:tensor:current:stochastic"
    model = qnnx.quantize_model(Net(), f"linear->{stochastic}", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Layer 'linear': it rounds stochastically"):
        qnnx.freeze(model)
