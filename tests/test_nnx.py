"""Training with q8jax.nnx: differentiation, calibration, stochastic rounding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from micro import quick_compiles  # noqa: F401
from nnx_cases import STOCHASTIC, Net, forward, inputs, linear, loss_fn, normal, relative_error

import q8jax.nnx as qnnx
from q8jax import scaling

WEIGHT_ONLY = "fwd=none,int8:tensor:delayed/dlhs=none,int8:tensor:delayed"

# Differentiation


class WithState(nnx.Module):
    """Batch statistics and dropout, which change with every call."""

    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.linear = linear()
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def loss_and_aux(model, batch):
    out = model(batch["x"])
    return jnp.mean(out**2), {"largest": jnp.max(out)}


def train(differentiate, steps: int = 3):
    model = qnnx.quantize_model(WithState(), "fp8")
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    def step(model, optimizer, batch):
        (loss, aux), grads, amaxes = differentiate(model, batch)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        qnnx.update_scaling(model, amaxes)
        return loss, aux

    return model, optimizer, step, [{"x": inputs() * (i + 1)} for i in range(steps)]


def test_inside_and_outside_of_jit_are_the_same_and_other_state_follows():
    model, optimizer, step, batches = train(qnnx.value_and_grad(loss_and_aux, has_aux=True))
    eager = [step(model, optimizer, batch) for batch in batches]
    compiled_model, optimizer, step, batches = train(qnnx.value_and_grad(loss_and_aux, has_aux=True))
    step = nnx.jit(step)
    compiled = [step(compiled_model, optimizer, batch) for batch in batches]
    chex.assert_trees_all_close(eager, compiled, rtol=1e-5)
    numbers = nnx.Not(nnx.RngState)
    chex.assert_trees_all_close(nnx.state(model, numbers), nnx.state(compiled_model, numbers), rtol=1e-4, atol=1e-6)

    assert model.dropout.rngs.count[...] == compiled_model.dropout.rngs.count[...] == 3
    assert (model.norm.mean[...] != 0).all() and (model.norm.var[...] != 1).all()
    assert (model.linear.dot_general.history[:, :3] > 0).all()


def test_gradients_are_those_of_nnx_grad():
    model, x = qnnx.quantize_model(linear(), "fp8-current"), inputs()
    loss, grads, _ = qnnx.value_and_grad(loss_fn)(model, x)
    plain_loss, plain = nnx.jit(nnx.value_and_grad(loss_fn))(model, x)
    chex.assert_trees_all_close((loss, grads), (plain_loss, plain), rtol=1e-6)


def test_the_same_loss_is_compiled_once():
    traces = []

    def counted(model, x):
        traces.append(x.shape)
        return loss_fn(model, x)

    model = qnnx.quantize_model(linear(), "fp8")
    for _ in range(3):
        _, _, amaxes = qnnx.value_and_grad(counted)(model, inputs())
        qnnx.update_scaling(model, amaxes)
    assert len(traces) == 1


def test_a_model_can_be_closed_over_by_a_scan_of_microbatches():
    model, x = qnnx.quantize_model(linear(), "fp8"), inputs()

    @nnx.jit
    def amaxes_of(model, x):
        zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, qnnx.Scale))
        add = lambda total, x: (scaling.combine(total, qnnx.value_and_grad(loss_fn)(model, x)[2]), None)
        return lax.scan(add, zeros, x.reshape(2, -1, 8))[0]

    amaxes = amaxes_of(model, x)
    chex.assert_trees_all_equal(amaxes["dot_general"]["scale"][0], jnp.max(jnp.abs(x)))


def test_a_layer_without_use_leaves_a_hole_and_keeps_its_scale():
    model = qnnx.quantize_model(nnx.Dict(a=linear(), b=linear(1)), "fp8")
    for loss in (lambda model, x: jnp.sum(model.b(model.a(x))), lambda model, x: jnp.sum(model.a(x))):
        before = model.b.dot_general.scale[...]
        _, _, amaxes = qnnx.value_and_grad(loss)(model, inputs())
        qnnx.update_scaling(model, amaxes)
    chex.assert_trees_all_equal(amaxes["b"]["dot_general"]["scale"][...], jnp.zeros(3))
    chex.assert_trees_all_equal(model.b.dot_general.scale[...], before)
    assert (model.b.dot_general.history[:, 0] == 0).all() and (model.b.dot_general.history[:, 1] > 0).all()


def test_what_is_not_finite_shows_in_the_amaxes():
    model = qnnx.quantize_model(linear(), "fp8")
    _, _, amaxes = qnnx.value_and_grad(loss_fn)(model, inputs().at[0, 0].set(jnp.nan))
    found = amaxes["dot_general"]["scale"][...]
    assert jnp.isnan(found[0]) and jnp.isfinite(found[1]) and jnp.isnan(found[2])


def test_a_shard_map_observes_what_the_whole_batch_has():
    mesh, x = Mesh(np.array(jax.devices()), ("data",)), jnp.round(4 * inputs())
    model = qnnx.quantize_model(nnx.Linear(8, 8, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0)), "fp8")

    def sharded(model, x):
        graphdef, state = nnx.split(model)
        forward = lambda state, x: nnx.merge(graphdef, state)(nnx.merge(graphdef, state)(x))
        return jnp.sum(jax.shard_map(forward, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(state, x))

    plain = qnnx.value_and_grad(lambda model, x: jnp.sum(model(model(x))))(model, x)
    chex.assert_trees_all_close(qnnx.value_and_grad(sharded)(model, x), plain, rtol=1e-6)


def test_a_result_is_sharded_as_it_is_told():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    layer = qnnx.quantize_model(linear(), f"{STOCHASTIC}/scales=power_of_two", rngs=nnx.Rngs(rounding=0))
    einsum = qnnx.Einsum("bd,dk->bk", (8, 8), recipe="int8-row", kernel_init=normal(0), rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        x = jax.device_put(inputs(), P(None, "data"))
        for model in (layer, einsum):
            nnx.update(model, jax.device_put(nnx.state(model), P()))
            model.kernel.set_value(jax.device_put(model.kernel[...], P("data", None)))
            out = nnx.jit(lambda model, x: model(x, out_sharding=P("data", None)))(model, x)
            assert out.sharding.spec == P("data", None)
            exact = np.asarray(x) @ np.asarray(model.kernel[...])
            assert 1e-3 < relative_error(np.asarray(out), exact) < 0.2


@pytest.mark.parametrize("recipe", ["int8", "int8-row", "fp8", WEIGHT_ONLY])
def test_a_model_that_nobody_calibrated_multiplies_its_weights(recipe):
    exact = linear()(inputs())
    layer = qnnx.Linear(8, 8, recipe=recipe, kernel_init=normal(0), rngs=nnx.Rngs(0))
    for model in (qnnx.quantize_model(linear(), recipe), layer):
        assert relative_error(model(inputs()), exact) < 0.06
    stack = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(nnx.Rngs(0).split(3))
    for state in qnnx.scaling_states(qnnx.quantize_model(stack, WEIGHT_ONLY)).values():
        amax = np.abs(stack.kernel[...]).max((1, 2))
        np.testing.assert_array_equal(state.scale, (amax * np.float32(1 / 127))[:, None])
        assert not state.history.any()


# Calibration


def test_calibration_makes_every_scale_right_and_changes_nothing_else():
    model = qnnx.quantize_model(WithState(), "fp8/scales=float32")
    batch = {"x": inputs() * 1000}
    others = nnx.Not(nnx.Any(qnnx.Scale, qnnx.AmaxHistory))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, others)))
    qnnx.calibrate(model, loss_and_aux, batch, has_aux=True)
    after = nnx.to_pure_dict(nnx.state(model, others))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), before, after)))
    dot = model.linear.dot_general
    largest = [jnp.max(jnp.abs(a)) for a in (batch["x"], model.linear.kernel[...])]
    np.testing.assert_allclose(dot.scale[:2], np.array(largest) / 448, rtol=1e-6)
    _, _, amaxes = qnnx.value_and_grad(loss_and_aux, has_aux=True)(model, batch)
    observed = amaxes["linear"]["dot_general"]["scale"][...]
    # The first step meets its own scales: the gradient's amax differs only by what quantization does to the output.
    np.testing.assert_allclose(observed, dot.history[:, 0], rtol=0.1)
    assert not dot.calibrating


def test_calibration_is_the_same_for_static_scales_which_then_stay():
    static = "/".join(f"{gemm}=e4m3fn:tensor:static,e4m3fn:tensor:static" for gemm in ("fwd", "dlhs", "drhs"))
    model = qnnx.quantize_model(linear(), static)
    qnnx.calibrate(model, loss_fn, inputs())
    calibrated = model.dot_general.scale[...]
    np.testing.assert_allclose(calibrated[0], jnp.max(jnp.abs(inputs())) / 448, rtol=1e-6)
    _, _, amaxes = qnnx.value_and_grad(loss_fn)(model, inputs() * 100)
    qnnx.update_scaling(model, amaxes)
    chex.assert_trees_all_equal(model.dot_general.scale[...], calibrated)


def test_a_static_forward_pass_stays_as_calibrated_below_delayed_gradients():
    model = qnnx.quantize_model(linear(), "fp8/fwd=e4m3fn:tensor:static,e4m3fn:tensor:static/amax=recent")
    qnnx.calibrate(model, loss_fn, inputs())
    calibrated = model.dot_general.scale[...]
    _, _, amaxes = qnnx.value_and_grad(loss_fn)(model, inputs() * 64)
    qnnx.update_scaling(model, amaxes)
    factors = (model.dot_general.scale[...] / calibrated)[:4]
    np.testing.assert_array_equal(factors, [64, 1, 1, 1])  # lhs delayed and static, rhs alike


def test_calibrating_ends_with_its_context():
    model = qnnx.quantize_model(Net(), "fp8")
    with pytest.raises(RuntimeError), qnnx.calibrating(model):
        assert model.linear.dot_general.calibrating
        raise RuntimeError
    assert not model.linear.dot_general.calibrating


# Stochastic rounding


def test_stochastic_rounding_needs_rngs():
    with pytest.raises(ValueError, match=r"needs rngs=, for example nnx.Rngs\(rounding=0\)"):
        qnnx.quantize_model(linear(), STOCHASTIC)


def test_each_step_layer_and_place_in_a_stack_rounds_by_itself():
    @nnx.vmap
    def stack(rngs):
        return nnx.Linear(8, 8, kernel_init=nnx.initializers.ones, rngs=rngs)

    model = nnx.Dict(stack=stack(nnx.Rngs(0).split(2)), other=stack(nnx.Rngs(0).split(2)))
    qnnx.quantize_model(model, STOCHASTIC, rngs=nnx.Rngs(rounding=3))
    forward = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))

    @nnx.jit
    def step(model, x):
        loss = lambda model, x: (jnp.float32(0), [forward(model.stack, x), forward(model.other, x)])
        (_, outputs), _, amaxes = qnnx.value_and_grad(loss, has_aux=True)(model, x)
        qnnx.update_scaling(model, amaxes)
        return jnp.concatenate(outputs)

    found = [step(model, inputs()) for _ in range(2)]
    rounded = np.concatenate(found).reshape(8, -1)
    assert len(np.unique(rounded, axis=0)) == 8
    exact = jnp.broadcast_to(jnp.sum(inputs(), axis=1, keepdims=True), (16, 8)).ravel()
    assert 1e-3 < relative_error(jnp.asarray(rounded[0]), exact) < 0.2
    assert relative_error(jnp.mean(rounded, axis=0), exact) < 0.7 * relative_error(jnp.asarray(rounded[0]), exact)

    again = nnx.Dict(stack=stack(nnx.Rngs(0).split(2)), other=stack(nnx.Rngs(0).split(2)))
    qnnx.quantize_model(again, STOCHASTIC, rngs=nnx.Rngs(rounding=3))
    chex.assert_trees_all_equal([step(again, inputs()) for _ in range(2)], found)


def test_folded_keys_make_calls_and_microbatches_round_by_themselves():
    model = qnnx.quantize_model(linear(), STOCHASTIC, rngs=nnx.Rngs(rounding=3))
    x = inputs()

    def twice(model, x):
        outputs = [model(x), qnnx.fold_rounding_keys(model, 1)(x)]
        return jnp.sum(outputs[1]), outputs

    @nnx.jit
    def step(model, x):
        def microbatch(total, number):
            twin = qnnx.fold_rounding_keys(model, number)
            (_, outputs), _, amaxes = qnnx.value_and_grad(twice, has_aux=True)(twin, x)
            return scaling.combine(total, amaxes), jnp.stack(outputs)

        zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, qnnx.Scale))
        return lax.scan(microbatch, zeros, jnp.arange(3))

    key = model.dot_general.rounding_key[...]
    amaxes, rounded = step(model, x)
    assert len(np.unique(rounded.reshape(6, -1), axis=0)) == 6
    chex.assert_trees_all_equal(model.dot_general.rounding_key[...], key)
    chex.assert_trees_all_equal(amaxes["dot_general"]["scale"][0], jnp.max(jnp.abs(x)))
    by_hand = qnnx.fold_rounding_keys(model, 2)
    chex.assert_trees_all_equal(forward(by_hand, x), rounded[2, 0])
    assert by_hand.kernel is model.kernel


def test_devices_of_a_shard_map_round_by_themselves():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    model = qnnx.quantize_model(linear(), STOCHASTIC, rngs=nnx.Rngs(rounding=3))
    graphdef, state = nnx.split(model)
    forward = lambda state, x: nnx.merge(graphdef, state)(x)
    sharded = jax.jit(jax.shard_map(forward, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))
    rows = sharded(state, jnp.tile(inputs(1), (8, 1)))
    assert len(np.unique(rows, axis=0)) > 4
