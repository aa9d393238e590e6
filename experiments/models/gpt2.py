"""GPT-2: a decoder of plain NNX layers (Radford et al. 2019, Language models are unsupervised multitask learners).

Shapes: B batch, T tokens, D width of the residual stream, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.kv_cache import KvCache, Reading
from experiments.models.layers import LayerNorm, Mlp, Product, SelfAttention, check_sizes
from q8jax.qarray import QArray


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """Shapes of GPT-2.

    Attributes:
      layers: number of blocks.
      d_model: width of the residual stream.
      heads: a divisor of it.
      d_ff: hidden width of the feed-forward layer.
      vocab: number of tokens.
      positions: the longest sequence.
      norm_eps: added to the variance in layer normalization.

    Raises:
      ValueError: a size below 1, or heads that do not divide the width.
    """

    layers: int
    d_model: int
    heads: int
    d_ff: int
    vocab: int
    positions: int
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_sizes(self, "layers", "d_model", "heads", "d_ff", "vocab", "positions")


class Block(nnx.Module):
    """A pre-norm block."""

    def __init__(self, config: Gpt2Config, dtype: Any, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, scale: float = 1.0) -> nnx.Linear:
            init = nnx.initializers.normal(0.02 * scale)
            return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=init, rngs=rngs)

        # Each block adds twice to the residual stream.
        out = functools.partial(linear, scale=(2 * config.layers) ** -0.5)
        self.attention_norm = LayerNorm(config.d_model, config.norm_eps, rngs=rngs)
        self.attention = SelfAttention(config.d_model, config.heads, linear, out)
        self.mlp_norm = LayerNorm(config.d_model, config.norm_eps, rngs=rngs)
        self.mlp = Mlp(config.d_model, config.d_ff, linear, out, approximate=True)

    def __call__(
        self, x_BxTxD: jax.Array, visible_BxTxS: jax.Array, reading: Reading | None = None, layer: int = 0
    ) -> tuple[jax.Array, Reading | None]:
        """The residual stream after the block, and the cache, where there is one, with its keys and values.

        Args:
          x_BxTxD: the stream before it.
          visible_BxTxS: bool, what each token sees: tokens of this call or, with a cache, its slots.
          reading: of a cache.
          layer: which block it is there.
        """
        k: jax.Array | QArray
        v: jax.Array | QArray
        q, k, v = self.attention.project(self.attention_norm(x_BxTxD))
        if reading is not None:
            reading, k, v = reading.extended(layer, k, v)
        x_BxTxD += self.attention.attend(q, k, v, visible_BxTxS)
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD)), reading


class Gpt2(nnx.Module):
    """The language model. Each layer has a path of its own, such as 'blocks/0/attention/qkv', and the head is 'head'.

    Args:
      config: shapes.
      dtype: compute dtype of activations; parameters are float32.
      rngs: for parameters.
    """

    def __init__(self, config: Gpt2Config, dtype: Any, *, rngs: nnx.Rngs):
        def embed(rows: int, std: float) -> nnx.Embed:
            init = nnx.initializers.normal(std)
            return nnx.Embed(rows, config.d_model, dtype=dtype, embedding_init=init, rngs=rngs)

        self.config = config
        self.embedding = embed(config.vocab, 0.02)
        self.position = embed(config.positions, 0.01)
        self.blocks = nnx.List([Block(config, dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = LayerNorm(config.d_model, config.norm_eps, rngs=rngs)
        self.head = Product("btd,vd->btv")

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V]. Padding goes behind the text, where no token of it looks.

        Raises:
          ValueError: sequences longer than the model has positions.
        """
        length = tokens_BxT.shape[1]
        if length > self.config.positions:
            raise ValueError(
                f"Sequences of {length} tokens are longer than the model's {self.config.positions}: truncate them."
            )
        visible_1xTxT = jnp.tril(jnp.ones((length, length), bool))[None]
        return self.logits(self._hidden(tokens_BxT, jnp.arange(length)[None], visible_1xTxT)[0])

    def _hidden(
        self, tokens_BxT: jax.Array, positions: jax.Array, visible: jax.Array, reading: Reading | None = None
    ) -> tuple[jax.Array, Reading | None]:
        x_BxTxD = self.embedding(tokens_BxT) + self.position(positions)
        for layer, block in enumerate(self.blocks):
            x_BxTxD, reading = block(x_BxTxD, visible, reading, layer)
        return self.norm(x_BxTxD), reading

    def empty_cache(self, rows: int, slots: int, qtype: str) -> KvCache:
        """A cache for so many rows of at most so many tokens, its format of `kv_cache.FORMATS`."""
        config = self.config
        sizes = {"layers": config.layers, "heads": config.heads, "head_dim": config.d_model // config.heads}
        return KvCache.empty(rows=rows, slots=slots, qtype=qtype, **sizes)

    def read(self, tokens_BxT: jax.Array, cache: KvCache, counts_B: jax.Array) -> tuple[jax.Array, KvCache]:
        """Reads on: the final normed residual stream [B, T, D] of tokens that follow those in a cache, and the cache.

        Args:
          tokens_BxT: int32.
          cache: of the tokens before; slots and positions have to reach.
          counts_B: int32, how many of the T are a row's own; what is behind them is padding.
        """
        reading = cache.reading(tokens_BxT.shape[1], counts_B)
        # Padding may lie beyond the last position, of which there is no embedding.
        positions_BxT = jnp.minimum(reading.positions_BxT, self.config.positions - 1)
        x_BxTxD, last = self._hidden(tokens_BxT, positions_BxT, reading.visible_BxTxS, reading)
        assert last is not None
        return x_BxTxD, last.finished()

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """Of the final normed residual stream, by the embedding."""
        kernel_VxD = self.embedding.embedding[...].astype(x_BxTxD.dtype)
        return self.head(x_BxTxD, kernel_VxD).astype(jnp.float32)
