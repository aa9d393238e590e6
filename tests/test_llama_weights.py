"""The transformer with the weights of a published Llama against NumPy, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from micro import SHAPES, quick_compiles  # noqa: F401
from published_models import LLAMA, head_size, llama, llama_tensors, publish

from experiments.models import published
from experiments.models.config import RopeScaling, TransformerConfig
from experiments.models.transformer import Transformer
from q8jax.policy import Policy

TOKENS = np.random.default_rng(1).integers(0, LLAMA["vocab_size"], (2, 9)).astype(np.int32)
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8,
}


def made(config, precision="fp32"):
    policy = Policy.parse(precision)
    return nnx.eval_shape(lambda: Transformer(config, policy, jnp.float32, rngs=nnx.Rngs(0)))


def loaded(folder, options, tensors):
    model = made(published.llama_config(publish(folder, options, tensors)))
    assert published.load(model, folder) == ()
    return model


def check(model, expected):
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))(state, TOKENS)
    assert logits.dtype == jnp.float32
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "shapes",
    [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}, {"num_hidden_layers": 1, "num_key_value_heads": 4}],
    ids=["grouped", "tied, one key", "one layer, a key each"],
)
def test_logits_are_those_of_numpy(tmp_path, shapes):
    options = LLAMA | shapes
    tensors = llama_tensors(options)
    check(loaded(tmp_path, options, tensors), np.stack([llama(tensors, options, row) for row in TOKENS]))


def test_scaled_frequencies_are_those_of_llama_3(tmp_path):
    options, size = LLAMA | {"rope_scaling": SCALING}, head_size(LLAMA)
    tensors = llama_tensors(options)
    frequencies = []
    for i in range(size // 2):
        frequency = LLAMA["rope_theta"] ** (-2 * i / size)
        turns = 8 * frequency / (2 * np.pi)
        kept = 1.0 if turns > 1.0 else 0.0 if turns < 0.2 else (turns - 0.2) / 0.8
        frequencies.append(kept * frequency + (1 - kept) * frequency / 8)
    scaled = np.array(frequencies) / LLAMA["rope_theta"] ** (-2 * np.arange(size // 2) / size)
    # Kept, in between, and divided: each is tried.
    assert scaled[0] == 1 and scaled[-1] == 0.125 and ((scaled > 0.125) & (scaled < 1)).any()
    expected = np.stack([llama(tensors, options, row, np.array(frequencies)) for row in TOKENS])
    check(loaded(tmp_path, options, tensors), expected)
    assert np.abs(expected - np.stack([llama(tensors, options, row) for row in TOKENS])).max() > 0.1


@pytest.mark.parametrize("shapes", [{}, {"tie_word_embeddings": True, "rope_scaling": SCALING}], ids=["untied", "tied"])
def test_a_model_comes_back_bit_for_bit_with_its_config(tmp_path, shapes):
    options = LLAMA | shapes
    tensors = llama_tensors(options)
    model = loaded(tmp_path / "given", options, tensors)
    published.save(model, tmp_path / "saved")
    assert published.llama_config(tmp_path / "saved") == model.config
    written = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert {n: t.tobytes() for n, t in written.items()} == {n: t.tobytes() for n, t in tensors.items()}


def test_buffers_of_old_files_and_the_copy_of_a_tied_head_are_left_out(tmp_path):
    options = LLAMA | {"tie_word_embeddings": True}
    tensors = llama_tensors(options)
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    more["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    loaded(tmp_path, options, tensors | more)
    more["lm_head.weight"][3, 5] += 1
    with pytest.raises(ValueError, match="'lm_head.weight' in .*model.safetensors differs from 'model.embed_tokens.we"):
        loaded(tmp_path, options, tensors | more)


def test_options_of_llama_are_read_where_old_and_new_versions_write_them(tmp_path):
    def read(options):
        (tmp_path / "config.json").write_text(json.dumps(options))
        return published.llama_config(tmp_path)

    first = {name: value for name, value in LLAMA.items() if name not in ("rope_theta", "num_key_value_heads")}
    config = read(first)
    assert (config.rope_theta, config.kv_heads, config.norm_eps, config.tied) == (10_000.0, 4, 1e-3, False)
    assert not config.scaled_embedding
    assert read(LLAMA | {"rope_scaling": None}).rope_scaling is None
    scaling = RopeScaling(factor=8.0, low=0.2, high=1.0, positions=8)
    assert read(LLAMA | {"rope_scaling": SCALING}).rope_scaling == scaling
    config = read(LLAMA | {"rope_parameters": SCALING | {"rope_theta": 5e5}, "rope_theta": None})
    assert (config.rope_theta, config.rope_scaling) == (5e5, scaling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "'gelu' for hidden_act, where only 'silu'"),
        ({"attention_bias": True}, "True for attention_bias"),
        ({"mlp_bias": True}, "True for mlp_bias"),
        ({"head_dim": 16}, "16 for head_dim, where only 8 is supported"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "'yarn' for rope_scaling.rope_type, where only 'default' or 'llama3'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' for rope_scaling.type"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "does not say rope_scaling.factor"),
        ({"rope_scaling": SCALING | {"factor": 0.5}}, "factor=0.5 of rotary scaling must be finite and at least 1"),
        ({"rope_scaling": SCALING | {"low_freq_factor": 2}}, "low=2.0 of rotary scaling must be positive and less"),
        ({"rope_scaling": "llama3"}, "gives rope_scaling the value 'llama3', which must be an object"),
        ({"num_key_value_heads": 3}, "config.json: kv_heads=3 must divide heads=4"),
        ({"rms_norm_eps": -1}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_options_that_are_not_supported_are_named(tmp_path, options, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | options))
    with pytest.raises(ValueError, match=message):
        published.llama_config(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "A Llama does not scale its embeddings"),
        ({"scaled_embedding": False, "activation": "gelu"}, "A Llama has a gated feed-forward layer, not gelu"),
    ],
)
def test_transformers_that_are_no_llama_are_not_published_as_one(tmp_path, shapes, message):
    with pytest.raises(ValueError, match=message):
        published.save(made(TransformerConfig(**SHAPES, **shapes)), tmp_path)
    assert not list(tmp_path.iterdir())
