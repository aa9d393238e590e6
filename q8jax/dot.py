"""`dot_general` and `einsum` whose three GEMMs run as a recipe says, under every JAX transform but forward-mode `jvp`.

The forward rule quantizes each operand once per way that the recipe needs it, so that what is kept
for the backward pass is codes (and the wide tensor only where a gradient GEMM is not quantized).
Observed amaxes leave through the cotangent of `scale`: see `scaling`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.fp8_ops import fm32
from jax import lax

from q8jax import scaling, tiles
from q8jax.contraction import Contraction, DimensionNumbers, contractions
from q8jax.einsum import as_dot
from q8jax.gemm import gemm, gemm_tiled
from q8jax.naming import role_scope
from q8jax.operands import Quantizer, Use
from q8jax.qarray import QArray
from q8jax.recipe import GEMM_TENSORS, GEMMS, Recipe

Operands = dict[Use, QArray | jax.Array]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one GEMM of a dot.

    Attributes:
      role: 'fwd', 'dlhs' or 'drhs'.
      formats: that the recipe wants it to multiply.
      contraction: of its operands as they are.
      uses: its operands as it takes them.
      tile: size of the pieces of the contracting axis on which both operands' scales are constant;
        None where they are constant on all of it, else the operands are flattened to matrices.
      shape: of the dot's (batch, first free, second free).
      dtype: of the result.
      powers_of_two: whether all scales are.
    """

    role: str
    formats: tuple[str, str]
    contraction: Contraction
    uses: tuple[Use, Use]
    tile: int | None
    shape: tuple[int, ...]
    dtype: np.dtype
    powers_of_two: bool

    def run(self, operands: Operands, *, accurate: bool) -> jax.Array:
        with role_scope(self.role, *self.formats):
            return self._run(*(operands[use] for use in self.uses), accurate=accurate)

    def _run(self, first: QArray | jax.Array, second: QArray | jax.Array, *, accurate: bool) -> jax.Array:
        if self.tile is None:
            return gemm(
                first, second, self.contraction, self.dtype, accurate=accurate, powers_of_two=self.powers_of_two
            )
        matrices = self.contraction.of_matrices
        out = gemm_tiled(first, second, matrices, self.tile, accurate=accurate)
        return self.contraction.finish(out.astype(self.dtype).reshape(self.shape))


@dataclasses.dataclass(frozen=True)
class _Dot:
    """Everything static about one dot."""

    recipe: Recipe
    calibrating: bool
    fwd: _Plan
    dlhs: _Plan
    drhs: _Plan

    @property
    def uses(self) -> tuple[Use, ...]:
        """The distinct uses that the GEMMs make of tensors."""
        return tuple(dict.fromkeys(self.fwd.uses + self.dlhs.uses + self.drhs.uses))

    @property
    def kept(self) -> tuple[Use, ...]:
        """What the backward pass needs of the operands."""
        return tuple(dict.fromkeys((self.dlhs.uses[1], self.drhs.uses[0])))

    def quantizer(self, scale: jax.Array, key: jax.Array | None) -> Quantizer:
        return Quantizer(self.recipe, self.uses, scale, key, self.calibrating)


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    recipe: Recipe | str,
    scale: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    preferred_element_type: "np.dtype | type | None" = None,
    calibrating: bool = False,
) -> jax.Array:
    """`jax.lax.dot_general` in the arithmetic of a recipe, differentiable once, in reverse mode.

    Under vmap each example is a dot of its own: what scales come from the tensor itself come from
    the example. Observed amaxes are the exception, for examples that share one `scale` are one
    tensor to the scaling state.

    Args:
      lhs, rhs: floating-point arrays.
      dimension_numbers: as in `jax.lax.dot_general`; anything legal there.
      recipe: a Recipe or its string.
      scale: float32 [S], one per slot of the recipe, from a `ScalingState`; its cotangent is the
        vector of observed amaxes. Powers of two where the recipe's scales are. Needed where scaling
        is delayed or static; else None observes nothing.
      key: a PRNG key, needed by stochastic rounding; fold step and site into it. Each operand of
        each GEMM, each element, and under vmap each example draws for itself.
      preferred_element_type: dtype of the result; by default that of the operands, or float32 if
        theirs differ.
      calibrating: whether every operand takes current scales, whatever the recipe says; its slots,
        and so the observed amaxes, stay as they are.

    Returns:
      The product, accumulated and dequantized in float32. Gradients have the operands' dtypes.

    Raises:
      ValueError: operands that are not floating-point, illegal dimension numbers, no scale or key
        where the recipe needs one, a scale of the wrong shape, a tile that does not divide its
        axis, or, when differentiated, a second derivative of a quantized dot.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype}: a dot takes floating-point arrays.")
    slots = len(recipe.slots)
    if scale is None:
        if recipe.keeps_state:
            raise ValueError("This recipe keeps scales from step to step: pass scale=, from a ScalingState.")
        scale = jnp.ones(slots, jnp.float32)
    if scale.shape != (slots,) or scale.dtype not in (jnp.float32, fm32):
        raise ValueError(
            f"scale is {scale.dtype} of shape {scale.shape}, but the recipe has {slots} slots: pass float32 [{slots}]."
        )
    if recipe.needs_key:
        if key is None:
            raise ValueError("Stochastic rounding needs key=, a jax.random.key folded with step and site.")
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
    tiles.check(recipe, lhs.shape, rhs.shape, dimension_numbers)
    by_gemm = contractions(lhs.shape, rhs.shape, dimension_numbers)
    dtypes = {
        "fwd": np.dtype(preferred_element_type or _result_dtype(lhs.dtype, rhs.dtype)),
        "dlhs": lhs.dtype,
        "drhs": rhs.dtype,
    }
    shapes = {"lhs": lhs.shape, "rhs": rhs.shape}
    shapes["grad"] = by_gemm["fwd"].dot_shape(lhs.shape, rhs.shape)
    plans = {name: _plan(recipe, name, by_gemm[name], shapes, dtypes[name]) for name in GEMMS}
    return _dot(_Dot(recipe, calibrating, **plans), lhs, rhs, scale, key if recipe.needs_key else None)


def _result_dtype(lhs: np.dtype, rhs: np.dtype) -> np.dtype:
    return lhs if lhs == rhs else np.dtype(jnp.float32)


def einsum(
    subscripts: str,
    lhs: jax.Array,
    rhs: jax.Array,
    recipe: Recipe | str,
    scale: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    preferred_element_type: "np.dtype | type | None" = None,
    calibrating: bool = False,
) -> jax.Array:
    """`jnp.einsum` of two operands in the arithmetic of a recipe.

    Args:
      subscripts: an einsum expression of two operands; '...', broadcasting of axes of size 1 and an
        implicit result are allowed, a repeated index within one operand is not.
      Others: as in `dot_general`.

    Raises:
      ValueError: as `dot_general`, or a subscript that does not fit the operands.
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    plan = as_dot(subscripts, lhs.shape, rhs.shape)
    out = dot_general(
        jnp.sum(lhs, plan.lhs_summed) if plan.lhs_summed else lhs,
        jnp.sum(rhs, plan.rhs_summed) if plan.rhs_summed else rhs,
        plan.dimension_numbers,
        recipe,
        scale,
        key=key,
        preferred_element_type=preferred_element_type,
        calibrating=calibrating,
    )
    return lax.transpose(out, plan.permutation)


