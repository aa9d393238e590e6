"""The scaling state after several steps of an NNX model is that of NumPy, bit for bit, whatever wraps its layers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling_oracle as oracle
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from micro import quick_compiles  # noqa: F401
from shardings import on_eight_devices

import q8jax.nnx as qnnx
from q8jax import scaling

WIDTH, BATCH = oracle.WIDTH, oracle.BATCH
LAYERS = 2


def linear(rngs) -> nnx.Linear:
    return nnx.Linear(WIDTH, WIDTH, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.own = linear(rngs)

    def __call__(self, x, shared):
        return nnx.relu(shared(nnx.relu(self.own(x))))


class Net(nnx.Module):
    """oracle.CHAIN: blocks with a layer of their own and one that they share, and a head."""

    def __init__(self, stacked: bool):
        rngs = nnx.Rngs(0)
        if stacked:
            self.blocks = nnx.vmap(Block, in_axes=0)(rngs.split(LAYERS))
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.shared = linear(rngs)
        self.head = linear(rngs)


def build(recipes: dict[str, str], stacked: bool = True) -> Net:
    net, w = Net(stacked), {name: jnp.asarray(value) for name, value in oracle.weights().items()}
    policy = {".*own": recipes["own0"], "shared": recipes["shared"], "head": recipes["head"]}
    # Before there are weights: a state would begin with their scales.
    net = qnnx.quantize_model(net, ";".join(f"{pattern}->{recipe}" for pattern, recipe in policy.items()))
    if stacked:
        net.blocks.own.kernel[...] = jnp.stack([w["own0"], w["own1"]])
    else:
        for i, block in enumerate(net.blocks):
            block.own.kernel[...] = w[f"own{i}"]
    net.shared.kernel[...], net.head.kernel[...] = w["shared"], w["head"]
    return net


def unrolled(net: Net, x):
    for block in net.blocks:
        x = block(x, net.shared)
    return net.head(x)


def slices(net: Net, x):
    graphdef, stack = nnx.split(net.blocks)
    for i in range(LAYERS):
        layer = jax.tree.map(functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False), stack)
        x = nnx.merge(graphdef, layer)(x, net.shared)
    return net.head(x)


def lax_scan(net: Net, x, wrap=lambda body: body):
    graphdef, stack = nnx.split(net.blocks)

    @wrap
    def body(x, block):
        return nnx.merge(graphdef, block)(x, net.shared), None

    return net.head(lax.scan(body, x, stack)[0])


def nnx_scan(net: Net, x, wrap=lambda body: body):
    @nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry)
    @wrap
    def body(x, block, shared):
        return block(x, shared)

    return net.head(body(x, net.blocks, net.shared))


FORWARDS = {
    "nnx.remat": nnx.remat(lambda net, x: lax_scan(net, x)),
    "lax.scan of jax.checkpoint": functools.partial(lax_scan, wrap=jax.checkpoint),
    "nnx.scan of nnx.remat": functools.partial(nnx_scan, wrap=nnx.remat),
    "jax.vmap of slices of a stack": lambda net, x: jax.vmap(lambda row: slices(net, row))(x),
    "nnx.vmap": nnx.vmap(lambda net, x: lax_scan(net, x), in_axes=(None, 0)),
}


def loss_of(forward, net: Net, x, grad):
    return jnp.sum(forward(net, x) * grad)


def plain_step(forward, net: Net, x, grad):
    _, grads, amaxes = qnnx.value_and_grad(functools.partial(loss_of, forward))(net, x, grad)
    qnnx.update_scaling(net, amaxes)
    return grads


def scan_in_loss(net: Net, x, grad):
    """Four microbatches, the scan inside the loss."""

    def loss(net, x, grad):
        add = lambda total, batch: (total + loss_of(lax_scan, net, *batch), None)
        return lax.scan(add, jnp.float32(0), (x.reshape(4, -1, WIDTH), grad.reshape(4, -1, WIDTH)))[0]

    _, grads, amaxes = qnnx.value_and_grad(loss)(net, x, grad)
    qnnx.update_scaling(net, amaxes)
    return grads


def scan_of_gradients(net: Net, x, grad):
    """Four microbatches, each differentiated by itself."""
    differentiate = qnnx.value_and_grad(functools.partial(loss_of, lax_scan))

    def add(total, batch):
        _, grads, amaxes = differentiate(net, *batch)
        return (jax.tree.map(jnp.add, total[0], grads), scaling.combine(total[1], amaxes)), None

    zeros = jax.tree.map(jnp.zeros_like, nnx.state(net, nnx.Param, qnnx.Scale))
    (grads, amaxes), _ = lax.scan(add, zeros, (x.reshape(4, -1, WIDTH), grad.reshape(4, -1, WIDTH)))
    qnnx.update_scaling(net, amaxes)
    return grads


STEPS = {name: functools.partial(plain_step, forward) for name, forward in FORWARDS.items()}
STEPS |= {"microbatches in the loss": scan_in_loss, "microbatches of gradients": scan_of_gradients}


def train(net: Net, step, batches, sharding=None):
    for x, grad in batches:
        grads = step(net, jax.device_put(x, sharding), jax.device_put(grad, sharding))
    return grads


def by_path(net: Net, values: dict) -> dict:
    """What NumPy has by layer, by the paths of the net."""
    if isinstance(net.blocks, nnx.List):
        paths = {"own0": "blocks/0/own", "own1": "blocks/1/own", "shared": "shared", "head": "head"}
        return {paths[name]: value for name, value in values.items()}
    own = jax.tree.map(lambda *leaves: np.stack(leaves), values["own0"], values["own1"])
    return {"blocks/own": own, "shared": values["shared"], "head": values["head"]}


def check_states(net: Net, recipes: dict[str, str], data):
    states, _ = oracle.run(recipes, data)
    found = {
        path.removesuffix("/dot_general"): (state.scale, state.history)
        for path, state in qnnx.scaling_states(net).items()
    }
    chex.assert_trees_all_equal(
        found, by_path(net, {name: (state.scale, state.history) for name, state in states.items()})
    )


def check(net: Net, grads, recipes: dict[str, str]):
    check_states(net, recipes, oracle.batches())
    expected = by_path(net, oracle.run(recipes)[1])
    found = {"/".join(map(str, path[:-1])): leaf[...] for path, leaf in nnx.to_flat_state(grads)}
    del expected["head"], found["head"]  # int8 has a scale per row, so a microbatch has scales of its own there
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


def test_unrolled():
    net = build(oracle.MIXED, stacked=False)
    check(net, train(net, nnx.jit(functools.partial(plain_step, unrolled)), oracle.batches()), oracle.MIXED)


@pytest.mark.parametrize("name", oracle.UNIFORM)
def test_a_layer_called_twice_in_a_step(name):
    layer = linear(nnx.Rngs(0))
    qnnx.quantize_model(layer, oracle.UNIFORM[name])
    layer.kernel[...] = jnp.asarray(oracle.weights()["shared"])
    step = nnx.jit(functools.partial(plain_step, lambda layer, x: layer(nnx.relu(layer(x)))))
    grads = train(layer, step, oracle.batches())
    states, expected = oracle.run({"shared": oracle.UNIFORM[name]}, chain=oracle.TWICE)
    found = qnnx.scaling_states(layer)["dot_general"]
    chex.assert_trees_all_equal((found.scale, found.history), (states["shared"].scale, states["shared"].history))
    chex.assert_trees_all_close(grads["kernel"][...], expected["shared"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_wrapped(name):
    net = build(oracle.MIXED)
    check(net, train(net, nnx.jit(STEPS[name]), oracle.batches()), oracle.MIXED)


STEP = nnx.jit(functools.partial(plain_step, lax_scan), donate_argnums=0)


def test_scanned_and_donated():
    net = build(oracle.MIXED)
    before = net.shared.dot_general.scale[...]
    check(net, train(net, STEP, oracle.batches()), oracle.MIXED)
    assert before.is_deleted()


def test_saved_and_restored_in_the_middle(tmp_path):
    net, batches = build(oracle.MIXED), oracle.batches()
    train(net, STEP, batches[:2])
    leaves = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(net))}
    np.savez(tmp_path / "state.npz", **leaves)

    net = build(oracle.MIXED)
    with np.load(tmp_path / "state.npz") as saved:
        for path, leaf in nnx.to_flat_state(nnx.state(net)):
            leaf[...] = jnp.asarray(saved["/".join(map(str, path))])
            nnx.update(net, nnx.from_flat_state({path: leaf}))
    check(net, train(net, STEP, batches[2:]), oracle.MIXED)


@pytest.mark.slow
@on_eight_devices
def test_on_eight_devices(mesh, weights):
    net = build(oracle.MIXED)
    for _, leaf in nnx.to_flat_state(nnx.state(net)):
        assert isinstance(leaf, nnx.Variable)
    place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, weights if leaf.shape[-1] == WIDTH else P()))
    nnx.update(net, jax.tree.map(place, nnx.state(net)))
    grads = train(
        net, nnx.jit(functools.partial(plain_step, lax_scan)), oracle.batches(), NamedSharding(mesh, P("data"))
    )
    assert grads["shared"]["kernel"][...].sharding.num_devices == 8
    check(net, grads, oracle.MIXED)


@pytest.mark.parametrize("name", oracle.POISONS)
@pytest.mark.parametrize("tensor", ["input", "gradient"])
def test_hostile_tensors(name, tensor):
    batches, net = oracle.poisoned(name, tensor), build(oracle.MIXED)
    for step in range(len(batches)):
        train(net, STEP, batches[step : step + 1])
        for state in qnnx.scaling_states(net).values():
            chex.assert_tree_all_finite((state.scale, state.history))
            assert (state.scale > 0).all() and (state.history >= 0).all()
        check_states(net, oracle.MIXED, batches[: step + 1])
