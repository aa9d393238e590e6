"""Axes of a dot and of its two gradients, for every legal `dimension_numbers`.

Each of the three GEMMs of a dot is again a dot of two operands, whose result is a permutation away from where it
belongs. A `Contraction` holds that: it is all that the arithmetic in `gemm` needs to know about shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
from jax import lax

DimensionNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


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
        return (self.first.contracting, self.second.contracting), (self.first.batch, self.second.batch)

    def finish(self, out: jax.Array) -> jax.Array:
        """Brings the dot's result to the layout of the tensor that it is, or is the gradient of."""
        return out if self.permutation == tuple(range(out.ndim)) else lax.transpose(out, self.permutation)


def contractions(lhs_ndim: int, rhs_ndim: int, dimension_numbers: DimensionNumbers) -> dict[str, Contraction]:
    """The contractions of 'fwd' (lhs, rhs), 'dlhs' (grad, rhs) and 'drhs' (lhs, grad).

    Args:
      lhs_ndim, rhs_ndim: ranks of the operands.
      dimension_numbers: as in `jax.lax.dot_general`.
    """
    return _contractions(lhs_ndim, rhs_ndim, _as_tuples(dimension_numbers))


def _as_tuples(dimension_numbers) -> DimensionNumbers:
    (lc, rc), (lb, rb) = dimension_numbers
    return (tuple(map(int, lc)), tuple(map(int, rc))), (tuple(map(int, lb)), tuple(map(int, rb)))


@functools.lru_cache(maxsize=None)
def _contractions(lhs_ndim: int, rhs_ndim: int, dimension_numbers: DimensionNumbers) -> dict[str, Contraction]:
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    lhs = Axes.of(lhs_ndim, lhs_batch, lhs_contracting)
    rhs = Axes.of(rhs_ndim, rhs_batch, rhs_contracting)
    batch, lhs_free, rhs_free = len(lhs.batch), len(lhs.free), len(rhs.free)
    out_batch = tuple(range(batch))
    out_lhs = tuple(range(batch, batch + lhs_free))
    out_rhs = tuple(range(batch + lhs_free, batch + lhs_free + rhs_free))
    rhs_of_lhs = dict(zip(lhs.contracting, rhs.contracting, strict=True))
    lhs_of_rhs = {r: l for l, r in rhs_of_lhs.items()}

    # dot(grad, rhs) is (batch, lhs free, rhs contracting); in lhs, the last of these sit on their partners' axes.
    dlhs_order = [*lhs.batch, *lhs.free, *(lhs_of_rhs[r] for r in sorted(rhs.contracting))]
    # dot(lhs, grad) is (batch, lhs contracting, rhs free).
    drhs_order = [*rhs.batch, *(rhs_of_lhs[l] for l in sorted(lhs.contracting)), *rhs.free]
    return {
        "fwd": Contraction(lhs, rhs, tuple(range(len(out_batch + out_lhs + out_rhs)))),
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


def to_matrices(x: jax.Array, axes: Axes) -> jax.Array:
    """Flattens an operand to [batch, free, contracting], the form that tiles and blocks are defined on."""
    groups = (axes.batch, axes.free, axes.contracting)
    sizes = [math.prod(x.shape[i] for i in group) for group in groups]
    return lax.transpose(x, [i for group in groups for i in group]).reshape(sizes)


def dot_shape(first: Sequence[int], second: Sequence[int], contraction: Contraction) -> tuple[int, ...]:
    """Shape of the dot's (batch, first free, second free)."""
    a, b = contraction.first, contraction.second
    return (*(first[i] for i in a.batch), *(first[i] for i in a.free), *(second[i] for i in b.free))
