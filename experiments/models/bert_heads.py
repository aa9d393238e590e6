"""What BERT is fine-tuned for: an encoder at path 'encoder', and a head, if any, at path 'head'.

Shapes: B batch, T tokens, D width of the residual stream, C classes. Arguments of calls are as for `Bert`; logits are
float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from experiments.models.bert import INIT, Bert, BertConfig
from experiments.models.layers import HIDDEN


def _head(inputs: int, classes: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, classes, dtype=dtype, kernel_init=INIT, rngs=rngs)


class SequenceClassifier(nnx.Module):
    """A class for each sequence, or pair of sequences, by the pooled first token.

    Args:
      config: of the encoder.
      classes: number of classes.
      dtype: compute dtype of activations.
      rngs: for parameters.
    """

    def __init__(self, config: BertConfig, classes: int, dtype: Any, *, rngs: nnx.Rngs):
        self.encoder = Bert(config, dtype, pooler=True, rngs=rngs)
        self.head = _head(config.d_model, classes, dtype, rngs)

    def __call__(self, tokens_BxT: jax.Array, mask_BxT: jax.Array, types_BxT: jax.Array | None = None) -> jax.Array:
        """Logits [B, C]."""
        pooled_BxD = self.encoder.pool(self.encoder(tokens_BxT, mask_BxT, types_BxT))
        return self.head(pooled_BxD).astype(jnp.float32)


class TokenClassifier(nnx.Module):
    """A class for each token; arguments as `SequenceClassifier`.

    Args:
      casings: as for `Bert`.
    """

    def __init__(self, config: BertConfig, classes: int, dtype: Any, *, casings: int = 0, rngs: nnx.Rngs):
        self.encoder = Bert(config, dtype, casings=casings, rngs=rngs)
        self.head = _head(config.d_model, classes, dtype, rngs)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        mask_BxT: jax.Array,
        types_BxT: jax.Array | None = None,
        casings_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, C]."""
        return self.head(self.encoder(tokens_BxT, mask_BxT, types_BxT, casings_BxT)).astype(jnp.float32)


class SpanPredictor(nnx.Module):
    """The first and the last token of an answer; arguments as `SequenceClassifier`."""

    def __init__(self, config: BertConfig, dtype: Any, *, rngs: nnx.Rngs):
        self.encoder = Bert(config, dtype, rngs=rngs)
        self.head = _head(config.d_model, 2, dtype, rngs)

    def __call__(
        self, tokens_BxT: jax.Array, mask_BxT: jax.Array, types_BxT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits of starts and of ends, each [B, T]; padding can be neither."""
        logits_BxTx2 = self.head(self.encoder(tokens_BxT, mask_BxT, types_BxT)).astype(jnp.float32)
        logits_BxTx2 = jnp.where(mask_BxT[:, :, None], logits_BxTx2, jnp.float32(HIDDEN))
        return logits_BxTx2[:, :, 0], logits_BxTx2[:, :, 1]


class PairClassifier(nnx.Module):
    """How two entities are related, by the tokens that mark their starts (Baldini Soares et al. 2019, Matching the
    blanks, arXiv:1906.03158, section 3.2); arguments as `SequenceClassifier`.
    """

    def __init__(self, config: BertConfig, classes: int, dtype: Any, *, rngs: nnx.Rngs):
        self.encoder = Bert(config, dtype, rngs=rngs)
        self.head = _head(2 * config.d_model, classes, dtype, rngs)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        mask_BxT: jax.Array,
        markers_Bx2: jax.Array,
        types_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, C], for markers at these positions; a position that the sequence does not have gives NaN."""
        x_BxTxD = self.encoder(tokens_BxT, mask_BxT, types_BxT)
        marked_Bx2xD = jnp.take_along_axis(x_BxTxD, markers_Bx2[:, :, None], axis=1, mode="fill")
        return self.head(marked_Bx2xD.reshape(len(markers_Bx2), -1)).astype(jnp.float32)


class SentenceEmbedder(nnx.Module):
    """A vector for each sentence, by whose cosine sentences are alike (Reimers and Gurevych 2019, arXiv:1908.10084).

    Args:
      config: of the encoder.
      dtype: compute dtype of activations.
      rngs: for parameters.
    """

    def __init__(self, config: BertConfig, dtype: Any, *, rngs: nnx.Rngs):
        self.encoder = Bert(config, dtype, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array, mask_BxT: jax.Array, types_BxT: jax.Array | None = None) -> jax.Array:
        """The mean over the tokens of each sentence, of length 1, float32 [B, D]; zeros of one without tokens."""
        x_BxTxD = self.encoder(tokens_BxT, mask_BxT, types_BxT).astype(jnp.float32)
        # A mean has the direction of a sum.
        sum_BxD = jnp.sum(jnp.where(mask_BxT[:, :, None], x_BxTxD, jnp.float32(0)), axis=1)
        square_Bx1 = jnp.sum(jnp.square(sum_BxD), axis=1, keepdims=True)
        return sum_BxD * lax.rsqrt(jnp.maximum(square_Bx1, jnp.float32(1e-24)))
