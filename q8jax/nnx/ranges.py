"""Ranges of activations that are trained with the parameters, in models whose recipes are those of `q8jax.qat`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from q8jax.nnx.dots import QuantizedDot, Range, dots_of


def learn_ranges(model: nnx.Module) -> nnx.Module:
    """Makes the static ranges of left operands parameters of a model, in place, beginning with its scales.

    A training step is as with other scaling state, with `update_scaling` after the optimizer's update: it makes scales
    of the trained ranges. Calibrate the model before or after.

    Args:
      model: quantized, in recipes with backward=codes.

    Returns:
      The same model.

    Raises:
      ValueError: no dot has a static left operand.
    """
    found = {dot: slot for dot in dots_of(model).values() if (slot := _slot(dot)) is not None}
    if not found:
        raise ValueError("There is no static range of a left operand to learn: use the recipes of q8jax.qat.")
    for dot, slot in found.items():
        top = np.float32(dot.recipe.slots[slot].format.max)
        dot.learned_range = Range(dot.scale[...][..., slot] * top)
    return model


def forget_ranges(model: nnx.Module) -> nnx.Module:
    """The inverse of `learn_ranges`, in place: scales, which are those of the ranges, stay."""
    for dot in dots_of(model).values():
        dot.learned_range = None
    return model


def _slot(dot: QuantizedDot) -> int | None:
    operand = dot.recipe.fwd.first
    if dot.recipe.backward != "codes" or operand is None or operand.scaling != "static":
        return None
    return next(i for i, slot in enumerate(dot.recipe.slots) if slot.tensor == "lhs" and slot.is_static)


def ranges(model: nnx.Module) -> dict[str, jax.Array]:
    """The learned ranges, float32, by the path of the layer."""
    return {
        "/".join(map(str, path[:-1])): jnp.asarray(dot.learned_range[...])
        for path, dot in dots_of(model).items()
        if dot.learned_range is not None
    }
