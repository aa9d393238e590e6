"""`dot_general` and `einsum` whose three GEMMs run as a recipe says, under every JAX transform but forward-mode `jvp`.

The forward rule quantizes each operand once per way that the recipe needs it, so that what is kept
for the backward pass is codes (and the wide tensor only where a gradient GEMM is not quantized).
Observed amaxes leave through the cotangent of `scale`: see `scaling`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.fp8_ops import fm32
from jax import lax

from q8jax import recompute, scaling, telemetry
from q8jax.codes import product
from q8jax.contraction import DimensionNumbers
from q8jax.einsum import as_dot
from q8jax.formats import as_bytes, of_bytes
from q8jax.operands import Encoded, Quantizer, Use
from q8jax.plan import DotPlan, plan
from q8jax.qarray import QArray
from q8jax.recipe import Recipe
from q8jax.shardings import DotShardings
from q8jax.stored import Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prequantized:
    """The right operand of dots with the codes that their GEMMs take of it, as `prequantize` makes it.

    Attributes:
      value: the operand itself, which receives the gradient; read only by a GEMM that finds no codes for it.
      codes: for each of `uses`, its codes, of 8-bit floats the bytes, and scales.
      amax: float32 of any shape; its maximum is max |value|, as the scaling state observes it.
      uses: how the codes enter GEMMs.
      recipe: by which they were made; dots of another quantize `value` themselves.
    """

    value: jax.Array
    codes: tuple[tuple[jax.Array, jax.Array], ...]
    amax: jax.Array
    uses: tuple[Use, ...] = dataclasses.field(metadata={"static": True})
    recipe: Recipe = dataclasses.field(metadata={"static": True})


def dot_general(
    lhs: jax.Array | QArray,
    rhs: jax.Array | Prequantized | QArray | Stored,
    dimension_numbers: DimensionNumbers,
    recipe: Recipe | str,
    scale: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    preferred_element_type: "np.dtype | type | None" = None,
    calibrating: bool = False,
    probe: telemetry.Probe | None = None,
    shardings: DotShardings | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` in the arithmetic of a recipe, differentiable once, in reverse mode.

    Under vmap each example is a dot of its own: what scales come from the tensor itself come from
    the example. Observed amaxes are the exception, for examples that share one `scale` are one
    tensor to the scaling state.

    Args:
      lhs, rhs: floating-point arrays; rhs may be what `prequantize` made of one. Or codes, either or both: then the
        product is that of inference, see `codes`, and is not differentiable.
      dimension_numbers: as in `jax.lax.dot_general`; anything legal there.
      recipe: a Recipe or its string.
      scale: float32 [S], one per slot of the recipe, from a `ScalingState`; its cotangent is the
        vector of observed amaxes. Or [N, S], the same for each of N devices, which are then
        observed apart. Powers of two where the recipe's scales are. Needed where scaling is delayed
        or static; else None observes nothing.
      key: a PRNG key, needed by stochastic rounding; fold step and site into it. Each operand of
        each GEMM, each element, and under vmap each example draws for itself.
      preferred_element_type: dtype of the result; by default that of the operands, or float32 if
        theirs differ.
      calibrating: whether every operand takes current scales, whatever the recipe says; its slots,
        and so the observed amaxes, stay as they are.
      probe: its cotangent is what the dot sees of its tensors and products, see `telemetry`.
      shardings: where its tensors are, on a mesh of automatic axes.

    Returns:
      The product, accumulated and dequantized in float32. Gradients have the operands' dtypes.

    Raises:
      ValueError: operands that are not floating-point, illegal dimension numbers, no scale or key
        where the recipe needs one, a scale of the wrong shape, a tile that does not divide its
        axis, or, when differentiated, a second derivative of a quantized dot, or any of one of given codes.
    """
    if isinstance(lhs, QArray) or isinstance(rhs, QArray | Stored):
        assert not isinstance(rhs, Prequantized)
        return _product(lhs, rhs, dimension_numbers, recipe, scale, key, preferred_element_type)
    made = rhs if isinstance(rhs, Prequantized) else None
    rhs = rhs.value if isinstance(rhs, Prequantized) else rhs
    lhs, rhs = floating("lhs", lhs), floating("rhs", rhs)
    recipe, scale, key = checked(recipe, scale, key)
    dtype = result_dtype(lhs.dtype, rhs.dtype, preferred_element_type)
    dot = plan(recipe, lhs, rhs, dimension_numbers, dtype, calibrating, shardings)
    taken = None
    if made is not None and (made.uses, made.recipe) == (dot.prequantized, recipe):
        taken = made.codes, made.amax
    return multiplied(dot, lhs, rhs, scale, key, probe, taken)


