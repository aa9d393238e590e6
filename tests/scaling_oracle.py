"""The scaling state of a small network over several steps, in NumPy: what every transform is held against.

The network is a chain of dots with ReLU between them, and the gradient of its loss with respect to its output is
given. A name may occur several times in a chain: that layer is used several times. Data are small integers times
powers of two, so that every sum is exact in any order.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

import q8jax

F32 = np.float32
TOPS = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
WIDTH, BATCH, STEPS = 8, 8, 4
CHAIN = ("own0", "shared", "own1", "shared", "head")
CHAIN_OF_SCANS = ("own0", "own1", "shared", "shared", "head")
TWICE = ("shared", "shared")
INT8 = "/".join(f"{gemm}=int8:tensor:delayed,int8:tensor:delayed" for gemm in ("fwd", "dlhs", "drhs"))
UNIFORM = {
    "fp8": "fp8/history=2",
    "int8-delayed": f"{INT8}/history=3/margin=1",
    "int8": "int8",
}
# All of them at once, with scales that keep every value a short multiple of a power of two.
MIXED = {
    "own0": "fp8/history=2",
    "own1": "fp8/history=2",
    "shared": f"{INT8}/history=3/amax=recent/margin=1/scales=power_of_two",
    "head": "int8/scales=power_of_two",
}


def rounded(x: np.ndarray) -> np.ndarray:
    """float64 rounded to the 24 bits, but not to the range, of float32."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(mantissa.astype(F32).astype(np.float64), exponent)


def scale_of(amax: np.ndarray, qtype: str, margin: int, scales: str) -> np.ndarray:
    """Contract: amax · 2^margin / max, rounded up to a power of two if asked; what leaves float32 is cut at 2^±126."""
    scale = rounded(np.float64(amax) * F32(2.0**margin / TOPS[qtype]))
    if scales != "float32":
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(1.0, exponent - (mantissa == 0.5))
    return F32(np.clip(scale, 2.0**-126, 2.0**126))


@dataclass
class State:
    """Of one dot: scale [S] and history [S, H], most recent first."""

    scale: np.ndarray
    history: np.ndarray

    @classmethod
    def fresh(cls, recipe) -> "State":
        return cls(np.ones(len(recipe.slots), F32), np.zeros((len(recipe.slots), recipe.history), F32))

    def following(self, amaxes: np.ndarray, recipe) -> "State":
        """Contract, point 4."""
        scales, histories = [], []
        for slot, amax, history, scale in zip(recipe.slots, amaxes, self.history, self.scale, strict=True):
            seen = [a if np.isfinite(a) and a >= 2.0**-126 else F32(0) for a in (amax, *history)][: recipe.history]
            window = [a for a in seen if a > 0]
            if window:
                chosen = max(window) if recipe.amax == "max" else window[0]
                scale = scale_of(F32(chosen), slot.qtype, recipe.margin, recipe.scales)
            scales.append(scale)
            histories.append(seen)
        return State(np.array(scales, F32), np.array(histories, F32))


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (rng.integers(-2, 3, (WIDTH, WIDTH)) / 4).astype(F32) for name in dict.fromkeys(CHAIN)}


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """(x, gradient of the loss) of each step; magnitudes rise and fall, so that windows matter."""
    rng = np.random.default_rng(1)
    integers = lambda: rng.integers(-4, 5, (BATCH, WIDTH)).astype(F32)
    return [(integers() * F32(f), integers() * F32(g)) for f, g in ((1, 0.25), (4, 2), (0.5, 1), (2, 0.125))[:STEPS]]


POISONS = {
    "one NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, F32(np.nan), x),
    "one inf": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, -F32(np.inf), x),
    "all zeros": np.zeros_like,
    "1e-36": lambda x: x * F32(2.0**-120),
    "3e38": lambda x: x * F32(1.75 * 2.0**127 / np.abs(x).max()),
}


