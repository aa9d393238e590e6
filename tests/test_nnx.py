"""Layers, whole-model quantization and differentiation for Flax NNX."""

import functools

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

import q8jax
import q8jax.nnx as qnnx
from q8jax import scaling

DELAYED_INT8 = "/".join(f"{gemm}=int8:tensor:delayed,int8:tensor:delayed" for gemm in ("fwd", "dlhs", "drhs"))
STOCHASTIC = "fwd=e4m3fn:tensor:delayed:stochastic,e4m3fn:tensor:delayed"


def normal(seed: int):
    """An initializer that costs no compilation."""

    def init(key, shape, dtype, out_sharding=None):
        del key, out_sharding
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(8), dtype)

    return init


def linear(seed: int = 0) -> nnx.Linear:
    return nnx.Linear(8, 8, kernel_init=normal(seed), rngs=nnx.Rngs(0))


class Net(nnx.Module):
    """Every kind of layer that quantize_model knows."""

    def __init__(self, seed: int = 0, rngs: nnx.Rngs | None = None):
        options = {"kernel_init": normal(seed), "rngs": rngs or nnx.Rngs(0)}
        self.linear = nnx.Linear(8, 8, **options)
        self.general = nnx.LinearGeneral(8, (2, 4), **options)
        self.layers = nnx.List([nnx.Einsum("bhd,hdk->bk", (2, 4, 8), (8,), **options)])
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, **options)

    def __call__(self, x):
        x = self.layers[0](self.general(nnx.relu(self.linear(x))))
        return self.attention(x[None])[0]


PATHS = ["attention/key", "attention/out", "attention/query", "attention/value", "general", "layers/0", "linear"]


def inputs(rows: int = 16):
    return jax.random.normal(jax.random.key(1), (rows, 8))


def loss_fn(model, x):
    return jnp.mean(model(x) ** 2)


@nnx.jit
def forward(model, x):
    return model(x)


def relative_error(found, exact) -> float:
    return float(jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel()))


def states_of(model):
    return {path: (state.scale, state.history) for path, state in qnnx.scaling_states(model).items()}


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
    einsum = qnnx.Einsum("bd,dk->bk", (8, 8), recipe="int8", kernel_init=normal(0), rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        x = jax.device_put(inputs(), P(None, "data"))
        for model in (layer, einsum):
            nnx.update(model, jax.device_put(nnx.state(model), P()))
            model.kernel.set_value(jax.device_put(model.kernel[...], P("data", None)))
            out = nnx.jit(lambda model, x: model(x, out_sharding=P("data", None)))(model, x)
            assert out.sharding.spec == P("data", None)
            exact = np.asarray(x) @ np.asarray(model.kernel[...])
            assert 1e-3 < relative_error(np.asarray(out), exact) < 0.2


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
