"""BERT: an encoder of plain NNX layers (Devlin et al. 2019, arXiv:1810.04805).

Shapes: B batch, T tokens, D width of the residual stream.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers import LayerNorm, Mlp, SelfAttention, check_sizes

INIT = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shapes of an encoder.

    Attributes:
      layers: number of blocks.
      d_model: width of the residual stream.
      heads: a divisor of it.
      d_ff: hidden width of the feed-forward layer.
      vocab: number of tokens.
      positions: the longest sequence.
      types: number of token types, that is of segments.
      norm_eps: added to the variance in layer normalization.

    Raises:
      ValueError: a size below 1, or heads that do not divide the width.
    """

    layers: int
    d_model: int
    heads: int
    d_ff: int
    vocab: int
    positions: int = 512
    types: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self):
        check_sizes(self, "layers", "d_model", "heads", "d_ff", "vocab", "positions", "types")


class Embeddings(nnx.Module):
    """The sum of what a token, its position, its type and, where it is told, its casing are embedded as, normalized."""

    def __init__(self, config: BertConfig, dtype: Any, casings: int, *, rngs: nnx.Rngs):
        def embed(rows: int, init: Any = INIT) -> nnx.Embed:
            return nnx.Embed(rows, config.d_model, dtype=dtype, embedding_init=init, rngs=rngs)

        self.token = embed(config.vocab)
        self.position = embed(config.positions)
        self.type = embed(config.types)
        # Of zeros, so that a pretrained encoder begins as it was.
        self.casing: Any = embed(casings, nnx.initializers.zeros) if casings else None
        self.norm = LayerNorm(config.d_model, config.norm_eps, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array, types_BxT: jax.Array | None, casings_BxT: jax.Array | None) -> jax.Array:
        length, positions = tokens_BxT.shape[1], self.position.num_embeddings
        if length > positions:
            raise ValueError(f"Sequences of {length} tokens are longer than the encoder's {positions}: truncate them.")
        if (casings_BxT is None) != (self.casing is None):
            raise ValueError("Casings are given to an encoder that is made with casings, and to no other.")
        x_BxTxD = self.token(tokens_BxT) + self.position(jnp.arange(length))[None]
        x_BxTxD += self.type(jnp.zeros_like(tokens_BxT) if types_BxT is None else types_BxT)
        if self.casing is not None:
            x_BxTxD += self.casing(casings_BxT)
        return self.norm(x_BxTxD)


class Block(nnx.Module):
    """A post-norm block."""

    def __init__(self, config: BertConfig, dtype: Any, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=INIT, rngs=rngs)

        self.attention = SelfAttention(config.d_model, config.heads, linear)
        self.attention_norm = LayerNorm(config.d_model, config.norm_eps, rngs=rngs)
        self.mlp = Mlp(config.d_model, config.d_ff, linear, approximate=False)
        self.mlp_norm = LayerNorm(config.d_model, config.norm_eps, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array, visible_BxTxT: jax.Array) -> jax.Array:
        x_BxTxD = self.attention_norm(x_BxTxD + self.attention(x_BxTxD, visible_BxTxT))
        return self.mlp_norm(x_BxTxD + self.mlp(x_BxTxD))


class Bert(nnx.Module):
    """The encoder. Each layer has a path of its own, such as 'blocks/0/attention/qkv', by which a policy names it.

    Args:
      config: shapes.
      dtype: compute dtype of activations; parameters are float32.
      pooler: whether it has the layer that `pool` needs.
      casings: number of casings that a token can have (an uncased vocabulary does not tell), or 0.
      rngs: for parameters.
    """

    def __init__(self, config: BertConfig, dtype: Any, *, pooler: bool = False, casings: int = 0, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, dtype, casings, rngs=rngs)
        self.blocks = nnx.List([Block(config, dtype, rngs=rngs) for _ in range(config.layers)])
        linear = functools.partial(nnx.Linear, config.d_model, config.d_model, dtype=dtype, kernel_init=INIT, rngs=rngs)
        self.pooler: Any = linear() if pooler else None

    def __call__(
        self,
        tokens_BxT: jax.Array,
        mask_BxT: jax.Array,
        types_BxT: jax.Array | None = None,
        casings_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """The last residual stream [B, T, D], in the compute dtype.

        Args:
          tokens_BxT: integer ids.
          mask_BxT: bool, whether a token is text; the others are padding, which no token sees.
          types_BxT: integer token types; all 0 if not given.
          casings_BxT: integer casings, for an encoder made with casings.

        Raises:
          ValueError: sequences longer than the encoder has positions, or casings without a place for them.
        """
        x_BxTxD = self.embeddings(tokens_BxT, types_BxT, casings_BxT)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD, mask_BxT[:, None, :])
        return x_BxTxD

    def pool(self, x_BxTxD: jax.Array) -> jax.Array:
        """What the first token, [CLS], says of the sequence, [B, D]."""
        return jnp.tanh(self.pooler(x_BxTxD[:, 0]))