def poisoned(name: str, tensor: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """`batches`, of whose second step the 'input' or the 'gradient' has a hostile value."""
    data = batches()
    x, grad = data[1]
    data[1] = (POISONS[name](x), grad) if tensor == "input" else (x, POISONS[name](grad))
    return data


def amax(x: np.ndarray) -> np.floating:
    return np.max(np.abs(x), initial=F32(0))


def encoded(x: np.ndarray, operand, recipe, scale: F32) -> tuple[np.ndarray, np.ndarray]:
    """Values of the codes of [rows, contracting], float64, and scales [rows or 1, 1]: the given one, or of each row."""
    axis = 1 if operand.granularity == "row" else None
    if operand.scaling == "current":
        finite = np.where(np.isfinite(x), np.abs(x), F32(0))
        amaxes = np.max(finite, axis=axis, keepdims=True, initial=F32(0))
        scale = np.where(amaxes > 0, scale_of(amaxes, operand.qtype, recipe.margin, recipe.scales), F32(1))
    else:
        scale = np.full((1, 1), F32(1) if operand.scaling == "unit" else scale)
    top = F32(TOPS[operand.qtype])
    codes = np.clip(x * (F32(1) / scale), -top, top)
    if operand.qtype == "int8":  # has no NaN: the scale carries it
        scale = np.where(np.any(np.isnan(x), axis=axis, keepdims=True), F32(np.nan), scale)
        codes = np.rint(np.nan_to_num(codes))
    else:
        codes = codes.astype(getattr(ml_dtypes, operand.qtype))
    return codes.astype(np.float64), scale


def backward(chain, weights, scales, recipes, x, grad):
    """One forward and backward pass.

    Args:
      chain: names of the layers, in order.
      weights: name to [WIDTH, WIDTH].
      scales: name to [S].
      recipes: name to Recipe, read as data.
      x, grad: [BATCH, WIDTH].

    Returns:
      (name to gradient of its weight, name to observed amaxes [S]); several uses of a layer add their gradients, and
      the largest amax is that of the layer.
    """

    def gemm(name, which, first, second):
        recipe = recipes[name]
        of = {(slot.tensor, slot.qtype): scale for slot, scale in zip(recipe.slots, scales[name], strict=True)}
        (p, s), (q, t) = (
            encoded(array, operand, recipe, of[tensor, operand.qtype])
            for (tensor, array), operand in zip((first, second), getattr(recipe, which), strict=True)
        )
        return (rounded(p @ q.T) * rounded(s.astype(np.float64) * t.T)).astype(F32)

    inputs = []
    for name in chain:
        if inputs:
            x = np.maximum(x, F32(0))
        inputs.append(x)
        x = gemm(name, "fwd", ("lhs", x), ("rhs", weights[name].T))
    grads, amaxes = {}, {}
    for name, lhs in reversed(list(zip(chain, inputs, strict=True))):
        w = weights[name]
        tensors = {"lhs": lhs, "rhs": w, "grad": grad}
        observed = np.array([amax(tensors[slot.tensor]) for slot in recipes[name].slots], F32)
        amaxes[name] = np.maximum(amaxes[name], observed) if name in amaxes else observed
        dw = gemm(name, "drhs", ("lhs", lhs.T), ("grad", grad.T))
        grads[name] = grads[name] + dw if name in grads else dw
        grad = np.where(lhs > 0, gemm(name, "dlhs", ("grad", grad), ("rhs", w)), F32(0))
    return grads, amaxes


@np.errstate(all="ignore")
def run(recipes: dict[str, str], data=None, chain=CHAIN) -> tuple[dict[str, State], dict[str, np.ndarray]]:
    """States after all steps, and the weights' gradients in the last one; by the names in the chain."""
    parsed, ws = {name: q8jax.Recipe.parse(recipes[name]) for name in chain}, weights()
    states = {name: State.fresh(recipe) for name, recipe in parsed.items()}
    grads: dict[str, np.ndarray] = {}
    for x, grad in batches() if data is None else data:
        grads, amaxes = backward(chain, ws, {name: state.scale for name, state in states.items()}, parsed, x, grad)
        states = {name: state.following(amaxes[name], parsed[name]) for name, state in states.items()}
    return states, grads
