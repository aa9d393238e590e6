"""What a run tells of its tensors and products, by `--telemetry`.

It is a program of its own beside the training step, which takes the state and the batch of a step before that step
does. So the step is the same program, and the run the same run, with telemetry and without.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import q8jax.nnx as qnnx
from experiments.models.transformer import Transformer
from experiments.training.cross_entropy import cross_entropy
from experiments.training.step import State, Trainer
from q8jax import telemetry
from q8jax.recipe import GEMM_TENSORS, GEMMS, TENSORS, Recipe

# As figures and files call the tensors of a dot.
NAMES = {"lhs": "x", "rhs": "w", "grad": "g"}


def observe(
    trainer: Trainer,
    kinds: tuple[str, ...],
    state: State,
    tokens_AxBxT1: jax.Array,
    recipes: Mapping[str, Recipe] | None = None,
) -> dict[str, Any]:
    """What the step from this state on this global batch is made of; a pure function of arrays that can be jitted.

    Args:
      trainer: of the phase.
      kinds: 'model' and those of `q8jax.telemetry.KINDS`.
      state: before the step.
      tokens_AxBxT1: its microbatches.
      recipes: what to look at in place of the layers' own, as for `q8jax.nnx.watching`.

    Returns:
      'dots': for every quantized dot a `q8jax.telemetry.Probe`; and with 'model' among the kinds 'model', scalars.
    """
    microbatches, rows, columns = tokens_AxBxT1.shape
    tokens = microbatches * rows * (columns - 1)
    factor = trainer.loss_factor(state, tokens)
    model = trainer.model(state)
    kept = tuple(kind for kind in telemetry.KINDS if kind in kinds)
    watching = qnnx.watching(_loss_and_signs, kept, recipes if kept else {}, has_aux=True)

    def microbatch(index, batch_BxT1):
        (_, signs), gradients, dots = watching(qnnx.fold_rounding_keys(model, index), batch_BxT1, factor)
        return signs, gradients, dots

    def join(total, indexed):
        signs, gradients, dots = microbatch(*indexed)
        largest = {name: jnp.maximum(total[0][name], signs[name]) for name in ("attention_logit_max", "residual_amax")}
        signs = {**largest, "log_z": total[0]["log_z"] + signs["log_z"]}
        return (signs, jax.tree.map(jnp.add, total[1], gradients), telemetry.combine(total[2], dots)), None

    indices = jnp.arange(microbatches)
    first = microbatch(indices[0], tokens_AxBxT1[0])
    (signs, gradients, dots), _ = lax.scan(join, first, (indices[1:], tokens_AxBxT1[1:]))
    if "model" not in kinds:
        return {"dots": dots}
    updates = trainer.updates(state, nnx.to_pure_dict(gradients))
    ratio = optax.tree.norm(updates) / optax.tree.norm(state["params"])
    return {"dots": dots, "model": {**signs, "log_z": signs["log_z"] / tokens, "update_ratio": ratio}}


def _loss_and_signs(
    model: Transformer, tokens_BxT1: jax.Array, factor: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    hidden, signs = model.hidden(tokens_BxT1[:, :-1])
    logits = model.logits(hidden)
    log_z = lax.stop_gradient(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    loss = jnp.sum(cross_entropy(logits, tokens_BxT1[:, 1:]))
    largest = {"attention_logit_max": jnp.max(signs.largest_logit), "residual_amax": jnp.max(signs.amax)}
    return loss * factor, {**largest, "log_z": jnp.sum(log_z)}


def line(trainer: Trainer, dots: dict[str, telemetry.Probe]) -> dict[str, Any]:
    """A line of telemetry.jsonl, the step left out: for every dot and tensor lists with an entry per depth."""
    recipes = trainer.recipes()
    found = {layer: _named(telemetry.summary(probe)) for layer, probe in dots.items()}
    qtypes = {layer: formats(recipes[layer]) for layer in dots}
    quantized = {layer for layer, tensors in qtypes.items() if any(tensors.values())}
    shown = {layer: found[layer] for layer in found if layer in quantized or not quantized}
    return {
        "dots": shown,
        "formats": {layer: qtypes[layer] for layer in shown},
        "first_binade": telemetry.FIRST_BINADE,
    }


def _named(summary: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    return {
        NAMES.get(part, part): {name: _listed(np.atleast_1d(value), name) for name, value in numbers.items()}
        for part, numbers in summary.items()
    }


def _listed(values: np.ndarray, name: str) -> list[Any]:
    """Values as JSON has them, to the digits that matter."""
    if name == "binades":
        return np.atleast_2d(values).astype(int).tolist()
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def formats(recipe: Recipe) -> dict[str, str | None]:
    """By tensor that of its first product which is quantized: what is looked at."""
    found: dict[str, str | None] = {NAMES[tensor]: None for tensor in TENSORS}
    for gemm in reversed(GEMMS):
        for tensor, operand in zip(GEMM_TENSORS[gemm], getattr(recipe, gemm), strict=True):
            if operand is not None:
                found[NAMES[tensor]] = operand.format.name
    return found
