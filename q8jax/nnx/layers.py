"""Layers in a recipe's arithmetic: made so, or made so of plain ones."""

from typing import Any

import jax
from flax import nnx

from q8jax import maxima, scaling, tiles
from q8jax.nnx.dots import OPERATIONS, ConvGeneralDilated, DotGeneral, EinsumOp, QuantizedDot
from q8jax.policy import Policy
from q8jax.recipe import Recipe


class Linear(nnx.Linear):
    """`nnx.Linear` in a recipe's arithmetic.

    Args:
      in_features, out_features: sizes of the kernel.
      recipe: a Recipe or its string.
      rngs: as for nnx.Linear, and stream 'rounding' for stochastic rounding.
      **kwargs: as for nnx.Linear.

    Raises:
      ValueError: a tile that does not divide its axis of the kernel; the other axes are checked by a call.
    """

    def __init__(self, in_features: int, out_features: int, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs):
        operation = DotGeneral(recipe, rngs=rngs)
        super().__init__(in_features, out_features, rngs=rngs, dot_general=operation, **kwargs)
        _check_tiles(self, operation.recipe)
        _begin(self, operation)


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` in a recipe's arithmetic; arguments as `Linear`."""

    def __init__(self, in_features, out_features, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs):
        operation = DotGeneral(recipe, rngs=rngs)
        super().__init__(in_features, out_features, rngs=rngs, dot_general=operation, **kwargs)
        _check_tiles(self, operation.recipe)
        _begin(self, operation)


class Einsum(nnx.Einsum):
    """`nnx.Einsum` in a recipe's arithmetic; arguments as `Linear`."""

    def __init__(
        self, einsum_str: str, kernel_shape, bias_shape=None, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs
    ):
        operation = EinsumOp(recipe, rngs=rngs)
        super().__init__(einsum_str, kernel_shape, bias_shape, rngs=rngs, einsum_op=operation, **kwargs)
        _check_tiles(self, operation.recipe)
        _begin(self, operation)


class Conv(nnx.Conv):
    """`nnx.Conv` in a recipe's arithmetic; arguments as `Linear`."""

    def __init__(self, in_features: int, out_features: int, kernel_size, *args, recipe: Recipe | str, rngs, **kwargs):
        operation = ConvGeneralDilated(recipe, rngs=rngs)
        options = {"conv_general_dilated": operation, "rngs": rngs, **kwargs}
        super().__init__(in_features, out_features, kernel_size, *args, **options)
        _check_tiles(self, operation.recipe)
        _begin(self, operation)


def layers_of(model: nnx.Module) -> dict[str, Any]:
    """The modules with a dot of their own, by path; those inside nnx.MultiHeadAttention are its LinearGenerals."""
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {path: module for path, module in modules.items() if vars(module).keys() & OPERATIONS}


def kernel_shape(layer: Any) -> tuple[int, ...] | None:
    """Shape of the kernel of one layer, also where the layer is a stack; None of a layer of another kind."""
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        return (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    return tuple(layer.kernel_shape) if isinstance(layer, nnx.Einsum | nnx.Conv) else None


def _begin(layer: Any, operation: QuantizedDot) -> None:
    """Starts a layer's scaling state with what its kernel is, where that is there."""
    own, kernel = kernel_shape(layer), getattr(layer, "kernel", None)
    if own is None or kernel is None or not operation.recipe.slots or not isinstance(kernel[...], jax.Array):
        return
    amax = maxima.amax
    for _ in range(kernel[...].ndim - len(own)):
        amax = jax.vmap(amax)
    operation.scale.set_value(scaling.begin_with(operation.state, "rhs", amax(kernel[...])).scale)


def _check_tiles(layer: Any, recipe: Recipe) -> None:
    kernel = kernel_shape(layer)
    if kernel is None:
        return
    if isinstance(layer, nnx.Einsum):
        tiles.check_einsum(recipe, layer.einsum_str, kernel)
    elif isinstance(layer, nnx.LinearGeneral):
        tiles.check_kernel(recipe, kernel, len(layer.batch_axis), len(layer.in_features))
    elif isinstance(layer, nnx.Conv):
        # Of one group; the others are alike.
        per_group = (*kernel[:-1], kernel[-1] // layer.feature_group_count)
        tiles.check_kernel(recipe, per_group, 0, len(kernel) - 1)
    else:
        tiles.check_kernel(recipe, kernel, 0, 1)


def _stack(layer: Any, recipe: Recipe) -> tuple[int, ...]:
    """Leading axes of a layer that is a stack: as it says itself, or those that `nnx.vmap` gave to its kernel."""
    if hasattr(layer, "stack"):
        return tuple(layer.stack)
    own = kernel_shape(layer)
    if own is None:
        return ()
    shape = layer.kernel[...].shape
    stack = shape[: len(shape) - len(own)]
    if stack and recipe.is_quantized and shape != stack + own:
        raise ValueError(
            f"its kernel of shape {shape} is no stack of kernels of shape {own} along leading axes: give nnx.vmap "
            "out_axes=0."
        )
    return stack


def quantize_model(model: nnx.Module, policy: Policy | Recipe | str, *, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """Makes an NNX model's layers run in the recipes of a policy, in place.

    Args:
      model: a model with `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` or `nnx.Conv` layers at any depth, also
        inside `nnx.MultiHeadAttention` and in stacks made by `nnx.vmap`. Any other module with an attribute
        `dot_general`, `einsum_op` or `conv_general_dilated` that it multiplies with is a layer too; if it is a stack,
        its attribute `stack`, a tuple of ints, gives the leading axes.
      policy: a Policy, a Recipe for every layer, or the string of either. A layer shared by several modules has the
        path of the first.
      rngs: for recipes with stochastic rounding.

    Returns:
      The same model. Its parameters are as before; each quantized layer has gained scaling state.

    Raises:
      ValueError: no layer to quantize, a rule that matches none, a tile that does not divide its axis of a kernel, or
        a stack on other than the leading axes.
    """
    if isinstance(policy, str):
        policy = Policy.parse(policy)
    elif isinstance(policy, Recipe):
        policy = Policy(((".*", policy),))
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            "quantize_model found no layer: give it a model with nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, "
            "or modules with an attribute dot_general, einsum_op or conv_general_dilated."
        )
    recipes = policy.resolve(layers)
    stacks = {}
    for path, recipe in recipes.items():
        try:
            stacks[path] = _stack(layers[path], recipe)
            _check_tiles(layers[path], recipe)
        except ValueError as error:
            raise ValueError(f"Layer {path!r}: {error}") from None
    for path, recipe in recipes.items():
        layer = layers[path]
        for name in [name for name in OPERATIONS if name in vars(layer)]:
            operation = OPERATIONS[name](recipe, stack=stacks[path], path=path, rngs=rngs)
            _begin(layer, operation)
            setattr(layer, name, nnx.data(operation))
        if hasattr(layer, "dot_general_cls"):
            layer.dot_general_cls = None  # it would take precedence
    return model
