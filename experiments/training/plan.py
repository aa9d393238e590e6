"""What a run would do: every GEMM's recipe, sizes, memory and FLOPs."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from experiments.models.config import TransformerConfig
from experiments.training.step import State, Trainer, summed_loss
from q8jax.recipe import GEMMS, Recipe
from q8jax.report import aligned

# How many products of m×k by k×n, in the forward pass.
Product = tuple[int, int, int, int]


def describe(trainer: Trainer, rows: int, seq_len: int, devices: int = 1) -> str:
    """A page for a person, worked out from shapes alone: nothing is compiled or allocated.

    Args:
      trainer: of the phase to describe.
      rows: rows of one microbatch.
      seq_len: tokens of a row.
      devices: over which the rows are split.
    """
    config, phase = trainer.config, trainer.phase
    tokens = rows * trainer.accumulate * seq_len
    memory = estimated_memory(trainer, rows // devices, seq_len)
    lines = [
        f"precision {phase.name} from step {phase.start} on, computing in {phase.compute}",
        *_gemm_table(trainer, rows, seq_len),
        f"parameters            {config.params:,}",
        f"tokens of a step      {tokens:,}",
        f"FLOPs of a step       {config.flops_per_token(seq_len) * tokens:.3e}",
        *(f"{name:<22}{_size(size)}" for name, size in memory.items()),
        f"{'estimated memory':<22}{_size(sum(memory.values()))} on each device, to which the compiler adds",
    ]
    return "\n".join(lines)


def products(config: TransformerConfig, rows: int, seq_len: int) -> dict[str, Product]:
    """The products of one microbatch's forward pass, by the path of the layer, in the order of the computation."""
    weights = {path: (config.layers, rows * seq_len, *shape) for path, shape in config.projections.items()}
    heads = config.layers * rows * config.heads
    return {
        "blocks/attention/qkv": weights["attention/qkv"],
        "blocks/attention/scores": (heads, seq_len, config.head_dim, seq_len),
        "blocks/attention/values": (heads, seq_len, seq_len, config.head_dim),
        "blocks/attention/out": weights["attention/out"],
        "blocks/mlp/up": weights["mlp/up"],
        "blocks/mlp/down": weights["mlp/down"],
        "head": (1, rows * seq_len, config.d_model, config.vocab),
    }


def _gemm_table(trainer: Trainer, rows: int, seq_len: int) -> list[str]:
    table = [("GEMM", "role", "times", "sizes", "operands")]
    recipes = trainer.recipes()
    for path, (times, m, k, n) in products(trainer.config, rows, seq_len).items():
        # A layer that no rule of the policy matches multiplies as Flax does.
        recipe = recipes.get(path, Recipe(compute=trainer.phase.compute))
        sizes = {"fwd": (m, k, n), "dlhs": (m, n, k), "drhs": (k, m, n)}
        for name in GEMMS:
            operands = " × ".join(str(o) if o else recipe.compute for o in getattr(recipe, name))
            table.append((path, name, f"{times}×", "{0}×{1} · {1}×{2}".format(*sizes[name]), operands))
    return aligned(table)


def estimated_memory(trainer: Trainer, rows: int, seq_len: int) -> dict[str, int]:
    """Bytes that a step needs for a microbatch of `rows` rows, by purpose; a lower bound."""
    tokens = jax.ShapeDtypeStruct((rows, seq_len + 1), jnp.int32)
    state = jax.eval_shape(trainer.init)
    everything = _kept(trainer, state, tokens, remat=False)
    return {
        "weights and moments": _bytes(state),
        "gradients": _bytes(state["params"]),
        "kept for backward": _kept(trainer, state, tokens, remat=True) if trainer.config.remat else everything,
        "backward of a block": everything // trainer.config.layers,
    }


def _kept(trainer: Trainer, state: State, tokens_BxT1: jax.ShapeDtypeStruct, *, remat: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters aside."""

    def backward(state, tokens_BxT1):
        def loss(params):
            model = trainer.model({**state, "params": params})
            model.config = dataclasses.replace(model.config, remat=remat)
            return summed_loss(model, tokens_BxT1)

        return jax.vjp(loss, state["params"])[1]

    own = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state["params"])}
    kept = jax.tree.leaves(jax.eval_shape(backward, state, tokens_BxT1))
    return _bytes([leaf for leaf in kept if (leaf.shape, leaf.dtype) not in own])


def _bytes(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
