"""A recurrent tagger of plain NNX layers, which a policy then quantizes: a class for each token.

Shapes: B batch, T tokens, I inputs and H units of a layer, D directions, 4 gates. What a layer makes of its inputs does
not wait for its state, so it is one product for all tokens and both directions; the product with the state stands in a
`lax.scan` over tokens. Both directions advance in the same step, the second one from the last token to the first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import q8jax.nnx as qnnx
from q8jax.policy import Policy

_GATES = 4


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """An LSTM tagger.

    Attributes:
      vocab: number of tokens.
      classes: number of classes.
      d_model: width of the embedding.
      hidden: units of each layer and direction.
      layers: number of layers.
      bidirectional: whether each layer reads the tokens in both directions.

    Raises:
      ValueError: a size below 1.
    """

    vocab: int
    classes: int
    d_model: int = 128
    hidden: int = 128
    layers: int = 2
    bidirectional: bool = True

    def __post_init__(self):
        for name in ("vocab", "classes", "d_model", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


class Lstm(nnx.Module):
    """A layer of long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000, with forget gates).

    Gates and cells are in float32; forget gates start open (Jozefowicz et al. 2015).
    """

    def __init__(self, inputs: int, config: RecurrentConfig, dtype: Any, *, rngs: nnx.Rngs):
        self.hidden, self.directions = config.hidden, config.directions
        gates = _GATES * self.hidden
        init = nnx.initializers.truncated_normal
        self.inputs = nnx.Linear(
            inputs,
            self.directions * gates,
            dtype=dtype,
            kernel_init=init(inputs**-0.5),
            bias_init=self._open_forget_gates,
            rngs=rngs,
        )
        self.recurrent = nnx.Einsum(
            "dbh,dhg->dbg",
            (self.directions, self.hidden, gates),
            dtype=dtype,
            kernel_init=init(self.hidden**-0.5),
            rngs=rngs,
        )

    def _open_forget_gates(self, key: jax.Array, shape: tuple[int, ...], dtype: Any, **kwargs: Any) -> jax.Array:
        del key, kwargs
        bias = jnp.zeros((self.directions, _GATES, self.hidden), dtype).at[:, 1].set(1)
        return bias.reshape(shape)

    def __call__(self, x_BxTxI: jax.Array, valid_BxT: jax.Array) -> jax.Array:
        """The states after each token, [B, T, D · H]; a token that is not valid leaves them as they are."""
        batch, tokens, _ = x_BxTxI.shape
        gates_BxTxDxG = self.inputs(x_BxTxI).reshape(batch, tokens, self.directions, -1)
        gates_TxDxBxG = self._in_reading_order(jnp.transpose(gates_BxTxDxG, (1, 2, 0, 3)))
        valid_TxDxB = jnp.broadcast_to(valid_BxT.T[:, None, :], (tokens, self.directions, batch))
        valid_TxDxB = self._in_reading_order(valid_TxDxB)

        def step(state, at_token):
            h_DxBxH, c_DxBxH = state
            own_DxBxG, valid_DxB = at_token
            gates = own_DxBxG.astype(jnp.float32) + self.recurrent(h_DxBxH).astype(jnp.float32)
            take, keep, new, show = jnp.split(gates, _GATES, axis=-1)
            cells = nnx.sigmoid(keep) * c_DxBxH + nnx.sigmoid(take) * jnp.tanh(new)
            states = (nnx.sigmoid(show) * jnp.tanh(cells)).astype(h_DxBxH.dtype)
            is_valid = valid_DxB[..., None]
            state = jnp.where(is_valid, states, h_DxBxH), jnp.where(is_valid, cells, c_DxBxH)
            return state, state[0]

        shape = (self.directions, batch, self.hidden)
        start = jnp.zeros(shape, x_BxTxI.dtype), jnp.zeros(shape, jnp.float32)
        _, states_TxDxBxH = lax.scan(step, start, (gates_TxDxBxG, valid_TxDxB))
        states_TxDxBxH = self._in_reading_order(states_TxDxBxH)
        return jnp.transpose(states_TxDxBxH, (2, 0, 1, 3)).reshape(batch, tokens, -1)

    def _in_reading_order(self, x_TxD: jax.Array) -> jax.Array:
        """The second direction turned round: to the order in which it is read, and back."""
        if self.directions == 1:
            return x_TxD
        return jnp.stack([x_TxD[:, 0], jnp.flip(x_TxD[:, 1], axis=0)], axis=1)


class Tagger(nnx.Module):
    """Token ids to float32 logits of each token's class.

    Args:
      config: shapes.
      policy: which layer runs in which recipe; paths are 'layers/' number '/' inputs and recurrent, and 'head'.
      dtype: compute dtype of activations; parameters are float32.
      rngs: for parameters, and stream 'rounding' for stochastic rounding.
    """

    def __init__(self, config: RecurrentConfig, policy: Policy, dtype: Any, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.truncated_normal
        self.embedding = nnx.Embed(config.vocab, config.d_model, dtype=dtype, embedding_init=init(1.0), rngs=rngs)
        states = config.directions * config.hidden
        sizes = [config.d_model] + [states] * (config.layers - 1)
        self.layers = nnx.List([Lstm(size, config, dtype, rngs=rngs) for size in sizes])
        self.head = nnx.Linear(states, config.classes, dtype=dtype, kernel_init=init(states**-0.5), rngs=rngs)
        qnnx.quantize_model(self, policy, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array, valid_BxT: jax.Array | None = None) -> jax.Array:
        """Logits, float32 [B, T, classes].

        Args:
          tokens_BxT: int32.
          valid_BxT: bool, False where a row is padded, so that the other tokens do not see it; None for nowhere.
        """
        valid_BxT = jnp.ones(tokens_BxT.shape, bool) if valid_BxT is None else valid_BxT
        x_BxTxI = self.embedding(tokens_BxT)
        for layer in self.layers:
            x_BxTxI = layer(x_BxTxI, valid_BxT)
        return self.head(x_BxTxI).astype(jnp.float32)
