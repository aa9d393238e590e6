"""Whether the tiles of a recipe divide the axes of a dot, found out from shapes alone.

Of a layer the kernel is known at construction, its input only when it is called: `check_kernel` and `check_einsum` look
at the axes that the kernel decides, and take it that tiles divide the others.
"""

import math
from collections.abc import Sequence

from q8jax.contraction import Axes, DimensionNumbers, contractions
from q8jax.einsum import as_dot, fitting_lhs
from q8jax.groups import divisors
from q8jax.recipe import GEMM_TENSORS, GEMMS, Operand, Recipe

Shape = tuple[int, ...]


def check(recipe: Recipe, lhs_shape: Shape, rhs_shape: Shape, dimension_numbers: DimensionNumbers) -> None:
    """Raises ValueError, naming what would, unless the tiles of all three GEMMs of a dot divide their axes."""
    by_gemm = contractions(lhs_shape, rhs_shape, dimension_numbers)
    shapes = {"lhs": lhs_shape, "rhs": rhs_shape, "grad": by_gemm["fwd"].dot_shape(lhs_shape, rhs_shape)}
    for name in GEMMS:
        axes = by_gemm[name].first, by_gemm[name].second
        for tensor, operand, own in zip(GEMM_TENSORS[name], getattr(recipe, name), axes, strict=True):
            if operand is not None and operand.tile:
                check_operand(f"{operand.granularity} of {tensor} in {name}", operand, own, shapes[tensor])


def check_operand(what: str, operand: Operand, axes: Axes, shape: Shape) -> None:
    """Raises ValueError unless the tiles of one operand divide its axes."""
    assert operand.tile is not None
    groups = {"contracting": axes.contracting} | ({"free": axes.free} if operand.is_block else {})
    for role, group in groups.items():
        size = math.prod(shape[axis] for axis in group)
        if size % operand.tile:
            raise ValueError(
                f"{what} does not divide its {role} size {size}: choose K from {divisors(size)}, or granularity row."
            )


def check_kernel(recipe: Recipe, kernel_shape: Sequence[int], batch: int, contracting: int) -> None:
    """As `check`, for the right operand of a dot.

    Args:
      recipe: of the dot.
      kernel_shape: first its batch axes, then the contracting ones, then the free ones.
      batch, contracting: how many there are of these.
    """
    kernel = tuple(kernel_shape)
    last = batch + contracting
    lhs = (*kernel[:batch], _divisible(recipe), *kernel[batch:last])
    numbers = (tuple(range(batch + 1, last + 1)), tuple(range(batch, last))), (tuple(range(batch)),) * 2
    check(recipe, lhs, kernel, numbers)


def check_einsum(recipe: Recipe, subscripts: str, kernel_shape: Sequence[int]) -> None:
    """As `check`, for the right operand of an einsum."""
    if not any(operand.tile for operand in recipe.operands):
        return
    shapes = fitting_lhs(subscripts, tuple(kernel_shape), _divisible(recipe)), tuple(kernel_shape)
    plan = as_dot(subscripts, *shapes)
    lhs, rhs = (
        tuple(size for axis, size in enumerate(shape) if axis not in summed)
        for shape, summed in zip(shapes, (plan.lhs_summed, plan.rhs_summed), strict=True)
    )
    check(recipe, lhs, rhs, plan.dimension_numbers)


def _divisible(recipe: Recipe) -> int:
    return math.lcm(*(operand.tile or 1 for operand in recipe.operands))
