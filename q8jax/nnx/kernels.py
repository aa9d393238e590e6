"""Kernels quantized once for all products of a step."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from q8jax import dot
from q8jax.contraction import DimensionNumbers
from q8jax.naming import path_scope
from q8jax.nnx.dots import DotGeneral, KernelCodes
from q8jax.nnx.layers import kernel_shape, layers_of

Model = TypeVar("Model", bound=nnx.Module)


def prequantize(model: Model, *, devices: int | None = None) -> Model:
    """A twin of a model whose layers multiply by codes of their kernels that are made here, once.

    Call it before a loop over microbatches, or over layers where they are a stack, and differentiate the twin instead:
    losses, gradients and amaxes are those of the model, bit for bit (but kernels that are rounded stochastically are so
    once, whatever `fold_rounding_keys` does later). It holds for kernels as they are now, so for one step. Its price is
    memory for the codes of all kernels.

    An nnx.Einsum or nnx.Conv, a layer without a dtype of its own, or with a kernel that is sharded along explicit mesh
    axes, quantizes as before, and so does any other product of a layer's `dot_general`.

    Args:
      model: stays as it is; the twin shares all its variables.
      devices: as for the `value_and_grad` that the twin is for.
    """
    graphdef, state = nnx.split(model)
    twin = nnx.merge(graphdef, state)
    for layer in layers_of(twin).values():
        product = vars(layer).get("dot_general")
        if not isinstance(layer, nnx.Linear | nnx.LinearGeneral) or not isinstance(product, DotGeneral):
            continue
        if layer.dtype is None or isinstance(layer.promote_dtype, _Promote) or not product.recipe.is_quantized:
            continue
        (kernel,) = layer.promote_dtype((layer.kernel[...],), dtype=layer.dtype)
        if jax.typeof(kernel).sharding.mesh.explicit_axes:
            continue
        stack = kernel.ndim - len(kernel_shape(layer) or ())
        with path_scope(product.path) if product.path else contextlib.nullcontext():
            made = product.prequantized(kernel, _dimension_numbers(layer), stack, devices)
        layer.promote_dtype = nnx.data(_Promote(layer.promote_dtype, made))
    return twin


class _Promote(nnx.Module):
    """A layer's `promote_dtype` that adds to its kernel the codes of it."""

    def __init__(self, promote: Callable, made: dot.Prequantized):
        self.promote = promote
        self.uses = made.uses
        self.recipe = made.recipe
        self.made: nnx.Variable = KernelCodes((made.codes, made.amax))

    def __call__(self, arrays, *, dtype=None, **kwargs):
        inputs, kernel, bias = self.promote(arrays, dtype=dtype, **kwargs)
        return inputs, dot.Prequantized(kernel, *self.made.get_value(), uses=self.uses, recipe=self.recipe), bias


def _dimension_numbers(layer: nnx.Linear | nnx.LinearGeneral) -> DimensionNumbers:
    """Of the layer's product with an input of as few axes as can be."""
    batch, contracting = (0, 1) if isinstance(layer, nnx.Linear) else (len(layer.batch_axis), len(layer.in_features))
    own = tuple(range(batch, batch + contracting))
    return (own, own), (tuple(range(batch)),) * 2
