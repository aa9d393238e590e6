"""Prefill and decoding of a batch of requests: two programs, each compiled once, that pass a cache on in place.

Shapes: B rows, C tokens of a chunk, N chunks, D width of the residual stream, V vocabulary.

A prompt is read in chunks, so that attention's scores are of a chunk and the cache, not of a prompt squared. Decoding
takes several steps in one call: what a call costs the host is then shared by their tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import q8jax.nnx as qnnx
from experiments.generating.sampling import Sampling, request_keys, sample, token_keys
from experiments.models.kv_cache import KvCache

READ_AT_ONCE = 128
STEPS_AT_ONCE = 16


def frozen(model: nnx.Module) -> nnx.Module:
    """A twin for inference: parameters in the dtype that its layers multiply in, kernels quantized once.

    The results are those of the model, for its layers convert and quantize alike in every call; norms stay in float32.
    """
    graphdef, state = nnx.split(model)
    twin = nnx.merge(graphdef, state, copy=True)
    for _, layer in nnx.iter_modules(twin):
        if isinstance(layer, nnx.Linear | nnx.LinearGeneral | nnx.Embed) and layer.dtype is not None:
            for name, variable in vars(layer).items():
                if isinstance(variable, nnx.Param) and variable.get_value() is not None:
                    setattr(layer, name, variable.replace(variable[...].astype(layer.dtype)))
    return qnnx.prequantize(twin)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch in the midst of decoding.

    Attributes:
      cache: of all tokens but the last of each row.
      token_B: int32, the last one.
      made: int32, how many have been made of each.
      done_B: bool, whether the last one ends its row.
      keys_B: of the requests.
    """

    cache: KvCache
    token_B: jax.Array
    made: jax.Array
    done_B: jax.Array
    keys_B: jax.Array


@dataclasses.dataclass
class Speed:
    """What decoding took, compiling apart.

    Attributes:
      read, made: tokens of prompts, and new ones.
      prefill_seconds, decode_seconds, compile_seconds: times; the first new token of each row comes with the prefill.
      cache_bytes: of the largest cache.
    """

    read: int = 0
    made: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    cache_bytes: int = 0


