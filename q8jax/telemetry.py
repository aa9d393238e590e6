"""What quantization does to the tensors and the products of a dot, seen while a model is differentiated.

A dot that is given a `Probe` returns what it returns without one; the *cotangent of the probe is what the dot saw*, of
its operands in the forward pass and of the gradient in the backward pass. So it comes out of any transform that
differentiates: `scan`, `checkpoint`, microbatches, sharded meshes. All but a few of the numbers are sums over elements,
which is how the uses of a shared layer, the examples of a `vmap` and the microbatches of a step add up; the others are
maxima, which combine by max as observed amaxes do (see `scaling`). `summary` makes shares and ratios of them.

Who does not ask for a probe traces nothing of this.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.fp8_ops import fm32

from q8jax import choices, maxima, scaling, stats
from q8jax.contraction import to_matrices
from q8jax.groups import as_float32, per_group
from q8jax.meshes import varying_axes
from q8jax.operands import Quantizer, Use
from q8jax.plan import DotPlan, plan
from q8jax.qarray import QArray
from q8jax.recipe import GEMMS, TENSORS, Recipe

KINDS = ("tensors", "binades", "gemms")
FIRST_BINADE = -24
BINADES = 48
# A sum of squares below it may have lost terms to float32's smallest number, and says nothing.
_LEAST_SQUARES = 1e-24
_SUMS = ("values", "nonzero", "clipped", "vanished", "signal", "noise", "tail")
_TOPS = ("amax", "scale", "staleness")
_PRODUCTS = ("error", "along", "exact", "loss_change")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """What goes into a dot to be given what it saw; all zero on the way in.

    The tensors stand in the order 'lhs', 'rhs', 'grad', the GEMMs in the order 'fwd', 'dlhs', 'drhs'.

    Attributes:
      sums: float32 [..., 3, 7], of each tensor, or None.
      tops: float32 [..., 3, 3], maxima of each tensor, or None.
      binades: float32 [..., 3, BINADES], counts of values by floor(log2(|x| / scale)), from FIRST_BINADE on, what lies
        beyond either end counted at the end, zeros nowhere; or None.
      gemms: float32 [..., 3, 4], inner products of each GEMM's error with itself and with the exact result, or None.
      recipe: of the quantization to look at, with current scales; None for that which the dot runs in.
    """

    sums: jax.Array | None
    tops: jax.Array | None
    binades: jax.Array | None
    gemms: jax.Array | None
    recipe: Recipe | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, kinds: tuple[str, ...], stack: tuple[int, ...] = (), recipe: Recipe | None = None) -> "Probe":
        """A probe for some of KINDS, of a dot or of a stack of dots.

        Raises:
          ValueError: an unknown kind.
        """
        for kind in kinds:
            choices.check("kind of telemetry", kind, KINDS)

        def zeros(kind: str, width: int) -> jax.Array | None:
            return jnp.zeros((*stack, 3, width), jnp.float32) if kind in kinds else None

        sums, tops = zeros("tensors", len(_SUMS)), zeros("tensors", len(_TOPS))
        return cls(sums, tops, zeros("binades", BINADES), zeros("gemms", len(_PRODUCTS)), recipe)

    def observing(self) -> "Probe":
        """The probe whose maxima combine by max; call it inside the function that is differentiated and jitted."""
        return self if self.tops is None else dataclasses.replace(self, tops=scaling.observing(self.tops))


def combine(first: Any, second: Any) -> Any:
    """Combines what two backward passes of one step saw, pytrees of Probe."""
    return jax.tree.map(_combined, first, second, is_leaf=lambda node: isinstance(node, Probe))


def _combined(first: Probe, second: Probe) -> Probe:
    added = jax.tree.map(jnp.add, first, second)
    tops = None if first.tops is None or second.tops is None else jnp.maximum(first.tops, second.tops)
    return dataclasses.replace(added, tops=tops)


def watched(
    dot: DotPlan,
    lhs: jax.Array,
    rhs: jax.Array,
    result: jax.Array,
    scale: jax.Array,
    key: jax.Array | None,
    probe: Probe,
) -> jax.Array:
    """The result of a dot, whose differentiation gives the probe its cotangent.

    Args:
      dot: the dot's plan.
      lhs, rhs: its operands.
      result: what it made of them.
      scale, key: that it was given.
      probe: what to look at.
    """
    if probe.recipe is not None:
        dot = plan(probe.recipe, lhs, rhs, dot.dimension_numbers, np.dtype(result.dtype), True)
        scale, key = jnp.ones(len(probe.recipe.slots), jnp.float32), _key_for(probe.recipe)
    arrays = jax.tree.map(jax.lax.stop_gradient, (lhs, rhs, scaling.readable(scale), key))
    return _watched(dot, result, arrays, probe)


def _key_for(recipe: Recipe) -> jax.Array | None:
    return jax.random.key(0) if recipe.needs_key else None


def _watched(dot: DotPlan, result: jax.Array, arrays: Any, probe: Probe) -> jax.Array:
    @jax.custom_vjp
    def watch(result, arrays, probe):
        del arrays, probe
        return result

    def forward(result, arrays, probe):
        return result, (result, arrays, probe)

    def backward(residuals, grad):
        result, arrays, probe = residuals
        lhs, rhs, scale, key = arrays
        seen = _seen(dot, {"lhs": lhs, "rhs": rhs, "grad": grad}, result, scale, key, probe)
        return grad, None, seen

    watch.defvjp(forward, backward)
    return watch(result, arrays, probe)


def _seen(
    dot: DotPlan,
    tensors: dict[str, jax.Array],
    result: jax.Array,
    scale: jax.Array,
    key: jax.Array | None,
    probe: Probe,
) -> Probe:
    quantizer = Quantizer(dot.recipe, dot.uses, scale[0] if scale.ndim == 2 else scale, key, dot.calibrating)
    operands, _ = quantizer(tensors, dot.uses)
    uses = [_quantized_use(dot, tensor) for tensor in TENSORS]
    pairs = [(_as_used(tensors[t], use), None if use is None else operands[use]) for t, use in zip(TENSORS, uses)]
    sums = tops = binades = gemms = None
    if probe.sums is not None and probe.tops is not None:
        margin = dot.recipe.margin
        sums = jnp.stack([_sums(x, xq) for x, xq in pairs])
        tops = jnp.stack([_tops(x, xq, margin) for x, xq in pairs])
        tops = scaling.shared_amax(probe.tops, tops)
        tops = scaling.observing(tops) if probe.tops.dtype == fm32 else tops
        sums = _over_devices(probe.sums, sums)
    if probe.binades is not None:
        binades = _over_devices(probe.binades, jnp.stack([_binades(x, xq) for x, xq in pairs]))
    if probe.gemms is not None:
        gemms = _gemms(dot, tensors, operands, None if probe.recipe is not None else result)
        gemms = _over_devices(probe.gemms, gemms)
    return Probe(sums, tops, binades, gemms, probe.recipe)


def _over_devices(probe: jax.Array, sums: jax.Array) -> jax.Array:
    """Sums over the parts that shard_map splits a tensor into, as `scaling.shared_amax` takes their maximum."""
    axes = tuple(axis for axis in varying_axes([sums]) if axis not in varying_axes([probe]))
    return jax.lax.psum(sums, axes) if axes else sums


def _quantized_use(dot: DotPlan, tensor: str) -> Use | None:
    """The first use of a tensor that quantizes it."""
    quantized = (use for use in dot.uses if use.tensor == tensor and use.operand is not None)
    return next(quantized, None)


def _as_used(x: jax.Array, use: Use | None) -> jax.Array:
    return x if use is None or use.layout is None else to_matrices(x, use.layout)


def _sums(x: jax.Array, xq: Any) -> jax.Array:
    """float32 [7] in the order of _SUMS; NaN where a tensor is not quantized."""
    values = jnp.float32(x.size)
    wide = as_float32(x)
    tail = values * _kurtosis(wide)
    if not isinstance(xq, QArray):
        unknown = jnp.float32(jnp.nan)
        return jnp.stack([values, *[unknown] * 5, tail])
    nonzero = jnp.sum((x != 0) & ~jnp.isnan(x), dtype=jnp.int32).astype(jnp.float32)
    clipped, vanished = values * stats.saturation(x, xq), nonzero * stats.underflow(x, xq)
    # NaN codes make the noise NaN, and so the SQNR.
    signal, noise = jnp.sum(jnp.square(wide)), jnp.sum(jnp.square(wide - xq.dequantize().astype(jnp.float32)))
    return jnp.stack([values, nonzero, clipped, vanished, signal, noise, tail])


def _kurtosis(x: jax.Array) -> jax.Array:
    """Fourth central moment over the squared second, 3 for a normal distribution; NaN of a constant."""
    unit = jnp.max(jnp.abs(x), initial=0)  # or the fourth power of a gradient would underflow
    centred = x / jnp.where(unit > 0, unit, 1)
    centred = jnp.square(centred - jnp.mean(centred))
    return jnp.mean(jnp.square(centred)) / jnp.square(jnp.mean(centred))


def _tops(x: jax.Array, xq: Any, margin: int) -> jax.Array:
    """float32 [3] in the order of _TOPS; 0 where a tensor is not quantized."""
    amax = maxima.amax(x)
    if not isinstance(xq, QArray):
        return jnp.stack([amax, jnp.float32(0), jnp.float32(0)])
    scale = xq.scale.astype(jnp.float32)
    return jnp.stack([amax, jnp.max(scale), jnp.max(stats.staleness(x, xq, margin=margin))])


def _binades(x: jax.Array, xq: Any) -> jax.Array:
    """float32 [BINADES]: how many |x| / scale lie in each; as if the scale were 1 where a tensor is not quantized."""
    wide = jnp.abs(as_float32(x))
    if isinstance(xq, QArray):
        wide = per_group(jnp.multiply, wide, 1 / xq.scale.astype(jnp.float32))
    exponent = jnp.frexp(wide)[1] - 1
    place = jnp.clip(exponent - FIRST_BINADE, 0, BINADES - 1)
    place = jnp.where((wide > 0) & jnp.isfinite(wide), place, -1)
    count = lambda index: jnp.sum(place == index, dtype=jnp.int32).astype(jnp.float32)
    return jax.lax.map(count, jnp.arange(BINADES, dtype=place.dtype))


def _gemms(dot: DotPlan, tensors: dict[str, jax.Array], operands: Any, result: jax.Array | None) -> jax.Array:
    """float32 [3, 4]: for each GEMM e·e, e·r and r·r of its float32 twin r and its error e; for fwd grad·e too."""
    wide = {tensor: x.astype(jnp.float32) for tensor, x in tensors.items()}
    float32 = np.dtype(jnp.float32)
    exact = plan(Recipe(compute="float32"), wide["lhs"], wide["rhs"], dot.dimension_numbers, float32, False)
    rows = []
    for name in GEMMS:
        ours, twin = getattr(dot, name), getattr(exact, name)
        made = ours.run(operands) if result is None or name != "fwd" else result
        r = twin.run({use: wide[use.tensor] for use in twin.uses})
        e = as_float32(made) - r
        change = jnp.sum(wide["grad"] * e) if name == "fwd" else jnp.float32(0)
        rows.append(jnp.stack([jnp.sum(e * e), jnp.sum(e * r), jnp.sum(r * r), change]))
    return jnp.stack(rows)


def summary(probe: Probe) -> dict[str, dict[str, np.ndarray]]:
    """Shares and ratios from what a dot, or a stack of dots, saw, as float64 arrays of the stack's shape.

    Args:
      probe: the cotangent, on the host or not.

    Returns:
      For 'lhs', 'rhs' and 'grad', of 'tensors': `amax`; `scale`, the largest; `staleness`, true amax ÷ amax the scale
      was built for, the largest; `saturation` and `underflow`, shares; `sqnr` in dB; `kurtosis` (of several uses or
      microbatches their mean); of 'binades' `binades`, counts over all uses [..., BINADES]. For 'fwd', 'dlhs' and
      'drhs', of 'gemms': `cosine` and relative `error` of the result against float32, split into `bias`, the share of
      the error along the exact result, and `variance`, the rest squared, so that error² = bias² + variance; for 'fwd'
      `loss_change`, what its error changes the loss by, to first order. Of several uses or microbatches each product
      counts by itself: the error of the sum of their weight gradients may be less than that of 'drhs'.

      What a tensor that is not quantized lacks is NaN, and so are ratios of tensors so small (below about 1e-12) that
      float32 does not hold their squares.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.errstate(all="ignore"):
        if probe.sums is not None and probe.tops is not None:
            for i, tensor in enumerate(TENSORS):
                found[tensor] = _tensor_summary(_row(probe.sums, i, _SUMS), _row(probe.tops, i, _TOPS))
        if probe.binades is not None:
            for i, tensor in enumerate(TENSORS):
                found.setdefault(tensor, {})["binades"] = np.asarray(probe.binades, np.float64)[..., i, :]
        if probe.gemms is not None:
            for i, name in enumerate(GEMMS):
                found[name] = _gemm_summary(_row(probe.gemms, i, _PRODUCTS))
                if name != "fwd":
                    del found[name]["loss_change"]
    return found


