"""Layers, differentiation and train states for Flax Linen."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT as OWG
from flax.training import train_state
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from micro import quick_compiles  # noqa: F401

import q8jax
import q8jax.linen as qlinen

STOCHASTIC = "fwd=e4m3fn:tensor:delayed:stochastic,e4m3fn:tensor:delayed"


def normal(seed: int = 0):
    """An initializer that costs no compilation."""
    return lambda key, shape, dtype: jnp.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(8), dtype)


def inputs(*shape: int):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape or (16, 8)), jnp.float32)


def dense(recipe: str, **options) -> nn.Dense:
    return nn.Dense(8, kernel_init=normal(), dot_general_cls=qlinen.dot_general_cls(recipe), **options)


def loss_of(model: nn.Module):
    return lambda variables, x: jnp.mean(model.apply(variables, x) ** 2)


def relative_error(found, exact) -> float:
    return float(jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel()))


def states_of(variables):
    return {path: (state.scale, state.history) for path, state in qlinen.scaling_states(variables).items()}


def flat_states(variables):
    is_state = lambda leaf: isinstance(leaf, qlinen.DotState)
    found = jax.tree.leaves_with_path(variables.get(OWG, {}), is_leaf=is_state)
    return [("/".join(part.key for part in path[:-1]), state) for path, state in found]


# Layers


@pytest.mark.parametrize("recipe", ["int8", "int8-row", "fp8"])
def test_a_model_that_nobody_calibrated_multiplies_its_weights(recipe):
    model = dense(recipe)
    variables = model.init(jax.random.key(0), inputs())
    exact = nn.Dense(8, kernel_init=normal()).apply({"params": variables["params"]}, inputs())
    assert relative_error(model.apply(variables, inputs()), exact) < 0.06
    assert all(not state.history.any() for _, state in flat_states(variables))


@pytest.mark.parametrize(
    ("quantized", "plain", "shape"),
    [
        (dense("fp8-current"), nn.Dense(8, kernel_init=normal()), (16, 8)),
        (
            nn.DenseGeneral(
                (3, 2), axis=(-2, -1), kernel_init=normal(), dot_general_cls=qlinen.dot_general_cls("fp8-current")
            ),
            nn.DenseGeneral((3, 2), axis=(-2, -1), kernel_init=normal()),
            (5, 2, 4),
        ),
        (
            qlinen.Einsum((2, 4, 6), "bhd,hdk->bk", kernel_init=normal(), recipe="fp8-current"),
            nn.Einsum((2, 4, 6), "bhd,hdk->bk", kernel_init=normal()),
            (5, 2, 4),
        ),
    ],
    ids=["Dense", "DenseGeneral", "Einsum"],
)
def test_layers_have_the_parameters_of_their_namesakes(quantized, plain, shape):
    x = inputs(*shape)
    variables, others = jax.jit(quantized.init)(jax.random.key(0), x), jax.jit(plain.init)(jax.random.key(0), x)
    chex.assert_trees_all_equal(variables["params"], others["params"])
    out, exact = jax.jit(quantized.apply)(variables, x), plain.apply({"params": variables["params"]}, x)
    assert out.dtype == exact.dtype and 5e-3 < relative_error(out, exact) < 0.1


@pytest.mark.parametrize(
    ("equation", "shape", "kernel"),
    [
        ("ab, bc -> ac", (3, 4), (4, 5)),
        ("abc,cde->abde", (2, 3, 4), (4, 5, 6)),
        ("...c,cd->...d", (2, 3, 4), (4, 5)),
        ("...c,...cd->...d", (2, 3, 4), (2, 3, 4, 5)),
        ("...c,...cd->...d", (2, 3, 4), (3, 4, 5)),
        ("abc,adc->adb", (2, 3, 4), (2, 5, 4)),
        ("bc,cd->db", (3, 4), (4, 5)),
    ],
)
def test_einsum_is_that_of_flax_where_nothing_is_quantized(equation, shape, kernel):
    options = {"kernel_init": normal(), "bias_init": normal(7)}
    x = inputs(*shape)
    plain = nn.Einsum(kernel, **options)
    quantized = qlinen.Einsum(kernel, recipe="fp32", **options)
    variables = quantized.init(jax.random.key(0), x, equation)
    chex.assert_trees_all_equal(variables, plain.init(jax.random.key(0), x, equation))
    out, exact = quantized.apply(variables, x, equation), plain.apply(variables, x, equation)
    chex.assert_trees_all_close(out, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("equation", ["ab,bc", "ab->a", "ab,bc,cd->ad"])
def test_an_equation_needs_two_operands_and_an_arrow(equation):
    with pytest.raises(ValueError, match="must have two operands and '->'"):
        qlinen.Einsum((4, 5), equation).init(jax.random.key(0), inputs(3, 4))


def test_attention_takes_it():
    cls = qlinen.dot_general_cls("fp8-current")
    attention = nn.MultiHeadDotProductAttention(2, qkv_dot_general_cls=cls, out_dot_general_cls=cls)
    variables = jax.eval_shape(attention.init, jax.random.key(0), inputs(1, 4, 8))
    paths = {f"{name}/DotGeneral_0" for name in ("query", "key", "value", "out")}
    assert {path for path, _ in flat_states(variables)} == paths


def test_a_misspelt_recipe_is_an_error_at_construction():
    with pytest.raises(ValueError, match="did you mean 'fp8'"):
        qlinen.dot_general_cls("fp9")


def test_a_recipe_that_quantizes_nothing_keeps_nothing():
    model = dense("bf16")
    variables = model.init(jax.random.key(0), inputs())
    assert set(variables) == {"params"}
    assert jnp.isfinite(qlinen.value_and_grad(loss_of(model))(variables, inputs())[0])
    chex.assert_trees_all_equal(qlinen.calibrate(loss_of(model), variables, inputs()), variables)
    assert qlinen.scaling_states(variables) == {}


def test_the_state_of_another_recipe_is_refused():
    variables = jax.eval_shape(dense("fp8").init, jax.random.key(0), inputs())
    with pytest.raises(ValueError, match="has recipe .* but its state was made for .*: take the collection _overwrite"):
        jax.eval_shape(dense("fp8/margin=1").apply, variables, inputs())


# Differentiation


class Twice(nn.Module):
    """One layer used as often as the call says, and one beside it."""

    @nn.compact
    def __call__(self, x, uses=1):
        layer, other = dense("fp8/history=4", name="layer"), dense("fp8/history=4", name="other")
        x = other(x)
        for _ in range(uses):
            x = layer(x)
        return x


TWICE = Twice()


def twice_loss(uses: int):
    return lambda variables, x: jnp.mean(TWICE.apply(variables, x, uses) ** 2)


LOSSES = {uses: twice_loss(uses) for uses in (0, 1, 2)}
PLAIN = {uses: jax.jit(jax.value_and_grad(loss)) for uses, loss in LOSSES.items()}


evaluate = jax.jit(LOSSES[1])


@functools.cache
def twice_variables():
    return jax.jit(TWICE.init)(jax.random.key(0), inputs())


def twice_state() -> train_state.TrainState:
    variables = jax.tree.map(jnp.copy, twice_variables())
    return train_state.TrainState.create(apply_fn=TWICE.apply, params=variables, tx=optax.sgd(0.1))


def test_plain_value_and_grad_is_right_for_single_use():
    ours = plain = twice_state()
    for step in range(3):
        x = inputs() * 2.0**step
        found, grads = qlinen.value_and_grad(LOSSES[1])(ours.params, x)
        ours = ours.apply_gradients(grads=grads)
        expected, grads = PLAIN[1](plain.params, x)
        plain = plain.apply_gradients(grads=grads)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
    chex.assert_trees_all_close(ours.params, plain.params, rtol=1e-5)
    chex.assert_trees_all_close(states_of(ours.params), states_of(plain.params), rtol=1e-5)
    assert (qlinen.scaling_states(plain.params)["layer/DotGeneral_0"].history[:, :3] > 0).all()


@pytest.mark.parametrize("uses", [0, 2])
def test_plain_value_and_grad_is_loud_otherwise(uses):
    state = twice_state()
    loss, grads = PLAIN[uses](state.params, inputs())
    assert jnp.isfinite(loss)
    state = state.apply_gradients(grads=grads)
    assert jnp.isnan(evaluate(state.params, inputs()))
    assert jnp.isnan(qlinen.value_and_grad(LOSSES[1])(state.params, inputs())[0])


@pytest.mark.parametrize("uses", [0, 2])
def test_outside_jit_a_sum_over_uses_names_its_cause(uses):
    state = twice_state()
    _, grads = PLAIN[uses](state.params, inputs())
    broken = state.apply_gradients(grads=grads).params
    ours = qlinen.TrainState.create(apply_fn=TWICE.apply, params=state.params, tx=optax.sgd(0.1))
    message = f"state of layer/DotGeneral_0 is a sum over {uses} uses .* by q8jax.linen.value_and_grad"
    for call in (
        lambda: ours.apply_gradients(grads=grads),
        lambda: qlinen.scaling_states(broken),
        lambda: qlinen.calibrate(LOSSES[1], broken, inputs()),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_microbatches_added_up_name_their_cause_and_joined_ones_pass():
    state = qlinen.TrainState.create(apply_fn=TWICE.apply, params=twice_variables(), tx=optax.sgd(0.1))
    _, grads = qlinen.value_and_grad(LOSSES[1])(state.params, inputs())
    with pytest.raises(ValueError, match="a sum over 2 uses .* microbatches by q8jax.scaling.combine"):
        state.apply_gradients(grads=jax.tree.map(jnp.add, grads, grads))
    state.apply_gradients(grads={**grads, OWG: q8jax.scaling.combine(grads[OWG], grads[OWG])})
    jax.eval_shape(lambda grads: state.apply_gradients(grads=grads), grads)


def test_a_layer_without_use_leaves_a_hole_and_keeps_its_scale():
    state = twice_state()
    for uses in (2, 0):
        before = qlinen.scaling_states(state.params)["layer/DotGeneral_0"].scale
        _, grads = qlinen.value_and_grad(LOSSES[uses])(state.params, inputs())
        state = state.apply_gradients(grads=grads)
    after = qlinen.scaling_states(state.params)["layer/DotGeneral_0"]
    chex.assert_trees_all_equal(after.scale[:2], before[:2])
    assert (after.history[:, 0] == 0).all() and (after.history[:, 1] > 0).all()


def test_argnums_and_aux():
    state, x = twice_state(), inputs()
    # With scales of its own a gradient loses nothing by being halved.
    state = state.apply_gradients(grads=qlinen.value_and_grad(LOSSES[1])(state.params, x)[1])
    loss = lambda scale, variables, x: (scale * LOSSES[1](variables, x), {"rows": x.shape[0]})
    (value, aux), grads = qlinen.value_and_grad(loss, argnums=1, has_aux=True)(jnp.float32(0.5), state.params, x)
    expected, expected_grads = qlinen.value_and_grad(LOSSES[1])(state.params, x)
    chex.assert_trees_all_close((value, aux["rows"]), (0.5 * expected, 16), rtol=1e-6)
    half = jax.tree.map(lambda g: 0.5 * g, expected_grads["params"])
    chex.assert_trees_all_close(grads["params"], half, rtol=0.1, atol=1e-3)
    assert jax.tree.structure(grads) == jax.tree.structure(state.params)


def test_the_same_loss_is_compiled_once():
    traces, state = [], twice_state()

    def counted(variables, x):
        traces.append(x.shape)
        return LOSSES[1](variables, x)

    for _ in range(3):
        _, grads = qlinen.value_and_grad(counted)(state.params, inputs())
        state = state.apply_gradients(grads=grads)
    assert len(traces) == 1


def test_what_is_not_finite_shows_in_the_amaxes():
    state = twice_state()
    _, grads = qlinen.value_and_grad(LOSSES[1])(state.params, inputs().at[0, 0].set(jnp.nan))
    amax = grads[OWG]["other"]["DotGeneral_0"]["state"].amax
    assert jnp.isnan(amax[0]) and jnp.isfinite(amax[1])


def test_a_shard_map_observes_what_the_whole_batch_has():
    mesh, x = Mesh(np.array(jax.devices()), ("data",)), jnp.round(4 * inputs())
    forward = functools.partial(TWICE.apply, uses=2)

    def sharded(variables, x):
        return jnp.sum(jax.shard_map(forward, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(variables, x))

    variables = twice_state().params
    plain = qlinen.value_and_grad(lambda variables, x: jnp.sum(forward(variables, x)))(variables, x)
    chex.assert_trees_all_close(qlinen.value_and_grad(sharded)(variables, x), plain, rtol=1e-5, atol=1e-5)


# Train states


class WithStatistics(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(dense("fp8")(x))


@pytest.mark.parametrize("cls", [train_state.TrainState, qlinen.TrainState])
def test_other_collections_survive_ours_and_not_that_of_flax(cls):
    model, x = WithStatistics(), inputs()
    state = cls.create(apply_fn=model.apply, params=jax.jit(model.init)(jax.random.key(0), x), tx=optax.sgd(0.1))

    def loss(variables, x):
        out, updates = model.apply(variables, x, mutable=["batch_stats"])
        return jnp.mean(out**2), updates

    for _ in range(2 if cls is qlinen.TrainState else 1):
        (_, updates), grads = qlinen.value_and_grad(loss, has_aux=True)(state.params, x)
        state = state.apply_gradients(grads=grads)
        assert ("batch_stats" in state.params) == (cls is qlinen.TrainState)
        state = state.replace(params={**state.params, **updates})
    assert (state.params["batch_stats"]["BatchNorm_0"]["mean"] != 0).all()
    assert (qlinen.scaling_states(state.params)["Dense_0/DotGeneral_0"].history[:, 0] > 0).all()


def test_our_train_state_takes_plain_parameters_too():
    state = qlinen.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(1.0))
    chex.assert_trees_all_equal(state.apply_gradients(grads={"w": jnp.ones(2)}).params, {"w": jnp.zeros(2)})


# Calibration


def test_calibration_makes_every_scale_right_and_changes_nothing_else():
    model, x = WithStatistics(), inputs() * 1000
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss(variables, x):
        out, updates = model.apply(variables, x, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(out)), updates

    calibrated = qlinen.calibrate(loss, variables, x, has_aux=True)
    chex.assert_trees_all_equal(*({k: v for k, v in tree.items() if k != OWG} for tree in (calibrated, variables)))
    assert jax.tree.structure(calibrated) == jax.tree.structure(variables)
    state = qlinen.scaling_states(calibrated)["Dense_0/DotGeneral_0"]
    largest = np.array([jnp.max(jnp.abs(a)) for a in (x, variables["params"]["Dense_0"]["kernel"])])
    np.testing.assert_array_equal(state.history[:2, 0], largest)
    np.testing.assert_array_equal(state.scale[:2], np.exp2(np.ceil(np.log2(largest / 448))))
    _, grads = qlinen.value_and_grad(loss, has_aux=True)(calibrated, x)
    observed = grads[OWG]["Dense_0"]["DotGeneral_0"]["state"].amax
    # The first step meets its own scales: the gradient's amax differs only by what quantization does to the output.
    np.testing.assert_allclose(observed, state.history[:, 0], rtol=0.2)


def test_calibrated_again_the_state_goes_on_as_in_a_step():
    recipe = "fwd=e4m3fn:tensor:static,e4m3fn:tensor:delayed/amax=recent/history=3"
    model = dense(recipe)
    variables = jax.jit(model.init)(jax.random.key(0), inputs())
    for factor in (1, 4, 2):
        variables = qlinen.calibrate(loss_of(model), variables, inputs() * factor)
    state = qlinen.scaling_states(variables)["DotGeneral_0"]
    largest = [jnp.max(jnp.abs(a)) for a in (inputs(), variables["params"]["kernel"])]
    chex.assert_trees_all_equal(state.history, jnp.stack([jnp.zeros(3).at[0].set(largest[0]), jnp.full(3, largest[1])]))
    assert state.recipe == q8jax.Recipe.parse(recipe)


# Stochastic rounding


def test_each_call_and_step_rounds_by_itself():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = dense(STOCHASTIC, name="layer", use_bias=False)
            return jnp.stack([layer(x), layer(x), dense(STOCHASTIC, name="other", use_bias=False)(x)])

    model, x = Pair(), inputs()
    variables = jax.jit(model.init)({"params": jax.random.key(0), "rounding": jax.random.key(1)}, x)
    apply = jax.jit(lambda key: model.apply(variables, x, rngs={"rounding": key}))
    steps = [apply(jax.random.key(step)) for step in range(2)]
    rounded = np.concatenate(steps).reshape(6, -1)
    assert len(np.unique(rounded, axis=0)) == 6
    chex.assert_trees_all_equal(apply(jax.random.key(1)), steps[1])
    exact = (x @ variables["params"]["layer"]["kernel"]).ravel()
    assert relative_error(jnp.mean(rounded, axis=0), exact) < 0.8 * relative_error(jnp.asarray(rounded[0]), exact)
