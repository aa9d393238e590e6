"""Which tensor of a failed step was the first that is not finite."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training.step import State, Trainer

# Modules with parameters, in the order in which a forward pass comes to them.
_BLOCK = ("attention_norm", "attention/qkv", "attention/out", "mlp_norm", "mlp/up", "mlp/down")
_BEFORE, _AFTER = ("embedding",), ("norm", "head")


def first_nonfinite(trainer: Trainer, state: State, tokens_AxBxT1: jax.Array) -> str | None:
    """Computes a step again and names the first tensor that is not finite, or None if all are.

    Args:
      trainer: of the phase.
      state: what the step was made from.
      tokens_AxBxT1: its microbatches.
    """
    look = jax.jit(lambda state, tokens_BxT1: _finite(trainer, state, tokens_BxT1))
    for tokens_BxT1 in tokens_AxBxT1:
        found = jax.device_get(look(state, tokens_BxT1))
        for name, finite in _in_order(found, trainer.config.layers):
            if not finite:
                return name
    return None


def _finite(trainer: Trainer, state: State, tokens_BxT1: jax.Array) -> dict[str, Any]:
    model = trainer.model(state)
    hidden, signs = model.hidden(tokens_BxT1[:, :-1])
    loss, gradients, _ = trainer.gradients(model, state, tokens_BxT1[None])
    end = {"the final norm": hidden, "the logits": model.logits(hidden), "the loss": loss}
    return {
        "parameter": _by_path(state["params"]),
        "output": signs.finite,
        "end": {name: _all_finite(x) for name, x in end.items()},
        "gradient": _by_path(gradients),
    }


def _by_path(tree: Any) -> dict[str, jax.Array]:
    """Whether all is finite, by the path of the module; of a stack for each block."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(str(part.key) for part in path if hasattr(part, "key")).rpartition("/")[0]
        found[name] = _all_finite(leaf, tuple(range(1, leaf.ndim)) if name.startswith("blocks/") else None)
    return found


def _all_finite(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    return jnp.all(jnp.isfinite(x), axes)


def _in_order(found: dict[str, Any], layers: int) -> Iterator[tuple[str, np.bool_]]:
    parameter, gradient = found["parameter"], found["gradient"]
    after = [name for name in _AFTER if name in parameter]
    yield from ((f"parameter {name}", parameter[name]) for name in _BEFORE)
    for i in range(layers):
        yield from ((f"parameter blocks/{name} of block {i}", parameter[f"blocks/{name}"][i]) for name in _BLOCK)
        yield f"the output of block {i}", found["output"][i]
    yield from ((f"parameter {name}", parameter[name]) for name in after)
    yield from found["end"].items()
    yield from ((f"the gradient of {name}", gradient[name]) for name in reversed(after))
    for i in reversed(range(layers)):
        for name in reversed(_BLOCK):
            yield f"the gradient of blocks/{name} of block {i}", gradient[f"blocks/{name}"][i]
    yield from ((f"the gradient of {name}", gradient[name]) for name in _BEFORE)
