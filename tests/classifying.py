"""A training loop of few lines for models that give logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import q8jax.nnx as qnnx


def loss_fn(model, inputs, labels):
    logits = model(inputs)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    return loss, jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))


def train(model: nnx.Module, batch: Callable[[int], tuple], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and accuracies of each step, before what it learns from its batch."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, inputs, labels):
        found, grads, amaxes = qnnx.value_and_grad(loss_fn, has_aux=True)(model, inputs, labels)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        qnnx.update_scaling(model, amaxes)
        return found

    losses, accuracies = zip(*(step(model, optimizer, *batch(i)) for i in range(steps)))
    return np.array(losses), np.array(accuracies)
