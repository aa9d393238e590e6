"""What each layer becomes: a recipe for its forward product, and what the recipe has no words for.

A recipe says which formats meet, in which granularity, and whether the scales of inputs are `static` or `current`.
Here it is joined by zero points, code books, and in which few bytes the scales of groups are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

import q8jax.nnx as qnnx
from experiments.training.precision import written_out
from q8jax import choices, codebook
from q8jax.nnx.layers import kernel_shape, layers_of
from q8jax.policy import Policy
from q8jax.ptq import Target
from q8jax.recipe import Operand, Recipe
from q8jax.stored import STORED_SCALES

WEIGHTS = ("symmetric", "affine", "nf4", "fitted", "binary")
INPUTS = ("symmetric", "affine")
# Short names of recipes for inference, less their compute dtype.
PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "w8": "fwd=none,int8:row",
        "w8-e4m3": "fwd=none,e4m3fn:tensor",
        "w8-e5m2": "fwd=none,e5m2:tensor",
        "w8-e3m4": "fwd=none,e3m4:row",
        "w8a8": "fwd=int8:row,int8:row",
        "w8a8-static": "fwd=int8:tensor:static,int8:row",
        "w8a8-e4m3": "fwd=e4m3fn:tensor,e4m3fn:tensor",
        "w8a8-e4m3-static": "fwd=e4m3fn:tensor:static,e4m3fn:tensor",
        "a8": "fwd=int8:row,none",
        "w4": "fwd=none,int4:tile32",
        "w4a8": "fwd=int8:row,int4:tile32",
        "fp4": "fwd=none,e2m1fn:tile16",
    }
)
_UNSIGNED = {"int8": "uint8", "int4": "uint4"}


def named(text: str, compute: str) -> str:
    """A precision with the names of PRESETS, which compute in a dtype, written out."""
    text = written_out(text)
    rules = text.split(";") if "->" in text else [text]
    made = []
    for rule in rules:
        pattern, arrow, recipe = rule.rpartition("->")
        name, *fields = recipe.strip().split("/")
        if name in PRESETS:
            own = [] if any(field.startswith("compute=") for field in fields) else [f"compute={compute}"]
            recipe = "/".join([PRESETS[name], *fields, *own])
        made.append(f"{pattern}{arrow}{recipe}")
    return ";".join(made)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What one layer becomes.

    Attributes:
      recipe: of the forward product.
      weights: what its kernel becomes; None if it stays.
      inputs: what its inputs become; None if they stay.
      scales: in which the scales of weights are kept.
      is_fitted: whether the code book of `weights` is a place for one that is fitted to the kernel.
      is_binary: whether codes are signs times the mean magnitude.
    """

    recipe: Recipe
    weights: Target | None
    inputs: Target | None
    scales: str
    is_fitted: bool = False
    is_binary: bool = False

    @property
    def is_static(self) -> bool:
        return self.recipe.fwd.first is not None and self.recipe.fwd.first.scaling == "static"

    @classmethod
    def of(cls, recipe: Recipe, weights: str, inputs: str, scales: str) -> Scheme | None:
        """The scheme of a recipe, or None where it quantizes nothing.

        Args:
          recipe: whose forward product counts; of what it says of gradients nothing does.
          weights, inputs, scales: of WEIGHTS, INPUTS and STORED_SCALES.

        Raises:
          ValueError: words that do not go together.
        """
        choices.check("--weights", weights, WEIGHTS)
        choices.check("--inputs", inputs, INPUTS)
        choices.check("--scales", scales, STORED_SCALES)
        recipe = qnnx.inference_recipe(recipe)
        first, second = recipe.fwd
        if first is None and second is None:
            return None
        of_inputs = None if first is None else _inputs(first, inputs)
        if second is None:
            return cls(recipe, None, of_inputs, "float32")
        scales = "e8m0" if recipe.scales == "e8m0" else scales
        target = _weights(second, weights, recipe.scales if recipe.scales != "e8m0" else "power_of_two")
        return cls(recipe, target, of_inputs, scales, weights == "fitted", weights == "binary")


def _inputs(operand: Operand, word: str) -> Target:
    granularity = {"tensor": "tensor", "row": "row"}.get(operand.granularity)
    affine = word == "affine"
    if granularity is None and affine:
        raise ValueError(f"--inputs=affine takes a scale by tensor or row, not {operand.granularity}.")
    if affine and operand.format.name != "int8":
        raise ValueError(f"--inputs=affine is for int8, not {operand.format.name}.")
    return Target(operand.qtype, granularity or "row", is_affine=affine, full_range=affine)


def _weights(operand: Operand, word: str, scale_format: str) -> Target:
    options: dict[str, Any] = {"scale_format": scale_format}
    if operand.granularity == "tensor":
        granularity = "tensor"
    elif operand.granularity == "row":
        granularity = "channel"
    elif operand.is_block:
        raise ValueError(f"{operand.granularity} is for training: let weights have granularity tensor, row or tileK.")
    else:
        granularity, options["group_size"] = "group", operand.tile
    if word == "symmetric":
        return Target(operand.qtype, granularity, **options)
    name = operand.format.name
    if name not in _UNSIGNED:
        raise ValueError(f"--weights={word} is for int8 and int4, not {name}.")
    if word == "affine":
        return Target(_UNSIGNED[name], granularity, is_affine=True, **options)
    if word == "binary":
        return Target("uint4", granularity, codebook=(-1.0, 1.0), **options)
    bits = operand.format.bits
    if word == "nf4" and bits != 4:
        raise ValueError("--weights=nf4 is for int4: write fwd=none,int4:tile64.")
    book = tuple(codebook.normal_float(bits).tolist())
    return Target(_UNSIGNED[name], granularity, codebook=book, **options)


def schemes_of(policy: Policy, model: nnx.Module, weights: str, inputs: str, scales: str) -> dict[str, Scheme]:
    """The schemes of layers with a kernel that a policy quantizes, by path.

    Raises:
      ValueError: a rule that matches no layer, or words that do not go together.
    """
    layers = layers_of(model)
    recipes = policy.resolve(layers).items()
    found = {path: Scheme.of(recipe, weights, inputs, scales) for path, recipe in recipes if has_kernel(layers[path])}
    return {path: scheme for path, scheme in found.items() if scheme is not None}


def products_of(policy: Policy, model: nnx.Module) -> dict[str, Recipe]:
    """The recipes of products without a kernel, as those of attention are, that a policy quantizes, by path.

    Raises:
      ValueError: one whose scales are kept, which nothing calibrates.
    """
    layers = layers_of(model)
    recipes = {path: qnnx.inference_recipe(recipe) for path, recipe in policy.resolve(layers).items()}
    found = {path: r for path, r in recipes.items() if r.is_quantized and not has_kernel(layers[path])}
    for path, recipe in found.items():
        if recipe.keeps_state:
            raise ValueError(f"Layer {path!r} is a product of two inputs, whose scales are their own: say current.")
    return found


def has_kernel(layer: Any) -> bool:
    return kernel_shape(layer) is not None and hasattr(layer, "kernel")