def _product(lhs, rhs, dimension_numbers, recipe, scale, key, preferred_element_type) -> jax.Array:
    """`dot_general` of operands of which at least one is codes."""
    sums = rhs.sums if isinstance(rhs, Stored) else None
    rhs = rhs.operand if isinstance(rhs, Stored) else rhs
    recipe, scale, key = checked(recipe, scale, key)
    given = {"lhs": lhs, "rhs": rhs}
    arrays = {name: not_differentiable(floating(name, x)) for name, x in given.items() if not isinstance(x, QArray)}
    wide = [x.dtype for x in arrays.values()] or [np.dtype(recipe.compute)]
    dtype = np.dtype(preferred_element_type or wide[0])
    lhs, rhs = (given | arrays).values()
    return product(lhs, rhs, dimension_numbers, recipe, scale, key, dtype, sums)


def prequantize(
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    recipe: Recipe | str,
    scale: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    calibrating: bool = False,
    shardings: DotShardings | None = None,
) -> Prequantized:
    """Quantizes the right operand of dots, a layer's weights, once for all of them.

    `dot_general` and `einsum` of the result are those of `rhs`, bit for bit, given the same recipe, scale and key: its
    gradient and its amax as well. So codes made outside a loop over microbatches, or over layers where they are a
    stack, are made once, not once a turn and again in a rematerialized one.

    Args:
      rhs: a floating-point array.
      dimension_numbers: of the dots.
      recipe, scale, key, calibrating, shardings: as in `dot_general`.

    Raises:
      ValueError: as `dot_general`.
    """
    rhs = floating("rhs", rhs)
    recipe, scale, key = checked(recipe, scale, key)
    (lhs_contracting, contracting), (lhs_batch, batch) = dimension_numbers
    # Of the left operand nothing matters but where its axes pair up.
    sizes = dict(zip((*lhs_contracting, *lhs_batch), (rhs.shape[i] for i in (*contracting, *batch)), strict=True))
    free = math.lcm(*(operand.tile or 1 for operand in recipe.operands))
    shape = [sizes.get(axis, free) for axis in range(max(sizes, default=-1) + 2)]
    lhs = jax.ShapeDtypeStruct(shape, rhs.dtype)
    dot = plan(recipe, lhs, rhs, dimension_numbers, rhs.dtype, calibrating, shardings)
    operands, amaxes = _quantizer(dot, scale, key)({"rhs": rhs}, dot.prequantized)
    made = [operands[use] for use in dot.prequantized]
    codes = tuple(_bytes_of(operand) for operand in made if isinstance(operand, QArray))
    amax = amaxes.get("rhs", jnp.zeros((), jnp.float32))
    return Prequantized(rhs, codes, amax, dot.prequantized, recipe)


