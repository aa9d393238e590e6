"""What a probe sees of a dot, against NumPy; under every transform; and without a trace where nobody looks."""

import functools

import dot_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from micro import quick_compiles  # noqa: F401

import q8jax.nnx as qnnx
from q8jax import Recipe, dot_general, telemetry
from q8jax.telemetry import BINADES, FIRST_BINADE, KINDS, Probe

RECIPES = {
    "fp8": "fp8",
    "fp8-current": "fp8-current/margin=1",
    "fp8-row": "fp8-row",
    "mxfp8": "mxfp8",
    "int8": "int8",
    "int8-tensor": "int8-tensor",
    "unscaled": "fp8-unscaled",
    "weight-only": "fwd=none,int8:row/dlhs=none,int8:row",
}
DIMENSIONS = (((1,), (0,)), ((), ()))
F64 = np.float64


def tensors(seed=0, m=64, k=128, n=96):
    rng = np.random.default_rng(seed)
    x, w, g = (rng.standard_t(4, shape) for shape in ((m, k), (k, n), (m, n)))
    x[0, :5] = [0, 1e-4, -2e-3, 300, -1e-30]
    return tuple(jnp.asarray(a * s, jnp.bfloat16) for a, s in ((x, 1), (w, 0.05), (g, 1e-4)))


def scales(recipe):
    """A scale that is somewhat too small for each slot, so that something saturates."""
    small = {"lhs": 2.0**-4, "rhs": 2.0**-11, "grad": 2.0**-21}
    coarse = {"lhs": 2.0**-1, "rhs": 2.0**-9, "grad": 2.0**-18}
    of_range = {"float8_e5m2": 2.0**-7}
    found = [
        small[s.tensor] * of_range.get(s.qtype, 1) if s.format.kind == "float" else coarse[s.tensor]
        for s in recipe.slots
    ]
    return jnp.asarray(found, jnp.float32)


@functools.cache
def seen(name):
    """A recipe, its scales, the tensors, what was seen of them, and the results with a probe and without."""
    recipe = Recipe.parse(RECIPES[name])
    x, w, g = tensors()
    scale = scales(recipe)
    product = functools.partial(dot_general, dimension_numbers=DIMENSIONS, recipe=recipe)

    @jax.jit
    def look(x, w, g, scale, probe):
        watched = lambda x, w, probe: product(x, w, scale=scale, probe=probe.observing())
        out, pullback = jax.vjp(watched, x, w, probe)
        return out, *pullback(g)

    @jax.jit
    def plain(x, w, g, scale):
        out, pullback = jax.vjp(lambda x, w: product(x, w, scale=scale), x, w)
        return out, *pullback(g)

    *results, probe = look(x, w, g, scale, Probe.of(KINDS))
    return recipe, scale, (x, w, g), telemetry.summary(probe), results, plain(x, w, g, scale)


def operand(recipe, tensor):
    """The first quantized operand that a tensor is, its axes with the contracting one last, and its slot's place."""
    entries = {
        "lhs": [(recipe.fwd.first, "mk"), (recipe.drhs.first, "km")],
        "rhs": [(recipe.fwd.second, "nk"), (recipe.dlhs.second, "kn")],
        "grad": [(recipe.dlhs.first, "mn"), (recipe.drhs.second, "nm")],
    }
    return next(((o, axes) for o, axes in entries[tensor] if o is not None), (None, None))


