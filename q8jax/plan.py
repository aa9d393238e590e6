"""What is static about a dot: its three GEMMs, and how its tensors enter them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from q8jax import tiles
from q8jax.contraction import Axes, Contraction, DimensionNumbers, contractions
from q8jax.convolution import Product, convolve, products
from q8jax.gemm import gemm, gemm_tiled, scaled_by_library
from q8jax.naming import role_scope
from q8jax.operands import Use
from q8jax.qarray import QArray
from q8jax.recipe import GEMM_TENSORS, GEMMS, Recipe
from q8jax.shardings import ANYWHERE, DotShardings, added_over, gathered, names_along, parts_along, placed, split_axis
from q8jax.windows import Window

Operands = dict[Use, QArray | jax.Array]


@dataclasses.dataclass(frozen=True)
class GemmPlan:
    """Everything static about one GEMM of a dot.

    Attributes:
      role: 'fwd', 'dlhs' or 'drhs'.
      formats: that the recipe wants it to multiply.
      contraction: of its operands as they are.
      uses: its operands as it takes them.
      tile: size of the pieces of the contracting axis on which both operands' scales are constant;
        None where they are constant on all of it, else the operands are flattened to matrices.
      shape: of the dot's (batch, first free, second free).
      dtype: of the result.
      powers_of_two: whether all scales are.
      accurate: whether a GPU must accumulate at full precision.
      shardings: where its operands and its result are.
    """

    role: str
    formats: tuple[str, str]
    contraction: Contraction
    uses: tuple[Use, Use]
    tile: int | None
    shape: tuple[int, ...]
    dtype: np.dtype
    powers_of_two: bool
    accurate: bool
    shardings: DotShardings

    @property
    def is_scaled_by_library(self) -> bool:
        """Whether a GPU's library multiplies these formats and scales and rounds what it writes."""
        per_tensor = all(use.operand is not None and use.operand.granularity == "tensor" for use in self.uses)
        return per_tensor and scaled_by_library(self.formats, self.dtype, self.powers_of_two)

    def run(self, operands: Operands) -> jax.Array:
        where = [getattr(self.shardings, use.tensor) for use in self.uses]
        taken = [gathered(operands[use], place, use.layout) for use, place in zip(self.uses, where, strict=True)]
        wanted, pair = getattr(self.shardings, self.role), self._pair_summed_over_devices(taken)
        if pair is None or wanted is None:
            with self._scope():
                return placed(self._run(*taken), wanted)
        # Each device rounds what it has summed to the result's dtype, which is what then travels.
        sides = self.contraction.first, self.contraction.second
        axes = [side.contracting[pair] for side in sides]
        names = names_along(where[0], axes[0])
        first, second = (
            split_axis(x, axis, parts_along(place, axis)) for x, place, axis in zip(taken, where, axes, strict=True)
        )
        with self._scope():
            each = self._multiply(first, second, self.contraction.split(pair))
        return added_over(each, names, wanted)

    def _pair_summed_over_devices(self, taken: Sequence[QArray | jax.Array]) -> int | None:
        """Of the pairs of contracting axes the first that is split over devices.

        None where there is no such pair, and where the accumulators that would be added are no wider than the result.
        """
        quantized = all(isinstance(operand, QArray) for operand in taken)
        if not quantized or self.tile is not None or self.is_scaled_by_library:
            return None
        where = [getattr(self.shardings, use.tensor) for use in self.uses]
        for pair, axes in enumerate(zip(self.contraction.first.contracting, self.contraction.second.contracting)):
            along = {names_along(place, axis) for place, axis in zip(where, axes, strict=True)}
            if len(along) == 1 and any(along) and taken[0].shape[axes[0]] % parts_along(where[0], axes[0]) == 0:
                return pair
        return None

    def _scope(self) -> Any:
        return role_scope(self.role, *self.formats)

    def _run(self, first: QArray | jax.Array, second: QArray | jax.Array) -> jax.Array:
        if self.tile is None:
            return self._multiply(first, second, self.contraction)
        matrices = self.contraction.of_matrices
        out = gemm_tiled(first, second, matrices, self.tile, accurate=self.accurate, scope=self._scope)
        return self.contraction.finish(out.astype(self.dtype).reshape(self.shape))

    def _multiply(self, first: QArray | jax.Array, second: QArray | jax.Array, contraction: Contraction) -> jax.Array:
        return gemm(first, second, contraction, self.dtype, accurate=self.accurate, powers_of_two=self.powers_of_two)


@dataclasses.dataclass(frozen=True)
class ConvolutionPlan(GemmPlan):
    """Everything static about one product of a convolution; as a GEMM it is one of patches of its first operand."""

    product: Product

    def _multiply(self, first: QArray | jax.Array, second: QArray | jax.Array, contraction: Contraction) -> jax.Array:
        return convolve(
            first, second, self.product, self.dtype, accurate=self.accurate, powers_of_two=self.powers_of_two
        )


