"""Layers for inference: kernels stored as codes, inputs quantized or not.

A frozen layer is the layer that it was, at its path, with its bias: only its kernel is a `StoredKernel`, and its
product a `StoredDot`, which says what happens to inputs before they meet the codes:

    x · inverse                  smoothing factors, 0 for channels that take the path of outliers
    quantized by `recipe`        not at all, by scales of their own, or by `scale`, which was calibrated
    or with `zero_point`         affine codes of 8 bits, by `scale`
    + x[outliers] @ outlier_kernel

The same for a stack of layers: every variable then has the leading axes of the stack.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes

from q8jax import conv, dot
from q8jax.contraction import Axes, Contraction, contractions, to_matrices
from q8jax.einsum import as_dot, fitting_lhs
from q8jax.naming import path_scope
from q8jax.nnx.layers import kernel_shape
from q8jax.qarray import QArray, quantize
from q8jax.recipe import Gemm, Recipe
from q8jax.stored import Stored

_MATRIX = (((1,), (0,)), ((), ()))


class StoredKernel(nnx.Variable):
    """A kernel, or a table of embeddings, as `Stored` codes; not trained."""

    def __getitem__(self, key: Any) -> Any:
        value = self.get_value()
        return value if key is Ellipsis else value[key]


class Inference(nnx.Variable):
    """What a product needs beside the codes of its kernel: scales, factors, outliers; not trained."""


@dataclasses.dataclass(frozen=True)
class Extras:
    """What calibration found for the inputs of a product; every array with the leading axes of a stack.

    Attributes:
      scale: float32 [slots of the recipe], or [] with a zero point; None where no scale is kept.
      affine: 'int8' or 'uint8' for inputs with a zero point, whose granularity alone the recipe says; else None.
      zero_point: int32 [], of affine inputs whose scale is kept; that of others is found with their scale.
      inverse: float32 [in], what inputs are multiplied with first.
      outliers: int32 [n], channels that are not quantized.
      outlier_kernel: floating-point [n, out], their weights.
    """

    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    affine: str | None = None
    inverse: jax.Array | None = None
    outliers: jax.Array | None = None
    outlier_kernel: jax.Array | None = None

    ARRAYS = ("scale", "zero_point", "inverse", "outliers", "outlier_kernel")


def inference_recipe(recipe: Recipe) -> Recipe:
    """The forward product alone, its delayed scales static: what a trained layer computes."""
    operands = [
        dataclasses.replace(operand, scaling="static") if operand and operand.scaling == "delayed" else operand
        for operand in recipe.fwd
    ]
    options: dict[str, Any] = {"fwd": Gemm(*operands), "compute": recipe.compute}
    if any(operand is not None and operand.scaling != "unit" for operand in operands):
        options |= {"scales": recipe.scales}
    if any(operand is not None and operand.scaling == "current" for operand in operands):
        options |= {"margin": recipe.margin}
    if all(operand is not None and operand.format.kind == "float" for operand in operands):
        options |= {"accumulation": recipe.accumulation}
    return Recipe(**options)


def kernel_axes(layer: Any) -> Axes:
    """Roles of the axes of one layer's kernel; of a convolution as of a product of patches."""
    shape = kernel_shape(layer)
    if shape is None:
        raise ValueError(f"A {type(layer).__name__} has no kernel that can be stored as codes.")
    if isinstance(layer, nnx.Einsum):
        lhs = fitting_lhs(layer.einsum_str, shape, 2)
        plan = as_dot(layer.einsum_str, lhs, shape)
        if plan.rhs_summed:
            raise ValueError(
                f"einsum {layer.einsum_str!r} sums its kernel along an axis of its own: leave it as it is."
            )
        (_, contracting), (_, batch) = plan.dimension_numbers
        return Axes.of(len(shape), batch, contracting)
    if isinstance(layer, nnx.LinearGeneral):
        first = len(layer.batch_axis)
        return Axes.of(len(shape), range(first), range(first, first + len(layer.in_features)))
    if isinstance(layer, nnx.Conv) and layer.feature_group_count > 1:
        raise ValueError("A grouped convolution cannot be stored as codes: leave it as it is.")
    return Axes.of(len(shape), (), range(len(shape) - 1))


def kernel_matrix(layer: Any) -> jax.Array:
    """A layer's kernel as the right operand [..., in, out] of a product of matrices, or a stack, or a batch of them."""
    kernel, axes = layer.kernel[...], kernel_axes(layer)
    shape = kernel_shape(layer) or ()
    stack = kernel.ndim - len(shape)
    order = (*range(stack), *(stack + i for i in (*axes.batch, *axes.contracting, *axes.free)))
    sizes = [int(np.prod([shape[i] for i in group])) for group in (axes.batch, axes.contracting, axes.free)]
    return jnp.transpose(kernel, order).reshape(*kernel.shape[:stack], *(sizes if axes.batch else sizes[1:]))


