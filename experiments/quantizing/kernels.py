"""What becomes of one kernel: codes, what inputs are multiplied with first, which channels stay, what a bias gains.

w [in, out]  →  channels of outliers apart  →  smoothed or scaled  →  rounded (to nearest, clipped, or by GPTQ)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.quantizing.recording import Seen
from experiments.quantizing.schemes import Scheme
from q8jax import choices, ptq
from q8jax.codebook import fit_codebook
from q8jax.groups import per_group
from q8jax.ptq import Target
from q8jax.qarray import QArray
from q8jax.stored import round_scale

METHODS = ("round", "smoothquant", "awq", "clip", "gptq", "bias", "outliers")


@dataclasses.dataclass(frozen=True)
class Method:
    """Which methods are joined, and how far they go.

    Attributes:
      names: of METHODS.
      outlier_share: of the input channels, that are kept apart.
      act_order: whether GPTQ takes rows by falling diagonal.
    """

    names: tuple[str, ...] = ("round",)
    outlier_share: float = 0.01
    act_order: bool = False

    def __post_init__(self) -> None:
        for name in self.names:
            choices.check("--method", name, METHODS)
        if {"smoothquant", "awq"} <= set(self.names):
            raise ValueError("--method=smoothquant+awq: both scale channels of inputs, so choose one of them.")

    @property
    def needs_inputs(self) -> bool:
        return self.names != ("round",)

    def check(self, scheme: Scheme) -> None:
        """Raises ValueError for a method that the scheme has no use for."""
        names = set(self.names)
        if "smoothquant" in names and (scheme.inputs is None or scheme.weights is None):
            raise ValueError("--method=smoothquant is for inputs and weights that are both quantized: try awq or gptq.")
        if "outliers" in names and scheme.inputs is None:
            raise ValueError("--method=outliers keeps inputs apart that are not quantized anyway: leave it out.")
        if scheme.weights is None and names - {"round", "outliers"}:
            raise ValueError(f"--method={'+'.join(self.names)} is for weights, which this precision leaves alone.")
        if (scheme.is_binary or scheme.is_fitted) and "clip" in names:
            raise ValueError("--method=clip is for codes with a range: leave it out for binary and fitted ones.")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What became of a kernel.

    Attributes:
      codes: [in, out]; None if it stays.
      inverse: float32 [in], what inputs are multiplied with; None for 1.
      outliers: int32 [n], channels that stay; None for none.
      outlier_kernel: float32 [n, out].
      bias: float32 [out], what is to be added to the bias; None for nothing.
      error: relative error of the output that rounding the kernel makes, on the inputs seen; NaN if none were.
      strength: of smoothing or scaling; NaN for none.
    """

    codes: QArray | None
    inverse: jax.Array | None = None
    outliers: jax.Array | None = None
    outlier_kernel: jax.Array | None = None
    bias: jax.Array | None = None
    error: float = float("nan")
    strength: float = float("nan")


def inputs_of(w: jax.Array, seen: Seen | None, scheme: Scheme, method: Method) -> Kernel:
    """What is decided before codes are made: channels of outliers, and the factors of the others."""
    rows = w.shape[0]
    inverse = np.ones(rows, np.float32)
    outliers = None
    strength = float("nan")
    if seen is None or seen.inputs is None:
        return Kernel(None)
    if "outliers" in method.names:
        amax = np.asarray(seen.inputs.amax)
        outliers = ptq.largest_channels(jnp.asarray(amax), max(1, round(method.outlier_share * rows)))
        inverse[outliers] = 0
    rest = jnp.asarray(inverse)
    if "smoothquant" in method.names:
        assert scheme.inputs is not None and scheme.weights is not None
        low, high = (jnp.asarray(end) * rest for end in (seen.low, seen.high))
        found = ptq.search_smoothing(
            seen.rows * rest[None], w * rest[:, None], scheme.inputs, scheme.weights, low=low, high=high
        )
        inverse, strength = inverse / np.asarray(found.factors), float(found.strength)
    if "awq" in method.names:
        magnitude = seen.inputs.mean_magnitude * rest
        gram = seen.inputs.gram * rest[:, None] * rest[None]
        scaling = ptq.search_scaling(w * rest[:, None], gram, magnitude, scheme.weights)
        inverse, strength = inverse / np.asarray(scaling.factors), float(scaling.strength)
    if np.all(inverse == 1):
        return Kernel(None)
    return Kernel(
        None,
        jnp.asarray(inverse),
        None if outliers is None else jnp.asarray(outliers),
        None if outliers is None else w[outliers],
        strength=strength,
    )