@dataclasses.dataclass(frozen=True)
class DotPlan:
    """Everything static about one dot, or one convolution.

    Attributes:
      recipe: its arithmetic.
      calibrating: whether every scale is the tensor's own.
      dimension_numbers: which axes it sums, or the window that it convolves with.
      fwd, dlhs, drhs: its three products.
    """

    recipe: Recipe
    calibrating: bool
    dimension_numbers: DimensionNumbers | Window
    fwd: GemmPlan
    dlhs: GemmPlan
    drhs: GemmPlan

    @property
    def uses(self) -> tuple[Use, ...]:
        """The distinct uses that the GEMMs make of tensors."""
        return tuple(dict.fromkeys(self.fwd.uses + self.dlhs.uses + self.drhs.uses))

    @property
    def kept(self) -> tuple[Use, ...]:
        """What the backward pass needs of the operands."""
        return tuple(dict.fromkeys(use.origin or use for use in self.through))

    @property
    def through(self) -> tuple[Use, Use]:
        """How the gradient products take the operands."""
        return self.dlhs.uses[1], self.drhs.uses[0]

    @property
    def prequantized(self) -> tuple[Use, ...]:
        """The quantized uses of the right operand."""
        return tuple(use for use in self.uses if use.tensor == "rhs" and use.operand is not None)


def plan(
    recipe: Recipe,
    lhs: jax.Array | jax.ShapeDtypeStruct,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers | Window,
    dtype: np.dtype,
    calibrating: bool,
    shardings: DotShardings | None = None,
) -> DotPlan:
    """The three GEMMs of a dot whose result has this dtype, or with a Window of a convolution.

    Raises:
      ValueError: a tile that does not divide its axis, or, of codes that windows slide over, any tile.
    """
    dtypes = {"fwd": dtype, "dlhs": lhs.dtype, "drhs": rhs.dtype}
    if isinstance(dimension_numbers, Window):
        if any(operand.tile for operand in recipe.operands):
            raise ValueError("Windows slide over tiles: let a convolution's operands have granularity tensor or row.")
        each = products(lhs.shape, dimension_numbers, rhs.shape[-1], rhs.ndim > len(dimension_numbers.size) + 2)
        convolutions = {name: _convolution(recipe, name, each[name], dtypes[name]) for name in GEMMS}
        return _straight_through(DotPlan(recipe, calibrating, dimension_numbers, **convolutions))
    tiles.check(recipe, lhs.shape, rhs.shape, dimension_numbers)
    by_gemm = contractions(lhs.shape, rhs.shape, dimension_numbers)
    shapes = {"lhs": lhs.shape, "rhs": rhs.shape}
    shapes["grad"] = by_gemm["fwd"].dot_shape(lhs.shape, rhs.shape)
    where = shardings or ANYWHERE
    gemms = {name: _gemm(recipe, name, by_gemm[name], shapes, dtypes[name], where) for name in GEMMS}
    (contracting, batch) = (tuple(tuple(int(i) for i in axes) for axes in pair) for pair in dimension_numbers)
    numbers = (contracting[0], contracting[1]), (batch[0], batch[1])
    return _straight_through(DotPlan(recipe, calibrating, numbers, **gemms))


def _straight_through(dot: DotPlan) -> DotPlan:
    """With backward=codes a plan whose gradient products take what fwd's codes mean, where they take no own ones."""
    if dot.recipe.backward != "codes":
        return dot
    forward = {use.tensor: use for use in dot.fwd.uses if use.operand is not None}
    of = lambda use: dataclasses.replace(use, origin=forward[use.tensor])
    take = lambda use: of(use) if use.operand is None and use.tensor in forward else use
    dlhs, drhs = (dataclasses.replace(gemm, uses=tuple(map(take, gemm.uses))) for gemm in (dot.dlhs, dot.drhs))
    return dataclasses.replace(dot, dlhs=dlhs, drhs=drhs)


def _gemm(
    recipe: Recipe,
    name: str,
    contraction: Contraction,
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
    shardings: DotShardings,
) -> GemmPlan:
    sizes = [operand.tile for operand in getattr(recipe, name) if operand is not None and operand.tile]
    uses = _uses(recipe, name, (contraction.first, contraction.second), tiled=bool(sizes))
    shape = contraction.dot_shape(*(shapes[tensor] for tensor in GEMM_TENSORS[name]))
    return GemmPlan(
        **_common(recipe, name, dtype),
        contraction=contraction,
        uses=uses,
        tile=math.gcd(*sizes) or None,
        shape=shape,
        shardings=shardings,
    )


def _convolution(recipe: Recipe, name: str, product: Product, dtype: np.dtype) -> ConvolutionPlan:
    return ConvolutionPlan(
        **_common(recipe, name, dtype),
        contraction=product.contraction,
        uses=_uses(recipe, name, product.roles, tiled=False),
        tile=None,
        shape=(),
        shardings=ANYWHERE,
        product=product,
    )


def _common(recipe: Recipe, name: str, dtype: np.dtype) -> dict[str, Any]:
    return {
        "role": name,
        "formats": recipe.formats(name),
        "dtype": dtype,
        "powers_of_two": recipe.scales != "float32",
        "accurate": not recipe.accumulates_fast(name),
    }


def _uses(recipe: Recipe, name: str, axes: tuple[Axes, Axes], *, tiled: bool) -> tuple[Use, Use]:
    first, second = (
        Use.of(tensor, operand, own, tiled)
        for tensor, operand, own in zip(GEMM_TENSORS[name], getattr(recipe, name), axes, strict=True)
    )
    return first, second
