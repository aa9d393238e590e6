"""The update rule against NumPy, and how amaxes leave a differentiated function."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling_oracle as oracle
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from q8jax import scaling
from q8jax.dot import dot_general
from q8jax.meshes import multiply
from q8jax.recipe import Recipe

MATMUL = (((1,), (0,)), ((), ()))
STATIC = "/".join(f"{gemm}=e4m3fn:tensor:static,e4m3fn:tensor:static" for gemm in ("fwd", "dlhs", "drhs"))
RULES = [
    f"{base}/history={history}/amax={amax}/margin={margin}/scales={scales}"
    for base, history, amax, margin, scales in [
        ("fp8", 1, "max", 0, "float32"),
        ("fp8", 3, "max", 2, "power_of_two"),
        ("fp8", 3, "recent", 0, "e8m0"),
        ("fp8", 16, "max", 0, "float32"),
        (oracle.INT8, 1, "recent", 1, "float32"),
        (oracle.INT8, 3, "max", 0, "float32"),
        (oracle.INT8, 16, "recent", 16, "power_of_two"),
    ]
]
UPDATE = jax.jit(scaling.update)


def observed(steps: int, shape: tuple[int, ...], rng) -> np.ndarray:
    """Amaxes [steps, *shape] of every magnitude, with zeros and non-finite ones among them."""
    values = np.exp2(rng.uniform(-20, 20, (steps, *shape)))
    hostile = rng.choice([0.0, np.nan, np.inf, 1e-36, 3e38, 1e-45], values.shape)
    return np.where(rng.uniform(size=values.shape) < 0.4, hostile, values).astype(np.float32)


def test_twenty_steps_of_every_rule_at_once():
    rng = np.random.default_rng(0)
    recipes = [Recipe.parse(text) for text in RULES]
    states = [scaling.init(recipe) for recipe in recipes] + [scaling.init(recipes[1], stack=(2, 2))]
    expected = [oracle.State.fresh(recipe) for recipe in recipes] + [[oracle.State.fresh(recipes[1])] * 4]
    amaxes = [observed(20, state.scale.shape, rng) for state in states]
    # A window of holes: nothing healthy is seen for long enough to empty every history but the longest.
    amaxes = [np.where(np.arange(20).reshape(20, *[1] * (a.ndim - 1)) // 5 == 2, np.float32(np.nan), a) for a in amaxes]
    for step in range(20):
        now = [a[step] for a in amaxes]
        states = UPDATE(states, now)
        for i, recipe in enumerate(recipes):
            expected[i] = expected[i].following(now[i], recipe)
            chex.assert_trees_all_equal((states[i].scale, states[i].history), (expected[i].scale, expected[i].history))
        rows = now[-1].reshape(4, -1)
        expected[-1] = [state.following(row, recipes[1]) for state, row in zip(expected[-1], rows, strict=True)]
        chex.assert_trees_all_equal(states[-1].scale.reshape(4, -1), np.stack([s.scale for s in expected[-1]]))
        chex.assert_trees_all_equal(states[-1].history.reshape(4, 3, 3), np.stack([s.history for s in expected[-1]]))
        for state in states:
            assert (jnp.isfinite(state.scale) & (state.scale > 0)).all()
            assert (jnp.isfinite(state.history) & (state.history >= 0)).all()


def test_the_window_is_strict():
    state = scaling.init(Recipe.parse(f"{oracle.INT8}/history=3"))
    amaxes = [1.0, 64.0, 1.0, 1.0, 1.0, 2.0]
    used = []  # the scale that each step uses, times 127
    for amax in amaxes:
        used.append(float(state.scale[0]) * 127)
        state = UPDATE(state, jnp.full(3, amax, jnp.float32))
    # Step t sees the amaxes of t-3 … t-1, so the spike of step 1 lasts from step 2 to step 4.
    np.testing.assert_allclose(used, [127, 1, 64, 64, 64, 1], rtol=1e-6)


def test_a_window_of_holes_keeps_the_last_scale():
    state = UPDATE(scaling.init(Recipe.parse("fp8/history=2")), jnp.full(3, 7, jnp.float32))
    scale = state.scale
    for amax in (np.nan, 0.0, np.inf, np.nan):
        state = UPDATE(state, jnp.full(3, amax, jnp.float32))
        chex.assert_trees_all_equal(state.scale, scale)
    assert (state.history == 0).all()
    state = UPDATE(state, jnp.full(3, 1e-3, jnp.float32))  # and the next healthy step recovers at once
    chex.assert_trees_all_equal(state.scale, UPDATE(scaling.init(state.recipe), jnp.full(3, 1e-3, jnp.float32)).scale)


def test_static_scales_take_the_first_amax_and_never_move():
    state = scaling.init(Recipe.parse(STATIC))
    for amax in (np.nan, 0.0, 5.0, 100.0, 1e-3, np.nan, 100.0, 100.0):
        state = UPDATE(state, jnp.full(3, amax, jnp.float32))
    np.testing.assert_allclose(state.scale, 5 / 448, rtol=1e-6)
    np.testing.assert_array_equal(state.history, np.pad(np.full((3, 1), 5.0, np.float32), ((0, 0), (0, 15))))


def test_static_scaling_observes_in_calibration_only():
    x, w = jnp.full((2, 2), 3.0), jnp.full((2, 2), 5.0)

    def amaxes(text, **options):
        recipe = Recipe.parse(f"{text}/compute=float32")
        product = lambda scale: jnp.sum(dot_general(x, w, MATMUL, recipe, scaling.observing(scale), **options))
        return jax.jit(jax.grad(product))(jnp.ones(len(recipe.slots))).tolist()

    assert amaxes(STATIC) == [0, 0, 0]
    assert amaxes(STATIC, calibrating=True) == [3, 5, 1]
    assert amaxes(STATIC.replace("static", "delayed")) == [3, 5, 1]
    # One tensor that is scaled in both ways is observed.
    assert amaxes("fwd=e4m3fn:tensor:static,none/drhs=e4m3fn:tensor:delayed,none") == [3, 3]


def test_static_and_delayed_slots_of_one_dot_follow_their_own_rules():
    mixed = Recipe.parse("fp8/fwd=e4m3fn:tensor:delayed,e4m3fn:tensor:static/dlhs=none,none/drhs=none,none")
    state = scaling.init(mixed)
    for amax in (2.0, 8.0):
        state = UPDATE(state, jnp.full(2, amax, jnp.float32))
    np.testing.assert_array_equal(state.history[:, 0], np.float32([8, 2]))


def test_one_tensor_in_one_format_can_be_static_in_a_gemm_and_delayed_in_another():
    recipe = Recipe.parse("fwd=int8:tensor:static,none/drhs=int8:tensor:delayed,none/compute=float32/history=1")
    x, w = jnp.float32([[1, 0.5]]), jnp.eye(2)
    loss = lambda scale, w, x: jnp.sum(dot(x, w, scaling.observing(scale), recipe))
    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    state = UPDATE(scaling.init(recipe), gradients(jnp.ones(2), w, x)[1][0])
    state = UPDATE(state, gradients(state.scale, w, 127 * x)[1][0])
    np.testing.assert_allclose(state.scale, [1, 1 / 127], rtol=1e-6)  # delayed, static
    out, (_, dw) = gradients(state.scale, w, jnp.float32([[100, 64]]))
    assert out == 2
    np.testing.assert_array_equal(dw, [[100, 100], [64, 64]])


def test_calibration_takes_current_scales_and_keeps_the_slots():
    recipe = Recipe.parse("fwd=int8:tensor:static,none/drhs=int8:tensor:delayed,none/compute=float32")
    x, w = jnp.float32([[254, 64]]), jnp.eye(2)
    product = functools.partial(dot_general, dimension_numbers=MATMUL, recipe=recipe, calibrating=True)
    loss = lambda scale, w: jnp.sum(product(x, w, scale=scaling.observing(scale)))
    out, (amaxes, dw) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.full(2, 1e-3), w)
    assert out == 254 + 64
    np.testing.assert_array_equal(amaxes, [254, 254])
    np.testing.assert_array_equal(dw, [[254, 254], [64, 64]])


def test_a_model_without_state_is_left_alone():
    state = scaling.init(Recipe.parse("bf16"))
    chex.assert_trees_all_equal(UPDATE([state], [state.scale]), [state])


def test_combine_takes_the_max_and_keeps_what_is_not_finite():
    first, second = {"a": jnp.float32([1, 5, np.nan])}, {"a": jnp.float32([2, 3, 4])}
    chex.assert_trees_all_equal(scaling.combine(first, second), {"a": jnp.float32([2, 5, np.nan])})
    chex.assert_trees_all_equal(scaling.combine(second, first), {"a": jnp.float32([2, 5, np.nan])})


def kernels(recipe: str, layers: int, stacked: bool) -> tuple[int, int]:
    """(instructions of the entry computation, reductions) of the update of so many dots."""
    stack = (layers,) if stacked else ()
    states = [scaling.init(Recipe.parse(recipe), stack) for _ in range(1 if stacked else layers)]
    text = UPDATE.lower(states, [state.scale for state in states]).compile().as_text()
    entry = re.findall(r"= .* (fusion|reduce|concatenate|copy|call)\(", text[text.index("ENTRY") :])
    return len(entry), len(re.findall(r" reduce\(", text))


@pytest.mark.parametrize("recipe", ["fp8", f"{oracle.INT8}/amax=recent"])
def test_the_update_does_not_grow_with_depth(recipe):
    assert kernels(recipe, 2, stacked=True) == kernels(recipe, 8, stacked=True)
    (few, reductions), (many, same_reductions) = kernels(recipe, 2, stacked=False), kernels(recipe, 8, stacked=False)
    assert same_reductions == reductions
    assert many - few <= 2 * (8 - 2)  # scale and history of each further dot are buffers of their own


FP8 = Recipe.parse("fp8")


def dot(x, w, scale, recipe=FP8):
    return dot_general(x, w, MATMUL, recipe, scale)


def amaxes_of(loss):
    """Jitted gradient of a loss(scale, *args) with respect to its scales, which observe."""
    return jax.jit(jax.grad(lambda scale, *args: loss(scaling.observing(scale), *args)))


def test_uses_are_joined_by_max_and_no_use_is_its_zero():
    x, w, ones = jnp.float32([[1, -3]]), jnp.float32([[2, 0], [0, 0.5]]), jnp.ones(3)
    twice = lambda s, x: jnp.sum(dot(dot(x, w, s), w, s))
    chex.assert_trees_all_equal(amaxes_of(twice)(ones, x), jnp.float32([3, 2, 2]))
    branch = lambda s, x: lax.cond(x[0, 0] > 0, lambda: jnp.sum(dot(x, w, s)), lambda: jnp.sum(x))
    chex.assert_trees_all_equal(amaxes_of(branch)(ones, x), jnp.float32([3, 2, 1]))
    chex.assert_trees_all_equal(amaxes_of(lambda s, x: jnp.sum(x))(ones, x), jnp.zeros(3))
    chex.assert_trees_all_equal(amaxes_of(branch)(ones, -x), jnp.full(3, -jnp.inf))
    chex.assert_trees_all_equal(UPDATE(scaling.init(FP8), jnp.full(3, -jnp.inf)), scaling.init(FP8))


def test_observing_twice_is_observing_once_and_keeps_the_values():
    seen = jax.jit(lambda s: scaling.readable(scaling.observing(scaling.observing(s))))(jnp.float32([1, 2]))
    chex.assert_trees_all_equal(seen, jnp.float32([1, 2]))


def test_observing_outside_jit_says_so():
    loss = lambda scale: jnp.sum(dot(jnp.ones((2, 2)), jnp.ones((2, 2)), scaling.observing(scale)))
    for function in (loss, jax.grad(loss)):
        with pytest.raises(ValueError, match=r"wrap the differentiated function in jax\.jit"):
            function(jnp.ones(3))


def test_examples_that_share_a_scale_are_one_tensor_and_models_are_not():
    x, ones = jnp.float32([[[1, -3]], [[5, 2]]]), jnp.ones(3)
    w = jnp.float32([[2, 0], [0, 0.5]])
    shared = lambda s, x: jnp.sum(jax.vmap(lambda x: dot(x, w, s))(x))
    chex.assert_trees_all_equal(amaxes_of(shared)(ones, x), jnp.float32([5, 2, 1]))
    ensemble = jax.jit(jax.vmap(amaxes_of(lambda s, x: jnp.sum(dot(x, w, s)))))
    chex.assert_trees_all_equal(ensemble(jnp.ones((2, 3)), x), jnp.float32([[3, 2, 1], [5, 2, 1]]))
    one_batch = jax.jit(jax.vmap(amaxes_of(lambda s, x: jnp.sum(dot(x, w, s))), in_axes=(0, None)))
    chex.assert_trees_all_equal(one_batch(jnp.ones((2, 3)), x[0]), jnp.float32([[3, 2, 1]] * 2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_example_that_is_not_finite_is_not_hidden_by_the_others(bad):
    # Many examples, because XLA:CPU loses a NaN only in a vectorized maximum.
    x = jnp.ones((4096, 1, 2)).at[1234].set(bad)
    shared = lambda s, x: jnp.sum(jax.vmap(lambda x: dot(x, jnp.eye(2), s))(x))
    assert not jnp.isfinite(amaxes_of(shared)(jnp.ones(3), x)[0])


@pytest.mark.parametrize("shapes", [((0, 2), (2, 3)), ((2, 0), (0, 3)), ((2, 3), (3, 0))])
def test_an_empty_axis_leaves_holes_and_keeps_the_scale(shapes):
    x, w = (jnp.ones(shape) for shape in shapes)
    state = dataclasses.replace(scaling.init(FP8), scale=jnp.full(3, 0.25))
    amaxes = amaxes_of(lambda s, x, w: jnp.sum(dot(x, w, s)))(state.scale, x, w)
    sizes = [x.size, w.size, x.shape[0] * w.shape[1]]
    chex.assert_trees_all_equal(amaxes, jnp.float32([float(size > 0) for size in sizes]))
    following = UPDATE(state, amaxes)
    assert (jnp.isfinite(following.scale) & (following.scale > 0)).all()
    chex.assert_trees_all_equal(following.scale[amaxes == 0], state.scale[amaxes == 0])


def step_on_eight_devices(check_vma: bool):
    product = functools.partial(dot_general, dimension_numbers=MATMUL, recipe=FP8)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def loss(scale, x, w):
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data"), check_vma=check_vma
        )
        def forward(scale, x, w):
            for _ in range(2):
                x = multiply(product, None, x, w, scale, None)
            return x

        return jnp.sum(forward(scaling.observing(scale), x, w))

    return jax.jit(jax.grad(loss, argnums=(0, 2)))


def test_devices_of_a_shard_map_are_one_tensor():
    x = jnp.float32(np.random.default_rng(0).integers(-3, 4, (8, 4)))
    w = jnp.float32(np.random.default_rng(1).integers(-2, 3, (4, 4)))
    plain = jax.jit(
        jax.grad(lambda s, x, w: jnp.sum(dot(dot(x, w, (s := scaling.observing(s))), w, s)), argnums=(0, 2))
    )
    chex.assert_trees_all_equal(step_on_eight_devices(True)(jnp.ones(3), x, w), plain(jnp.ones(3), x, w))


def test_a_shard_map_that_hides_its_sums_raises():
    with pytest.raises(TypeError, match="leave check_vma"), scaling.explained():
        step_on_eight_devices(False)(jnp.ones(3), jnp.ones((8, 4)), jnp.ones((4, 4)))


def test_an_index_into_a_stack_says_what_to_use():
    stack = jnp.ones((2, 3))
    with pytest.raises(TypeError, match=r"not by stack\[i\]"), scaling.explained():
        amaxes_of(lambda s, x: jnp.sum(dot(x, x, s[1])))(stack, jnp.ones((2, 2)))
    taken = amaxes_of(lambda s, x: jnp.sum(dot(x, x, lax.dynamic_index_in_dim(s, 1, keepdims=False))))
    chex.assert_trees_all_equal(taken(stack, jnp.ones((2, 2))), jnp.float32([[0, 0, 0], [1, 1, 1]]))


def test_other_errors_pass_unchanged():
    with pytest.raises(ValueError, match="^unrelated$"), scaling.explained():
        raise ValueError("unrelated")
