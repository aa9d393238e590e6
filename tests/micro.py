"""A model small enough to train in a test, and compiling that does not optimize."""

import jax
import numpy as np
import pytest

from experiments.models.config import TransformerConfig
from experiments.models.shardings import WHOLE
from experiments.training.optimizer import OptimizerConfig
from experiments.training.precision import resolve
from experiments.training.step import Trainer

SHAPES = {"layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "d_ff": 64, "vocab": 64}
STEPS = 10


# For programs that are started, what the fixture below is for a test's own process.
QUICK_COMPILES = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Compiling is nearly all that these tests do; import it to halve that."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_trainer(
    precision,
    *,
    quantize=("blocks",),
    accumulate=1,
    optimizer=None,
    seed=0,
    perturbation=0.0,
    shardings=WHOLE,
    **shapes,
):
    config = TransformerConfig(**SHAPES | shapes)
    phase = resolve(precision, quantize)
    optimizer = optimizer or OptimizerConfig(steps=STEPS, warmup=2)
    return Trainer(config, phase, optimizer, accumulate, seed, perturbation, shardings)


def make_tokens(step=0, rows=8, length=16):
    """int32 [1, rows, length + 1] that can be learnt: each token is the one before it plus the row's stride."""
    rng = np.random.default_rng(step)
    start, stride = rng.integers(0, SHAPES["vocab"], (rows, 1)), rng.integers(1, 4, (rows, 1))
    return ((start + stride * np.arange(length + 1)) % SHAPES["vocab"]).astype(np.int32)[None]


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(first, second):
    """Whether two trees hold the same bits."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(leaves(first), leaves(second), strict=True))
