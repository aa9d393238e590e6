"""GPT-2 against NumPy, with weights as they are published."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from micro import quick_compiles  # noqa: F401
from published_models import GPT2, gpt2, gpt2_tensors, publish

import q8jax.nnx
from experiments.models import published
from experiments.models.gpt2 import Gpt2

TOKENS = np.random.default_rng(1).integers(0, GPT2["vocab_size"], (2, 9)).astype(np.int32)


def made(folder, dtype=jnp.float32):
    config = published.gpt2_config(folder)
    return nnx.eval_shape(lambda: Gpt2(config, dtype, rngs=nnx.Rngs(0)))


def run(model, tokens):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))(state, tokens)


def test_logits_are_those_of_numpy_and_padding_behind_changes_none(tmp_path):
    tensors = gpt2_tensors()
    # Masks that older files carry, and the head that is the embedding.
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 12, 12), np.uint8) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(2)}
    model = made(publish(tmp_path, GPT2, tensors | masks | {"lm_head.weight": tensors["wte.weight"]}))
    assert published.load(model, tmp_path) == ()
    logits = run(model, TOKENS)
    expected = np.stack([gpt2(tensors, GPT2, row) for row in TOKENS])
    assert logits.dtype == jnp.float32
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    padded = np.where(np.arange(9) < 5, TOKENS, 0)
    np.testing.assert_array_equal(run(model, padded)[:, :5], logits[:, :5])


def test_a_prefix_is_left_off_or_not_and_a_file_comes_back_bit_for_bit(tmp_path):
    bare, full = gpt2_tensors(), gpt2_tensors(prefix="transformer.")
    states = []
    for name, tensors in (("bare", bare), ("full", full)):
        model = made(publish(tmp_path / name, GPT2, tensors))
        published.load(model, tmp_path / name)
        states.append(jax.tree.leaves(nnx.state(model, nnx.Param)))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    published.save(model, tmp_path / "saved")
    saved = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert published.gpt2_config(tmp_path / "saved") == model.config
    assert {name: tensor.tobytes() for name, tensor in saved.items()} == {
        name: tensor.tobytes() for name, tensor in full.items()
    }


def test_every_projection_can_be_quantized_by_its_path(tmp_path):
    options = GPT2 | {"n_layer": 1}
    tensors = gpt2_tensors(options)
    model = made(publish(tmp_path, options, tensors))
    published.load(model, tmp_path)
    q8jax.nnx.quantize_model(model, "blocks/.*->fp8-current/compute=float32;head->int8-row/compute=float32")
    dots = {"/".join(map(str, path[:-1])) for path, m in nnx.iter_modules(model) if hasattr(m, "recipe")}
    parts = ("attention/qkv", "attention/scores", "attention/values", "attention/out", "mlp/up", "mlp/down")
    assert dots == {f"blocks/0/{part}" for part in parts} | {"head"}
    expected = gpt2(tensors, options, TOKENS[0])
    error = np.linalg.norm(run(model, TOKENS[:1])[0] - expected) / np.linalg.norm(expected)
    assert 0.01 < error < 0.2


def test_sequences_longer_than_the_positions_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"n_positions": 8}))
    with pytest.raises(ValueError, match="Sequences of 9 tokens are longer than the model's 8"):
        made(tmp_path)(TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_function": "relu"}, "'relu' for activation_function, where only 'gelu_new' or"),
        ({"scale_attn_weights": False}, "False for scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "True for scale_attn_by_inverse_layer_idx"),
        ({"tie_word_embeddings": False}, "False for tie_word_embeddings"),
        ({"n_inner": "96"}, "gives n_inner the value '96', which must be a whole number"),
        ({"n_head": 7}, "heads=7 must divide d_model=24"),
        ({"n_layer": None}, "does not say n_layer"),
    ],
)
def test_options_that_are_not_supported_are_named(tmp_path, options, message):
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | options))
    with pytest.raises(ValueError, match=message):
        published.gpt2_config(tmp_path)