def _row(array: jax.Array, index: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return dict(zip(names, np.moveaxis(np.asarray(array, np.float64)[..., index, :], -1, 0), strict=True))


def _tensor_summary(sums: Mapping[str, np.ndarray], tops: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    quantized = np.isfinite(sums["nonzero"]) | (tops["scale"] > 0)
    return {
        "amax": tops["amax"],
        "scale": np.where(quantized, tops["scale"], np.nan),
        "staleness": np.where(quantized, tops["staleness"], np.nan),
        "saturation": sums["clipped"] / sums["values"],
        "underflow": np.where(sums["nonzero"] == 0, 0, sums["vanished"] / sums["nonzero"]),
        "sqnr": 10 * np.log10(_known(sums["signal"]) / sums["noise"]),
        "kurtosis": sums["tail"] / sums["values"],
    }


def _known(squares: np.ndarray) -> np.ndarray:
    return np.where(squares < _LEAST_SQUARES, np.nan, squares)


def _gemm_summary(products: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    exact = _known(products["exact"])
    bias, squared = products["along"] / exact, products["error"] / exact
    return {
        "cosine": (1 + bias) / np.sqrt(1 + 2 * bias + squared),
        "error": np.sqrt(squared),
        "bias": bias,
        "variance": np.maximum(squared - np.square(bias), 0),
        "loss_change": products["loss_change"],
    }
