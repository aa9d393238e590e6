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
from nnx_cases import DELAYED_INT8, relative_error
from shardings import on_eight_devices

import q8jax
import q8jax.nnx as qnnx
from q8jax import scaling, telemetry
from q8jax.recipe import GEMMS
from q8jax.report import EMULATED, NATIVE

LAYERS, CHANNELS = 2, 4
EXACT = (
    f"stem->fp8/history=2;body->fp8/history=3/amax=recent;shared->{DELAYED_INT8}/scales=power_of_two/margin=1;head->fp8"
)


def quarters(key, shape, dtype, out_sharding=None):
    """An initializer of weights whose products with small integers are exact in any order."""
    del out_sharding
    return jax.random.randint(key, shape, -2, 3).astype(dtype) / 4


def conv(*args, rngs, **kwargs) -> nnx.Conv:
    return nnx.Conv(*args, kernel_init=quarters, use_bias=False, rngs=rngs, **kwargs)


class Net(nnx.Module):
    """A strided convolution, a stack of them, one that each layer of the stack shares, and a head."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = conv(2, CHANNELS, (3, 3), 2, rngs=rngs)
        stack = nnx.vmap(lambda rngs: conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs))
        self.body = stack(rngs.split(LAYERS))
        self.shared = conv(CHANNELS, CHANNELS, (1, 1), rngs=rngs)
        self.head = nnx.Linear(CHANNELS, 3, kernel_init=quarters, use_bias=False, rngs=rngs)


def scanned(net: Net, x, wrap=lambda body: body):
    graphdef, stack = nnx.split(net.body)

    @wrap
    def body(x, layer):
        return nnx.relu(net.shared(nnx.relu(nnx.merge(graphdef, layer)(x)))), None

    x, _ = lax.scan(body, nnx.relu(net.stem(x)), stack)
    return net.head(x.sum((1, 2)))


def unrolled(net: Net, x):
    graphdef, stack = nnx.split(net.body)
    x = nnx.relu(net.stem(x))
    for i in range(LAYERS):
        layer = jax.tree.map(functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False), stack)
        x = nnx.relu(net.shared(nnx.relu(nnx.merge(graphdef, layer)(x))))
    return net.head(x.sum((1, 2)))


def batches(steps: int = 3):
    random = np.random.default_rng(1)
    integers = lambda *shape: random.integers(-2, 3, shape).astype(np.float32)
    return [(integers(8, 6, 6, 2) * 2.0**step, integers(8, 3) / 4) for step in range(steps)]


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
    (grads, amaxes), _ = lax.scan(add, zeros, (x.reshape(4, 2, *x.shape[1:]), grad.reshape(4, 2, -1)))
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
    states = {path: (state.scale, state.history) for path, state in qnnx.scaling_states(net).items()}
    return jax.tree.map(np.asarray, (states, nnx.to_pure_dict(grads)))


@pytest.fixture(scope="module")
def plain():
    return train(functools.partial(plain_step, unrolled))


@pytest.mark.parametrize("name", STEPS)
def test_state_and_gradients_are_those_of_the_plain_run(plain, name):
    chex.assert_trees_all_equal(train(STEPS[name]), plain)


@on_eight_devices
def test_on_eight_devices(plain, mesh, weights):
    if weights != P():
        pytest.skip("kernels are whole on every device")
    step = functools.partial(plain_step, scanned)
    net, run = qnnx.quantize_model(Net(), EXACT), nnx.jit(step)
    nnx.update(net, jax.device_put(nnx.state(net), NamedSharding(mesh, P())))
    for x, grad in batches():
        grads = run(net, *jax.device_put((x, grad), NamedSharding(mesh, P("data"))))
    found = {path: (state.scale, state.history) for path, state in qnnx.scaling_states(net).items()}
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, (found, nnx.to_pure_dict(grads))), plain)


def test_what_is_observed_is_the_largest_of_all_uses(plain):
    """In NumPy, and that a step which forgot one use, or had no scales, would be seen."""
    states, _ = plain
    x = batches()
    scale, history = states["stem/conv_general_dilated"]
    np.testing.assert_array_equal(history[0], [np.abs(x[2][0]).max(), np.abs(x[1][0]).max()])
    net = Net()
    amax = np.abs(net.body.kernel[...]).max((1, 2, 3, 4))
    np.testing.assert_array_equal(states["body/conv_general_dilated"][1][:, 1, 0], amax)
    assert (scale > 0).all() and (history > 0).all()


# Layers.


def test_a_policy_finds_convolutions_by_path_and_leaves_parameters_as_they_are():
    float_model, model = Net(), qnnx.quantize_model(Net(), "(stem|body|shared)->int8-row;head->bf16")
    assert {path.rpartition("/")[0] for path in qnnx.scaling_states(model)} == {"stem", "body", "shared", "head"}
    params = [nnx.state(m, nnx.Param) for m in (float_model, model)]
    chex.assert_trees_all_equal(*params)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 2)), jnp.float32)
    out, plain = (nnx.jit(scanned)(m, x) for m in (model, float_model))
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
    with pytest.raises(ValueError, match="Layer 'stem': tile32 of lhs in fwd does not divide its contracting size 18"):
        qnnx.quantize_model(Net(), "stem->mxfp8")


def test_calibration_makes_every_scale_right():
    net = qnnx.quantize_model(Net(), "fp8/scales=float32")
    x, grad = batches()[2]
    qnnx.calibrate(net, functools.partial(loss_of, scanned), x, grad)
    scale = qnnx.scaling_states(net)["stem/conv_general_dilated"].scale
    np.testing.assert_allclose(scale[:2], [np.abs(x).max() / 448, 0.5 / 448], rtol=1e-6)
    qnnx.prequantize(net)  # leaves convolutions as they are


def test_telemetry_sees_the_tensors_and_products_of_a_convolution():
    net = qnnx.quantize_model(Net(), "stem->int8-row;body->fp8-current")
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype(np.float32)
    loss = lambda net, x: jnp.sum(scanned(net, x) ** 2)
    _, _, probes = qnnx.watching(loss, telemetry.KINDS)(net, x)
    seen = {layer: telemetry.summary(probe) for layer, probe in probes.items()}
    assert set(seen) == {"stem", "body"} and seen["body"]["fwd"]["error"].shape == (LAYERS,)
    assert seen["stem"]["lhs"]["amax"] == np.abs(x).max() and 30 < seen["stem"]["lhs"]["sqnr"] < 50
    for gemm in GEMMS:
        assert 0.004 < seen["stem"][gemm]["error"] < 0.02 < seen["body"][gemm]["error"].min()
        assert seen["body"][gemm]["error"].max() < 0.1
    _, _, probes = qnnx.watching(loss, ("tensors",), {"body": q8jax.Recipe.parse("int8-tensor")})(net, x)
    assert telemetry.summary(probes["body"])["lhs"]["sqnr"].min() > 30


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8-e3m4", "int8-switchback", "bf16"])
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
