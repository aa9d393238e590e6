"""Convolutions of NNX models in a recipe's arithmetic, and their scaling state under whatever wraps the layers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from micro import quick_compiles  # noqa: F401
from nnx_cases import DELAYED_INT8, relative_error, states_of
from shardings import AUTOMATIC, EXPLICIT

import q8jax
import q8jax.nnx as qnnx
from q8jax import scaling, telemetry
from q8jax.recipe import GEMMS
from q8jax.report import EMULATED, NATIVE

LAYERS, CHANNELS = 2, 4
F32 = np.float32
EXACT = f"body->fp8/history=2;shared->{DELAYED_INT8}/history=3/amax=recent/margin=1/scales=power_of_two"


def quarters(key, shape, dtype, out_sharding=None):
    """An initializer of weights whose products with small integers are exact in any order."""
    del out_sharding
    return jax.random.randint(key, shape, -2, 3).astype(dtype) / 4


def conv(*args, rngs, **kwargs) -> nnx.Conv:
    return nnx.Conv(*args, kernel_init=quarters, use_bias=False, rngs=rngs, **kwargs)


class Net(nnx.Module):
    """A stack of convolutions, and one that each layer of the stack shares."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        stack = nnx.vmap(lambda rngs: conv(CHANNELS, CHANNELS, (2, 2), rngs=rngs))
        self.body = stack(rngs.split(LAYERS))
        self.shared = conv(CHANNELS, CHANNELS, (1, 1), rngs=rngs)


def scanned(net: Net, x, wrap=lambda body: body):
    graphdef, stack = nnx.split(net.body)

    @wrap
    def body(x, layer):
        return nnx.relu(net.shared(nnx.relu(nnx.merge(graphdef, layer)(x)))), None

    return lax.scan(body, x, stack)[0]


def inputs_of_shared(net: Net, x):
    """In an unrolled loop, what the layer is given at each of its uses."""
    inputs, (graphdef, stack) = [], nnx.split(net.body)
    for i in range(LAYERS):
        layer = jax.tree.map(functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False), stack)
        inputs.append(nnx.relu(nnx.merge(graphdef, layer)(x)))
        x = nnx.relu(net.shared(inputs[-1]))
    return inputs


def unrolled(net: Net, x):
    return nnx.relu(net.shared(inputs_of_shared(net, x)[-1]))


def batches(steps: int = 3):
    random = np.random.default_rng(1)
    integers = lambda *shape: random.integers(-2, 3, shape).astype(np.float32)
    shape = 8, 4, 4, CHANNELS
    return [(integers(*shape) * F32(2.0**step), integers(*shape) / F32(4)) for step in range(steps)]


def loss_of(forward, net, x, grad):
    return jnp.sum(forward(net, x) * grad)


def plain_step(forward, net, x, grad):
    _, grads, amaxes = qnnx.value_and_grad(functools.partial(loss_of, forward))(net, x, grad)
    qnnx.update_scaling(net, amaxes)
    return grads


def microbatches(net, x, grad):
    def add(total, batch):
        _, grads, amaxes = qnnx.value_and_grad(functools.partial(loss_of, scanned))(net, *batch)
        return (jax.tree.map(jnp.add, total[0], grads), scaling.combine(total[1], amaxes)), None

    zeros = jax.tree.map(jnp.zeros_like, nnx.state(net, nnx.Param, qnnx.Scale))
    (grads, amaxes), _ = lax.scan(add, zeros, (x.reshape(4, 2, *x.shape[1:]), grad.reshape(4, 2, *x.shape[1:])))
    qnnx.update_scaling(net, amaxes)
    return grads


STEPS = {
    "lax.scan of jax.checkpoint": functools.partial(plain_step, functools.partial(scanned, wrap=jax.checkpoint)),
    "nnx.remat": functools.partial(plain_step, nnx.remat(lambda net, x: scanned(net, x))),
    "jax.vmap": functools.partial(plain_step, lambda net, x: jax.vmap(lambda row: scanned(net, row[None])[0])(x)),
    "microbatches": microbatches,
}


def train(step, sharding=None):
    net, run = qnnx.quantize_model(Net(), EXACT), nnx.jit(step)
    for x, grad in batches():
        grads = run(net, jax.device_put(x, sharding), jax.device_put(grad, sharding))
    return seen(net, grads)


def seen(net, grads):
    return jax.tree.map(np.asarray, (states_of(net), nnx.to_pure_dict(grads)))


@pytest.fixture(scope="module")
def plain():
    return train(functools.partial(plain_step, unrolled))


SLOW = ("nnx.remat", "jax.vmap")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in STEPS])
def test_state_and_gradients_are_those_of_the_plain_run(plain, name):
    chex.assert_trees_all_equal(train(STEPS[name]), plain)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [AUTOMATIC, pytest.param(EXPLICIT, marks=pytest.mark.slow)], ids=["batch", "by type"])
def test_on_eight_devices(plain, mesh):
    net, run = qnnx.quantize_model(Net(), EXACT), nnx.jit(functools.partial(plain_step, scanned))
    nnx.update(net, jax.device_put(nnx.state(net), NamedSharding(mesh, P())))
    for x, grad in batches():
        grads = run(net, *jax.device_put((x, grad), NamedSharding(mesh, P("data"))))
    chex.assert_trees_all_equal(seen(net, grads), plain)


