"""Quantized models in folders: bit for bit, and what is damaged is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from micro import quick_compiles  # noqa: F401
from published_models import BERT, bert_tensors, publish

import q8jax.nnx as qnnx
from experiments.models import folder, quantized
from experiments.models.config import TransformerConfig
from experiments.models.kinds import KINDS
from experiments.models.purpose import Purpose
from q8jax import Policy, Recipe, quantize
from q8jax.nnx.frozen import freeze_embedding, freeze_layer
from q8jax.nnx.layers import layers_of
from q8jax.stored import Stored, round_scale

FLOAT = "/compute=float32"
PURPOSE = Purpose("sentence-embedding", policy=".*->compute=float32")


def four_bits(w):
    codes = quantize(w, "uint4", channelwise_axes=(1,), tiled_axes={0: 8}, calibration="minmax")
    scale = round_scale(codes.scale, "bfloat16")
    return Stored.of(quantize(w, "uint4", scale=scale, zero_point=codes.zero_point), scales="bfloat16")


def two_levels(w):
    scale = round_scale(quantize(w, "e2m1fn", channelwise_axes=(1,), tiled_axes={0: 8}).scale, "e4m3")
    return Stored.of(quantize(w, "e2m1fn", scale=scale), scales="e4m3")


def eight_bits(w):
    return Stored.of(quantize(w, "int8", channelwise_axes=(1,)))


def floats(w):
    return Stored.of(quantize(w, "e4m3fn"))


KERNELS = {
    "encoder/blocks/0/attention/qkv": (four_bits, f"fwd=none,none{FLOAT}", lambda n: qnnx.Extras()),
    "encoder/blocks/0/mlp/up": (two_levels, f"fwd=int8:row,none{FLOAT}", lambda n: qnnx.Extras()),
    "encoder/blocks/0/mlp/down": (
        eight_bits,
        f"fwd=int8:tensor:static,int8:row{FLOAT}",
        lambda n: qnnx.Extras(scale=jnp.array([0.1, 1], jnp.float32), inverse=jnp.linspace(0.5, 2, n)),
    ),
    "encoder/blocks/1/attention/out": (floats, f"fwd=e4m3fn,e4m3fn{FLOAT}", lambda n: qnnx.Extras()),
    "encoder/blocks/1/mlp/up": (
        eight_bits,
        f"fwd=int8:tensor:static,none{FLOAT}",
        lambda n: qnnx.Extras(scale=jnp.float32(0.1), zero_point=jnp.int32(-3), affine="int8"),
    ),
    "encoder/blocks/1/mlp/down": (
        eight_bits,
        f"fwd=int8:row,int8:row{FLOAT}",
        lambda n: qnnx.Extras(
            inverse=jnp.ones(n, jnp.float32).at[3].set(0),
            outliers=jnp.array([3], jnp.int32),
            outlier_kernel=jnp.full((1, BERT["hidden_size"]), 0.25, jnp.float32),
        ),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with every kind of codes, the model that is in it, and what that computes."""
    place = tmp_path_factory.mktemp("quantized")
    model, _ = folder.load(str(publish(place / "published", BERT, bert_tensors())))
    for path, (codes, recipe, extras) in KERNELS.items():
        layer = layers_of(model)[path]
        matrix = qnnx.kernel_matrix(layer)
        freeze_layer(layer, codes(matrix), Recipe.parse(recipe), extras(len(matrix)), path=path)
    table = model.encoder.embeddings.token.embedding[...]
    freeze_embedding(
        model, "encoder/embeddings/token", Stored.of(quantize(table, "int8", channelwise_axes=(0,)), axis=-1)
    )
    folder.save(place / "model", model, PURPOSE, quantized_by="mine")
    return place / "model", model, embed(model)


def embed(model):
    graphdef, state = nnx.split(model)
    ids = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    return np.asarray(jax.jit(lambda s: nnx.merge(graphdef, s)(ids, ids >= 0))(state))


@pytest.mark.slow
def test_what_is_saved_comes_back_bit_for_bit(saved):
    place, model, before = saved
    again, found = folder.load(str(place))
    assert quantized.read_header(place).policy == "mine" and found.purpose == PURPOSE
    np.testing.assert_array_equal(embed(again), before)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    one, other = (jax.tree.leaves(nnx.state(m)) for m in (model, again))
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_other_weights_keep_their_published_names(saved):
    tensors = safetensors.numpy.load_file(saved[0] / "model.safetensors")
    assert "encoder.layer.0.output.dense.bias" in tensors
    assert "encoder.layer.0.output.dense.weight" not in tensors
    assert tensors["encoder.blocks.0.mlp.down.codes"].dtype == np.int8
    assert tensors["encoder.blocks.0.attention.qkv.codes"].shape == (12, 72)