def expected(recipe, scale, tensor, x):
    """The statistics of a tensor, worked out in NumPy."""
    own, axes = operand(recipe, tensor)
    stored = {"lhs": "mk", "rhs": "kn", "grad": "mn"}[tensor]
    wide = np.asarray(x, F64)
    unit = np.abs(wide).max()
    centred = wide / unit - (wide / unit).mean()
    found = {"amax": unit, "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2}
    if own is None:
        return found
    turned = np.asarray(x, np.float32)
    turned = turned.T if axes != stored else turned
    place = [i for i, s in enumerate(recipe.slots) if s.tensor == tensor and s.qtype == own.qtype]
    values, used = dot_oracle.quantized(turned[None], own, recipe, np.asarray(scale)[place[0]])
    turned, top = turned[None].astype(F64), float(own.format.max)
    half_a_step = {"float8_e4m3fn": 16, "float8_e5m2": 4096, "int8": 0.5}[own.qtype]  # at the top of the format
    exact, back = turned / used, values * used
    staleness = max(
        (np.abs(turned)[used == s].max() / s * 2.0**recipe.margin / top for s in np.unique(used)), default=0
    )
    nonzero = turned != 0
    return {
        **found,
        "scale": used.max(),
        "staleness": staleness,
        "saturation": (np.abs(exact) > top + half_a_step).mean(),
        "underflow": (nonzero & (back == 0)).sum() / nonzero.sum(),
        "sqnr": 10 * np.log10((turned**2).sum() / ((turned - back) ** 2).sum()),
        "binades": np.histogram(
            np.clip(np.floor(np.log2(np.abs(exact[exact != 0]))), FIRST_BINADE, FIRST_BINADE + BINADES - 1),
            np.arange(FIRST_BINADE, FIRST_BINADE + BINADES + 1) - 0.5,
        )[0],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_tensor_has_the_statistics_that_numpy_finds(name):
    recipe, scale, arrays, found, _, _ = seen(name)
    for tensor, x in zip(("lhs", "rhs", "grad"), arrays, strict=True):
        wanted = expected(recipe, scale, tensor, x)
        for key, value in wanted.items():
            exact = key in ("amax", "scale", "saturation", "underflow", "binades")
            np.testing.assert_allclose(
                found[tensor][key], value, rtol=1e-6 if exact else 2e-5, err_msg=f"{tensor} {key}"
            )
        for key in found[tensor].keys() - wanted.keys() - {"binades"}:
            assert np.isnan(found[tensor][key]), f"{tensor} {key} of a tensor that is not quantized"


def test_what_is_seen_is_not_trivial():
    fp8, unscaled, row = (seen(name)[3] for name in ("fp8", "unscaled", "fp8-row"))
    assert fp8["lhs"]["saturation"] > 0 and fp8["lhs"]["staleness"] > 1
    assert 0 < fp8["lhs"]["underflow"] < 0.01 < unscaled["grad"]["underflow"]
    assert fp8["grad"]["sqnr"] < 10 < unscaled["grad"]["sqnr"] < 25.3 < row["grad"]["sqnr"] < 33
    assert row["lhs"]["saturation"] == 0


@pytest.mark.parametrize("name", RECIPES)
def test_products_are_compared_with_their_float64_twins(name):
    _, _, (x, w, g), found, results, _ = seen(name)
    x, w, g = (np.asarray(a, F64) for a in (x, w, g))
    twins = {"fwd": x @ w, "dlhs": g @ w.T, "drhs": x.T @ g}
    for (role, r), q in zip(twins.items(), results, strict=True):
        e = np.asarray(q, F64) - r
        bias = (e * r).sum() / (r * r).sum()
        error = np.sqrt((e * e).sum() / (r * r).sum())
        cosine = ((r + e) * r).sum() / np.sqrt((r * r).sum() * ((r + e) ** 2).sum())
        assert found[role]["error"] == pytest.approx(error, rel=2e-3)
        assert found[role]["bias"] == pytest.approx(bias, abs=1e-5)
        assert found[role]["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert found[role]["variance"] == pytest.approx(error**2 - bias**2, rel=1e-2, abs=1e-9)
        if role == "fwd":
            assert found[role]["loss_change"] == pytest.approx((g * e).sum(), rel=1e-2, abs=1e-6)
    assert found["fwd"]["error"] > 0.001


@pytest.mark.parametrize("name", RECIPES)
def test_a_probe_changes_no_bit_of_result_and_gradients(name):
    _, _, _, _, watched, plain = seen(name)
    for a, b in zip(watched, plain, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind of telemetry 'tensor' .did you mean 'tensors'"):
        Probe.of(("tensor",))


def test_another_recipe_can_be_looked_at_than_the_one_that_runs():
    x, w, g = tensors()

    @jax.jit
    def look(x, w, probe):
        product = lambda x, w, probe: dot_general(x, w, DIMENSIONS, "bf16", probe=probe.observing())
        out, pullback = jax.vjp(product, x, w, probe)
        return out, pullback(g)[2]

    out, probe = look(x, w, Probe.of(KINDS, recipe=Recipe.parse("fp8-current/margin=1")))
    bare = dot_general(x, w, DIMENSIONS, "bf16")
    assert np.asarray(out).tobytes() == np.asarray(bare).tobytes()
    found, wanted = telemetry.summary(probe), seen("fp8-current")[3]
    for part in ("lhs", "rhs", "grad", "fwd", "dlhs", "drhs"):
        for key, value in wanted[part].items():
            np.testing.assert_allclose(found[part][key], value, rtol=1e-4, atol=1e-6, err_msg=f"{part} {key}")


class Stack(nnx.Module):
    """Three layers under scan, one of them used twice, and its input."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(16, 16, use_bias=False, rngs=rngs, dtype=jnp.bfloat16)

        self.layers = stack(rngs)
        self.shared = nnx.Linear(16, 16, use_bias=False, rngs=rngs, dtype=jnp.bfloat16)

    def __call__(self, x, remat=False):
        graphdef, layers = nnx.split(self.layers)
        body = lambda x, layer: (x + jnp.tanh(nnx.merge(graphdef, layer)(x)), None)
        x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, self.shared(x), layers)
        return self.shared(x)


def loss_fn(model, x, remat=False):
    return jnp.sum(model(x.astype(jnp.bfloat16), remat).astype(jnp.float32) ** 2) / 64


@pytest.fixture(scope="module")
def model():
    model = qnnx.quantize_model(Stack(nnx.Rngs(0)), "fp8")
    qnnx.calibrate(model, loss_fn, inputs())
    return model


def inputs():
    return jax.random.normal(jax.random.key(1), (8, 16))


def look(model, x, fn=loss_fn):
    loss, grads, probes = qnnx.watching(fn, KINDS)(model, x)
    return loss, grads, jax.device_get(probes)


COUNTS, MAXIMA = ("values", "nonzero", "clipped", "vanished"), ("tops",)


def assert_alike(first, second, rtol):
    """Counts and maxima equal, sums of real numbers nearly so."""
    assert first.keys() == second.keys() == {"layers", "shared"}
    for layer in first:
        a, b = first[layer], second[layer]
        np.testing.assert_array_equal(a.tops, b.tops)
        np.testing.assert_array_equal(a.sums[..., :4], b.sums[..., :4])
        np.testing.assert_array_equal(a.binades, b.binades)
        np.testing.assert_allclose(a.sums, b.sums, rtol=rtol)
        np.testing.assert_allclose(a.gemms[..., 2], b.gemms[..., 2], rtol=rtol)


@pytest.mark.slow
def test_loss_and_gradients_are_those_without_telemetry(model):
    loss, grads, probes = look(model, inputs())
    plain, wanted, _ = qnnx.value_and_grad(loss_fn)(model, inputs())
    assert loss == plain
    jax.tree.map(np.testing.assert_array_equal, grads, wanted)
    assert probes["layers"].sums.shape == (3, 3, 7)
    # Both uses of the shared layer are in its sums, and the larger of them in its maxima.
    assert probes["shared"].sums[0, 0] == 2 * 8 * 16 and probes["layers"].sums[0, 0, 0] == 8 * 16
    states = qnnx.scaling_states(model)
    assert "probe" not in str(nnx.state(model)).lower() and states.keys() == {
        "layers/dot_general",
        "shared/dot_general",
    }


@pytest.mark.slow
def test_remat_and_examples_of_a_vmap_add_up(model):
    _, _, plain = look(model, inputs())
    _, _, remat = look(model, inputs(), functools.partial(loss_fn, remat=True))
    assert_alike(plain, remat, 1e-6)

    def by_example(model, x):
        graphdef, state = nnx.split(model)
        one = lambda row: jnp.sum(nnx.merge(graphdef, state)(row[None].astype(jnp.bfloat16)).astype(jnp.float32) ** 2)
        return jnp.sum(jax.vmap(one)(x)) / 64

    _, _, vmapped = look(model, inputs(), by_example)
    for layer in plain:
        # A weight is one operand of each example.
        rows = np.s_[..., (0, 2), :4]
        np.testing.assert_array_equal(plain[layer].sums[rows], vmapped[layer].sums[rows])
        np.testing.assert_array_equal(plain[layer].tops, vmapped[layer].tops)


@pytest.mark.slow
def test_microbatches_combine(model):
    halves = [look(model, half)[2] for half in jnp.split(inputs(), 2)]
    both = telemetry.combine(*halves)
    _, _, whole = look(model, inputs())
    for layer in whole:
        np.testing.assert_array_equal(both[layer].tops, whole[layer].tops)
        rows = np.s_[..., (0, 2), :4]
        np.testing.assert_array_equal(both[layer].sums[rows], whole[layer].sums[rows])


@pytest.mark.slow
def test_a_batch_split_over_devices_is_seen_whole(model):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharded = jax.device_put(inputs(), NamedSharding(mesh, PartitionSpec("data")))
    assert_alike(look(model, inputs())[2], look(model, sharded)[2], 1e-5)


@pytest.mark.slow
def test_a_mesh_in_the_types_is_seen_whole(model):
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(inputs(), NamedSharding(mesh, PartitionSpec("data")))
        twin = nnx.clone(model)
        nnx.update(twin, jax.device_put(nnx.state(twin), NamedSharding(mesh, PartitionSpec())))
        seen = look(twin, sharded)[2]
    plain = look(model, inputs())[2]
    for layer in plain:
        np.testing.assert_array_equal(plain[layer].sums[..., 0], seen[layer].sums[..., 0])
        # Sums in another order round a few gradients to other numbers.
        np.testing.assert_allclose(plain[layer].tops, seen[layer].tops, rtol=0.02)
        np.testing.assert_allclose(plain[layer].sums[..., (4, 6)], seen[layer].sums[..., (4, 6)], rtol=0.05)


@pytest.mark.slow
def test_the_parts_of_a_shard_map_are_seen_as_one_tensor(model):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def sharded(model, x):
        graphdef, state = nnx.split(model)
        forward = lambda state, x: nnx.merge(graphdef, state)(x.astype(jnp.bfloat16))
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec("data")}
        out = jax.shard_map(forward, mesh=mesh, **specs)(state, x)
        return jnp.sum(out.astype(jnp.float32) ** 2) / 64

    plain, seen = look(model, inputs())[2], look(model, inputs(), sharded)[2]
    for layer in plain:
        np.testing.assert_array_equal(plain[layer].tops, seen[layer].tops)
        # Each device sees the whole weight.
        rows = np.s_[..., (0, 2), :4]
        np.testing.assert_array_equal(plain[layer].sums[rows], seen[layer].sums[rows])


@pytest.mark.slow
def test_layers_that_are_not_asked_for_are_not_looked_at(model):
    recipes = {"shared": Recipe.parse("int8-row")}
    _, _, probes = qnnx.watching(loss_fn, ("gemms",), recipes)(model, inputs())
    assert probes.keys() == {"shared"} and probes["shared"].sums is None
    found = telemetry.summary(probes["shared"])
    assert found.keys() == {"fwd", "dlhs", "drhs"} and 0 < found["fwd"]["error"] < 0.02