def test_what_is_observed_is_the_largest_of_all_uses(plain):
    states, _ = plain
    net = Net()
    for path, kernel, axes in (("body", net.body.kernel, (1, 2, 3, 4)), ("shared", net.shared.kernel, None)):
        scale, history = states[f"{path}/conv_general_dilated"]
        np.testing.assert_array_equal(history[..., 1, 0], np.abs(kernel[...]).max(axes))
        assert (scale > 0).all() and (history > 0).all()
    _, history = states["body/conv_general_dilated"]
    np.testing.assert_array_equal(history[0, 0], [np.abs(x).max() for x, _ in batches()[:0:-1]])
    # The oldest of three is the first step's.
    inputs = nnx.jit(inputs_of_shared)(qnnx.quantize_model(Net(), EXACT), batches()[0][0])
    largest = [np.abs(x).max() for x in inputs]
    assert largest[0] != largest[1]
    assert states["shared/conv_general_dilated"][1][0, 2] == max(largest)


# Layers.


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_policy_finds_convolutions_by_path_and_leaves_parameters_as_they_are():
    float_model, model = Net(), qnnx.quantize_model(Net(), "body->int8-row;shared->bf16")
    assert set(qnnx.scaling_states(model)) == {"body/conv_general_dilated", "shared/conv_general_dilated"}
    chex.assert_trees_all_equal(nnx.state(model, nnx.Param), nnx.state(float_model, nnx.Param))
    out, plain = (nnx.jit(scanned)(m, image(8, 4, 4, CHANNELS)) for m in (model, float_model))
    assert 2e-3 < relative_error(out, plain) < 0.1


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_a_layer_made_so_is_one_that_was_quantized(recipe):
    options = {"strides": 2, "padding": "CIRCULAR", "rngs": nnx.Rngs(3)}
    made = qnnx.Conv(2, 4, (3, 3), recipe=recipe, **options)
    quantized = qnnx.quantize_model(nnx.Conv(2, 4, (3, 3), **(options | {"rngs": nnx.Rngs(3)})), recipe)
    plain = nnx.Conv(2, 4, (3, 3), **(options | {"rngs": nnx.Rngs(3)}))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 2)), jnp.float32)
    chex.assert_trees_all_equal(made(x), quantized(x))
    # A model that nobody calibrated begins with its weights' scales.
    assert 1e-3 < relative_error(made(x), plain(x)) < 0.06
    np.testing.assert_array_equal(made(x)[0], made(x[0]))


def test_a_tile_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="Layer 'body': tile32 of lhs in fwd does not divide its contracting size 16"):
        qnnx.quantize_model(Net(), "body->mxfp8")


def power(layer, x):
    return jnp.sum(layer(x) ** 2)


def test_calibration_makes_every_scale_right():
    layer, x = qnnx.quantize_model(conv(2, 4, (2, 2), rngs=nnx.Rngs(0)), "fp8/scales=float32"), image(4, 4, 4, 2)
    qnnx.calibrate(layer, power, x)
    scale = layer.conv_general_dilated.scale[...]
    np.testing.assert_allclose(scale[:2], [np.abs(x).max() / 448, 0.5 / 448], rtol=1e-6)
    assert qnnx.prequantize(layer).kernel is layer.kernel  # and is quantized when it is used


@pytest.mark.slow
def test_telemetry_sees_the_tensors_and_products_of_a_convolution():
    layer, x = qnnx.quantize_model(conv(2, 4, (2, 2), rngs=nnx.Rngs(0)), "int8-row"), image(8, 4, 4, 2)
    geometry = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def three(convolve, **kwargs):
        """The products, of the gradient that comes back to the layer."""
        out, vjp = jax.vjp(functools.partial(convolve, **geometry, **kwargs), x, layer.kernel[...])
        return dict(zip(GEMMS, (out, *vjp(2 * layer(x))), strict=True))

    exact = three(lax.conv_general_dilated)
    for recipe, sqnr in (("int8-row", 45), ("fp8-current", 31)):
        watched = None if recipe == "int8-row" else {"": q8jax.Recipe.parse(recipe)}
        _, _, probes = qnnx.watching(power, telemetry.KINDS, watched)(layer, x)
        found = telemetry.summary(probes[""])
        assert found["lhs"]["amax"] == np.abs(x).max() and found["lhs"]["binades"].sum() == np.count_nonzero(x)
        assert abs(found["lhs"]["sqnr"] - sqnr) < 3
        ours = three(q8jax.conv_general_dilated, recipe=recipe)
        for gemm in GEMMS:
            error = np.linalg.norm(ours[gemm] - exact[gemm]) / np.linalg.norm(exact[gemm])
            assert error > 1e-3
            np.testing.assert_allclose(found[gemm]["error"], error, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", "int8", "int8-switchback"])
def test_the_audit_finds_the_three_products_of_each_convolution(recipe):
    options = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    net = nnx.Dict(one=conv(4, 8, (3, 3), **options), two=conv(8, 8, (1, 3), **options))
    graphdef, state = nnx.split(qnnx.quantize_model(net, recipe))
    loss = lambda net, x: jnp.sum(net.two(nnx.relu(net.one(x))).astype(jnp.float32) ** 2)
    apply = lambda state, x: qnnx.value_and_grad(loss)(nnx.merge(graphdef, state), x)[1:]
    report = q8jax.audit(jax.jit(apply).lower(state, jax.ShapeDtypeStruct((4, 8, 8, 4), jnp.bfloat16)))
    found = {(gemm.path, gemm.role): gemm for gemm in report.gemms}
    # Nothing asks for the gradient of the input.
    assert set(found) == {(path, role) for path in ("one", "two") for role in GEMMS} - {("one", "dlhs")}
    for (_, role), gemm in found.items():
        assert gemm.asked == q8jax.Recipe.parse(recipe).formats(role)
        assert gemm.verdict in (NATIVE, EMULATED) and gemm.accumulator in ("float32", "int32")
    assert report.ok
