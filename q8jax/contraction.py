"""Axes of a dot and of its two gradients, for every legal `dimension_numbers`.

Each of the three GEMMs of a dot is again a dot of two operands, whose result is a permutation away
from where it belongs. A `Contraction` holds that: it is all that the arithmetic in `gemm` needs to
know about shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
from jax import lax

AxisPairs = tuple[tuple[int, ...], tuple[int, ...]]
DimensionNumbers = tuple[AxisPairs, AxisPairs]
# Three groups of axes of a tensor, to be flattened to one axis each.
Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one operand, by role.

    Invariant: every axis is in exactly one of the three; `free` ascends.
    """

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracting: tuple[int, ...]

    @classmethod
    def of(cls, ndim: int, batch: Sequence[int], contracting: Sequence[int]) -> "Axes":
        taken = {*batch, *contracting}
        return cls(tuple(batch), tuple(i for i in range(ndim) if i not in taken), tuple(contracting))

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that a scale per vector keeps."""
        return self.batch + self.free

    @property
    def along_rows(self) -> "Axes":
        """The axes of the operand once it is transposed to (batch, free, contracting)."""
        ends = (len(self.batch), len(self.kept), len(self.kept) + len(self.contracting))
        return Axes(*(tuple(range(start, stop)) for start, stop in zip((0, *ends), ends)))

    def split(self, axis: int) -> "Axes":
        """The axes once a contracting one is two, the first of them a batch axis, before all others."""
        batch, free, contracting = (
            tuple(i + (i >= axis) for i in role) for role in (self.batch, self.free, self.contracting)
        )
        return Axes((axis, *batch), free, contracting)

    @property
    def layout(self) -> Layout:
        """Groups that flatten the operand to a batch of matrices, in the order that moves least."""
        rows, columns = sorted((self.free, self.contracting), key=lambda group: group[:1])
        return self.batch, rows, columns

    @property
    def of_matrices(self) -> "Axes":
        """The axes of the operand once it is flattened as `layout` says."""
        if self.layout[1] == self.free:
            return Axes((0,), (1,), (2,))
        return Axes((0,), (2,), (1,))


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One GEMM: a dot of two operands, and the permutation that its result is due.

    Attributes:
      first, second: axes of the operands; contracting and batch axes pair up in order.
      permutation: for `jax.lax.transpose` of the dot's (batch, first free, second free).
    """

    first: Axes
    second: Axes
    permutation: tuple[int, ...]

    @property
    def dimension_numbers(self) -> DimensionNumbers:
        return (
            (self.first.contracting, self.second.contracting),
            (self.first.batch, self.second.batch),
        )

    @property
    def of_matrices(self) -> "Contraction":
        """The same GEMM between operands flattened to matrices."""
        return Contraction(self.first.of_matrices, self.second.of_matrices, (0, 1, 2))

    def split(self, pair: int) -> "Contraction":
        """The same GEMM as several along a pair of contracting axes, whose results, along axis 0, are to be added."""
        first, second = (side.split(side.contracting[pair]) for side in (self.first, self.second))
        return Contraction(first, second, (0, *(i + 1 for i in self.permutation)))

    def dot_shape(self, first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
        """Shape of the dot's (batch, first free, second free)."""
        return (
            *(first[i] for i in self.first.kept),
            *(second[i] for i in self.second.free),
        )

    def spread(self, values: jax.Array, position: int) -> jax.Array:
        """What an operand has one of per vector along its contracting axes, in the rank of the dot's result.

        Args:
          values: of the rank of the operand, its contracting axes of size 1; 1 where they do not depend on an axis.
          position: of the operand, 0 or 1.
        """
        axes = (self.first, self.second)[position]
        others = len((self.second, self.first)[position].free)
        kept = lax.squeeze(lax.transpose(values, (*axes.kept, *axes.contracting)), range(len(axes.kept), values.ndim))
        new = len(axes.batch) if position == 1 else kept.ndim
        return lax.expand_dims(kept, range(new, new + others))

    def finish(self, out: jax.Array) -> jax.Array:
        """Brings the dot's result to the layout of the tensor that it is, or is the gradient of."""
        if self.permutation == tuple(range(out.ndim)):
            return out
        return lax.transpose(out, self.permutation)


def contractions(
    lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...], dimension_numbers: DimensionNumbers
) -> dict[str, Contraction]:
    """The contractions of 'fwd' (lhs, rhs), 'dlhs' (grad, rhs) and 'drhs' (lhs, grad).

    Args:
      lhs_shape, rhs_shape: shapes of the operands.
      dimension_numbers: as in `jax.lax.dot_general`.

    Raises:
      ValueError: dimension numbers that `jax.lax.dot_general` would not take.
    """
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = (
        (tuple(map(int, first)), tuple(map(int, second))) for first, second in dimension_numbers
    )
    pairs = ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))
    legal = all(len(first) == len(second) for first, second in pairs)
    for shape, axes in (
        (lhs_shape, lhs_batch + lhs_contracting),
        (rhs_shape, rhs_batch + rhs_contracting),
    ):
        legal &= len(set(axes)) == len(axes) and all(0 <= axis < len(shape) for axis in axes)
    if not legal or any(lhs_shape[i] != rhs_shape[j] for first, second in pairs for i, j in zip(first, second)):
        raise ValueError(
            f"dimension_numbers {pairs} do not fit operands of shapes {tuple(lhs_shape)} and "
            f"{tuple(rhs_shape)}: name each axis once, from 0 up, and pair axes of equal size."
        )
    return _contractions(len(lhs_shape), len(rhs_shape), pairs)


