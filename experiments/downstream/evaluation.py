"""A model run over examples, and scored."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.downstream.heads import Batch, Head, Report
from experiments.encoding import Batches


def evaluate(head: Head, model: nnx.Module, examples: Any, batches: Batches) -> Report:
    """Scores of what a model says of examples, its scales as they are.

    Compiles once for each length of the batches, and of models that differ in values alone no more than once.

    Args:
      head: of the task.
      model: for it.
      examples: as the head encodes them.
      batches: of their rows.
    """
    graphdef, state = nnx.split(model)
    outputs = [_guess(head, graphdef, state, head.of(batch)) for batch in batches.once()]
    found = {name: batches.in_order(np.asarray(output[name]) for output in outputs) for name in outputs[0]}
    return head.score(examples, batches.rows, found)


def guess(head: Head, model: nnx.Module, batch: Batch) -> dict[str, np.ndarray]:
    """What a model says of one batch."""
    graphdef, state = nnx.split(model)
    return jax.device_get(_guess(head, graphdef, state, head.of(batch)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _guess(head: Head, graphdef: Any, state: Any, batch: Batch) -> dict[str, jax.Array]:
    return head.guesses(head.logits(nnx.merge(graphdef, state), batch), batch)