def test_a_quantized_model_is_not_quantized_again(saved):
    with pytest.raises(ValueError, match="is quantized already, in mine"):
        folder.load(str(saved[0]), policy=Policy.parse("fp32"))


def damaged(saved, tmp_path, change):
    """The folder with its tensors and header changed."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_bytes((saved[0] / "config.json").read_bytes())
    file = saved[0] / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, "numpy") as opened:
        header = dict(opened.metadata())
    entry = json.loads(header["q8jax"])
    change(tensors, entry)
    text = entry["raw"] if "raw" in entry else json.dumps(entry)
    safetensors.numpy.save_file(tensors, place / "model.safetensors", metadata=header | {"q8jax": text})
    return str(place)


DOWN = "encoder.blocks.0.mlp.down"
LAYER = "encoder/blocks/0/mlp/down"


def put(name, value):
    return lambda tensors, entry: tensors.__setitem__(name, value)


def form(**fields):
    return lambda tensors, entry: entry["layers"][LAYER]["form"].update(fields)


DAMAGES = {
    "a tensor is missing": (lambda t, e: t.pop(f"{DOWN}.scale"), "codes or .scale is missing"),
    "a scale of inputs is missing": (lambda t, e: t.pop(f"{DOWN}.input_scale"), "keeps scales"),
    "a tensor is too many": (put("more", np.zeros(3, np.float32)), "'more'.*no place"),
    "codes of another shape": (put(f"{DOWN}.codes", np.zeros((40, 23), np.int8)), "does not fit|are not of a kernel"),
    "codes of another type": (put(f"{DOWN}.codes", np.zeros((40, 24), np.float32)), "codes is float32"),
    "a scale that is zero": (put(f"{DOWN}.scale", np.zeros((1, 24), np.float32)), "finite and > 0"),
    "factors of another shape": (put(f"{DOWN}.inverse", np.ones(3, np.float32)), "inverse of inputs"),
    "outliers out of range": (put("encoder.blocks.1.mlp.down.outliers", np.array([99], np.int32)), "no channels"),
    "a form of another size": (form(size=7), "codes is int8 of shape"),
    "a form of no such format": (form(qtype="int9"), "int9"),
    "a form that lies about its types": (form(size="40"), "size is '40'"),
    "a layer that is none": (lambda t, e: e["layers"].update(other=e["layers"][LAYER]), "no such layer"),
    "a recipe that is none": (lambda t, e: e["layers"][LAYER].update(recipe="int9"), "int9"),
    "no JSON": (lambda t, e: e.update(raw="["), "header .* damaged"),
    "another object": (lambda t, e: e.update(raw='{"code": "import os"}'), "header .* damaged"),
    "a deep object": (lambda t, e: e.update(raw="[" * 100_000), "header .* damaged"),
    "layers that are none": (lambda t, e: e.update(layers=[]), "header .* damaged"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_damaged_is_named(saved, tmp_path, what):
    change, words = DAMAGES[what]
    with pytest.raises(ValueError, match=words):
        folder.load(damaged(saved, tmp_path, change))


def test_a_truncated_file_is_named(saved, tmp_path):
    place = damaged(saved, tmp_path, lambda tensors, entry: None)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        folder.load(place)


@pytest.mark.slow
def test_a_stack_that_was_trained_is_frozen_and_kept(tmp_path):
    kind, config = (
        KINDS["q8jax-transformer"],
        TransformerConfig(layers=2, d_model=16, heads=2, kv_heads=1, d_ff=16, vocab=20),
    )
    policy = Policy.parse("blocks/attention/(qkv|out)|blocks/mlp/.*->fp8;.*->bf16")
    purpose = Purpose("text-generation", policy=".*->bf16")
    model = folder.build(kind, config, purpose, policy)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    run = lambda model: np.asarray(nnx.jit(lambda m, t: m(t))(model, tokens))
    trained = run(model)
    qnnx.freeze(model)
    folder.save(tmp_path / "model", model, purpose, quantized_by=str(policy))
    np.testing.assert_array_equal(run(folder.load(str(tmp_path / "model"))[0]), trained)
