"""An einsum of two operands as one dot."""

import dataclasses
import string

from q8jax.contraction import DimensionNumbers


@dataclasses.dataclass(frozen=True)
class EinsumAsDot:
    """Sum these axes of the operands, run the dot, transpose its result.

    Attributes:
      lhs_summed, rhs_summed: axes of indices that occur nowhere else.
      dimension_numbers: of the dot of the summed operands.
      permutation: for the dot's result.
    """

    lhs_summed: tuple[int, ...]
    rhs_summed: tuple[int, ...]
    dimension_numbers: DimensionNumbers
    permutation: tuple[int, ...]


def as_dot(subscripts: str, lhs_ndim: int, rhs_ndim: int) -> EinsumAsDot:
    """Plans an einsum.

    Args:
      subscripts: two operands; '...' and an implicit result are allowed.
      lhs_ndim, rhs_ndim: ranks of the operands.

    Raises:
      ValueError: not two operands, subscripts that do not fit the ranks, an index repeated within one operand, or a
        result with an index that no operand has.
    """
    inputs, arrow, result = subscripts.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != 2:
        raise ValueError(f"einsum {subscripts!r} must have two operands separated by one comma.")
    spare = [c for c in string.ascii_letters if c not in subscripts]
    lhs, lhs_dots = _expand(operands[0], lhs_ndim, spare, subscripts)
    rhs, rhs_dots = _expand(operands[1], rhs_ndim, spare, subscripts)
    dots = max(lhs_dots, rhs_dots, key=len)
    if arrow:
        result = result.replace("...", dots)
    else:
        result = dots + "".join(sorted(c for c in set(lhs) ^ set(rhs) if c not in dots))
    for name, indices in (("operand", lhs), ("operand", rhs), ("result", result)):
        if len(set(indices)) < len(indices):
            raise ValueError(f"einsum {subscripts!r} repeats an index within one {name}, which is not a dot.")
    unknown = set(result) - set(lhs) - set(rhs)
    if unknown:
        raise ValueError(f"einsum {subscripts!r} has {', '.join(sorted(unknown))} in its result but in no operand.")

    lhs_summed = tuple(i for i, c in enumerate(lhs) if c not in rhs and c not in result)
    rhs_summed = tuple(i for i, c in enumerate(rhs) if c not in lhs and c not in result)
    lhs = "".join(c for c in lhs if c in rhs or c in result)
    rhs = "".join(c for c in rhs if c in lhs or c in result)
    batch = [c for c in lhs if c in rhs and c in result]
    contracting = [c for c in lhs if c in rhs and c not in result]
    free = [c for c in lhs if c not in rhs] + [c for c in rhs if c not in lhs]
    dimension_numbers = (
        (tuple(map(lhs.index, contracting)), tuple(map(rhs.index, contracting))),
        (tuple(map(lhs.index, batch)), tuple(map(rhs.index, batch))),
    )
    order = [*batch, *free]
    return EinsumAsDot(lhs_summed, rhs_summed, dimension_numbers, tuple(map(order.index, result)))


def _expand(operand: str, ndim: int, spare: list[str], subscripts: str) -> tuple[str, str]:
    """Replaces '...' by letters, aligned to the right as broadcasting is; returns the indices and these letters."""
    named = operand.replace("...", "")
    covered = ndim - len(named)
    if covered < 0 or (covered and "..." not in operand) or not (named == "" or named.isalpha()):
        raise ValueError(f"einsum {subscripts!r}: {operand!r} does not fit an operand of rank {ndim}.")
    dots = "".join(reversed(spare[:covered]))
    return operand.replace("...", dots), dots
