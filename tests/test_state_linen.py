"""The scaling state after several steps of a Linen model is that of NumPy, bit for bit, whatever wraps its layers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scaling_oracle as oracle
from flax import linen as nn
from flax import serialization
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT as OWG
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from micro import quick_compiles  # noqa: F401
from shardings import on_eight_devices

import q8jax.linen as qlinen
from q8jax import scaling

WIDTH, LAYERS = oracle.WIDTH, 2


def dense(name: str, recipe: str) -> nn.Dense:
    return nn.Dense(WIDTH, use_bias=False, dot_general_cls=qlinen.dot_general_cls(recipe), name=name)


class Layer(nn.Module):
    recipe: str

    @nn.compact
    def __call__(self, x):
        return nn.relu(dense("dense", self.recipe)(x)), None


class Unrolled(nn.Module):
    """oracle.CHAIN_OF_SCANS."""

    recipes: dict

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = nn.relu(dense(f"own{i}", self.recipes["own0"])(x))
        shared = dense("shared", self.recipes["shared"])
        for _ in range(LAYERS):
            x = nn.relu(shared(x))
        return dense("head", self.recipes["head"])(x)


class Scanned(nn.Module):
    """The same chain: a scan with state per layer, then a scan of one layer."""

    recipes: dict
    wrap: object = lambda layer: layer

    @nn.compact
    def __call__(self, x):
        wrapped = self.wrap(Layer)
        own = nn.scan(wrapped, variable_axes={"params": 0, OWG: 0}, split_rngs={"params": True}, length=LAYERS)
        shared = nn.scan(wrapped, variable_broadcast=("params", OWG), split_rngs={"params": False}, length=LAYERS)
        x, _ = own(self.recipes["own0"], name="own")(x)
        x, _ = shared(self.recipes["shared"], name="shared")(x)
        return dense("head", self.recipes["head"])(x)


class Batched(nn.Module):
    """`Scanned`, one example at a time."""

    recipes: dict

    @nn.compact
    def __call__(self, x):
        batched = nn.vmap(Scanned, variable_axes={"params": None, OWG: None}, split_rngs={"params": False})
        return batched(self.recipes, name="net")(x)


def init(model: nn.Module) -> dict:
    """Variables as model.init makes them, which is slow to compile, with the weights of the oracle."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((oracle.BATCH, WIDTH)))
    weights = {name: jnp.asarray(w) for name, w in oracle.weights().items()}
    weights["own"] = jnp.stack([weights["own0"], weights["own1"]])

    def value(path, leaf):
        if isinstance(leaf, qlinen.DotState):
            ones = leaf.replace(scale=jnp.ones(leaf.scale.shape), uses=jnp.ones(leaf.uses.shape))
            return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.zeros(x.shape, x.dtype), ones)
        return weights[next(part.key for part in path if part.key in weights)]

    return jax.tree.map_with_path(value, shapes, is_leaf=lambda leaf: isinstance(leaf, qlinen.DotState))


def gradients(apply, variables, x, grad):
    loss = lambda variables, x, grad: jnp.sum(apply(variables, x) * grad)
    return qlinen.value_and_grad(loss)(variables, x, grad)[1]


def scan_in_loss(apply, variables, x, grad):
    """Four microbatches, the scan inside the loss."""

    def loss(variables, x, grad):
        add = lambda total, batch: (total + jnp.sum(apply(variables, batch[0]) * batch[1]), None)
        return lax.scan(add, jnp.float32(0), (x.reshape(4, -1, WIDTH), grad.reshape(4, -1, WIDTH)))[0]

    return qlinen.value_and_grad(loss)(variables, x, grad)[1]


def scan_of_gradients(apply, variables, x, grad):
    """Four microbatches, each differentiated by itself."""

    def add(total, batch):
        grads = gradients(apply, variables, *batch)
        joined = scaling.combine(total[OWG], grads[OWG])
        return {"params": jax.tree.map(jnp.add, total["params"], grads["params"]), OWG: joined}, None

    zeros = jax.tree.map(jnp.zeros_like, variables)
    return lax.scan(add, zeros, (x.reshape(4, -1, WIDTH), grad.reshape(4, -1, WIDTH)))[0]


def step_of(gradients):
    """A step that updates the scaling state, and also returns the gradients."""

    def step(variables, x, grad):
        grads = gradients(variables, x, grad)
        return {**variables, OWG: grads[OWG]}, grads["params"]

    return jax.jit(step)


def train(variables, step, batches, sharding=None):
    for x, grad in batches:
        variables, grads = step(variables, jax.device_put(x, sharding), jax.device_put(grad, sharding))
    return variables, grads


def check_states(variables, recipes, data, chain=oracle.CHAIN_OF_SCANS):
    states, _ = oracle.run(recipes, data, chain)
    expected = {name: (state.scale, state.history) for name, state in states.items()}
    found = {}
    for path, state in qlinen.scaling_states(variables).items():
        name = next(part for part in path.split("/") if part in ("own", *expected))
        found[name] = state.scale, state.history
    if "own" in found:
        stack = lambda *leaves: np.stack(leaves)
        expected["own"] = jax.tree.map(stack, expected.pop("own0"), expected.pop("own1"))
    chex.assert_trees_all_equal(found, expected)