class Decoder:
    """Decodes with one model.

    Args:
      model: as `frozen` makes it; a Transformer or a Gpt2.
      qtype: of the cache, of `kv_cache.FORMATS`.
      sampling: how tokens are chosen.
      vocab: tokens from this on are never chosen, since the tokenizer does not know them.
      end: the token that ends a row.
      steps_at_once: steps of a call.

    Attributes:
      speed: of all calls so far.
    """

    def __init__(
        self,
        model: Any,
        qtype: str,
        sampling: Sampling,
        *,
        vocab: int,
        end: int,
        steps_at_once: int = STEPS_AT_ONCE,
    ):
        self._model, self._qtype, self._sampling = model, qtype, sampling
        self._vocab, self._end, self._steps = vocab, end, steps_at_once
        self._graphdef, self._leaves = nnx.split(model)
        self._programs: dict[Any, Callable] = {}
        self.speed = Speed()

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._leaves))

    def generate(
        self, prompts: Sequence[np.ndarray], requests: Sequence[int], *, slots: int, new: int, seed: int
    ) -> Iterator[list[np.ndarray]]:
        """Writes on.

        Args:
          prompts: int [tokens] each, none empty.
          requests: their numbers, by which they draw.
          slots: tokens that a row has room for.
          new: tokens to write.
          seed: of all requests.

        Yields:
          The next tokens of each row, int [tokens]; of a row that has ended, none. The last is the one that ends it.
        """
        rows = self._begun(prompts, requests, slots, seed)
        parts = self._until_end(np.asarray(rows.token_B)[:, None], np.zeros(len(prompts), bool))
        yield parts
        done = np.asarray(rows.done_B)
        written = 1
        while written < new and not done.all():
            program = self._compiled(self._decode, rows)
            started = time.perf_counter()
            rows, tokens = program(self._leaves, rows)
            tokens = np.asarray(tokens)[:, : new - written]
            self.speed.decode_seconds += time.perf_counter() - started
            written += tokens.shape[1]
            parts = self._until_end(tokens, done)
            self.speed.made += sum(map(len, parts))
            done = np.asarray(rows.done_B)
            yield parts

    def _begun(self, prompts: Sequence[np.ndarray], requests: Sequence[int], slots: int, seed: int) -> Rows:
        cache = self._model.empty_cache(len(prompts), slots, self._qtype)
        self.speed.cache_bytes = max(self.speed.cache_bytes, cache.nbytes)
        keys_B = request_keys(seed, jnp.array(requests, jnp.uint32))
        tokens, counts = in_chunks(prompts)
        arguments = cache, keys_B, jnp.asarray(tokens), jnp.asarray(counts)
        program = self._compiled(self._prefill, *arguments)
        started = time.perf_counter()
        rows = jax.block_until_ready(program(self._leaves, *arguments))
        self.speed.prefill_seconds += time.perf_counter() - started
        self.speed.read += sum(map(len, prompts))
        return rows

    def _compiled(self, function: Callable, first: Any, *others: Any, takes_over: bool = True) -> Callable:
        """A method as a program, compiled once, which writes its first argument's successor in its place."""
        key = function.__name__, *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((first, *others)))
        if key not in self._programs:
            started = time.perf_counter()
            jitted = jax.jit(function, donate_argnums=1 if takes_over else ())
            self._programs[key] = jitted.lower(self._leaves, first, *others).compile()
            self.speed.compile_seconds += time.perf_counter() - started
        return self._programs[key]

    def _until_end(self, tokens_BxT: np.ndarray, done_B: np.ndarray) -> list[np.ndarray]:
        ends = tokens_BxT == self._end
        lengths = np.where(ends.any(1), ends.argmax(1) + 1, tokens_BxT.shape[1])
        return [row[: 0 if done else length] for row, length, done in zip(tokens_BxT, lengths, done_B, strict=True)]

    def _choose(self, model: Any, x_BxD: jax.Array, keys_B: jax.Array, number: jax.Array) -> jax.Array:
        logits_BxV = model.logits(x_BxD[:, None])[:, 0, : self._vocab].astype(jnp.float32)
        return sample(logits_BxV, token_keys(keys_B, number), self._sampling)

    def _prefill(
        self, leaves: Any, cache: KvCache, keys_B: jax.Array, tokens_NxBxC: jax.Array, counts_NxB: jax.Array
    ) -> Rows:
        def read(carried, chunk):
            (cache, last_BxD), (tokens_BxC, counts_B) = carried, chunk
            x_BxCxD, cache = nnx.merge(self._graphdef, leaves).read(tokens_BxC, cache, counts_B)
            place = jnp.maximum(counts_B - 1, 0)[:, None, None]
            own = jnp.take_along_axis(x_BxCxD, place, axis=1)[:, 0]
            return (cache, jnp.where(counts_B[:, None] > 0, own, last_BxD)), None

        model = nnx.merge(self._graphdef, leaves)
        last_BxD = jnp.zeros((tokens_NxBxC.shape[1], model.config.d_model), model.embedding.dtype)
        (cache, last_BxD), _ = lax.scan(read, (cache, last_BxD), (tokens_NxBxC, counts_NxB))
        first_B = self._choose(model, last_BxD, keys_B, jnp.int32(0))
        return Rows(cache, first_B, jnp.int32(1), first_B == self._end, keys_B)

    def _decode(self, leaves: Any, rows: Rows) -> tuple[Rows, jax.Array]:
        def step(rows: Rows, _: None) -> tuple[Rows, jax.Array]:
            model = nnx.merge(self._graphdef, leaves)
            counts_B = jnp.where(rows.done_B, 0, 1)
            x_Bx1xD, cache = model.read(rows.token_B[:, None], rows.cache, counts_B)
            token_B = self._choose(model, x_Bx1xD[:, 0], rows.keys_B, rows.made)
            following = Rows(cache, token_B, rows.made + 1, rows.done_B | (token_B == self._end), rows.keys_B)
            return following, token_B

        rows, tokens_TxB = lax.scan(step, rows, None, length=self._steps)
        return rows, tokens_TxB.T

    def losses(self, texts: np.ndarray) -> np.ndarray:
        """The loss in nats of each text's tokens after its first, read through the cache, summed: float64 [texts].

        Args:
          texts: int [texts, tokens], of one length.
        """
        tokens, counts = in_chunks(list(texts[:, :-1]))
        targets, _ = in_chunks(list(texts[:, 1:]))
        cache = self._model.empty_cache(len(texts), texts.shape[1] - 1, self._qtype)
        arguments = cache, jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(counts)
        program = self._compiled(self._losses, *arguments, takes_over=False)
        return np.asarray(program(self._leaves, *arguments), np.float64)

    def _losses(
        self, leaves: Any, cache: KvCache, tokens_NxBxC: jax.Array, targets_NxBxC: jax.Array, counts_NxB: jax.Array
    ) -> jax.Array:
        def read(carried, chunk):
            (cache, total_B), (tokens_BxC, targets_BxC, counts_B) = carried, chunk
            model = nnx.merge(self._graphdef, leaves)
            x_BxCxD, cache = model.read(tokens_BxC, cache, counts_B)
            scores_BxCxV = jax.nn.log_softmax(model.logits(x_BxCxD).astype(jnp.float32), axis=-1)
            loss_BxC = -jnp.take_along_axis(scores_BxCxV, targets_BxC[..., None], axis=2)[..., 0]
            own_BxC = jnp.arange(loss_BxC.shape[1])[None, :] < counts_B[:, None]
            return (cache, total_B + jnp.sum(jnp.where(own_BxC, loss_BxC, jnp.float32(0)), axis=1)), None

        total_B = jnp.zeros(tokens_NxBxC.shape[1], jnp.float32)
        return lax.scan(read, (cache, total_B), (tokens_NxBxC, targets_NxBxC, counts_NxB))[0][1]


def in_chunks(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths padded behind and cut: tokens int32 [N, B, C], and how many are a row's own [N, B]."""
    lengths = np.array([len(row) for row in rows])
    size = min(READ_AT_ONCE, int(lengths.max()))
    chunks = -(-int(lengths.max()) // size)
    tokens = np.zeros((len(rows), chunks * size), np.int32)
    for row, own in zip(tokens, rows, strict=True):
        row[: len(own)] = own
    counts = np.clip(lengths[None, :] - size * np.arange(chunks)[:, None], 0, size).astype(np.int32)
    return tokens.reshape(len(rows), chunks, size).swapaxes(0, 1), counts
