"""Quantization-aware training: gradients straight through codes against NumPy, ranges that are learned or observed."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from micro import quick_compiles  # noqa: F401

import q8jax
import q8jax.nnx as qnnx
from q8jax import qat, scaling
from q8jax.clipping import within
from q8jax.recipe import Recipe

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(6, 8)).astype(np.float32), RNG.normal(size=(8, 5)).astype(np.float32)
G = RNG.normal(size=(6, 5)).astype(np.float32)
E4M3, INT8 = (ml_dtypes.float8_e4m3fn, 448.0), (np.int8, 127.0)


def fake(x, kind, axis):
    """What codes of x mean, one scale along an axis, in float64."""
    dtype, top = kind
    scale = np.float32(np.abs(x).max(axis, keepdims=True) * np.float32(1 / top))
    codes = np.clip(x * (1 / scale), -top, top)
    codes = np.rint(codes) if dtype is np.int8 else codes.astype(dtype).astype(np.float64)
    return np.float64(codes) * scale


@pytest.mark.parametrize("what", qat.QUANTIZED)
@pytest.mark.parametrize(("name", "kind"), [("int8", INT8), ("fp8/scales=float32", E4M3)])
def test_gradients_are_those_of_what_codes_mean(what, name, kind):
    recipe = qat.recipe_for(Recipe.parse(f"{name}/compute=float32"), what)
    assert Recipe.parse(str(recipe)) == recipe and not recipe.keeps_state
    axis = (0, 1) if name.startswith("fp8") else 1
    x = fake(X, kind, axis) if what != "weights" else np.float64(X)
    w = fake(W, kind, 0) if what != "activations" else np.float64(W)
    y, grads = jax.jit(
        jax.value_and_grad(lambda x, w: jnp.sum(q8jax.einsum("tk,kn->tn", x, w, recipe) * G), argnums=(0, 1))
    )(X, W)
    np.testing.assert_allclose(y, (x @ w * G).sum(), rtol=2e-6)
    for found, wanted, plain in zip(grads, (G @ w.T, x.T @ G), (G @ W.T, X.T @ G), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        off = np.abs(np.float64(wanted) - plain).max()
        assert off < 1e-6 or np.abs(found - plain).max() > 0.5 * off > 1e-4, "the codes have to be seen"


def test_the_forward_product_is_the_deployed_one():
    for precision in ("int8", "fp8", "fp8-row", "int8-row"):
        trained = qat.recipe_for(Recipe.parse(precision))
        deployed = Recipe(trained.fwd, scales=trained.scales)
        product = lambda recipe: jax.jit(functools.partial(q8jax.einsum, "tk,kn->tn", recipe=recipe))(X, W)
        np.testing.assert_array_equal(product(trained), product(deployed))
        assert np.abs(product(trained) - X @ W).max() > 1e-3


def test_convolutions_have_these_gradients_too():
    images, kernel = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32), RNG.normal(size=(3, 3, 3, 2)).astype(np.float32)
    recipe = qat.recipe_for(Recipe.parse("int8-tensor/compute=float32"))
    numbers = ("NHWC", "HWIO", "NHWC")

    def loss(convolve, images, kernel):
        return jnp.sum(jnp.sin(convolve(images, kernel, (1, 1), "SAME", dimension_numbers=numbers)))

    ours = functools.partial(loss, functools.partial(q8jax.conv_general_dilated, recipe=recipe))
    plain = functools.partial(loss, functools.partial(jax.lax.conv_general_dilated, precision="highest"))
    meant = [fake(images, INT8, None).astype(np.float32), fake(kernel, INT8, (0, 1, 2)).astype(np.float32)]
    for found, wanted in zip(
        jax.jit(jax.grad(ours, (0, 1)))(images, kernel), jax.grad(plain, (0, 1))(*meant), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_no_gradient_would_see_is_refused():
    for text, message in [
        ("int8/backward=codes", "backward=codes has no effect without a tensor that fwd alone quantizes"),
        ("bf16/backward=codes", "has no effect"),
        ("mxfp8/dlhs=none,none/drhs=none,none/backward=codes", "takes no tiles"),
        ("int8/backward=code", "did you mean 'codes'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe.parse(text)
    assert "backward" not in str(Recipe.parse("int8"))
    for precision, what, message in [("bf16", "both", "does not quantize both"), ("int8", "weight", "did you mean")]:
        with pytest.raises(ValueError, match=message):
            qat.recipe_for(Recipe.parse(precision), what)


def test_beyond_its_range_a_gradient_is_the_ranges():
    bound = np.float32(0.7)
    x = np.float32([-2, -0.7, -0.1, 0, 0.7, 0.71, np.inf, np.nan])
    grad = np.arange(1, 9, dtype=np.float32)
    y, pull = jax.vjp(within, x, bound)
    np.testing.assert_array_equal(y, x)
    of_x, of_bound = pull(grad)
    np.testing.assert_array_equal(of_x, [0, 2, 3, 4, 5, 0, 0, 8])
    assert of_bound == -1 + 6 + 7


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


def quantized(ranges, precision="int8/compute=float32"):
    return qnnx.quantize_model(Model(nnx.Rngs(0)), qat.recipe_for(Recipe.parse(precision), ranges=ranges))


def loss_fn(model, x):
    return jnp.sum(model(x) * G)


def test_learned_ranges_have_the_gradient_of_pact_and_make_the_scales():
    model = qnnx.learn_ranges(quantized("learned"))
    qnnx.calibrate(model, loss_fn, X)
    np.testing.assert_allclose(qnnx.ranges(model)["layer"], np.abs(X).max(), rtol=1e-6)
    bound = np.float32(1.1)
    model.layer.dot_general.learned_range.set_value(jnp.asarray(bound))
    _, _, amaxes = qnnx.value_and_grad(loss_fn)(model, X)
    qnnx.update_scaling(model, amaxes)
    np.testing.assert_array_equal(model.layer.dot_general.scale[0], bound * np.float32(1 / 127))

    loss, grads, _ = qnnx.value_and_grad(loss_fn)(model, X)
    clipped = np.clip(X, -bound, bound)
    scale = bound * np.float32(1 / 127)
    x, w = np.rint(np.float64(clipped) / scale) * scale, fake(np.asarray(model.layer.kernel[...]), INT8, 0)
    np.testing.assert_allclose(loss, (x @ w * G).sum(), rtol=1e-5)
    outside = np.sign(X) * (np.abs(X) > bound)
    assert 3 < np.abs(outside).sum() < X.size
    np.testing.assert_allclose(grads.layer.kernel[...], x.T @ G, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads.layer.dot_general.learned_range[...], ((G @ w.T) * outside).sum(), rtol=1e-4)

    forgotten = qnnx.forget_ranges(model)
    assert not qnnx.ranges(forgotten)
    np.testing.assert_array_equal(loss, qnnx.value_and_grad(loss_fn)(forgotten, X)[0])


def test_gradients_end_where_static_ranges_do_and_inputs_are_not_seen_beyond():
    model = quantized("static")
    qnnx.calibrate(model, loss_fn, X)
    scale = np.asarray(model.layer.dot_general.scale[0])
    gradient = jax.jit(jax.grad(lambda x: loss_fn(model, x)))
    far = X.copy()
    far[0, 0] = 10 * np.abs(X).max()
    w = fake(np.asarray(model.layer.kernel[...]), INT8, 0)
    wanted = G @ w.T
    np.testing.assert_allclose(gradient(X), wanted, rtol=1e-5, atol=1e-5)
    wanted[0, 0] = 0
    np.testing.assert_allclose(gradient(far), wanted, rtol=1e-5, atol=1e-5)
    _, _, amaxes = qnnx.value_and_grad(loss_fn)(model, far)
    qnnx.update_scaling(model, amaxes)
    np.testing.assert_array_equal(model.layer.dot_general.scale[0], scale)


def test_average_ranges_follow_the_amaxes_that_are_seen():
    model = quantized("average", "int8/compute=float32/history=3")
    seen = []
    for factor in (1.0, 4.0, 2.0, 8.0):
        _, _, amaxes = qnnx.value_and_grad(loss_fn)(model, factor * X)
        qnnx.update_scaling(model, amaxes)
        seen.append(factor * np.abs(X).max())
        wanted = np.mean(seen[-3:]) / 127
        np.testing.assert_allclose(model.layer.dot_general.scale[0], wanted, rtol=1e-5)
    holes = scaling.update(model.layer.dot_general.state, jnp.zeros(2))
    np.testing.assert_allclose(holes.scale[:1], [np.mean(seen[-2:]) / 127], rtol=1e-5)


def test_ranges_in_stacks_of_layers_are_learned_layer_by_layer():
    recipe = qat.recipe_for(Recipe.parse("int8/compute=float32"), ranges="learned")

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = stack(nnx.Rngs(0))

        def __call__(self, x):
            graphdef, state = nnx.split(self.layers)
            return jax.lax.scan(lambda x, layer: (nnx.merge(graphdef, layer)(x), None), x, state)[0]

    model = qnnx.learn_ranges(qnnx.quantize_model(Stack(), recipe))
    loss = lambda model, x: jnp.sum(jnp.square(model(x)))
    qnnx.calibrate(model, loss, X)
    before = qnnx.ranges(model)["layers"]
    assert before.shape == (3,) and len(set(before.tolist())) == 3
    model.layers.dot_general.learned_range.set_value(before * np.float32([0.5, 2, 0.4]))
    _, grads, amaxes = qnnx.value_and_grad(loss)(model, X)
    qnnx.update_scaling(model, amaxes)
    assert (np.asarray(grads.layers.dot_general.learned_range[...]) != 0).tolist() == [True, False, True]
    scales = model.layers.dot_general.scale[...][:, 0]
    np.testing.assert_allclose(scales * 127, before * np.float32([0.5, 2, 0.4]), rtol=1e-6)


def test_four_bits_are_learned_where_rounding_alone_fails():
    target = RNG.normal(size=(8, 5)).astype(np.float32)
    inputs = RNG.normal(size=(64, 8)).astype(np.float32) ** 3
    fwd = "fwd=int4:tensor:current,int4:row:current/compute=float32"
    model = qnnx.quantize_model(Model(nnx.Rngs(0)), qat.recipe_for(Recipe.parse(fwd), ranges="learned"))
    model.layer.kernel.set_value(jnp.asarray(target))
    loss = lambda model, x: jnp.mean(jnp.square(model(x) - x @ target))
    qnnx.learn_ranges(model)
    qnnx.calibrate(model, loss, inputs)
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        found, grads, amaxes = qnnx.value_and_grad(loss)(model, inputs)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        qnnx.update_scaling(model, amaxes)
        return found

    losses = [float(step(model, optimizer)) for _ in range(120)]
    assert 1 < np.mean(losses[-20:]) < 0.92 * losses[0], losses[::20]
