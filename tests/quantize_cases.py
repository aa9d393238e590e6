"""What several tests quantize, and how."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from q8jax.qarray import QArray, quantize


def data(shape=(48, 64), seed=0, dtype=np.float32) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(dtype)


def jitted(x: np.ndarray | jax.Array, name: str, **options) -> QArray:
    return jax.jit(functools.partial(quantize, qtype=name, **options))(jnp.asarray(x)).check()
