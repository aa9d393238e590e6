"""The quantized dot in NumPy and ml_dtypes, written without q8jax: what its GEMMs are held against.

Every axis has a letter; each operand becomes [batch, free, contracting], its codes are multiplied in
float64, where sums of them are exact, and scales are applied in float32.
"""

import math
import string
from dataclasses import dataclass

import format_oracle
import ml_dtypes
import numpy as np

EPS = 2.0**-24  # half the spacing of float32 just above 1
F32 = np.float32


@dataclass
class Product:
    """A GEMM's float32 result, and how far another order of its float32 sums may be from it."""

    value: np.ndarray
    slack: np.ndarray


def _top(qtype: str) -> float:
    return format_oracle.limits(qtype)[1]


def scale_of(amax: np.ndarray, qtype: str, margin: int, scales: str) -> np.ndarray:
    """Contract: amax · 2^margin / max, rounded up to a power of two if asked, within 2^±126."""
    scale = amax * (F32(1) / F32(_top(qtype)) * F32(2.0**margin))
    if scales != "float32":
        mantissa, exponent = np.frexp(scale.astype(np.float64))
        scale = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
    scale = np.clip(scale, 2.0**-126, 2.0**126).astype(F32)
    return np.where(amax == 0, F32(1), scale)


def _groups(x: np.ndarray, granularity: str) -> np.ndarray:
    """The index of the group of each entry of [batch, free, contracting]."""
    b, m, k = np.indices(x.shape)
    kind = granularity.rstrip(string.digits)
    size = int(granularity[len(kind) :] or 1)
    key = {
        "tensor": 0 * b,
        "row": b * x.shape[1] + m,
        "tile": (b * x.shape[1] + m) * x.shape[2] + k // size,
        "block": (b * x.shape[1] + m // size) * x.shape[2] + k // size,
    }[kind]
    return np.unique(key, return_inverse=True)[1].reshape(x.shape)


def quantized(x: np.ndarray, operand, recipe, scale) -> tuple[np.ndarray, np.ndarray]:
    """Values of codes in float64 and scales in float32, both [batch, free, contracting]."""
    if operand is None:
        wide = x.astype(getattr(ml_dtypes, recipe.compute, recipe.compute))
        return wide.astype(np.float64), np.ones(x.shape, F32)
    x = x.astype(F32)
    groups = _groups(x, operand.granularity)
    if operand.scaling == "current":
        finite = np.where(np.isfinite(x), np.abs(x), F32(0))
        amax = np.zeros(groups.max(initial=0) + 1, F32)
        np.maximum.at(amax, groups, finite)
        scale = scale_of(amax, operand.qtype, recipe.margin, recipe.scales)[groups]
    else:
        scale = np.full(x.shape, 1 if operand.scaling == "unit" else scale, F32)
    integers = operand.qtype.startswith("int")
    with np.errstate(all="ignore"):
        codes = format_oracle.nearest_even(x * (F32(1) / scale), operand.qtype)
    if integers or "float6" in operand.qtype or "float4" in operand.qtype:
        for group in np.unique(groups[np.isnan(x)]):
            scale = np.where(groups == group, F32(np.nan), scale)
    return format_oracle.values_of(codes, operand.qtype), scale


def _matrix(x: np.ndarray, letters: str, groups: tuple[str, str, str]) -> np.ndarray:
    order = [letters.index(c) for group in groups for c in group]
    sizes = [math.prod(x.shape[letters.index(c)] for c in group) for group in groups]
    return x.transpose(order).reshape(sizes)


def gemm(sides, result: str, contracting: str, recipe, scales) -> Product:
    """One GEMM.

    Args:
      sides: two of (array, letters of its axes, operand, tensor name).
      result: letters of the result's axes.
      contracting: letters that are summed, in the order in which tiles run over them.
      recipe: q8jax.Recipe, read as data.
      scales: (tensor, qtype) to float32 scale, for delayed and static operands.
    """
    (x, a, *_), (y, b, *_) = sides
    batch = "".join(c for c in a if c in b and c in result)
    free = ["".join(c for c in own if c not in other) for own, other in ((a, b), (b, a))]
    (first, s1), (second, s2) = (
        quantized(
            _matrix(array, letters, (batch, own, contracting)),
            operand,
            recipe,
            None if operand is None else scales.get((tensor, operand.qtype)),
        )
        for (array, letters, operand, tensor), own in zip(sides, free)
    )
    pieces = _pieces(s1, s2)
    integers = all(op is not None and op.qtype.startswith("int") for *_, op, _ in sides)
    shape = (first.shape[0], first.shape[1], second.shape[1])
    value, slack = np.zeros(shape, F32), np.zeros(shape)
    length = first.shape[2]
    with np.errstate(all="ignore"):
        for piece in pieces:
            p, q = first[:, :, piece], second[:, :, piece]
            sums = np.einsum("bmk,bnk->bmn", p, q).astype(F32).astype(np.float64)
            bound = 0 if integers else np.einsum("bmk,bnk->bmn", np.abs(p), np.abs(q)) * length
            scale = _rounded(s1[:, :, None, piece.start], s2[:, None, :, piece.start])
            value = value + (sums * scale).astype(F32)
            # Each partial sum and the sum over pieces round once per addition.
            slack = slack + (bound + (len(pieces) > 1) * length * np.abs(sums)) * scale * EPS
    axes = [(x, a), (y, b)]
    size_of = {c: n for array, letters in axes for c, n in zip(letters, array.shape)}
    order = batch + free[0] + free[1]
    unflatten = lambda z: z.reshape([size_of[c] for c in order]).transpose([order.index(c) for c in result])
    return Product(unflatten(value), unflatten(slack))


def _rounded(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The product of two scales rounded to 24 bits, but not to float32's range; float64."""
    mantissa, exponent = np.frexp(first.astype(np.float64) * second)
    return np.ldexp(mantissa.astype(F32).astype(np.float64), exponent)


def _pieces(s1: np.ndarray, s2: np.ndarray) -> list[slice]:
    """Pieces of the contracting axis on which no scale changes."""
    length = s1.shape[2]
    changes = [0] * (length > 0)
    for k in range(1, length):
        if any((s[:, :, k] != s[:, :, k - 1]).any() for s in (s1, s2)):
            changes.append(k)
    return [slice(start, stop) for start, stop in zip(changes, [*changes[1:], length])]


def dot(lhs, rhs, grad, dimension_numbers, recipe, scales=None):
    """(out, dlhs, drhs) as Products, before the last cast."""
    (lc, rc), (lb, rb) = dimension_numbers
    names = iter(string.ascii_letters)
    a, b = [None] * lhs.ndim, [None] * rhs.ndim
    for i, j in [*zip(lb, rb), *zip(lc, rc)]:
        a[i] = b[j] = next(names)
    a, b = ("".join(c or next(names) for c in own) for own in (a, b))
    out = "".join([*(a[i] for i in lb), *(c for c in a if c not in b), *(c for c in b if c not in a)])
    lhs_free = "".join(c for c in a if c not in b)
    rhs_free = "".join(c for c in b if c not in a)
    tensors = {"lhs": (lhs, a), "rhs": (rhs, b), "grad": (grad, out)}
    products = []
    for pair, operands, result, contracting in (
        (("lhs", "rhs"), recipe.fwd, out, "".join(a[i] for i in lc)),
        (("grad", "rhs"), recipe.dlhs, a, rhs_free),
        (("lhs", "grad"), recipe.drhs, b, lhs_free),
    ):
        sides = [(*tensors[name], operand, name) for name, operand in zip(pair, operands)]
        products.append(gemm(sides, result, contracting, recipe, scales or {}))
    return products


def scales_of(recipe, lhs, rhs, grad, factor: float = 1.0) -> dict:
    """A scale for each slot, `factor` times what the tensor's amax needs."""
    tensors = {"lhs": lhs, "rhs": rhs, "grad": grad}
    return {
        (slot.tensor, slot.qtype): scale_of(
            F32(np.abs(tensors[slot.tensor].astype(F32)).max(initial=0)),
            slot.qtype,
            recipe.margin,
            recipe.scales,
        )
        * F32(factor)
        for slot in recipe.slots
    }