def check(variables, grads, recipes):
    check_states(variables, recipes, oracle.batches())
    expected = oracle.run(recipes, chain=oracle.CHAIN_OF_SCANS)[1]
    found = {
        path[0].key if path[0].key != "net" else path[1].key: leaf for path, leaf in jax.tree.leaves_with_path(grads)
    }
    if "own" in found:
        expected["own"] = np.stack([expected.pop("own0"), expected.pop("own1")])
    del expected["head"], found["head"]  # int8 has a scale per row, so a microbatch has scales of its own there
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


SCANNED = Scanned(oracle.MIXED)
GRADIENTS = {
    "nn.scan of nn.remat": functools.partial(gradients, Scanned(oracle.MIXED, nn.remat).apply),
    "jax.checkpoint": functools.partial(gradients, jax.checkpoint(SCANNED.apply)),
    "jax.vmap": functools.partial(gradients, jax.vmap(SCANNED.apply, (None, 0))),
    "microbatches in the loss": functools.partial(scan_in_loss, SCANNED.apply),
    "microbatches of gradients": functools.partial(scan_of_gradients, SCANNED.apply),
}


def test_unrolled():
    model = Unrolled(oracle.MIXED)
    check(*train(init(model), step_of(functools.partial(gradients, model.apply)), oracle.batches()), oracle.MIXED)


class Twice(nn.Module):
    recipe: str

    @nn.compact
    def __call__(self, x):
        shared = dense("shared", self.recipe)
        return shared(nn.relu(shared(x)))


@pytest.mark.parametrize("name", oracle.UNIFORM)
def test_a_layer_called_twice_in_a_step(name):
    model = Twice(oracle.UNIFORM[name])
    variables, grads = train(init(model), step_of(functools.partial(gradients, model.apply)), oracle.batches())
    states, expected = oracle.run({"shared": oracle.UNIFORM[name]}, chain=oracle.TWICE)
    found = qlinen.scaling_states(variables)["shared/DotGeneral_0"]
    chex.assert_trees_all_equal((found.scale, found.history), (states["shared"].scale, states["shared"].history))
    chex.assert_trees_all_close(grads["shared"]["kernel"], expected["shared"], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENTS)
def test_wrapped(name):
    check(*train(init(SCANNED), step_of(GRADIENTS[name]), oracle.batches()), oracle.MIXED)


def test_nn_vmap():
    model = Batched(oracle.MIXED)
    check(*train(init(model), step_of(functools.partial(gradients, model.apply)), oracle.batches()), oracle.MIXED)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, x, grad):
    grads = gradients(state.apply_fn, state.params, x, grad)
    return state.apply_gradients(grads=grads), grads["params"]


FROZEN = optax.set_to_zero()


def train_state() -> TrainState:
    state = TrainState.create(apply_fn=SCANNED.apply, params=init(SCANNED), tx=FROZEN)
    return state.replace(step=jnp.zeros((), jnp.int32))


def run(state: TrainState, batches):
    for x, grad in batches:
        state, grads = train_step(state, x, grad)
    return state, grads


def test_scanned_and_donated_in_the_train_state_of_flax():
    state = train_state()
    before = state.params[OWG]["head"]["DotGeneral_0"]["state"].scale
    state, grads = run(state, oracle.batches())
    check(state.params, grads, oracle.MIXED)
    assert before.is_deleted()


def test_saved_and_restored_in_the_middle():
    batches = oracle.batches()
    saved = serialization.to_bytes(run(train_state(), batches[:2])[0])
    state, grads = run(serialization.from_bytes(train_state(), saved), batches[2:])
    check(state.params, grads, oracle.MIXED)


@pytest.mark.slow
@on_eight_devices
def test_on_eight_devices(mesh, weights):
    variables = jax.device_put(init(SCANNED), NamedSharding(mesh, P()))
    variables["params"] = jax.device_put(variables["params"], NamedSharding(mesh, weights))
    step = step_of(functools.partial(gradients, SCANNED.apply))
    variables, grads = train(variables, step, oracle.batches(), NamedSharding(mesh, P("data")))
    assert jax.tree.leaves(grads)[0].sharding.num_devices == 8
    check(variables, grads, oracle.MIXED)


@pytest.mark.parametrize("name", oracle.POISONS)
@pytest.mark.parametrize("tensor", ["input", "gradient"])
def test_hostile_tensors(name, tensor):
    batches, state = oracle.poisoned(name, tensor), train_state()
    for step in range(len(batches)):
        state, _ = run(state, batches[step : step + 1])
        for scaling_state in qlinen.scaling_states(state.params).values():
            chex.assert_tree_all_finite((scaling_state.scale, scaling_state.history))
            assert (scaling_state.scale > 0).all() and (scaling_state.history >= 0).all()
        check_states(state.params, oracle.MIXED, batches[: step + 1])
