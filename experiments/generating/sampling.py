"""Choosing the next token of each row from its logits, with a key of its own."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: divisor of the logits; 0 takes the most likely token.
      top_k: only so many of the most likely tokens; 0 for all.
      top_p: of these the fewest most likely ones whose probabilities add up to this much (nucleus sampling, Holtzman et
        al. 2020, arXiv:1904.09751, section 3.1); 1 for all.

    Raises:
      ValueError: a value out of its range, naming the flag.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature={self.temperature} must be finite and at least 0.")
        if self.top_k < 0:
            raise ValueError(f"--top_k={self.top_k} must be at least 1, or 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p={self.top_p} must be above 0 and at most 1.")


def sample(logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BxV: float32.
      keys_B: a PRNG key for each row, of which its token alone depends.
      sampling: how.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / jnp.float32(sampling.temperature)
    vocab = logits_BxV.shape[-1]
    if sampling.top_p == 1 and not 0 < sampling.top_k < vocab:
        return _drawn(keys_B, logits_BxV)
    best_BxK, tokens_BxK = lax.top_k(logits_BxV, min(sampling.top_k or vocab, vocab))
    return jnp.take_along_axis(tokens_BxK, _drawn(keys_B, _nucleus(best_BxK, sampling.top_p))[:, None], axis=1)[:, 0]


def _nucleus(descending_BxK: jax.Array, top_p: float) -> jax.Array:
    """Logits without those before which the probabilities add up to enough; the first is always kept."""
    if top_p == 1:
        return descending_BxK
    shares = jax.nn.softmax(descending_BxK, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    return jnp.where(before < jnp.float32(top_p), descending_BxK, jnp.float32(-jnp.inf))


def _drawn(keys_B: jax.Array, logits_BxV: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)


def request_keys(seed: int, requests_B: jax.Array) -> jax.Array:
    """A key for each request, by its number among all of a command: whatever rows it is beside, it draws the same."""
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(requests_B)


def token_keys(keys_B: jax.Array, number: jax.Array) -> jax.Array:
    """The keys of each request's token of this number."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)
