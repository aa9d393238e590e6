"""Recipes for quantization-aware training: what a deployed product computes, with gradients straight through it.

The forward product multiplies the codes themselves, so it is the deployed one. Both gradients are wide, of what these
codes mean.
"""

import dataclasses

from q8jax import choices
from q8jax.recipe import Gemm, Operand, Recipe

RANGES = ("current", "average", "static", "learned")
QUANTIZED = ("weights", "activations", "both")


def recipe_for(recipe: Recipe, what: str = "both", ranges: str = "current") -> Recipe:
    """The recipe that trains a model for the forward product of another one.

    Args:
      recipe: whose formats, scales and compute dtype to take.
      what: 'weights', 'activations' or 'both' are quantized.
      ranges: of activations. 'current', each tensor's own, in the granularity of the recipe; else one for the whole
        tensor: the moving 'average' of those observed in its history of steps, 'static', as calibrated, or 'learned':
        calibrated, and then trained. Weights, of which all is known, have one by output, the current one.

    Raises:
      ValueError: a misspelt word, or a recipe whose forward product does not quantize what is asked for.
    """
    choices.check("what is quantized", what, QUANTIZED)
    choices.check("ranges", ranges, RANGES)
    lhs, rhs = recipe.fwd
    if (what != "weights" and lhs is None) or (what != "activations" and rhs is None):
        raise ValueError(f"its forward product does not quantize {what}: choose a precision that does.")
    first = None if lhs is None or what == "weights" else _activations(lhs, ranges)
    second = None if rhs is None or what == "activations" else Operand(rhs.qtype, "row", "current", rhs.rounding)
    delayed = first is not None and first.scaling == "delayed"
    return Recipe(
        Gemm(first, second),
        compute=recipe.compute,
        history=recipe.history if delayed else Recipe.history,
        amax="average" if delayed else Recipe.amax,
        margin=recipe.margin,
        # A bound that is learned is not rounded up.
        scales="float32" if ranges == "learned" else recipe.scales,
        backward="codes",
    )


def _activations(operand: Operand, ranges: str) -> Operand:
    if ranges == "current":
        granularity = "row" if operand.tile else operand.granularity
        return dataclasses.replace(operand, granularity=granularity, scaling="current")
    scaling = "delayed" if ranges == "average" else "static"
    return dataclasses.replace(operand, granularity="tensor", scaling=scaling)
