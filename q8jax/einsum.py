"""An einsum of two operands as one dot."""

import dataclasses
import string

from q8jax.contraction import DimensionNumbers


@dataclasses.dataclass(frozen=True)
class EinsumAsDot:
    """Sum these axes of the operands, run the dot, transpose its result.

    Attributes:
      lhs_summed, rhs_summed: axes of indices that occur nowhere else, and axes of size 1 that are
        broadcast against the other operand's.
      dimension_numbers: of the dot of the summed operands.
      permutation: for the dot's result.
    """

    lhs_summed: tuple[int, ...]
    rhs_summed: tuple[int, ...]
    dimension_numbers: DimensionNumbers
    permutation: tuple[int, ...]


def as_dot(subscripts: str, lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...]) -> EinsumAsDot:
    """Plans an einsum.

    Args:
      subscripts: two operands; '...' and an implicit result are allowed.
      lhs_shape, rhs_shape: shapes of the operands; as in `jnp.einsum`, an axis of size 1 is
        broadcast against the other operand's axis of the same index.

    Raises:
      ValueError: not two operands, subscripts that do not fit their shapes, an index repeated
        within one operand, or a result with an index that no operand has.
    """
    inputs, arrow, result = subscripts.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != 2:
        raise ValueError(f"einsum {subscripts!r} must have two operands separated by one comma.")
    spare = [c for c in string.ascii_letters if c not in subscripts]
    lhs, lhs_dots = _expand(operands[0], len(lhs_shape), spare, subscripts)
    rhs, rhs_dots = _expand(operands[1], len(rhs_shape), spare, subscripts)
    dots = max(lhs_dots, rhs_dots, key=len)
    if arrow:
        result = result.replace("...", dots)
    else:
        result = dots + "".join(sorted((set(lhs) ^ set(rhs)) - set(dots)))
    for name, indices in (("operand", lhs), ("operand", rhs), ("result", result)):
        if len(set(indices)) < len(indices):
            raise ValueError(f"einsum {subscripts!r} repeats an index within one {name}, which is not a dot.")
    unknown = set(result) - set(lhs) - set(rhs)
    if unknown:
        raise ValueError(f"einsum {subscripts!r} has {', '.join(sorted(unknown))} in its result but in no operand.")

    sizes = dict(zip(lhs, lhs_shape)), dict(zip(rhs, rhs_shape))
    lhs_live, rhs_live = (_live(own, other, subscripts) for own, other in (sizes, sizes[::-1]))
    lhs_kept = "".join(c for c in lhs if c in lhs_live and (c in rhs_live or c in result))
    rhs_kept = "".join(c for c in rhs if c in rhs_live and (c in lhs_live or c in result))
    batch = [c for c in lhs_kept if c in rhs_kept and c in result]
    contracting = [c for c in lhs_kept if c in rhs_kept and c not in result]
    dimension_numbers = (
        (tuple(map(lhs_kept.index, contracting)), tuple(map(rhs_kept.index, contracting))),
        (tuple(map(lhs_kept.index, batch)), tuple(map(rhs_kept.index, batch))),
    )
    order = [
        *batch,
        *(c for c in lhs_kept if c not in rhs_kept),
        *(c for c in rhs_kept if c not in lhs_kept),
    ]
    return EinsumAsDot(
        tuple(i for i, c in enumerate(lhs) if c not in lhs_kept),
        tuple(i for i, c in enumerate(rhs) if c not in rhs_kept),
        dimension_numbers,
        tuple(map(order.index, result)),
    )


def fitting_lhs(subscripts: str, rhs_shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """A shape of the left operand that fits the right one's, `size` wherever that leaves it open.

    Args:
      subscripts, rhs_shape: as in `as_dot`; in the left operand '...' is one axis more than in the right one.
      size: of the axes that the right operand has not, or has with size 1.
    """
    lhs, rhs = subscripts.replace(" ", "").partition("->")[0].split(",")
    spare = [c for c in string.ascii_letters if c not in subscripts]
    indices, dots = _expand(rhs, len(rhs_shape), spare, subscripts)
    known = {c: n for c, n in zip(indices, rhs_shape) if n > 1}
    return tuple(known.get(c, size) for c in lhs.replace("...", spare[len(dots)] + dots))


def _live(own: dict[str, int], other: dict[str, int], subscripts: str) -> set[str]:
    """The indices of an operand, without those of size 1 that are broadcast against the other's."""
    differing = {c for c in own if own[c] != other.get(c, own[c])}
    for c in differing:
        if own[c] != 1 and other[c] != 1:
            raise ValueError(f"einsum {subscripts!r} has index {c} of sizes {own[c]} and {other[c]}.")
    return set(own) - {c for c in differing if own[c] == 1}


def _expand(operand: str, ndim: int, spare: list[str], subscripts: str) -> tuple[str, str]:
    """Replaces '...' by letters, aligned to the right as broadcasting is.

    Returns:
      The indices, and the letters that '...' stands for.
    """
    named = operand.replace("...", "")
    covered = ndim - len(named)
    fits = covered == 0 or (covered > 0 and "..." in operand)
    if not fits or not (named == "" or (named.isascii() and named.isalpha())):
        raise ValueError(f"einsum {subscripts!r}: {operand!r} does not fit an operand of rank {ndim}.")
    dots = "".join(reversed(spare[:covered]))
    return operand.replace("...", dots), dots
