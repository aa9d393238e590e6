"""`dot_general` and `einsum` whose three GEMMs run as a recipe says, under every JAX transform.

The forward rule quantizes each operand once per way that the recipe needs it, so that what is kept for the backward
pass is codes (and the wide tensor only where a gradient GEMM is not quantized). Observed amaxes leave through the
cotangent of `scale`: see `scaling`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.fp8_ops import fm32
from jax import lax

from q8jax import scaling
from q8jax.contraction import Axes, Contraction, DimensionNumbers, contractions, dot_shape, to_matrices
from q8jax.einsum import as_dot
from q8jax.gemm import gemm, gemm_tiled
from q8jax.qarray import QArray, amax as group_amax, encode, scale_from_amax
from q8jax.recipe import GEMM_TENSORS, GEMMS, TENSORS, Gemm, Operand, Recipe, Slot


@dataclasses.dataclass(frozen=True)
class _Dot:
    """Everything static about one dot."""

    recipe: Recipe
    contractions: tuple[Contraction, Contraction, Contraction]
    dtype: np.dtype

    def contraction(self, gemm_name: str) -> Contraction:
        return self.contractions[GEMMS.index(gemm_name)]


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    recipe: Recipe | str,
    scale: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    preferred_element_type: "np.dtype | type | None" = None,
) -> jax.Array:
    """`jax.lax.dot_general` in the arithmetic of a recipe, differentiable once.

    Args:
      lhs, rhs: floating-point arrays.
      dimension_numbers: as in `jax.lax.dot_general`; anything legal there.
      recipe: a Recipe or its string.
      scale: float32 [S], one per slot of the recipe, from a `ScalingState`; its cotangent is the vector of observed
        amaxes. Needed where scaling is delayed or static; else None observes nothing.
      key: a PRNG key, needed by stochastic rounding; fold step and site into it. Each operand of each GEMM, each
        element, and under vmap each example draws for itself.
      preferred_element_type: dtype of the result; by default the promoted dtype of the operands.

    Returns:
      The product, accumulated and dequantized in float32. Gradients have the operands' dtypes.

    Raises:
      ValueError: no scale or key where the recipe needs one, a scale of the wrong shape, or a tile that does not divide
        its axis.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    slots = len(recipe.slots)
    if scale is None:
        if recipe.keeps_state:
            raise ValueError("This recipe keeps scales from step to step: pass scale=, from a ScalingState.")
        scale = jnp.ones(slots, jnp.float32)
    if scale.shape != (slots,):
        raise ValueError(f"scale has shape {scale.shape}, but the recipe has {slots} slots: pass float32 [{slots}].")
    if recipe.needs_key and key is None:
        raise ValueError("Stochastic rounding needs key=, a jax.random.key folded with step and site.")
    dtype = np.dtype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype))
    by_gemm = contractions(lhs.ndim, rhs.ndim, dimension_numbers)
    dot = _Dot(recipe, (by_gemm["fwd"], by_gemm["dlhs"], by_gemm["drhs"]), dtype)
    _check_tiles(dot, lhs.shape, rhs.shape)
    return _dot(dot, lhs, rhs, scale, key if recipe.needs_key else None)


def einsum(
    subscripts: str,
    lhs: jax.Array,
    rhs: jax.Array,
    recipe: Recipe | str,
    scale: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    preferred_element_type: "np.dtype | type | None" = None,
) -> jax.Array:
    """`jnp.einsum` of two operands in the arithmetic of a recipe.

    Args:
      subscripts: an einsum expression of two operands; '...' and an implicit result are allowed, a repeated index
        within one operand is not.
      Others: as in `dot_general`.

    Raises:
      ValueError: as `dot_general`, or a subscript that does not fit the operands.
    """
    plan = as_dot(subscripts, lhs.ndim, rhs.ndim)
    out = dot_general(
        jnp.sum(lhs, plan.lhs_summed) if plan.lhs_summed else lhs,
        jnp.sum(rhs, plan.rhs_summed) if plan.rhs_summed else rhs,
        plan.dimension_numbers,
        recipe,
        scale,
        key=key,
        preferred_element_type=preferred_element_type,
    )
    return lax.transpose(out, plan.permutation)


