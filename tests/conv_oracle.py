"""The quantized convolution and its gradients in NumPy and ml_dtypes, by loops over the kernel.

Arrays are [N, *spatial, C] and kernels [*kernel, C, O]. Every entry of the kernel meets the entries of the input that
it lies on, which are found by their positions alone: nothing is padded, dilated, reversed or copied into patches.
"""

import itertools
import math
from dataclasses import dataclass

import dot_oracle
import format_oracle
import numpy as np
from dot_oracle import EPS, F32, Product

AXES_OF_ROWS = {  # what a scale of granularity 'row' does not change along
    ("fwd", "lhs"): lambda ndim: tuple(range(1, ndim)),
    ("fwd", "rhs"): lambda ndim: tuple(range(ndim - 1)),
    ("dlhs", "grad"): lambda ndim: tuple(range(1, ndim)),
    ("dlhs", "rhs"): lambda ndim: (*range(ndim - 2), ndim - 1),
    ("drhs", "lhs"): lambda ndim: tuple(range(ndim - 1)),
    ("drhs", "grad"): lambda ndim: tuple(range(ndim - 1)),
}


@dataclass
class Geometry:
    """Of each spatial axis: stride, (low, high) padding, dilation of the input and of the kernel."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]

    def outputs(self, sizes, kernel) -> tuple[int, ...]:
        found = []
        for size, k, stride, (low, high), a, d in zip(
            sizes, kernel, self.strides, self.padding, self.lhs_dilation, self.rhs_dilation, strict=True
        ):
            found.append(((size - 1) * a + 1 + low + high - (k - 1) * d - 1) // stride + 1)
        return tuple(found)

    def meetings(self, sizes, kernel):
        """(index into the kernel, outputs of each axis, inputs of each axis) of all that meets."""
        outputs = self.outputs(sizes, kernel)
        for index in itertools.product(*map(range, kernel)):
            ys, xs = [], []
            for i, k in enumerate(index):
                at = np.arange(outputs[i]) * self.strides[i] + k * self.rhs_dilation[i] - self.padding[i][0]
                met = (at >= 0) & (at <= (sizes[i] - 1) * self.lhs_dilation[i]) & (at % self.lhs_dilation[i] == 0)
                ys.append(np.flatnonzero(met))
                xs.append(at[met] // self.lhs_dilation[i])
            yield index, ys, xs


def three(first, second, sizes, kernel, geometry, gemm):
    """One of the three sums in float64; sizes are the input's spatial ones."""
    batch = first.shape[0]
    outputs = geometry.outputs(sizes, kernel)
    every = np.arange(batch)
    shape = {
        "fwd": lambda: (batch, *outputs, second.shape[-1]),
        "dlhs": lambda: (batch, *sizes, second.shape[-2]),
        "drhs": lambda: (*kernel, first.shape[-1], second.shape[-1]),
    }[gemm]()
    total = np.zeros(shape)
    for index, ys, xs in geometry.meetings(sizes, kernel):
        at_y, at_x = np.ix_(every, *ys), np.ix_(every, *xs)
        if gemm == "fwd":
            total[at_y] += first[at_x] @ second[index]
        elif gemm == "dlhs":
            total[at_x] += first[at_y] @ second[index].T
        else:
            total[index] += np.tensordot(first[at_x], second[at_y], (range(first.ndim - 1),) * 2)
    return total


def quantized(x, operand, recipe, scale, rows):
    """Values of the codes, float64, and scales that broadcast with x."""
    if operand is None:
        whole = np.ones((1,) * x.ndim, F32)
        return dot_oracle.quantized(x.reshape(1, 1, -1), None, recipe, None)[0].reshape(x.shape), whole
    x = x.astype(F32)
    axes = rows if operand.granularity == "row" else tuple(range(x.ndim))
    if operand.scaling == "current":
        amax = np.max(np.where(np.isfinite(x), np.abs(x), F32(0)), axis=axes, keepdims=True)
        scale = dot_oracle.scale_of(amax, operand.qtype, recipe.margin, recipe.scales)
    else:
        scale = np.full((1,) * x.ndim, 1 if operand.scaling == "unit" else scale, F32)
    with np.errstate(all="ignore"):
        codes = format_oracle.nearest_even(x * (F32(1) / scale), operand.qtype)
    if operand.qtype.startswith("int"):
        scale = np.where(np.isnan(x).any(axis=axes, keepdims=True), F32(np.nan), scale)
    return format_oracle.values_of(codes, operand.qtype), scale


def conv(lhs, rhs, grad, geometry, recipe, scales=None):
    """(out, dlhs, drhs) as Products, before the last cast."""
    tensors = {"lhs": lhs, "rhs": rhs, "grad": grad}
    sizes, kernel = lhs.shape[1:-1], rhs.shape[:-2]
    lengths = {
        "fwd": math.prod(rhs.shape[:-1]),
        "dlhs": math.prod(kernel) * rhs.shape[-1],
        "drhs": math.prod(grad.shape[:-1]),
    }
    results = []
    for gemm, names in (("fwd", ("lhs", "rhs")), ("dlhs", ("grad", "rhs")), ("drhs", ("lhs", "grad"))):
        operands = tuple(getattr(recipe, gemm))
        pairs = []
        for name, operand in zip(names, operands, strict=True):
            scale = None if operand is None else (scales or {}).get((name, operand.qtype))
            x = tensors[name]
            pairs.append(quantized(x, operand, recipe, scale, AXES_OF_ROWS[gemm, name](x.ndim)))
        (p, s), (q, t) = pairs
        if gemm == "dlhs":
            t = np.swapaxes(t, -1, -2)
        elif gemm == "drhs":
            s = np.swapaxes(s, -1, -2)
        with np.errstate(all="ignore"):
            sums = three(p, q, sizes, kernel, geometry, gemm).astype(F32)
            scale = dot_oracle._rounded(s, t)
            integers = all(op is not None and op.qtype.startswith("int") for op in operands)
            bound = np.zeros_like(sums, np.float64)
            if not integers:
                bound = three(np.abs(p), np.abs(q), sizes, kernel, geometry, gemm) * lengths[gemm]
            results.append(Product((sums.astype(np.float64) * scale).astype(F32), bound * scale * EPS))
    return results
