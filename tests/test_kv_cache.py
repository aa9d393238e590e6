"""Decoding through a cache against the full forward pass, and against attention to quantized keys in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published_models
import pytest
from flax import nnx
from micro import quick_compiles  # noqa: F401
from published_models import GPT2, LLAMA, gpt2, gpt2_tensors, llama, llama_tensors, publish

import q8jax
from experiments.models import published
from experiments.models.gpt2 import Gpt2
from experiments.models.kv_cache import FORMATS, KvCache
from experiments.models.layers import Product
from experiments.models.transformer import Transformer
from q8jax.mixed import mixed_einsum
from q8jax.policy import Policy

ROWS, LENGTH, SLOTS = 2, 9, 11
TOKENS = np.random.default_rng(1).integers(0, 50, (ROWS, LENGTH)).astype(np.int32)
DTYPES = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}


def make_gpt2(folder):
    tensors = gpt2_tensors()
    config = published.gpt2_config(publish(folder, GPT2, tensors))
    model = nnx.eval_shape(lambda: Gpt2(config, jnp.float32, rngs=nnx.Rngs(0)))
    published.load(model, folder)
    return model, lambda row: gpt2(tensors, GPT2, row)


def make_llama(folder):
    tensors = llama_tensors()
    config = published.llama_config(publish(folder, LLAMA, tensors))
    policy = Policy.parse("fp32")
    model = nnx.eval_shape(lambda: Transformer(config, policy, jnp.float32, rngs=nnx.Rngs(0)))
    published.load(model, folder)
    return model, lambda row: llama(tensors, LLAMA, row)


@pytest.fixture(scope="module", params=[make_gpt2, make_llama], ids=["gpt2", "llama"])
def made(request, tmp_path_factory):
    """A model as a function of (tokens, cache, counts), the model, and its oracle."""
    model, oracle = request.param(tmp_path_factory.mktemp("model"))
    graphdef, state = nnx.split(model)

    @jax.jit
    def read(tokens, cache, counts):
        twin = nnx.merge(graphdef, state)
        x, cache = twin.read(tokens, cache, counts)
        return twin.logits(x), cache

    return read, model, oracle


def read_all(read, cache, tokens, sizes):
    """Logits of tokens that are read so many at a time."""
    found, start = [], 0
    for size in sizes:
        counts = jnp.full(len(tokens), size, jnp.int32)
        logits, cache = read(jnp.asarray(tokens[:, start : start + size]), cache, counts)
        found.append(logits)
        start += size
    return np.concatenate(found, axis=1), cache


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def quantized(x, kind):
    """A row's [T, heads · H] as 8 bits hold it, with a scale per token and head."""
    heads = np.float32(x).reshape(len(x), -1, 8)
    scale = np.abs(heads).max(-1, keepdims=True) / np.float32(LARGEST[kind])
    codes = heads * (1 / scale)
    codes = np.rint(codes) if kind == "int8" else codes
    return (np.float64(codes.astype(DTYPES[kind]).astype(np.float32)) * scale).reshape(x.shape)


def test_a_cache_in_float32_gives_the_logits_of_the_full_forward_pass(made):
    read, model, oracle = made
    cache = model.empty_cache(ROWS, SLOTS, "fp32")
    found, cache = read_all(read, cache, TOKENS, (4, *[1] * 5))
    expected = np.stack([oracle(row) for row in TOKENS])
    assert np.std(expected) > 0.1
    # The order of sums depends on how many tokens are read at once: the last bits.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(cache.lengths, [LENGTH] * ROWS)


@pytest.mark.parametrize("kind", DTYPES)
def test_tokens_attend_to_what_8_bits_hold_as_in_numpy(made, kind, monkeypatch):
    read, model, oracle = made
    found, cache = read_all(read, model.empty_cache(ROWS, SLOTS, kind), TOKENS, (4, *[1] * 5))
    wide = np.stack([oracle(row) for row in TOKENS])
    plain = published_models.attend
    attend = lambda q, k, v, heads, visible: plain(q, quantized(k, kind), quantized(v, kind), heads, visible)
    monkeypatch.setattr(published_models, "attend", attend)
    expected = np.stack([oracle(row) for row in TOKENS])
    lost = distance(expected, wide)
    # Seen, and not more than rounding; a code that lies between two may fall to either side in float32.
    assert (0.001 if kind == "int8" else 0.003) < lost < 0.08
    assert distance(found, expected) < 0.1 * lost
    # Of each head 8 codes and a float32.
    keys = cache.keys
    assert keys.codes.dtype.itemsize == 1 and keys.codes.shape[-2:] == (SLOTS, 8)
    assert keys.nbytes == keys.codes.size // 8 * (8 + 4) and cache.nbytes == 2 * keys.nbytes


def test_a_text_is_the_same_in_however_many_calls_it_is_read(made):
    read, model, _ = made
    at_once, _ = read_all(read, model.empty_cache(ROWS, SLOTS, "fp8"), TOKENS, (4, 4, 1))
    one_by_one, _ = read_all(read, model.empty_cache(ROWS, SLOTS, "fp8"), TOKENS, (4, *[1] * 5))
    assert distance(one_by_one, at_once) < 1e-3


