"""What a run tells of itself: the same run without it, the same numbers in microbatches, remat and when resumed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import leaves, make_tokens, make_trainer, quick_compiles, same  # noqa: F401

from experiments.training.telemetry import formats, line, observe
from q8jax import telemetry
from q8jax.recipe import Recipe

EVERYTHING = ("model", *telemetry.KINDS)
PROJECTIONS = {f"blocks/{name}" for name in ("attention/qkv", "attention/out", "mlp/up", "mlp/down")}


@functools.cache
def start(precision):
    trainer = make_trainer(precision)
    state = trainer.init()
    if trainer.keeps_scales:
        state = {**state, "dots": jax.jit(trainer.calibrate)(state, make_tokens())}
    # The first step has learning rate 0.
    step = jax.jit(trainer.step)
    return trainer, step(state, make_tokens())[0], step


@functools.cache
def seen(precision, microbatches=1, **options):
    """What is seen of the second step of a run."""
    state = start(precision)[1]
    trainer = make_trainer(precision, accumulate=microbatches, **options)
    rows, columns = make_tokens(1).shape[1:]
    tokens = make_tokens(1).reshape(microbatches, rows // microbatches, columns)
    return jax.device_get(jax.jit(functools.partial(observe, trainer, EVERYTHING))(state, tokens))


@pytest.mark.slow
def test_every_dot_is_seen_and_named():
    found = line(start("fp8")[0], seen("fp8")["dots"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["dots"].keys() == found["formats"].keys() == PROJECTIONS
    for layer in PROJECTIONS:
        assert found["formats"][layer] == {"x": "float8_e4m3fn", "w": "float8_e4m3fn", "g": "float8_e4m3fn"}
        assert found["dots"][layer].keys() == {"x", "w", "g", "fwd", "dlhs", "drhs"}
        for tensor, (low, high) in {"x": (30, 33), "w": (30, 33), "g": (30, 33)}.items():
            statistics = found["dots"][layer][tensor]
            assert all(len(values) == 2 for values in statistics.values())
            assert all(low < value < high for value in statistics["sqnr"])
            # Scales are from the step before.
            assert all(0.3 < value < 2 for value in statistics["staleness"])
    assert found["first_binade"] == telemetry.FIRST_BINADE


def test_of_two_formats_that_of_the_first_product_is_told():
    recipe = Recipe.parse("fp8/fwd=int8:tensor:delayed,int8:tensor:delayed")
    assert formats(recipe) == {"x": "int8", "w": "int8", "g": "float8_e4m3fn"}
    assert formats(Recipe.parse("fp8/fwd=none,none")) == {
        "x": "float8_e4m3fn",
        "w": "float8_e4m3fn",
        "g": "float8_e4m3fn",
    }


@pytest.mark.slow
def test_a_run_without_quantization_tells_of_its_tensors_too():
    found = line(start("bf16")[0], seen("bf16")["dots"])
    assert found["dots"].keys() >= PROJECTIONS and set(found["formats"]["blocks/mlp/up"].values()) == {None}
    statistics = found["dots"]["blocks/mlp/up"]["x"]
    assert all(value > 0 for value in statistics["amax"] + statistics["kurtosis"])
    assert statistics["sqnr"] == statistics["scale"] == [None, None]


@pytest.mark.slow
def test_the_signs_of_the_model_are_what_they_are_called():
    trainer, state, step = start("fp32")
    found = seen("fp32")["model"]
    following, values = step(state, make_tokens(1))
    moved = [after - before for after, before in zip(leaves(following["params"]), leaves(state["params"]), strict=True)]
    norm = lambda arrays: np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays))
    assert found["update_ratio"] == pytest.approx(norm(moved) / norm(leaves(state["params"])), rel=1e-3)
    assert found["update_ratio"] > 1e-4

    logits = np.asarray(trainer.model(state)(make_tokens(1)[0, :, :-1]), np.float64)
    assert found["log_z"] == pytest.approx(np.log(np.exp(logits).sum(-1)).mean(), rel=1e-5)
    logit, amax = signs_by_hand(trainer, state, np.asarray(make_tokens(1)[0, :, :-1]))
    assert found["attention_logit_max"] == pytest.approx(logit, rel=1e-4)
    assert found["residual_amax"] == pytest.approx(amax, rel=1e-4)
    assert values["gradient_norm"] > 0


def signs_by_hand(trainer, state, tokens_BxT):
    """(largest attention logit, largest magnitude in the residual stream) of a model in float32."""
    config, params = trainer.config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state["params"])
    norm = lambda x, scale: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale
    x = params["embedding"]["embedding"][tokens_BxT] * config.d_model**0.5
    logits, amaxes = [], [np.abs(x).max()]
    time = np.arange(x.shape[1])
    angles = time[:, None] * config.rope_theta ** -(np.arange(config.head_dim // 2) / (config.head_dim // 2))

    def turned(z_BxTxNxH):
        a, b = np.split(z_BxTxNxH, 2, axis=-1)
        cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for depth in range(config.layers):
        block = jax.tree.map(lambda leaf, depth=depth: leaf[depth], params["blocks"])
        qkv = norm(x, block["attention_norm"]["scale"]) @ block["attention"]["qkv"]["kernel"]
        grouped = qkv.reshape(*x.shape[:2], config.kv_heads, -1, config.head_dim)
        q, k, v = np.split(grouped, [grouped.shape[3] - 2, grouped.shape[3] - 1], axis=3)
        q, k, v = (z.reshape(*x.shape[:2], -1, config.head_dim) for z in (q, k, v))
        k, v = (np.repeat(z, config.heads // config.kv_heads, axis=2) for z in (k, v))
        scores = np.einsum("btnh,bsnh->bnts", turned(q), turned(k)) / np.sqrt(config.head_dim)
        scores = np.where(time[:, None] >= time, scores, -np.inf)
        logits.append(scores.max())
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(x.shape) @ block["attention"]["out"]["kernel"]
        amaxes.append(np.abs(x).max())
        gate, up = (norm(x, block["mlp_norm"]["scale"]) @ block["mlp"]["up"]["kernel"][:, i] for i in range(2))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
        amaxes.append(np.abs(x).max())
    return max(logits), max(amaxes)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"microbatches": 4}, {"remat": True}])
def test_microbatches_and_remat_see_the_same(options):
    one, other = seen("fp8"), seen("fp8", **options)
    for layer in one["dots"]:
        # A weight is seen once for each microbatch; in bfloat16 sums of another order move a few values to other codes.
        a, b = (telemetry.summary(found["dots"][layer]) for found in (one, other))
        for tensor in ("lhs", "rhs", "grad"):
            np.testing.assert_allclose(a[tensor]["amax"], b[tensor]["amax"], rtol=0.02)
            np.testing.assert_array_equal(a[tensor]["scale"], b[tensor]["scale"])
            np.testing.assert_allclose(a[tensor]["sqnr"], b[tensor]["sqnr"], atol=0.1)
        values = [found["dots"][layer].sums[..., (0, 2), 0] for found in (one, other)]
        np.testing.assert_array_equal(*values)
        for gemm in ("fwd", "dlhs"):
            np.testing.assert_allclose(a[gemm]["error"], b[gemm]["error"], rtol=0.05)
    for name, value in one["model"].items():
        assert other["model"][name] == pytest.approx(value, rel=0.01)


@pytest.mark.slow
def test_in_float16_the_update_is_that_of_the_unscaled_gradient():
    assert seen("fp16")["model"]["update_ratio"] == pytest.approx(seen("bf16")["model"]["update_ratio"], rel=0.02)


def test_only_what_is_asked_for_is_computed():
    trainer = make_trainer("fp8")
    state = jax.eval_shape(trainer.init)
    shapes = jax.eval_shape(functools.partial(observe, trainer, ("model",)), state, make_tokens())
    assert shapes["dots"] == {} and shapes["model"]["log_z"] == jax.ShapeDtypeStruct((), jnp.float32)
    shapes = jax.eval_shape(functools.partial(observe, trainer, ("gemms",)), state, make_tokens())
    assert "model" not in shapes and {probe.sums for probe in shapes["dots"].values()} == {None}
