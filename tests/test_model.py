"""The transformer against NumPy, and what must not change what it computes."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from micro import SHAPES, leaves, make_tokens, make_trainer, quick_compiles, same  # noqa: F401

from experiments.models import transformer
from experiments.models.config import SIZES, TransformerConfig
from experiments.models.transformer import Transformer, rotate
from q8jax.policy import Policy

PUBLISHED = {"124m": (50257, 124e6), "350m": (50257, 350e6), "1b": (128256, 1.24e9), "8b": (128256, 8.03e9)}


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def turn(x, theta):
    """x [T, H], each pair (i, i + H/2) turned by position · theta^(-2i/H), as complex numbers."""
    tokens, size = x.shape
    pairs = x[:, : size // 2] + 1j * x[:, size // 2 :]
    angle = np.arange(tokens)[:, None] * theta ** (-2 * np.arange(size // 2) / size)
    turned = pairs * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def reference(params, config, tokens):
    """Logits of one row in float64, one head at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    embedding, size, group = p["embedding"]["embedding"], config.head_dim, config.heads // config.kv_heads
    x = embedding[tokens] * np.sqrt(config.d_model)
    for i in range(config.layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        qkv = norm(x, block["attention_norm"]["scale"]) @ block["attention"]["qkv"]["kernel"]
        heads = np.split(qkv, qkv.shape[-1] // size, -1)
        mixed = []
        for head in range(config.heads):
            *queries, key, value = heads[head // group * (group + 2) :][: group + 2]
            query, key = (turn(x, config.rope_theta) for x in (queries[head % group], key))
            scores = query @ key.T / np.sqrt(size)
            weights = np.exp(np.where(np.tri(len(tokens)) > 0, scores, -np.inf))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ value)
        x = x + np.concatenate(mixed, -1) @ block["attention"]["out"]["kernel"]
        *gate, up = (
            norm(x, block["mlp_norm"]["scale"]) @ kernel for kernel in block["mlp"]["up"]["kernel"].swapaxes(0, 1)
        )
        hidden = silu(gate[0]) * up if gate else gelu(up)
        x = x + hidden @ block["mlp"]["down"]["kernel"]
    head = embedding.T if config.tied else p["head"]["kernel"]
    return norm(x, p["norm"]["scale"]) @ head


def compiled(trainer):
    return jax.jit(lambda state, tokens: trainer.model(state)(tokens))


@pytest.mark.parametrize(
    "shapes",
    [{}, {"activation": "smooth_swiglu"}, {"activation": "gelu", "tied": True, "kv_heads": 4, "rope_theta": 500.0}],
    ids=["grouped swiglu", "smooth swiglu", "tied gelu"],
)
def test_float32_logits_are_those_of_numpy(shapes):
    trainer = make_trainer("fp32", **shapes)
    state = trainer.init()
    tokens = make_tokens()[0, :2, :-1]
    logits = compiled(trainer)(state, tokens)
    assert logits.dtype == jnp.float32
    expected = np.stack([reference(state["params"], trainer.config, row) for row in tokens])
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_fp32_multiplies_at_the_highest_precision_everywhere(tied):
    trainer = make_trainer("fp32", tied=tied)
    tokens = jax.ShapeDtypeStruct((1, 8, 17), jnp.int32)
    program = jax.export.export(jax.jit(trainer.step), platforms=["tpu"])(jax.eval_shape(trainer.init), tokens)
    dots = [line for line in program.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    # Of the block's four projections and two products and of the head, forward and twice backward.
    assert len(dots) == 3 * 7
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_a_tied_head_is_quantized_where_the_policy_says():
    exact, coarse = make_trainer("bf16", tied=True), make_trainer("fp8-current", quantize=("head",), tied=True)
    state, tokens = exact.init(), make_tokens()[0, :2, :-1]
    right = compiled(exact)(state, tokens)
    rounded = compiled(coarse)(coarse.enter(state, coarse.phase_state()), tokens)
    assert rounded.dtype == jnp.float32
    assert 0.01 < np.linalg.norm(rounded - right) / np.linalg.norm(right) < 0.1


def test_rotation_keeps_length_and_depends_on_distance_only():
    x, y = np.random.default_rng(0).normal(size=(2, 1, 9, 1, 8)).astype(np.float32)
    x, y = np.broadcast_to(x[:, :1], x.shape), np.broadcast_to(y[:, :1], y.shape)
    products = np.einsum("bthd,bshd->ts", rotate(jnp.asarray(x), 100.0), rotate(jnp.asarray(y), 100.0))
    for distance in range(-8, 9):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], atol=1e-5)
    assert np.ptp(products) > 0.1


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_later_tokens_change_no_earlier_logits(precision):
    trainer = make_trainer(precision)
    state = trainer.init()
    apply = compiled(trainer)
    tokens = make_tokens()[0, :, :-1]
    changed = tokens.copy()
    changed[:, 9] = (changed[:, 9] + 1) % SHAPES["vocab"]
    before, after = apply(state, tokens), apply(state, changed)
    assert same(before[:, :9], after[:, :9])
    assert (np.abs(before[:, 9:] - after[:, 9:]).max(-1) > 0).all()


@pytest.mark.slow
def test_attention_in_blocks_of_queries_is_attention(monkeypatch):
    results, tokens = [], make_tokens(rows=2, length=11)
    for queries in (16, 4):
        monkeypatch.setattr(transformer, "_QUERIES", queries)
        trainer = make_trainer("fp8", quantize=("attention",), remat=queries == 4)
        state = trainer.init()
        state["dots"] = jax.jit(trainer.calibrate)(state, tokens)
        step = lambda state, tokens, trainer=trainer: trainer.gradients(trainer.model(state), state, tokens)
        results.append(jax.jit(step)(state, tokens))
        products = str(jax.make_jaxpr(lambda state, t=trainer: t.model(state)(tokens[0, :, :-1]))(state))
        assert [f"2,2,2,{n},{n + begin}" in products.replace(" ", "") for begin, n in ((0, 11), (4, 4), (8, 3))] == (
            [True, False, False] if queries == 16 else [False, True, True]
        )
    (loss, gradients, amaxes), (other_loss, other_gradients, other_amaxes) = results
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    for a, b in zip(leaves(amaxes), leaves(other_amaxes), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02)  # sums of a few bfloat16 in another order
    for a, b in zip(leaves(gradients), leaves(other_gradients), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)


@pytest.mark.slow
def test_smooth_swiglu_takes_an_outlier_channel_out_of_the_scale():
    """In float32 it is SwiGLU; in 8 bits one large channel no longer drowns the others."""
    errors = {}
    for activation in ("swiglu", "smooth_swiglu"):
        exact = make_trainer("fp32", activation=activation, layers=1)
        state = exact.init()
        # The gated half of one hidden channel a thousand times as large, its output weights as much smaller.
        up, down = (state["params"]["blocks"]["mlp"][name]["kernel"] for name in ("up", "down"))
        state["params"]["blocks"]["mlp"]["up"]["kernel"] = up.at[:, :, 1, 0].multiply(1024)
        state["params"]["blocks"]["mlp"]["down"]["kernel"] = down.at[:, 0].multiply(1 / 1024)
        coarse = make_trainer("blocks/mlp/down->int8-tensor/compute=float32", activation=activation, layers=1)
        tokens = make_tokens()[0, :, :-1]
        right = compiled(exact)(state, tokens)
        rounded = compiled(coarse)(coarse.enter(state, coarse.phase_state()), tokens)
        errors[activation] = np.linalg.norm(rounded - right) / np.linalg.norm(right)
    assert 1e-4 < errors["smooth_swiglu"] < errors["swiglu"] / 5


@pytest.fixture
def slow_compiles():
    """As users compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
def test_remat_gives_the_same_loss_and_the_same_observations(slow_compiles):
    results = []
    for remat in (False, True):
        trainer = make_trainer("fp8", remat=remat)
        state = trainer.init()
        results.append(
            jax.jit(lambda s, t, trainer=trainer: trainer.gradients(trainer.model(s), s, t))(state, make_tokens())
        )
    (loss, gradients, amaxes), (remat_loss, remat_gradients, remat_amaxes) = results
    assert loss == remat_loss
    assert same(amaxes, remat_amaxes)
    for a, b in zip(leaves(gradients), leaves(remat_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max())


@pytest.mark.slow
def test_depth_does_not_make_the_program_longer():
    lines = []
    for layers in (2, 8):
        trainer = make_trainer("fp8", layers=layers)
        tokens = jax.ShapeDtypeStruct((1, 8, 17), jnp.int32)
        program = jax.jit(trainer.step).lower(jax.eval_shape(trainer.init), tokens).as_text()
        lines.append(len(program.splitlines()))
    assert lines[0] == lines[1] > 500


def real_params(config):
    policy = Policy.parse("blocks/.*->bf16")
    model = nnx.eval_shape(lambda: Transformer(config, policy, jnp.bfloat16, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_counted_right_and_come_to_the_name(size):
    config = SIZES[size]
    assert config.params == real_params(config)
    if size in PUBLISHED:
        vocab, params = PUBLISHED[size]
        assert dataclasses.replace(config, vocab=vocab).params == pytest.approx(params, rel=0.04)
    else:
        assert config.params < {"tiny": 1e6, "small": 11e6}[size]


@pytest.mark.parametrize("shapes", [{"tied": True}, {"activation": "gelu"}, {"kv_heads": 1}])
def test_parameters_are_counted_right_in_every_shape(shapes):
    config = TransformerConfig(**SHAPES | shapes)
    assert config.params == real_params(config)


def test_flops_are_six_per_weight_and_token_and_causal_attention():
    config = SIZES["tiny"]
    weights = config.params - config.d_model * config.vocab - (2 * config.layers + 1) * config.d_model
    # Forward: scores and values, each 2 FLOPs per channel and visible token, of which there are T / 2 on average.
    attention = 3 * config.layers * 2 * 2 * config.d_model * 256 // 2
    assert config.flops_per_token(256) == 6 * weights + attention


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"heads": 5}, "--heads=5 must divide --d_model=32"),
        ({"heads": 32, "kv_heads": 32}, "--heads=32 must divide --d_model=32 into even sizes"),
        ({"kv_heads": 3}, "--kv_heads=3 must divide --heads=4"),
        ({"layers": 0}, "--layers=0 must be at least 1"),
        ({"activation": "swigle"}, "--activation 'swigle' .did you mean 'swiglu'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**SHAPES | shapes)
