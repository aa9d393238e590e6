"""Flax NNX: quantized dots as modules, layers, and whole-model quantization.

A layer is quantized by the module in its attribute `dot_general`, `einsum_op` or `conv_general_dilated`; its parameters
are untouched, so they stay interchangeable with the float model's. One training step is

    loss, grads, amaxes = q8jax.nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    q8jax.nnx.update_scaling(model, amaxes)

Of several microbatches, add the gradients and join the amaxes by `q8jax.scaling.combine`, and have kernels quantized
once for all of them by `prequantize`. `nnx.grad` differentiates a
quantized model as well, but observes nothing: only `value_and_grad` from here does.

Stochastic rounding draws by one key per layer and step, which `update_scaling` advances. So a layer that is called
twice in a step rounds equal values alike, and so do microbatches; `fold_rounding_keys` gives each of them its own keys:

    loss, grads, amaxes = q8jax.nnx.value_and_grad(loss_fn)(q8jax.nnx.fold_rounding_keys(model, i), microbatch)

A trained model is made ready for inference by `freeze`, which keeps codes in the place of kernels; `freeze_layer` takes
codes that were made otherwise.

Not supported: observing inside `jax.shard_map(..., check_vma=False)`, which hides from JAX what has to be summed (it
raises TypeError); stacks on other than the leading axes of a kernel (`nnx.vmap` with `out_axes` other than 0); and
taking a layer that observes out of a stack by `stack[i]`: use `jax.lax.scan` or `jax.lax.dynamic_index_in_dim`. Outside
`value_and_grad`, which says so, JAX's own error is "Cannot interpret 'fp8_meta32' as a data type".
"""

from q8jax.nnx.dots import (
    AmaxHistory,
    ConvGeneralDilated,
    DotGeneral,
    EinsumOp,
    KernelCodes,
    QuantizedDot,
    Range,
    RoundingKey,
    Scale,
)
from q8jax.nnx.freeze import freeze
from q8jax.nnx.frozen import (
    Extras,
    Inference,
    StoredDot,
    StoredEmbed,
    StoredKernel,
    freeze_embedding,
    freeze_layer,
    inference_recipe,
    kernel_matrix,
)
from q8jax.nnx.kernels import prequantize
from q8jax.nnx.layers import Conv, Einsum, Linear, LinearGeneral, quantize_model
from q8jax.nnx.ranges import forget_ranges, learn_ranges, ranges
from q8jax.nnx.step import (
    calibrate,
    calibrating,
    fold_rounding_keys,
    scaling_states,
    update_scaling,
    value_and_grad,
)
from q8jax.nnx.watch import watching

__all__ = [
    "AmaxHistory",
    "Conv",
    "ConvGeneralDilated",
    "DotGeneral",
    "Einsum",
    "EinsumOp",
    "Extras",
    "Inference",
    "KernelCodes",
    "Linear",
    "LinearGeneral",
    "QuantizedDot",
    "Range",
    "RoundingKey",
    "Scale",
    "StoredDot",
    "StoredEmbed",
    "StoredKernel",
    "calibrate",
    "calibrating",
    "fold_rounding_keys",
    "forget_ranges",
    "freeze",
    "freeze_embedding",
    "freeze_layer",
    "inference_recipe",
    "kernel_matrix",
    "learn_ranges",
    "prequantize",
    "quantize_model",
    "ranges",
    "scaling_states",
    "update_scaling",
    "value_and_grad",
    "watching",
]