class StoredDot(nnx.Module):
    """The product of a frozen layer, in the place of its `dot_general`, `einsum_op` or `conv_general_dilated`.

    Args:
      recipe: of its forward product alone.
      shape: of the kernel.
      axes: the roles of its axes.
      extras: what calibration found.
      path: of the layer in the model.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...], axes: Axes, extras: Extras, path: str = ""):
        self.recipe, self.shape, self.axes, self.path = recipe, shape, axes, path
        self.affine = extras.affine
        for name in Extras.ARRAYS:
            value = getattr(extras, name)
            setattr(self, name, nnx.data(None if value is None else Inference(value)))

    scale: Any
    zero_point: Any

    def _read(self, name: str) -> Any:
        variable = getattr(self, name)
        return None if variable is None else variable[...]

    def _inputs(self, x: jax.Array) -> tuple[jax.Array | QArray, jax.Array | None]:
        """Inputs [..., in] as the product takes them, and those of outlier channels."""
        inverse, outliers = map(self._read, ("inverse", "outliers"))
        apart = None if outliers is None else jnp.take(x, outliers, axis=-1)
        if inverse is not None:
            x = x.astype(jnp.float32) * inverse.reshape((1,) * (x.ndim - 1) + inverse.shape)
        if self.affine is None:
            return x, apart
        if self.scale is not None:
            given = {"scale": self._read("scale"), "zero_point": self._read("zero_point")}
            return quantize(x, self.affine, full_range=True, **given), apart
        first = self.recipe.fwd.first
        rows = tuple(range(x.ndim - 1)) if first is not None and first.granularity == "row" else ()
        return quantize(x, self.affine, calibration="minmax", channelwise_axes=rows, full_range=True), apart

    def matrices(self, x: jax.Array, kernel: Stored, dtype: Any) -> jax.Array:
        """The product of x [..., in], or [batch, rows, in], with the stored matrix, or batch of them."""
        inputs, apart = self._inputs(x)
        numbers: Any = (((x.ndim - 1,), (kernel.ndim - 2,)), ((0,), (0,)) if kernel.ndim == 3 else ((), ()))
        scale = None if self.affine else self._read("scale")
        with path_scope(self.path) if self.path else contextlib.nullcontext():
            wide = Recipe(compute=self.recipe.compute)
            recipe = wide if self.affine else self.recipe
            out = dot.dot_general(inputs, kernel, numbers, recipe, scale, preferred_element_type=dtype)
        if apart is not None:
            weights = self._read("outlier_kernel")
            out += dot.dot_general(apart, weights.astype(apart.dtype), numbers, wide, preferred_element_type=dtype)
        return out


class StoredDotGeneral(StoredDot):
    """In the place of a `dot_general`."""

    def __call__(
        self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None
    ) -> jax.Array:
        del precision, out_sharding  # the recipe says, and the partitioner
        contraction = contractions(lhs.shape, self.shape, dimension_numbers)["fwd"]
        return self._contract(lhs, rhs, contraction, np.dtype(preferred_element_type or lhs.dtype))

    def _contract(self, lhs: jax.Array, kernel: Stored, contraction: Contraction, dtype: np.dtype) -> jax.Array:
        axes = contraction.first
        if axes.batch:
            layout = axes.batch, axes.free, axes.contracting
            x = to_matrices(lhs, layout)
        else:
            x = jnp.transpose(lhs, (*axes.free, *axes.contracting))
            x = x.reshape(*x.shape[: len(axes.free)], -1)
        out = self.matrices(x, kernel, dtype)
        return contraction.finish(out.reshape(contraction.dot_shape(lhs.shape, self.shape)))


class StoredEinsum(StoredDotGeneral):
    """In the place of an `einsum_op`."""

    def __call__(  # type: ignore[override]
        self, subscripts, lhs, rhs, precision=None, preferred_element_type=None, out_sharding=None
    ) -> jax.Array:
        del precision, out_sharding
        plan = as_dot(subscripts, lhs.shape, self.shape)
        dtype = np.dtype(preferred_element_type or lhs.dtype)
        lhs = jnp.sum(lhs, plan.lhs_summed) if plan.lhs_summed else lhs
        contraction = contractions(lhs.shape, self.shape, plan.dimension_numbers)["fwd"]
        return jnp.transpose(self._contract(lhs, rhs, contraction, dtype), plan.permutation)


class StoredConv(StoredDot):
    """In the place of a `conv_general_dilated`; smoothing and outlier channels are not for windows."""

    def __call__(
        self,
        lhs,
        rhs,
        window_strides,
        padding,
        *,
        precision=None,
        preferred_element_type=None,
        out_sharding=None,
        **geometry,
    ) -> jax.Array:
        del precision, out_sharding
        array = rhs.operand
        by_channel = lambda part: part.reshape((1,) * (len(self.shape) - 1) + part.shape[-1:])
        zero_point = None if array.zero_point is None else by_channel(array.zero_point)
        kernel = QArray(
            array.qvalue.reshape(self.shape), by_channel(array.scale), zero_point, array.codebook, qtype=array.qtype
        )
        dtype = preferred_element_type or lhs.dtype
        options = {"preferred_element_type": dtype, **geometry}
        with path_scope(self.path) if self.path else contextlib.nullcontext():
            return conv.conv_general_dilated(
                lhs, kernel, window_strides, padding, self.recipe, self._read("scale"), **options
            )


_STORED = {"dot_general": StoredDotGeneral, "einsum_op": StoredEinsum, "conv_general_dilated": StoredConv}


def promote_around_codes(arrays: Any, *, dtype: Any = None, **kwargs: Any) -> Any:
    """`nnx`'s promotion of a layer's inputs and bias, which leaves its codes as they are."""
    inputs, kernel, bias = arrays
    inputs, bias = dtypes.promote_dtype((inputs, bias), dtype=dtype, **kwargs)
    return inputs, kernel, bias


def freeze_layer(layer: Any, kernel: Stored, recipe: Recipe, extras: Extras = Extras(), *, path: str = "") -> None:
    """Gives a layer stored codes for its kernel, in place.

    Args:
      layer: an nnx.Linear, LinearGeneral, Einsum or Conv, or a stack of them.
      kernel: of the layer's `kernel_matrix`.
      recipe: of its forward product; what it says of the kernel is how the codes were made.
      extras: what is done to inputs.
      path: of the layer in the model.

    Raises:
      ValueError: codes of another shape than the kernel, a recipe that quantizes gradients, or scales that the recipe
        does not keep.
    """
    shape, axes = kernel_shape(layer) or (), kernel_axes(layer)
    matrix = jax.eval_shape(lambda: kernel_matrix(layer))
    if kernel.shape != matrix.shape:
        raise ValueError(f"Codes of shape {kernel.shape} are not of a kernel of shape {matrix.shape}.")
    if recipe != inference_recipe(recipe):
        raise ValueError("A frozen layer has a recipe for its forward product alone: see `inference_recipe`.")
    if (extras.zero_point is not None) != (extras.affine is not None and extras.scale is not None):
        raise ValueError("A zero point goes with affine inputs whose scale is kept, and only with them.")
    if extras.affine is None and recipe.keeps_state != (extras.scale is not None):
        raise ValueError(f"scale= goes with a recipe that keeps scales, and only with one, not with {recipe}.")
    names = [name for name in _STORED if name in vars(layer)]
    if isinstance(layer, nnx.Conv):
        if any(getattr(extras, name) is not None for name in ("affine", "inverse", "outliers")):
            raise ValueError("A convolution takes inputs as they are: no zero point, smoothing or outlier channels.")
        if kernel.form.axis == -2 and kernel.form.groups > 1:
            raise ValueError("A convolution takes codes with scales by tensor or channel, not in groups.")
    kernel = kernel.with_sums() if extras.affine else kernel
    layer.kernel = StoredKernel(kernel)
    layer.promote_dtype = promote_around_codes
    for name in names:
        setattr(layer, name, nnx.data(_STORED[name](recipe, shape, axes, extras, path)))
    if hasattr(layer, "dot_general_cls"):
        layer.dot_general_cls = None


class StoredEmbed(nnx.Module):
    """An `nnx.Embed` whose table is stored as codes, each row with scales of its own; rows are looked up as codes.

    Args:
      table: of the embeddings, packed along its last axis.
      dtype: of the result.
    """

    def __init__(self, table: Stored, dtype: Any):
        self.num_embeddings, self.features = table.shape
        self.dtype = dtype
        self.embedding = StoredKernel(table)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.embedding[...].rows(inputs, self.dtype)


def freeze_embedding(model: nnx.Module, path: str, table: Stored) -> None:
    """Puts a StoredEmbed in the place of the nnx.Embed at a path of a model.

    Raises:
      ValueError: there is none, or its table has another shape.
    """
    modules = {"/".join(map(str, at)): module for at, module in nnx.iter_modules(model)}
    found = modules.get(path)
    if not isinstance(found, nnx.Embed):
        raise ValueError(f"{path!r} is no nnx.Embed: those are {', '.join(embeddings_of(model)) or 'none'}.")
    if table.shape != (found.num_embeddings, found.features):
        raise ValueError(f"Codes of shape {table.shape} are not of the embeddings {path!r}.")
    parent, _, name = path.rpartition("/")
    holder = modules[parent] if parent else model
    setattr(holder, name, StoredEmbed(table, found.dtype or jnp.float32))


def embeddings_of(model: nnx.Module) -> dict[str, Any]:
    """The tables of embeddings of a model, by path."""
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {path: module for path, module in modules.items() if isinstance(module, nnx.Embed | StoredEmbed)}
