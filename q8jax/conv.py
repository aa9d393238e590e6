"""`conv_general_dilated` whose three products run as a recipe says, under the same transforms as `dot_general`."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax import telemetry
from q8jax.codes import canonical
from q8jax.convolution import convolve, products
from q8jax.dot import checked, dot_general, floating, multiplied, not_differentiable, result_dtype
from q8jax.naming import role_scope
from q8jax.operands import Quantizer, Use
from q8jax.plan import plan
from q8jax.qarray import QArray
from q8jax.recipe import Recipe
from q8jax.windows import Window

Padding = str | Sequence[tuple[int, int]]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array | QArray,
    window_strides: Sequence[int],
    padding: Padding,
    recipe: Recipe | str,
    scale: jax.Array | None = None,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: "lax.ConvDimensionNumbers | tuple[str, str, str] | None" = None,
    feature_group_count: int = 1,
    key: jax.Array | None = None,
    preferred_element_type: "np.dtype | type | None" = None,
    calibrating: bool = False,
    probe: telemetry.Probe | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` in the arithmetic of a recipe, differentiable once, in reverse mode.

    A 'row' is an example of lhs and of the gradient, and a channel of rhs; for the gradient of rhs it is a channel of
    lhs and of the gradient. With tiles or blocks the patches that the window sees are quantized, as the rows of a dot
    whose contracting axis is (*kernel, channels); they cost memory in the dtype of lhs.

    Args:
      lhs, rhs: floating-point arrays, lhs with one batch axis. rhs may be codes, as they are stored, of one group and
        without scales in tiles; then the convolution is that of inference, and not differentiable.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers: as in `jax.lax.conv_general_dilated`.
      feature_group_count: likewise; groups, so depthwise convolutions too, are products of patches everywhere, which
        is slow where they have few channels.
      recipe, scale, key, preferred_element_type, calibrating, probe: as in `dot_general`.

    Returns:
      The convolution, accumulated and dequantized in float32. Gradients have the operands' dtypes.

    Raises:
      ValueError: as `dot_general`, and for a kernel without a place on lhs.
      TypeError, ValueError: what `jax.lax.conv_general_dilated` raises for arguments that do not fit.
    """
    stored = rhs if isinstance(rhs, QArray) else None
    lhs, rhs = floating("lhs", lhs), floating("rhs", rhs.dequantize() if isinstance(rhs, QArray) else rhs)
    recipe, scale, key = checked(recipe, scale, key)
    dtype = result_dtype(lhs.dtype, lhs.dtype if stored else rhs.dtype, preferred_element_type)
    spatial = lhs.ndim - 2
    dilations = lhs_dilation or (1,) * spatial, rhs_dilation or (1,) * spatial
    # What does not fit, JAX says in its own words.
    jax.eval_shape(
        functools.partial(
            lax.conv_general_dilated,
            window_strides=window_strides,
            padding=padding,
            lhs_dilation=dilations[0],
            rhs_dilation=dilations[1],
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
        ),
        *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (lhs, rhs)),
    )
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    lhs = lax.transpose(lhs, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    rhs_order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    rhs = lax.transpose(rhs, rhs_order)
    window = _window(lhs.shape[1:-1], rhs.shape[:-2], window_strides, padding, dilations)
    if stored is not None and feature_group_count > 1:
        raise ValueError("Stored codes convolve in one group: dequantize those of grouped convolutions.")
    if feature_group_count > 1:
        lhs = lhs.reshape(*lhs.shape[:-1], feature_group_count, -1)
        rhs = rhs.reshape(*rhs.shape[:-1], feature_group_count, -1)
    if stored is not None:
        out = _of_codes(lhs, _transposed(stored, rhs_order), window, recipe, scale, key, dtype)
    elif any(operand.tile for operand in recipe.operands):
        product = products(lhs.shape, window, rhs.shape[-1], feature_group_count > 1)["fwd"]
        out = dot_general(
            product.unfold(lhs),
            rhs,
            product.contraction.dimension_numbers,
            recipe,
            scale,
            key=key,
            preferred_element_type=dtype,
            calibrating=calibrating,
            probe=probe,
        )
        out = product.contraction.finish(out)
    else:
        out = multiplied(plan(recipe, lhs, rhs, window, dtype, calibrating), lhs, rhs, scale, key, probe)
    if feature_group_count > 1:
        out = out.reshape(*out.shape[:-2], -1)
    order = np.argsort((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]))
    return lax.transpose(out, tuple(map(int, order)))


def _transposed(x: QArray, order: tuple[int, ...]) -> QArray:
    zero_point = None if x.zero_point is None else lax.transpose(x.zero_point, order)
    codes, scale = lax.transpose(x.qvalue, order), lax.transpose(x.scale, order)
    return QArray(codes, scale, zero_point, x.codebook, qtype=x.qtype)


def _of_codes(
    lhs: jax.Array, rhs: QArray, window: Window, recipe: Recipe, scale: jax.Array, key: jax.Array | None, dtype
) -> jax.Array:
    """The convolution with codes [*kernel, inputs, outputs], or with their values where it takes no such codes."""
    product = products(lhs.shape, window, rhs.shape[-1], False)["fwd"]
    if recipe.fwd.first is not None and recipe.fwd.first.tile:
        raise ValueError("Windows slide over tiles: let a convolution's operands have granularity tensor or row.")
    use = Use.of("lhs", recipe.fwd.first, product.roles[0], False)
    lhs = not_differentiable(lhs)
    first = Quantizer(recipe, (use,), scale, key)({"lhs": lhs}, (use,))[0][use]
    codes = canonical(rhs)
    is_plain = codes.zero_point is None and codes.codebook is None
    second = codes if is_plain else codes.dequantize(np.dtype(recipe.compute))
    with role_scope("fwd", use.operand.qtype if use.operand else recipe.compute, rhs.qtype):
        accurate = not recipe.accumulates_fast("fwd")
        return convolve(first, second, product, dtype, accurate=accurate, powers_of_two=False)


def _window(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilations: tuple[Sequence[int], Sequence[int]],
) -> Window:
    of_lhs, of_rhs = (tuple(map(int, dilation)) for dilation in dilations)
    strides = tuple(map(int, strides))
    if isinstance(padding, str):
        spans = [(size - 1) * step + 1 for size, step in zip(kernel, of_rhs, strict=True)]
        padding = lax.padtype_to_pads(sizes, spans, strides, padding)
    pairs = tuple((int(low), int(high)) for low, high in padding)
    return Window(tuple(kernel), strides, pairs, of_lhs, of_rhs)
