"""Layers that several models are made of: plain NNX, so that a policy can quantize every product.

Shapes: B batch, T tokens that ask, S tokens that are looked at, D width of the residual stream, N heads, H head size,
F hidden width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q8jax.mixed import mixed_einsum
from q8jax.qarray import QArray

HIDDEN = -1e30


class Product(nnx.Module):
    """A product of two arrays that a policy can quantize by its `einsum_op`, without parameters of its own."""

    def __init__(self, subscripts: str, *, stack: tuple[int, ...] = ()):
        self.subscripts = subscripts
        self.einsum_op: Any = jnp.einsum
        self.stack = stack

    def __call__(self, lhs: jax.Array, rhs: jax.Array | QArray) -> jax.Array:
        """Of codes, those themselves are multiplied, unless a policy says how: then that holds for their values."""
        if isinstance(rhs, QArray):
            recipe = getattr(self.einsum_op, "recipe", None)
            if recipe is None or not recipe.is_quantized:
                return mixed_einsum(self.subscripts, lhs, rhs)
            rhs = rhs.dequantize(lhs.dtype)
        return self.einsum_op(self.subscripts, lhs, rhs)


class LayerNorm(nnx.LayerNorm):
    """Layer normalization in float32 (Ba et al. 2016, arXiv:1607.06450); the result has the argument's dtype."""

    def __init__(self, size: int, epsilon: float, *, rngs: nnx.Rngs):
        # The mean square less the squared mean, which is faster, loses what a large mean drowns.
        super().__init__(size, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return super().__call__(x, mask=mask).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Multi-head attention with biases (Vaswani et al. 2017, arXiv:1706.03762); query, key and value are one GEMM.

    A call is `project`, then `attend`. A decoder that keeps keys and values of earlier tokens does the same with its
    cache in between.

    Args:
      d_model: width of the residual stream.
      heads: a divisor of it.
      linear: makes a layer of so many inputs and outputs.
      out: makes the last one.
    """

    def __init__(self, d_model: int, heads: int, linear: Callable[[int, int], nnx.Linear], out: Callable | None = None):
        self.heads = heads
        self.qkv = linear(d_model, 3 * d_model)
        self.out = (out or linear)(d_model, d_model)
        self.scores = Product("btnh,bsnh->bnts")
        self.values = Product("bnts,bsnh->btnh")

    def __call__(self, x_BxTxD: jax.Array, visible_BxTxS: jax.Array) -> jax.Array:
        """The mixed values [B, T, D], each token's of those that are visible to it."""
        return self.attend(*self.project(x_BxTxD), visible_BxTxS)

    def project(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each [B, T, N, H]."""
        batch, tokens, width = x_BxTxD.shape
        qkv_BxTx3xNxH = self.qkv(x_BxTxD).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = jnp.split(qkv_BxTx3xNxH, 3, axis=2)
        return jnp.squeeze(q, 2), jnp.squeeze(k, 2), jnp.squeeze(v, 2)

    def attend(
        self,
        q_BxTxNxH: jax.Array,
        k_BxSxNxH: jax.Array | QArray,
        v_BxSxNxH: jax.Array | QArray,
        visible_BxTxS: jax.Array,
    ) -> jax.Array:
        """The mixed values [B, T, D].

        Args:
          q_BxTxNxH, k_BxSxNxH, v_BxSxNxH: as `project` gives them, or as a cache has keys and values stored.
          visible_BxTxS: bool; an axis of size 1 stands for all of B or T. A token that sees none sees all alike.
        """
        scale = jnp.float32(q_BxTxNxH.shape[-1] ** -0.5)
        scores = self.scores(q_BxTxNxH, k_BxSxNxH).astype(jnp.float32) * scale
        logits = jnp.where(visible_BxTxS[:, None], scores, jnp.float32(HIDDEN))
        weights = jax.nn.softmax(logits, axis=-1).astype(q_BxTxNxH.dtype)
        mixed = self.values(weights, v_BxSxNxH)
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class Mlp(nnx.Module):
    """Two layers with GELU between them (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Args:
      d_model, d_ff: widths.
      linear: makes a layer of so many inputs and outputs.
      out: makes the last one.
      approximate: whether GELU is by tanh, or by erf.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        linear: Callable[[int, int], nnx.Linear],
        out: Callable | None = None,
        *,
        approximate: bool,
    ):
        self.approximate = approximate
        self.up = linear(d_model, d_ff)
        self.down = (out or linear)(d_ff, d_model)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x_BxTxD), approximate=self.approximate))


def check_sizes(config: Any, *names: str) -> None:
    """Raises ValueError: a named attribute below 1, heads that do not divide d_model, or a negative norm_eps."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    if config.d_model % config.heads:
        raise ValueError(f"heads={config.heads} must divide d_model={config.d_model}.")
    if config.norm_eps < 0:
        raise ValueError(f"norm_eps={config.norm_eps} must not be negative.")
