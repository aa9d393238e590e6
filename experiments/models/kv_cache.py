"""Keys and values of what a decoder has read, so that for each new token only its own are computed.

Shapes: L layers, B rows, T new tokens of each, S slots, K key-value heads, H head size.

A token's slot is its position in its row, so that a row has the same bits whatever stands beside it. Prompts of
different lengths are padded behind; padding is not stored, and no token sees it. In 8 bits each token has for each head
one scale for its key and one for its value: their channels lie within a few powers of two of each other, while those of
different tokens and heads need not, and a scale that is known when a token comes is never to be changed. Tokens attend
to what is stored, their own key and value included, so it makes no difference in how many calls a text is read.
"""

import dataclasses
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import lax

from q8jax import choices
from q8jax.formats import as_bytes, get_format, of_bytes
from q8jax.qarray import QArray, quantize

FORMATS = MappingProxyType(
    {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp8-e3m4": "float8_e3m4", "int8": "int8"}
)
# The least that a scale may be; an empty slot has it.
_EMPTY = 2.0**-126


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """The keys, or the values, of all layers.

    Attributes:
      codes: [L, B, K, S, H]; of 8-bit floats the bytes.
      scale: float32 [L, B, K, S], what codes are multiplied by; None of formats that need none.
      qtype: name of the format; static.
    """

    codes: jax.Array
    scale: jax.Array | None
    qtype: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, shape_LxBxKxSxH: tuple[int, ...], qtype: str) -> "Stored":
        fmt = get_format(qtype)
        codes = as_bytes(jnp.zeros(shape_LxBxKxSxH, fmt.dtype))
        scale = jnp.full(shape_LxBxKxSxH[:-1], _EMPTY, jnp.float32) if fmt.bits == 8 else None
        return cls(codes, scale, fmt.name)

    def put(self, layer: int | jax.Array, slots_BxT: jax.Array, x_BxTxKxH: jax.Array) -> "Stored":
        """With tokens of a layer in their slots; those beyond the last are left out."""
        rows_Bx1 = jnp.arange(slots_BxT.shape[0])[:, None]
        place = layer, rows_Bx1, slice(None), slots_BxT
        if self.scale is None:
            codes = self.codes.at[place].set(x_BxTxKxH.astype(self.codes.dtype), mode="drop")
            return dataclasses.replace(self, codes=codes)
        made = quantize(x_BxTxKxH, self.qtype, channelwise_axes=(0, 1, 2))
        codes = self.codes.at[place].set(as_bytes(made.qvalue), mode="drop")
        scale = self.scale.at[place].set(jnp.squeeze(made.scale, 3), mode="drop")
        return dataclasses.replace(self, codes=codes, scale=scale)

    def of(self, layer: int | jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array | QArray:
        """What a layer has stored, [B, S, K, H]: in `dtype`, or codes of 8 bits with their scales."""
        codes = jnp.swapaxes(lax.dynamic_index_in_dim(self.codes, layer, keepdims=False), 1, 2)
        if self.scale is None:
            return codes.astype(dtype)
        scale = jnp.swapaxes(lax.dynamic_index_in_dim(self.scale, layer, keepdims=False), 1, 2)
        return QArray(of_bytes(codes, get_format(self.qtype).dtype), scale[..., None], qtype=self.qtype)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KvCache:
    """What a decoder remembers of its rows.

    Attributes:
      keys, values: of all layers.
      lengths: int32 [B], how many tokens each row has.
    """

    keys: Stored
    values: Stored
    lengths: jax.Array

    @classmethod
    def empty(cls, *, layers: int, rows: int, slots: int, heads: int, head_dim: int, qtype: str) -> "KvCache":
        """Of no tokens yet.

        Args:
          layers, rows, slots, heads, head_dim: sizes; heads are those of keys and values.
          qtype: a key of FORMATS.

        Raises:
          ValueError: an unknown format.
        """
        choices.check("--kv_cache", qtype, FORMATS)
        shape = layers, rows, heads, slots, head_dim
        # Two arrays, not one twice: each is donated for itself.
        keys, values = (Stored.empty(shape, FORMATS[qtype]) for _ in range(2))
        return cls(keys, values, jnp.zeros(rows, jnp.int32))

    def reading(self, tokens: int, counts_B: jax.Array) -> "Reading":
        """Begins a call of a model that reads more tokens.

        Args:
          tokens: T.
          counts_B: int32, how many of each row's T are its own; the others, behind them, are padding.
        """
        slots = self.keys.codes.shape[3]
        order_1xT = jnp.arange(tokens)[None, :]
        positions_BxT = self.lengths[:, None] + order_1xT
        places_BxT = jnp.where(order_1xT < counts_B[:, None], positions_BxT, slots)
        visible_BxTxS = jnp.arange(slots)[None, None, :] <= positions_BxT[..., None]
        return Reading(self, counts_B, positions_BxT, places_BxT, visible_BxTxS)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """A cache in the midst of a call, which goes from layer to layer.

    Attributes:
      cache: with the new tokens of the layers so far.
      counts_B: int32, how many of each row's new tokens are its own.
      positions_BxT: int32, of the new tokens in their rows.
      places_BxT: int32, the slots they go to; beyond the last for padding.
      visible_BxTxS: bool, the slots that each new token sees.
    """

    cache: KvCache
    counts_B: jax.Array
    positions_BxT: jax.Array
    places_BxT: jax.Array
    visible_BxTxS: jax.Array

    def extended(
        self, layer: int | jax.Array, k_BxTxKxH: jax.Array, v_BxTxKxH: jax.Array
    ) -> tuple["Reading", jax.Array | QArray, jax.Array | QArray]:
        """With the new tokens of a layer, and all its keys and values, [B, S, K, H], as they are stored."""
        keys = self.cache.keys.put(layer, self.places_BxT, k_BxTxKxH)
        values = self.cache.values.put(layer, self.places_BxT, v_BxTxKxH)
        extended = dataclasses.replace(self, cache=dataclasses.replace(self.cache, keys=keys, values=values))
        return extended, keys.of(layer, k_BxTxKxH.dtype), values.of(layer, v_BxTxKxH.dtype)

    def finished(self) -> KvCache:
        """The cache once the last layer has been."""
        return dataclasses.replace(self.cache, lengths=self.cache.lengths + self.counts_B)
