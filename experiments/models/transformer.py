"""A decoder-only transformer of plain NNX layers, which a policy then quantizes.

Shapes: B batch, T tokens, D width of the residual stream, N query heads, K key-value heads, H head size, F hidden
width. The projections that read the same tensor are one GEMM (query, key and value; gate and up), so each tensor is
quantized once. The blocks are a stack under `lax.scan`, so depth costs no compile time.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import q8jax.nnx as qnnx
from experiments.models.config import RopeScaling, TransformerConfig
from experiments.models.kv_cache import KvCache, Reading
from experiments.models.layers import HIDDEN, Product
from experiments.models.shardings import WHOLE, ModelShardings
from q8jax.policy import Policy
from q8jax.qarray import QArray
from q8jax.recompute import recomputing
from q8jax.rounding import ceil_power_of_two
from q8jax.shardings import placed

_PRODUCT = "product"
# Less, with grouped queries, crashes the compiler of libtpu 0.0.42 for TPU v7x.
_QUERIES = 1024


def _named(x: jax.Array, config: TransformerConfig) -> jax.Array:
    """The result of a product with weights, which rematerialization may keep."""
    return checkpoint_name(x, _PRODUCT) if config.remat else x


def rotate(
    x_BxTxAxH: jax.Array, theta: float, scaling: RopeScaling | None = None, positions_BxT: jax.Array | None = None
) -> jax.Array:
    """Rotary position embedding, halves paired (Su et al. 2021, RoFormer, arXiv:2104.09864).

    Args:
      x_BxTxAxH: with any axes between those of tokens and heads' channels.
      theta: base of the frequencies.
      scaling: what makes the low ones lower.
      positions_BxT: int32, of the tokens; by default 0, 1, … in each row.
    """
    tokens, size, between = x_BxTxAxH.shape[1], x_BxTxAxH.shape[-1], range(2, x_BxTxAxH.ndim - 1)
    frequency = jnp.float32(theta) ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling is not None:
        turns = frequency * jnp.float32(scaling.positions / (2 * math.pi))
        kept = jnp.clip((turns - jnp.float32(scaling.low)) / jnp.float32(scaling.high - scaling.low), 0, 1)
        frequency *= kept + (1 - kept) / jnp.float32(scaling.factor)
    positions = jnp.arange(tokens)[None] if positions_BxT is None else positions_BxT
    angle_BxTxH = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
    cos, sin = (jnp.expand_dims(turn(angle_BxTxH), tuple(between)) for turn in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BxTxAxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x_BxTxAxH.dtype)


def _split(qkv_BxTxKxSxH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The query heads [B, T, K, G, H] of each key-value head, its key and its value, [B, T, K, H]."""
    queries = qkv_BxTxKxSxH.shape[3] - 2
    q, k, v = jnp.split(qkv_BxTxKxSxH, [queries, queries + 1], axis=3)
    return q, jnp.squeeze(k, 3), jnp.squeeze(v, 3)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        wide = x_BxTxD.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + jnp.float32(self.epsilon))
        return (normed * self.scale[...][None, None, :]).astype(x_BxTxD.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: TransformerConfig, linear: Any):
        self.config = config
        self.qkv = linear(*config.projections["attention/qkv"])
        self.out = linear(*config.projections["attention/out"], scale=(2 * config.layers) ** -0.5)
        self.scores = Product("btkgh,bskh->bkgts", stack=(config.layers,))
        self.values = Product("bkgts,bskh->btkgh", stack=(config.layers,))

    def __call__(
        self, x_BxTxD: jax.Array, reading: Reading | None = None, layer: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Reading | None]:
        """The mixed values; the largest logit of the softmax, float32; and the cache, where there is one.

        Args:
          x_BxTxD: normed residual stream.
          reading: of a cache, which holds the tokens before these.
          layer: int32, which block this is there.
        """
        config = self.config
        # Each key-value head stands beside its query heads, so that a mesh can split them all alike.
        shape = *x_BxTxD.shape[:2], config.kv_heads, config.heads // config.kv_heads + 2, config.head_dim
        q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH = _split(_named(self.qkv(x_BxTxD), config).reshape(shape))
        rotary = config.rope_theta, config.rope_scaling, None if reading is None else reading.positions_BxT
        q_BxTxKxGxH, k_BxTxKxH = rotate(q_BxTxKxGxH, *rotary), rotate(k_BxTxKxH, *rotary)
        if reading is None:
            mixed, largest = self._mixed(q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH)
        else:
            assert layer is not None
            reading, k_BxSxKxH, v_BxSxKxH = reading.extended(layer, k_BxTxKxH, v_BxTxKxH)
            mixed, largest = self._looks(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, reading.visible_BxTxS)
        out_BxTxD = _named(self.out(mixed.reshape(*x_BxTxD.shape[:2], -1)), config)
        return out_BxTxD, largest, reading

    def _mixed(self, q_BxTxKxGxH: jax.Array, k_BxTxKxH: jax.Array, v_BxTxKxH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What all tokens see of the values, and the largest logit.

        In blocks of queries, none of which looks at the keys behind its last: that saves up to half of the work, and
        no more than one block's logits are in memory where they are computed again for the gradient.
        """
        tokens = q_BxTxKxGxH.shape[1]
        begins = range(0, tokens, _QUERIES)
        looks = jax.checkpoint(self._looks) if self.config.remat and len(begins) > 1 else self._looks
        mixed, largest = [], []
        for begin in begins:
            end = min(begin + _QUERIES, tokens)
            visible_1xQxS = jnp.tril(jnp.ones((end - begin, end), bool), begin)[None]
            seen = looks(q_BxTxKxGxH[:, begin:end], k_BxTxKxH[:, :end], v_BxTxKxH[:, :end], visible_1xQxS)
            mixed.append(seen[0])
            largest.append(seen[1])
        return jnp.concatenate(mixed, axis=1), jnp.max(jnp.stack(largest))

    def _looks(
        self,
        q_BxQxKxGxH: jax.Array,
        k_BxSxKxH: jax.Array | QArray,
        v_BxSxKxH: jax.Array | QArray,
        visible_BxQxS: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The same of Q queries, each of which sees some of S keys."""
        scores = self.scores(q_BxQxKxGxH, k_BxSxKxH).astype(jnp.float32) * jnp.float32(self.config.head_dim**-0.5)
        logits = jnp.where(visible_BxQxS[:, None, None], scores, jnp.float32(HIDDEN))
        weights = jax.nn.softmax(logits, axis=-1)
        return self.values(weights.astype(q_BxQxKxGxH.dtype), v_BxSxKxH), jnp.max(lax.stop_gradient(logits))


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), Smooth-SwiGLU (Fishman et al. 2024, arXiv:2409.12517) or GELU."""

    def __init__(self, config: TransformerConfig, linear: Any):
        self.config = config
        # The gate and the hidden units have an axis of their own, so that a mesh can split them alike.
        self.up = linear(config.d_model, (2 if config.gated else 1, config.d_ff))
        self.down = linear(*config.projections["mlp/down"], scale=(2 * config.layers) ** -0.5)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        *gate, up_BxTxF = jnp.unstack(_named(self.up(x_BxTxD), self.config), axis=2)
        if not gate:
            return self.down(nnx.gelu(up_BxTxF))
        hidden_BxTxF = nnx.silu(gate[0]) * up_BxTxF
        if self.config.activation == "swiglu":
            return self.down(hidden_BxTxF)
        return self._smooth_down(hidden_BxTxF)

    def _smooth_down(self, hidden_BxTxF: jax.Array) -> jax.Array:
        # Each channel is brought to the same magnitude before it is quantized, and its weights carry what was taken
        # out: one outlier channel no longer sets the scale of all. Powers of two, so nothing is rounded on the way.
        amax_F = jnp.max(jnp.abs(lax.stop_gradient(hidden_BxTxF)), axis=(0, 1)).astype(jnp.float32)
        scale_F = jnp.where(jnp.isfinite(amax_F) & (amax_F > 0), ceil_power_of_two(amax_F), jnp.float32(1))
        smooth_BxTxF = (hidden_BxTxF.astype(jnp.float32) * (1 / scale_F)[None, None, :]).astype(hidden_BxTxF.dtype)
        kernel_FxD = (self.down.kernel[...].astype(jnp.float32) * scale_F[:, None]).astype(hidden_BxTxF.dtype)
        return self.down.dot_general(smooth_BxTxF, kernel_FxD, (((2,), (0,)), ((), ())))


class Signs(NamedTuple):
    """How each block is doing; who does not ask does not pay, for the compiler drops it.

    Attributes:
      finite: bool [layers], whether the residual stream after the block is.
      amax: float32 [layers], the largest magnitude of the stream before, within and after the block.
      largest_logit: float32 [layers], of attention's softmax.
    """

    finite: jax.Array
    amax: jax.Array
    largest_logit: jax.Array


class Block(nnx.Module):
    """A pre-norm block."""

    def __init__(self, config: TransformerConfig, dtype: Any, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int | tuple[int, ...], scale: float = 1.0) -> nnx.LinearGeneral:
            init = nnx.initializers.truncated_normal(scale * inputs**-0.5)
            return nnx.LinearGeneral(inputs, outputs, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, linear)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = Mlp(config, linear)

    def __call__(
        self, x_BxTxD: jax.Array, reading: Reading | None = None, layer: jax.Array | None = None
    ) -> tuple[jax.Array, Signs, Reading | None]:
        """The residual stream after the block, its signs, and the cache as `Attention` takes and gives it."""
        mixed, largest_logit, reading = self.attention(self.attention_norm(x_BxTxD), reading, layer)
        middle_BxTxD = x_BxTxD + mixed
        last_BxTxD = middle_BxTxD + self.mlp(self.mlp_norm(middle_BxTxD))
        streams = [lax.stop_gradient(stream) for stream in (x_BxTxD, middle_BxTxD, last_BxTxD)]
        amax = jnp.max(jnp.stack([jnp.max(jnp.abs(stream)) for stream in streams])).astype(jnp.float32)
        return last_BxTxD, Signs(jnp.all(jnp.isfinite(streams[-1])), amax, largest_logit), reading


class Transformer(nnx.Module):
    """The language model: token ids to float32 logits. Padding goes behind the text, where no token of it looks.

    Args:
      config: shapes.
      policy: which layer runs in which recipe; paths are 'blocks/attention/' qkv, scores, values and out, 'blocks/mlp/'
        up and down, and 'head'.
      dtype: compute dtype of activations; parameters are float32.
      rngs: for parameters, and stream 'rounding' for stochastic rounding.
      shardings: where its arrays are.
    """

    def __init__(
        self,
        config: TransformerConfig,
        policy: Policy,
        dtype: Any,
        *,
        rngs: nnx.Rngs,
        shardings: ModelShardings = WHOLE,
    ):
        self.config = config
        self.shardings = shardings

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype, rngs=rngs)

        init = nnx.initializers.truncated_normal(config.d_model**-0.5)
        self.embedding = nnx.Embed(config.vocab, config.d_model, dtype=dtype, embedding_init=init, rngs=rngs)
        self.blocks = stack(rngs)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if config.tied:
            self.head: Any = Product("btd,vd->btv")
        else:
            self.head = nnx.Linear(
                config.d_model, config.vocab, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs
            )
        qnnx.quantize_model(self, policy, rngs=rngs)
        where = dict(shardings.dots)
        for path, module in nnx.iter_modules(self):
            if isinstance(module, qnnx.DotGeneral):
                module.shardings = where.get("/".join(map(str, path[:-1])))

    def hidden(self, tokens_BxT: jax.Array) -> tuple[jax.Array, Signs]:
        """The final normed residual stream [B, T, D], and the signs of the blocks."""
        return self._hidden(tokens_BxT, None)[:2]

    def empty_cache(self, rows: int, slots: int, qtype: str) -> KvCache:
        """A cache for so many rows of at most so many tokens, its format of `kv_cache.FORMATS`."""
        config = self.config
        sizes = {"layers": config.layers, "heads": config.kv_heads, "head_dim": config.head_dim}
        return KvCache.empty(rows=rows, slots=slots, qtype=qtype, **sizes)

    def read(self, tokens_BxT: jax.Array, cache: KvCache, counts_B: jax.Array) -> tuple[jax.Array, KvCache]:
        """Reads on: the final normed residual stream [B, T, D] of tokens that follow those in a cache, and the cache.

        Args:
          tokens_BxT: int32.
          cache: of the tokens before; its slots have to reach.
          counts_B: int32, how many of the T are a row's own; what is behind them is padding.
        """
        x_BxTxD, _, last = self._hidden(tokens_BxT, cache.reading(tokens_BxT.shape[1], counts_B))
        assert last is not None
        return x_BxTxD, last.finished()

    def _hidden(self, tokens_BxT: jax.Array, reading: Reading | None) -> tuple[jax.Array, Signs, Reading | None]:
        graphdef, stack = nnx.split(self.blocks)

        def apply(carried, layer):
            (x_BxTxD, reading), (leaves, number) = carried, layer
            x_BxTxD, signs, reading = nnx.merge(graphdef, leaves)(
                placed(x_BxTxD, self.shardings.stream), reading, number
            )
            return (placed(x_BxTxD, self.shardings.stream), reading), signs

        if reading is not None:
            body = apply
        elif self.config.remat:
            keeping = self.config.remat_keeps == "products"
            kept = jax.checkpoint_policies.save_only_these_names(_PRODUCT) if keeping else None
            # A scan keeps the two computations apart by itself.
            body = jax.checkpoint(apply, prevent_cse=False, policy=kept)
        else:
            body = recomputing(apply)
        x_BxTxD = self.embedding(tokens_BxT)
        if self.config.scaled_embedding:
            # The scale that RMSNorm takes out again, so that embeddings start at unit variance in the stream.
            x_BxTxD *= jnp.asarray(self.config.d_model**0.5, self.embedding.dtype)
        numbers = None if reading is None else jnp.arange(self.config.layers)
        (x_BxTxD, reading), signs = lax.scan(body, (x_BxTxD, reading), (stack, numbers))
        return self.norm(x_BxTxD), signs, reading

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V]."""
        return self.logits(self.hidden(tokens_BxT)[0]).astype(jnp.float32)

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """The head's logits [B, T, V] of `hidden`, in the compute dtype."""
        if not self.config.tied:
            return self.head(x_BxTxD)
        return self.head(x_BxTxD, self.embedding.embedding[...].astype(x_BxTxD.dtype))
