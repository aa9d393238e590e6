"""Post-training quantization in plain NumPy, float64, one value or one row at a time, written without q8jax."""

import numpy as np


def integer_step(w: np.ndarray, top: float, axis: int = 0) -> np.ndarray:
    amax = np.abs(w).max(axis, keepdims=True)
    return np.where(amax > 0, amax / top, 1.0)


def round_symmetric(w: np.ndarray, step: np.ndarray, top: float) -> np.ndarray:
    return np.clip(np.rint(w / step), -top, top) * step


def affine_step(w: np.ndarray, levels: float) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.minimum(w.min(0, keepdims=True), 0), np.maximum(w.max(0, keepdims=True), 0)
    step = (high - low) / levels
    return step, np.clip(-np.rint(low / step), 0, levels)


def obq(w, gram, damping, find, rounded, group, order=None):
    """GPTQ by its definition: each row that is rounded is eliminated from the inverse of H over the rows that are left.

    `find(rows)` gives the parameters of a group when it begins, or of all groups before the first row where there is
    an order; `rounded(row, parameters)` the rounded row.
    """
    w = w.astype(np.float64).copy()
    h = gram.astype(np.float64) + damping * np.diagonal(gram).mean() * np.eye(len(w))
    static = order is not None
    order = np.arange(len(w)) if order is None else order
    parameters = {g: find(w[g * group : (g + 1) * group]) for g in range(len(w) // group)} if static else {}
    result = np.zeros_like(w)
    left = list(order)
    inverse = np.linalg.inv(h[np.ix_(left, left)])
    while left:
        i = left[0]
        if not static and i % group == 0:
            parameters[i // group] = find(w[i : i + group])
        result[i] = rounded(w[i : i + 1], parameters[i // group])[0]
        error = (w[i] - result[i]) / inverse[0, 0]
        w[left] -= inverse[:, :1] * error
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
        left = left[1:]
    return result


def divergence(counts, kept, code_of):
    """The Kullback–Leibler divergence of keeping so many bins, bin by bin.

    `code_of(share)` is the code that a share of the range, from 0 to 1, is rounded to.
    """
    reference = [float(count) for count in counts[:kept]]
    reference[-1] += float(sum(counts[kept:]))
    members = {}
    for j in range(kept):
        members.setdefault(code_of((j + 0.5) / kept), []).append(j)
    candidate = [0.0] * kept
    for bins in members.values():
        filled = [j for j in bins if reference[j] > 0]
        for j in filled:
            candidate[j] = sum(float(counts[b]) for b in bins) / len(filled)
    p_sum, q_sum = sum(reference), sum(candidate)
    total = 0.0
    for p, q in zip(reference, candidate):
        if p > 0:
            if q == 0:
                return np.inf
            total += p / p_sum * np.log((p / p_sum) / (q / q_sum))
    return total


def migacz(counts, levels=128):
    """How many bins to keep as the slides have it: the kept bins cut into so many equal parts."""
    best = {}
    for kept in range(levels, len(counts) + 1):
        best[kept] = divergence(counts, kept, lambda share: int(share * levels))
    return min(best, key=best.get), best


def correlated(rows, features, seed=0, rank=4, noise=0.1):
    """Inputs of few directions, with channels of uneven size; float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, features))
    x += noise * rng.standard_normal((rows, features))
    return (x * np.exp(0.5 * rng.standard_normal(features))).astype(np.float32)