def _plan(
    recipe: Recipe,
    name: str,
    contraction: Contraction,
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
) -> _Plan:
    sides = list(
        zip(
            GEMM_TENSORS[name],
            getattr(recipe, name),
            (contraction.first, contraction.second),
            strict=True,
        )
    )
    sizes = [operand.tile for _, operand, _ in sides if operand is not None and operand.tile]
    first, second = (Use.of(*side, tiled=bool(sizes)) for side in sides)
    shape = contraction.dot_shape(*(shapes[tensor] for tensor in GEMM_TENSORS[name]))
    return _Plan(
        name,
        recipe.formats(name),
        contraction,
        (first, second),
        math.gcd(*sizes) or None,
        shape,
        dtype,
        recipe.scales != "float32",
    )


# Inlined, so that it changes nothing under jit; without jit it spares a compilation per operation.
_jit = functools.partial(jax.jit, static_argnums=0, inline=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@_jit
def _dot(dot: _Dot, lhs, rhs, scale, key):
    operands, _ = dot.quantizer(scale, key)({"lhs": lhs, "rhs": rhs}, dot.fwd.uses)
    return dot.fwd.run(operands, accurate=False)


@_jit
def _dot_fwd(dot: _Dot, lhs, rhs, scale, key):
    tensors = {"lhs": _once(dot.recipe, lhs), "rhs": _once(dot.recipe, rhs)}
    operands, amaxes = dot.quantizer(scale, key)(tensors, dot.fwd.uses + dot.kept)
    kept = [_as_bytes(operands[use]) for use in dot.kept]
    return dot.fwd.run(operands, accurate=False), (kept, amaxes, scale, key)


@_jit
def _dot_bwd(dot: _Dot, residuals, grad):
    kept, amaxes, scale, key = residuals
    uses = (dot.dlhs.uses[0], dot.drhs.uses[1])
    operands, amax = dot.quantizer(scale, key)({"grad": grad}, uses)
    operands |= {use: _from_bytes(dot.recipe, use, x) for use, x in zip(dot.kept, kept, strict=True)}
    amaxes = amaxes | amax
    dlhs, drhs = (plan.run(operands, accurate=True) for plan in (dot.dlhs, dot.drhs))
    by_slot = [amaxes[slot.tensor] for slot in dot.recipe.slots]
    observed = jnp.stack(by_slot) if by_slot else jnp.zeros(0, jnp.float32)
    return dlhs, drhs, scaling.observing(observed) if scale.dtype == fm32 else observed, None


_dot.defvjp(_dot_fwd, _dot_bwd)


def _as_bytes(operand: QArray | jax.Array) -> tuple[jax.Array, jax.Array] | jax.Array:
    """What is kept of an operand: its codes and scales, of 8-bit floats the bytes.

    To put an FP8 array into the stack that a scan keeps, XLA:CPU converts the whole stack to float16 and back.
    """
    if not isinstance(operand, QArray):
        return operand
    to_bytes = lambda x: lax.bitcast_convert_type(x, jnp.uint8) if _is_byte_float(x.dtype) else x
    return to_bytes(operand.qvalue), to_bytes(operand.scale)


def _from_bytes(recipe: Recipe, use: Use, kept: tuple[jax.Array, jax.Array] | jax.Array) -> QArray | jax.Array:
    if not isinstance(kept, tuple):
        return kept
    assert use.operand is not None
    fmt = use.operand.format
    dtypes = (fmt.dtype, np.dtype(jnp.float8_e8m0fnu if recipe.scales == "e8m0" else jnp.float32))
    codes, scale = (
        lax.bitcast_convert_type(x, dtype) if _is_byte_float(dtype) else x
        for x, dtype in zip(kept, dtypes, strict=True)
    )
    return QArray(codes, scale, qtype=fmt.name)


def _is_byte_float(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1 and jnp.finfo(dtype).bits == 8


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