def _check_tiles(dot: _Dot, lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...]) -> None:
    shapes = {"lhs": lhs_shape, "rhs": rhs_shape, "grad": dot_shape(lhs_shape, rhs_shape, dot.contraction("fwd"))}
    for name in GEMMS:
        contraction = dot.contraction(name)
        operands = zip(GEMM_TENSORS[name], getattr(dot.recipe, name), (contraction.first, contraction.second), strict=True)
        for tensor, operand, axes in operands:
            if operand is None or operand.tile is None:
                continue
            lengths = {"contracting": axes.contracting} | ({"free": axes.free} if operand.is_block else {})
            for role, group in lengths.items():
                length = math.prod(shapes[tensor][i] for i in group)
                if length % operand.tile:
                    raise ValueError(
                        f"{operand.granularity} of {tensor} in {name} does not divide its {role} size {length}: choose "
                        "a K that divides it, or granularity row."
                    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(dot: _Dot, lhs, rhs, scale, key):
    return _forward(dot, _Encoder(dot, scale, key), lhs, rhs)


def _forward(dot: _Dot, encoder: "_Encoder", lhs, rhs):
    return _run(dot, encoder, "fwd", lhs, rhs, dot.dtype)


def _dot_fwd(dot: _Dot, lhs, rhs, scale, key):
    encoder = _Encoder(dot, scale, key)
    out = _forward(dot, encoder, lhs, rhs)
    kept = {
        "dlhs": encoder.operand("dlhs", 1, rhs),
        "drhs": encoder.operand("drhs", 0, lhs),
    }
    observed = {tensor: encoder.observe(tensor, x) for tensor, x in (("lhs", lhs), ("rhs", rhs))}
    # Zero-size: they carry the operands' shapes and dtypes to the backward rule.
    like = jnp.zeros((0, *lhs.shape), lhs.dtype), jnp.zeros((0, *rhs.shape), rhs.dtype)
    return out, (kept, observed, scale, key, like)


def _dot_bwd(dot: _Dot, residuals, grad):
    kept, observed, scale, key, (lhs_like, rhs_like) = residuals
    encoder = _Encoder(dot, scale, key)
    dlhs = _run(dot, encoder, "dlhs", grad, kept["dlhs"], lhs_like.dtype, lhs_like.shape[1:])
    drhs = _run(dot, encoder, "drhs", kept["drhs"], grad, rhs_like.dtype, rhs_like.shape[1:])
    amaxes = {**observed, "grad": encoder.observe("grad", grad)}
    return dlhs, drhs, encoder.observations(amaxes), None


_dot.defvjp(_dot_fwd, _dot_bwd)


def _run(dot: _Dot, encoder: "_Encoder", name: str, first, second, dtype, shape=None):
    """Runs one GEMM; an operand that is a residual is encoded already."""
    contraction = dot.contraction(name)
    is_fwd = name == "fwd"
    encoded = [
        x if isinstance(x, _Ready) else encoder.operand(name, position, x) for position, x in enumerate((first, second))
    ]
    operands = [ready.value for ready in encoded]
    tile = _tile(getattr(dot.recipe, name))
    if tile is None:
        return gemm(*operands, contraction, dtype, accurate=not is_fwd)
    if shape is None:
        shape = dot_shape(first.shape, second.shape, contraction)
    else:
        # The gradient has the layout of the tensor; the dot's result has it before the permutation.
        inverse = sorted(range(len(shape)), key=contraction.permutation.__getitem__)
        shape = tuple(shape[i] for i in inverse)
    return gemm_tiled(*operands, tile, shape, contraction, dtype, accurate=not is_fwd)


def _tile(pair: Gemm) -> int | None:
    """The size of the pieces of the contracting axis on which both operands' scales are constant."""
    tiles = [operand.tile for operand in pair if operand is not None and operand.tile is not None]
    return math.gcd(*tiles) if tiles else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Ready:
    """An operand as its GEMM takes it: quantized, or in the compute dtype; flattened to matrices if scales are tiled."""

    value: QArray | jax.Array


class _Encoder:
    """Makes the operands of one dot's GEMMs, each distinct quantization of a tensor once."""

    def __init__(self, dot: _Dot, scale: jax.Array, key: jax.Array | None):
        self._dot = dot
        self._recipe = dot.recipe
        self._scale = scale
        self._key = key
        self._cache: dict[object, _Ready] = {}
        self._amaxes: dict[str, jax.Array] = {}

    def operand(self, name: str, position: int, x: jax.Array) -> _Ready:
        tensor, operand = GEMM_TENSORS[name][position], tuple(getattr(self._recipe, name))[position]
        contraction = self._dot.contraction(name)
        axes = (contraction.first, contraction.second)[position]
        tiled = _tile(getattr(self._recipe, name)) is not None
        whole = operand is None or operand.granularity == "tensor"
        # One scale for the whole tensor does not care which axes are summed.
        cache_key = (tensor, operand, None if whole and not tiled else axes, tiled)
        if cache_key not in self._cache:
            self._cache[cache_key] = _Ready(self._encode(tensor, operand, axes, tiled, x))
        return self._cache[cache_key]

    def _encode(self, tensor: str, operand: Operand | None, axes: Axes, tiled: bool, x: jax.Array):
        if operand is None:
            wide = x.astype(self._recipe.compute)
            return to_matrices(wide, axes) if tiled else wide
        amax = self._amax(tensor, x) if operand.scaling != "current" else None
        if tiled:
            x, axes = to_matrices(x, axes), Axes((0,), (1,), (2,))
        scale = self._scale_of(tensor, operand, axes, x, amax)
        key = None
        if operand.rounding == "stochastic":
            key = _own_key(jax.random.fold_in(self._key, TENSORS.index(tensor)), x)
        return QArray(encode(x, scale, operand.qtype, rounding=operand.rounding, key=key), scale, qtype=operand.qtype)

    def _scale_of(self, tensor: str, operand: Operand, axes: Axes, x: jax.Array, amax: jax.Array | None):
        fmt = operand.format
        if amax is not None:
            slot = self._recipe.slots.index(Slot(tensor, fmt.name))
            scale = scaling.readable(self._scale)[slot]
            if not fmt.has_nan:
                scale = jnp.where(jnp.isnan(amax), jnp.float32(jnp.nan), scale)
            return jnp.reshape(scale, (1,) * x.ndim)
        kept, tiles = (), None
        if operand.granularity == "row":
            kept = axes.kept
        elif operand.tile is not None:
            kept = axes.batch if operand.is_block else axes.kept
            tiles = {axis: operand.tile for axis in (axes.free if operand.is_block else ()) + axes.contracting}
        found = group_amax(x, channelwise_axes=kept, tiled_axes=tiles, keep_nan=not fmt.has_nan)
        return scale_from_amax(found, fmt, margin=self._recipe.margin, scale_format=self._recipe.scales)

    def _amax(self, tensor: str, x: jax.Array) -> jax.Array:
        """max |x| of the whole tensor, NaN or Inf if it has one, 0 if it is empty."""
        if tensor not in self._amaxes:
            self._amaxes[tensor] = jnp.max(jnp.abs(x), initial=0).astype(jnp.float32)
        return self._amaxes[tensor]

    def observe(self, tensor: str, x: jax.Array) -> jax.Array | None:
        if not any(slot.tensor == tensor for slot in self._recipe.slots):
            return None
        return scaling.shared_amax(self._scale, self._amax(tensor, x))

    def observations(self, amaxes: dict[str, jax.Array | None]) -> jax.Array:
        if not self._recipe.slots:
            observed = jnp.zeros(0, jnp.float32)
        else:
            observed = jnp.stack([amaxes[slot.tensor] for slot in self._recipe.slots])
        return scaling.observing(observed) if self._scale.dtype == fm32 else observed


@jax.custom_batching.custom_vmap
def _own_key(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `key`; under vmap, a key of its own for each example, also where all share `key`."""
    del x
    return key


@_own_key.def_vmap
def _own_key_vmap(axis_size, in_batched, key, x):
    key_batched, x_batched = in_batched
    if not x_batched:
        return key, key_batched
    keys = key if key_batched else jax.random.split(key, axis_size)
    return jax.vmap(_own_key)(keys, x), True