def codes_of(w: jax.Array, before: Kernel, seen: Seen | None, scheme: Scheme, method: Method) -> Kernel:
    """Makes the codes of a kernel whose inputs are multiplied with `before.inverse`."""
    if scheme.weights is None:
        return before
    inverse = before.inverse
    factors = None if inverse is None else jnp.where(inverse > 0, 1 / inverse, jnp.float32(0))
    scaled = w if factors is None else w * factors[:, None]
    gram = None if seen is None or seen.inputs is None else seen.inputs.gram
    if gram is not None and inverse is not None:
        gram = gram * inverse[:, None] * inverse[None]
    codes = _rounded(scaled, gram, scheme, method)
    if gram is None:
        return dataclasses.replace(before, codes=codes)
    error = float(ptq.relative_error(gram, scaled, codes.dequantize()))
    bias = None
    if "bias" in method.names:
        assert seen is not None and seen.inputs is not None
        mean = seen.inputs.mean if inverse is None else seen.inputs.mean * inverse
        bias = ptq.bias_correction(scaled, codes, mean)
    return dataclasses.replace(before, codes=codes, bias=bias, error=error)


def _rounded(w: jax.Array, gram: jax.Array | None, scheme: Scheme, method: Method) -> QArray:
    target = scheme.weights
    assert target is not None
    if scheme.is_fitted:
        target = _fitted(w, target)
    scale, zero_point = _scales(w, gram, target, scheme, method)
    if "gptq" in method.names:
        assert gram is not None
        given: dict[str, Any] = {} if scale is None else {"scale": scale, "zero_point": zero_point}
        return ptq.gptq(w, gram, target, act_order=method.act_order, **given)
    if scale is None:
        return target.quantize(w)
    return target.assemble(target.encode(w, scale, zero_point).qvalue, scale, zero_point)


def _scales(
    w: jax.Array, gram: jax.Array | None, target: Target, scheme: Scheme, method: Method
) -> tuple[jax.Array | None, jax.Array | None]:
    """Scales that are decided before rounding; None where rounding finds them itself."""
    if scheme.is_binary:
        # The mean magnitude loses least (Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279, section 3.1).
        groups = target.scale_shape(w.shape)
        tall = jnp.abs(w).reshape(groups[0], w.shape[0] // groups[0], groups[1], w.shape[1] // groups[1])
        scale, zero_point = jnp.mean(tall, axis=(1, 3)), None
    elif "clip" in method.names:
        found = ptq.clip(w, target, None if gram is None else jnp.diagonal(gram))
        scale, zero_point = found.scale.astype(jnp.float32), found.zero_point
    elif scheme.scales in ("bfloat16", "e4m3"):
        scale, zero_point = target.scales(w)
    else:
        return None, None
    if scheme.scales != "float32":
        scale = round_scale(scale, scheme.scales)
    return scale, zero_point


def _fitted(w: jax.Array, target: Target) -> Target:
    """The target with a book fitted to the kernel, each group brought to a largest magnitude of 1."""
    unit = dataclasses.replace(target, codebook=(-1.0, 1.0))
    book, _ = fit_codebook(per_group(jnp.divide, w, unit.scales(w)[0]), target.format.bits)
    return dataclasses.replace(target, codebook=tuple(np.asarray(book).tolist()))