def encoded(
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    recipe: Recipe,
    scale: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> QArray:
    """The codes that the forward product of a dot takes of its right operand; flattened to matrices if in tiles.

    Args:
      rhs, dimension_numbers, scale, key: as in `prequantize`.
      recipe: its forward product alone quantizes.

    Raises:
      ValueError: as `dot_general`, or a recipe that does not quantize the operand.
    """
    made = prequantize(rhs, dimension_numbers, recipe, scale, key=key)
    if len(made.uses) != 1:
        raise ValueError(f"{recipe} makes {len(made.uses)} codes of a right operand: quantize it in fwd alone.")
    codes = _from_bytes(recipe, made.uses[0], made.codes[0])
    assert isinstance(codes, QArray)
    return codes


def multiplied(
    dot: DotPlan,
    lhs: jax.Array,
    rhs: jax.Array,
    scale: jax.Array,
    key: jax.Array | None,
    probe: telemetry.Probe | None,
    taken: Any = None,
) -> jax.Array:
    """What a plan makes of its operands, differentiable.

    Args:
      dot: the plan, of a dot or of a convolution.
      lhs, rhs, scale, key, probe: as in `dot_general`, and checked.
      taken: codes and amax of rhs that were made before.
    """
    operand, observed = recompute.operand(lhs)
    result = _dot(dot, operand, observed, rhs, scale, key, taken)
    result = recompute.scaled(result) if dot.fwd.is_scaled_by_library else result
    return result if probe is None else telemetry.watched(dot, lhs, rhs, result, scale, key, probe)


def floating(name: str, x: jax.Array) -> jax.Array:
    """An operand as an array; raises ValueError unless it is floating-point."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} is {x.dtype}: a dot takes floating-point arrays.")
    return x


def checked(
    recipe: Recipe | str, scale: jax.Array | None, key: jax.Array | None
) -> tuple[Recipe, jax.Array, jax.Array | None]:
    """A recipe, the scales of its slots and the key of its rounding; raises ValueError for one that it lacks."""
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    slots = len(recipe.slots)
    if scale is None:
        if recipe.keeps_state:
            raise ValueError("This recipe keeps scales from step to step: pass scale=, from a ScalingState.")
        scale = jnp.ones(slots, jnp.float32)
    if scale.ndim not in (1, 2) or scale.shape[-1] != slots or scale.dtype not in (jnp.float32, fm32):
        raise ValueError(
            f"scale is {scale.dtype} of shape {scale.shape}, but the recipe has {slots} slots: pass float32 [{slots}]."
        )
    if not recipe.needs_key:
        return recipe, scale, None
    if key is None:
        raise ValueError("Stochastic rounding needs key=, a jax.random.key folded with step and site.")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return recipe, scale, key


def result_dtype(lhs: np.dtype, rhs: np.dtype, preferred: "np.dtype | type | None") -> np.dtype:
    """The dtype of a product of operands of these dtypes."""
    return np.dtype(preferred or (lhs if lhs == rhs else jnp.float32))


def einsum(
    subscripts: str,
    lhs: jax.Array | QArray,
    rhs: jax.Array | Prequantized | QArray | Stored,
    recipe: Recipe | str,
    scale: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    preferred_element_type: "np.dtype | type | None" = None,
    calibrating: bool = False,
    probe: telemetry.Probe | None = None,
) -> jax.Array:
    """`jnp.einsum` of two operands in the arithmetic of a recipe.

    Args:
      subscripts: an einsum expression of two operands; '...', broadcasting of axes of size 1 and an
        implicit result are allowed, a repeated index within one operand is not, nor is of codes an index of its own.
      Others: as in `dot_general`.

    Raises:
      ValueError: as `dot_general`, or a subscript that does not fit the operands.
    """
    lhs = lhs if isinstance(lhs, QArray) else jnp.asarray(lhs)
    rhs = rhs if isinstance(rhs, Prequantized | QArray | Stored) else jnp.asarray(rhs)
    value = rhs.value if isinstance(rhs, Prequantized) else rhs
    dot = as_dot(subscripts, lhs.shape, value.shape)
    out = dot_general(
        _summed(subscripts, lhs, dot.lhs_summed),
        _summed(subscripts, value, dot.rhs_summed) if dot.rhs_summed else rhs,
        dot.dimension_numbers,
        recipe,
        scale,
        key=key,
        preferred_element_type=preferred_element_type,
        calibrating=calibrating,
        probe=probe,
    )
    return lax.transpose(out, dot.permutation)


def _summed(subscripts: str, x: Any, axes: tuple[int, ...]) -> Any:
    if axes and isinstance(x, QArray | Stored):
        raise ValueError(f"einsum {subscripts!r} sums codes along an axis that only they have: dequantize them first.")
    return jnp.sum(x, axes) if axes else x


# Inlined, so that it changes nothing under jit; without jit it spares a compilation per operation.
_jit = functools.partial(jax.jit, static_argnums=0, inline=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@_jit
def _dot(dot: DotPlan, lhs, seen, rhs, scale, key, made):
    del seen  # the left operand once more, to be observed
    tensors = {"lhs": lhs, "rhs": rhs}
    operands, _ = _quantizer(dot, scale, key)(tensors, dot.fwd.uses, _encoded(dot, made))
    return dot.fwd.run(operands)


@_jit
def _dot_fwd(dot: DotPlan, lhs, seen, rhs, scale, key, made):
    tensors = {"lhs": _once(dot.recipe, lhs), "rhs": _once(dot.recipe, rhs)}
    operands, amaxes = _quantizer(dot, scale, key)(tensors, dot.fwd.uses + dot.kept, _encoded(dot, made), seen)
    # What came as bytes is kept as such, so that a scan which hands it in does not stack it once more.
    came = {} if made is None else dict(zip(dot.prequantized, made[0], strict=True))
    kept = [came[use] if use in came else _kept(operands[use]) for use in dot.kept]
    return dot.fwd.run(operands), (kept, amaxes, scale, key)


@_jit
def _dot_bwd(dot: DotPlan, residuals, grad):
    kept, amaxes, scale, key = residuals
    uses = (dot.dlhs.uses[0], dot.drhs.uses[1])
    quantizer = _quantizer(dot, scale, key)
    operands, amax = quantizer({"grad": grad}, uses)
    operands |= {use: _from_bytes(dot.recipe, use, x) for use, x in zip(dot.kept, kept, strict=True)}
    operands |= {use: quantizer.dequantized(use, operands) for use in dot.through if use.origin is not None}
    dlhs, drhs = (gemm.run(operands) for gemm in (dot.dlhs, dot.drhs))
    observed = scaling.shared_amax(scale, quantizer.joined(amaxes | amax))
    return dlhs, None, drhs, scaling.observing(observed) if scale.dtype == fm32 else observed, None, None


_dot.defvjp(_dot_fwd, _dot_bwd)


def _quantizer(dot: DotPlan, scale: jax.Array, key: jax.Array | None) -> Quantizer:
    return Quantizer(dot.recipe, dot.uses, scale, key, dot.calibrating, dot.fwd.shardings)


def _encoded(dot: DotPlan, made: Any) -> Encoded | None:
    if made is None:
        return None
    codes, amax = made
    uses = dot.prequantized
    return Encoded({use: _from_bytes(dot.recipe, use, x) for use, x in zip(uses, codes, strict=True)}, amax)


def _kept(operand: QArray | jax.Array) -> tuple[jax.Array, jax.Array] | jax.Array:
    return _bytes_of(operand) if isinstance(operand, QArray) else operand


def _bytes_of(operand: QArray) -> tuple[jax.Array, jax.Array]:
    """Codes and scales, of 8-bit floats the bytes.

    To put an FP8 array into the stack that a scan keeps, XLA:CPU converts the whole stack to float16 and back.
    """
    return as_bytes(operand.qvalue), as_bytes(operand.scale)


def _from_bytes(recipe: Recipe, use: Use, kept: tuple[jax.Array, jax.Array] | jax.Array) -> QArray | jax.Array:
    if not isinstance(kept, tuple):
        return kept
    assert use.operand is not None
    fmt = use.operand.format
    dtypes = (fmt.dtype, np.dtype(jnp.float8_e8m0fnu if recipe.scales == "e8m0" else jnp.float32))
    codes, scale = (of_bytes(x, dtype) for x, dtype in zip(kept, dtypes, strict=True))
    return QArray(codes, scale, qtype=fmt.name)


def _once(recipe: Recipe, x: jax.Array) -> jax.Array:
    return _differentiable_once(x) if recipe.is_quantized else x


@jax.custom_jvp
def _differentiable_once(x: jax.Array) -> jax.Array:
    """Returns x; raises where a rule of a quantized dot is itself differentiated.

    Codes have no derivative, so a second one would come out as zero or worse.
    """
    return x


@_differentiable_once.defjvp
def _differentiable_once_jvp(primals, tangents):
    raise ValueError(
        "A quantized dot is differentiable once: for second derivatives use a precision without "
        "quantization, such as bf16."
    )


@jax.custom_jvp
def not_differentiable(x: jax.Array) -> jax.Array:
    """Returns x; raises where what is made of it is differentiated."""
    return x


@not_differentiable.defjvp
def not_differentiable_jvp(primals, tangents):
    raise ValueError("A product of stored codes is not differentiable: train the model that they were made of.")