@functools.cache
def _contractions(lhs_ndim: int, rhs_ndim: int, dimension_numbers: DimensionNumbers) -> dict[str, Contraction]:
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    lhs = Axes.of(lhs_ndim, lhs_batch, lhs_contracting)
    rhs = Axes.of(rhs_ndim, rhs_batch, rhs_contracting)
    ends = (len(lhs.batch), len(lhs.kept), len(lhs.kept) + len(rhs.free))
    out_batch, out_lhs, out_rhs = (tuple(range(start, stop)) for start, stop in zip((0, *ends), ends))
    rhs_of_lhs = dict(zip(lhs.contracting, rhs.contracting, strict=True))
    lhs_of_rhs = {r: l for l, r in rhs_of_lhs.items()}

    # dot(grad, rhs) is (batch, lhs free, rhs contracting); in lhs, the last of these sit on their
    # partners' axes.
    dlhs_order = [*lhs.kept, *(lhs_of_rhs[r] for r in sorted(rhs.contracting))]
    # dot(lhs, grad) is (batch, lhs contracting, rhs free).
    drhs_order = [*rhs.batch, *(rhs_of_lhs[l] for l in sorted(lhs.contracting)), *rhs.free]
    return {
        "fwd": Contraction(lhs, rhs, (*out_batch, *out_lhs, *out_rhs)),
        "dlhs": Contraction(
            Axes(out_batch, out_lhs, out_rhs),
            Axes(rhs.batch, tuple(sorted(rhs.contracting)), rhs.free),
            tuple(dlhs_order.index(axis) for axis in range(lhs_ndim)),
        ),
        "drhs": Contraction(
            Axes(lhs.batch, tuple(sorted(lhs.contracting)), lhs.free),
            Axes(out_batch, out_rhs, out_lhs),
            tuple(drhs_order.index(axis) for axis in range(rhs_ndim)),
        ),
    }


def to_matrices(x: jax.Array, layout: Layout) -> jax.Array:
    """Flattens an operand to rank 3, the form that tiles and blocks are defined on."""
    sizes = [math.prod(x.shape[i] for i in group) for group in layout]
    return lax.transpose(x, [i for group in layout for i in group]).reshape(sizes)
