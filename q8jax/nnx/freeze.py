"""From a model that was trained in low precision to one that infers: the same products, of codes that are kept."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q8jax import dot
from q8jax.nnx.dots import OPERATIONS, QuantizedDot
from q8jax.nnx.frozen import Extras, freeze_layer, inference_recipe, kernel_matrix
from q8jax.nnx.layers import kernel_shape, layers_of
from q8jax.qarray import QArray
from q8jax.recipe import Recipe
from q8jax.stored import Stored


def freeze(model: nnx.Module) -> nnx.Module:
    """Freezes a quantized model, in place: its outputs stay what they are, bit for bit on the same backend.

    Every kernel that the forward product takes as codes is kept as these codes alone, scales that were delayed stay as
    they are, and what gradients needed is gone. Layers that do not quantize their kernel keep it.

    Args:
      model: as `quantize_model` made it, trained; it can no longer be.

    Returns:
      The same model.

    Raises:
      ValueError: a layer whose kernel is rounded stochastically, or cannot be stored as codes.
    """
    for path, layer in layers_of(model).items():
        for name in [name for name in OPERATIONS if isinstance(vars(layer).get(name), QuantizedDot)]:
            try:
                _freeze_dot(layer, name, path)
            except ValueError as error:
                raise ValueError(f"Layer {path!r}: {error}") from None
    return model


def _freeze_dot(layer: Any, name: str, path: str) -> None:
    product = getattr(layer, name)
    recipe = inference_recipe(product.recipe)
    if recipe.needs_key:
        raise ValueError("it rounds stochastically, which inference does not: choose another rounding.")
    scale = _scale_of(product, recipe)
    if kernel_shape(layer) is None or recipe.fwd.second is None:
        frozen = type(product)(recipe, stack=product.stack, path=path)
        if scale is not None:
            frozen.scale.set_value(scale)
        setattr(layer, name, nnx.data(frozen))
        return
    matrix = kernel_matrix(layer)
    matrix = matrix if layer.dtype is None else matrix.astype(layer.dtype)
    stack = len(product.stack)
    batch = matrix.ndim - stack - 2
    numbers: Any = (((batch + 1,), (batch,)), (tuple(range(batch)),) * 2)

    def codes(matrix: jax.Array, scale: jax.Array | None) -> QArray:
        return _of_matrix(dot.encoded(matrix, numbers, recipe, scale), matrix)

    for _ in range(stack):
        codes = jax.vmap(codes, in_axes=(0, None if scale is None else 0))
    scales = "e8m0" if recipe.scales == "e8m0" else "float32"
    kernel = Stored.of(codes(matrix, scale), scales=scales)
    extras = Extras(scale=scale) if recipe.keeps_state else Extras()
    freeze_layer(layer, kernel, recipe, extras, path=path)


def _of_matrix(codes: QArray, matrix: jax.Array) -> QArray:
    """Codes of a flattened matrix, as those of the matrix."""
    if codes.ndim == matrix.ndim:
        return codes
    swapped = codes.shape[1:] != matrix.shape
    as_it_was = lambda x: jnp.swapaxes(x[0], 0, 1) if swapped else x[0]
    return QArray(as_it_was(codes.qvalue), as_it_was(codes.scale), qtype=codes.qtype)


def _scale_of(product: QuantizedDot, recipe: Recipe) -> jax.Array | None:
    """The scales of a dot's state that the slots of its forward product keep."""
    if not recipe.keeps_state:
        return None
    # A delayed scale is static from now on; where there was a static one as well, that is its own slot.
    slots = {(slot.tensor, slot.qtype): i for i, slot in enumerate(product.recipe.slots) if not slot.is_static}
    slots_kept = {slot: i for i, slot in enumerate(product.recipe.slots)}
    at = [slots_kept.get(slot, slots.get((slot.tensor, slot.qtype), 0)) for slot in recipe.slots]
    return product.state.scale[..., jnp.array(at)]