@pytest.mark.parametrize("kind", ["fp32", "fp8"])
def test_padding_is_neither_stored_nor_seen(made, kind):
    read, model, _ = made
    first, cache = read(jnp.asarray(TOKENS[:, :4]), model.empty_cache(ROWS, SLOTS, kind), jnp.array([3, 4], jnp.int32))
    np.testing.assert_array_equal(cache.lengths, [3, 4])
    for kept in (cache.keys, cache.values):
        codes = np.asarray(kept.codes, np.float32)
        assert not codes[:, 0, :, 3:].any() and codes[:, 0, :, :3].any() and codes[:, 1, :, :4].any()
    # Whatever padding and neighbours hold, a row has the same bits, and goes on where it ended.
    other = np.where(np.arange(4)[None] < [[3], [0]], TOKENS[:, :4], 7)
    second, _ = read(jnp.asarray(other), model.empty_cache(ROWS, SLOTS, kind), jnp.array([3, 2], jnp.int32))
    np.testing.assert_array_equal(first[0, :3], second[0, :3])
    following, cache = read(jnp.asarray(TOKENS[:, 3:4]), cache, jnp.array([1, 0], jnp.int32))
    np.testing.assert_array_equal(cache.lengths, [4, 4])
    whole, _ = read_all(read, model.empty_cache(ROWS, SLOTS, kind), TOKENS, (4,))
    assert distance(following[0, 0], whole[0, 3]) < 1e-3


def test_what_goes_beyond_the_slots_is_dropped_and_nothing_becomes_nan(made):
    read, model, _ = made
    cache = model.empty_cache(ROWS, SLOTS, "int8")
    for _ in range(4):
        logits, cache = read(jnp.asarray(TOKENS[:, :4]), cache, jnp.full(ROWS, 4, jnp.int32))
    assert np.isfinite(logits).all() and np.isfinite(cache.keys.scale).all()
    assert (np.asarray(cache.keys.scale) > 0).all()


def test_a_format_of_a_cache_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="Unknown --kv_cache 'fp7'.*: choose one of fp32, bf16, fp8"):
        KvCache.empty(layers=1, rows=1, slots=1, heads=1, head_dim=1, qtype="fp7")
    assert set(DTYPES) < set(FORMATS)


@pytest.mark.parametrize(
    ("subscripts", "axes", "qtype", "dtype"),
    [
        # Scales of what is not summed, and of what is.
        ("btkgh,bskh->bkgts", (0, 1, 2), "int8", np.float32),
        ("bkgts,bskh->btkgh", (0, 1, 2), "e4m3fn", np.float32),
        ("bkgts,bskh->bkgth", (1,), "e3m4", np.float32),
        ("btkgh,bskh->bkgts", (), "e4m3fn", jnp.bfloat16),
        ("bkgts,bskh->btkgh", (0, 1, 2), "int8", jnp.bfloat16),
        ("bkgts,bskh->btkgh", (0, 1, 2), "e4m3fn", np.float16),
    ],
)
def test_products_of_codes_are_those_of_their_values(subscripts, axes, qtype, dtype):
    sizes = {"b": 2, "t": 3, "k": 2, "g": 2, "s": 5, "h": 8}
    rng = np.random.default_rng(0)
    shapes = [[sizes[c] for c in operand] for operand in subscripts.partition("->")[0].split(",")]
    lhs = jnp.asarray(rng.normal(size=shapes[0]), dtype)
    # Far below the least of float16.
    wide = jnp.asarray(rng.normal(size=shapes[1]) * 2.0 ** -rng.integers(10, 20, shapes[1][:2])[..., None, None])
    rhs = q8jax.quantize(wide.astype(jnp.float32), qtype, channelwise_axes=axes)
    found = jax.jit(lambda lhs, rhs: mixed_einsum(subscripts, lhs, rhs))(lhs, rhs)
    expected = np.einsum(subscripts, np.float64(lhs), np.float64(rhs.dequantize()))
    assert found.dtype == dtype
    precision = {4: 1e-6}.get(np.dtype(dtype).itemsize, 2.0**-7 if dtype == jnp.bfloat16 else 2.0**-9)
    np.testing.assert_allclose(np.float64(found), expected, rtol=0, atol=precision * np.abs(expected).max())


def test_scales_that_cannot_be_taken_out_are_refused():
    lhs, wide = jnp.ones((2, 4)), jnp.ones((4, 8))
    with pytest.raises(ValueError, match="scales change, and they change along an axis that only rhs has"):
        mixed_einsum("ij,jk->ik", lhs, q8jax.quantize(wide, "int8", channelwise_axes=(0, 1)))
    with pytest.raises(ValueError, match="no scales per tile"):
        mixed_einsum("ij,jk->ik", lhs, q8jax.quantize(wide, "int8", tiled_axes={0: 2}))
    with pytest.raises(ValueError, match="bare codes"):
        mixed_einsum("ij,jk->ik", lhs, q8jax.quantize(wide, "uint8", calibration="minmax"))
    with pytest.raises(ValueError, match="sums or broadcasts an index of one operand"):
        mixed_einsum("ij,kl->ik", lhs, q8jax.quantize(wide, "int8"))


def test_a_policy_decides_how_values_of_codes_are_multiplied():
    rng = np.random.default_rng(0)
    lhs, wide = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4), (4, 8)))
    codes = q8jax.quantize(wide, "int8", channelwise_axes=(1,))
    model = nnx.Dict(product=Product("ij,jk->ik"))
    bare = model.product(lhs, codes)
    exact = np.asarray(lhs) @ np.asarray(codes.dequantize())
    np.testing.assert_allclose(bare, exact, rtol=1e-5, atol=1e-6)
    q8jax.nnx.quantize_model(model, "fp8-current/compute=float32")
    assert 0.005 < distance(model.product(lhs, codes), exact) < 0.1
