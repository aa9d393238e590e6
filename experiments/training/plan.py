"""What a run would do: every GEMM's recipe, sizes, memory and FLOPs."""

import math

import jax
import jax.numpy as jnp

from experiments.models.config import TransformerConfig
from experiments.training.step import Trainer
from q8jax.recipe import GEMMS, Recipe


def describe(trainer: Trainer, rows: int, seq_len: int) -> str:
    """A page for a person, worked out from shapes alone: nothing is compiled or allocated.

    Args:
      trainer: of the phase to describe.
      rows: rows of one microbatch.
      seq_len: tokens of a row.
    """
    config, phase = trainer.config, trainer.phase
    state = jax.eval_shape(trainer.init)
    kept = trainer.residuals(state, jax.ShapeDtypeStruct((rows, seq_len + 1), jnp.int32))
    state_bytes, kept_bytes = _bytes(state), _bytes(kept)
    tokens = rows * trainer.accumulate * seq_len
    lines = [
        f"precision {phase.name} from step {phase.start}, computing in {phase.compute}",
        *_gemm_table(trainer.recipes(), config),
        f"parameters          {config.params:,}",
        f"tokens per step     {tokens:,}",
        f"FLOPs per step      {config.flops_per_token(seq_len) * tokens:.3e}",
        f"state               {_size(state_bytes)} (master weights, AdamW moments, scales)",
        f"gradients           {_size(_bytes(state['params']))}",
        f"kept for backward   {_size(kept_bytes)} per microbatch of {rows} rows",
        f"estimated memory    {_size(state_bytes + _bytes(state['params']) + kept_bytes)} and what the compiler adds",
    ]
    return "\n".join(lines)


def _gemm_table(recipes: dict[str, Recipe], config: TransformerConfig) -> list[str]:
    rows = [("GEMM", "role", "shape", "operands")]
    shapes = {f"blocks/{path}": shape for path, shape in config.projections.items()}
    shapes["head"] = (config.d_model, config.vocab)
    for path, recipe in recipes.items():
        inputs, outputs = shapes.get(path, (None, None))
        times = f" ×{config.layers}" if path.startswith("blocks/") else ""
        for name in GEMMS:
            operands = " × ".join(str(o) if o else recipe.compute for o in getattr(recipe, name))
            size = f"{inputs}→{outputs}" if inputs else "activations"
            rows.append((path + times, name, size, operands))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _bytes(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
