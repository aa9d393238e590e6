"""From tensors to operands of GEMMs: each distinct quantization of a tensor is made once.

A `Use` says how a tensor enters a GEMM. Two GEMMs that make equal use of a tensor share its codes:
one scale for the whole tensor does not care which axes are summed, nor do square blocks.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from q8jax import maxima, scaling
from q8jax.contraction import Axes, Layout, to_matrices
from q8jax.formats import scale_to_e8m0
from q8jax.groups import extremes, scale_shape
from q8jax.qarray import QArray, encode, scale_from_amax
from q8jax.recipe import Operand, Recipe, Slot
from q8jax.shardings import ANYWHERE, DotShardings, amax_by_device


@dataclasses.dataclass(frozen=True)
class Use:
    """How a tensor enters a GEMM.

    Attributes:
      tensor: 'lhs', 'rhs' or 'grad'.
      operand: its quantization, or None for the compute dtype.
      layout: how it is flattened to matrices first; None, as it is.
      axes: the roles of its axes, once flattened, where scales depend on them; else None.
      origin: where the operand is None, the use whose codes it is dequantized from; None, of the tensor as it is.
    """

    tensor: str
    operand: Operand | None
    layout: Layout | None
    axes: Axes | None
    origin: "Use | None" = None

    @classmethod
    def of(cls, tensor: str, operand: Operand | None, axes: Axes, tiled: bool) -> "Use":
        """The use of a tensor whose axes have these roles, in a GEMM with or without tiles."""
        layout = axes.layout if tiled else None
        if operand is None or operand.granularity == "tensor" or operand.is_block:
            return cls(tensor, operand, layout, None)
        return cls(tensor, operand, layout, axes.of_matrices if tiled else axes)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of this shape, once flattened."""
        assert self.operand is not None
        tile = self.operand.tile
        if self.operand.is_block and tile:
            return scale_shape(shape, (0,), {1: tile, 2: tile})
        if self.axes is None:
            return (1,) * len(shape)
        tiles = dict.fromkeys(self.axes.contracting, tile) if tile else {}
        return scale_shape(shape, self.axes.kept, tiles)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a `Quantizer` made of a tensor: the operand for each use of it, and an array whose maximum is max |x|."""

    operands: Mapping[Use, QArray | jax.Array]
    amax: jax.Array


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Makes the operands of one dot.

    Attributes:
      recipe: the arithmetic of the dot.
      uses: all distinct uses that its three GEMMs make of its tensors.
      scale: the scale vector that the dot was given.
      key: the PRNG key that it was given, None where nothing is rounded stochastically.
      calibrating: whether every scale is the tensor's own, whatever the recipe says.
      shardings: where the tensors are.
    """

    recipe: Recipe
    uses: tuple[Use, ...]
    scale: jax.Array
    key: jax.Array | None
    calibrating: bool = False
    shardings: DotShardings = ANYWHERE

    def __call__(
        self,
        tensors: Mapping[str, jax.Array],
        uses: Sequence[Use],
        encoded: Encoded | None = None,
        seen: jax.Array | None = None,
    ) -> tuple[dict[Use, QArray | jax.Array], dict[str, jax.Array]]:
        """Encodes tensors for these uses of them.

        Args:
          tensors: by name.
          uses: of them.
          encoded: of the right operand, what need not be made again.
          seen: the left operand again, where its amax is not found by what makes its codes.

        Returns:
          The operand for each use, flattened as the use says, and for each tensor that has a slot
          an array whose maximum is max |x|: float32, NaN or Inf if the tensor has one, 0 if it is
          empty. `maxima.joined` finishes all of a dot at once.
        """
        made: dict[Use, QArray | jax.Array] = {} if encoded is None else dict(encoded.operands)
        operands: dict[Use, QArray | jax.Array] = {}
        amaxes: dict[str, jax.Array] = {} if encoded is None else {"rhs": encoded.amax}
        if any(use.tensor == "lhs" and use.operand and not self._keeps_scale(use) for use in uses):
            # What an activation function makes, XLA:GPU would make again for amaxes and for codes, from the sums of the
            # GEMM before it. A gradient, of whose making nothing else is kept, it writes once by itself; a kernel is a
            # parameter that is only converted.
            tensors = {**tensors, "lhs": _in_memory(tensors["lhs"])}
        if self._is_observed("grad") and any(use.tensor == "grad" and self._keeps_scale(use) for use in uses):
            grad, amaxes["grad"] = self._with_amax(tensors["grad"])
            tensors = {**tensors, "grad": grad}
        if seen is not None and self._is_observed("lhs") and self._all_kept("lhs", uses):
            amaxes["lhs"] = self._amax("lhs", seen)
        alone = tensors.keys() == {"rhs"} and self._is_observed("rhs")
        if alone and any(self._keeps_scale(use) for use in uses):
            # To be finished with the others of the dots that will be made of it.
            amaxes["rhs"] = self._amax("rhs", tensors["rhs"])
        for use in uses:
            for each in (use.origin, use):
                if each is None or each in operands:
                    continue
                if each in made:
                    operands[each] = made[each]
                elif each.origin is not None:
                    operands[each] = self.dequantized(each, operands)
                else:
                    operands[each] = self._encode(each, tensors[each.tensor], amaxes)
        for tensor in tensors:
            quantized = {
                use: x for use, x in operands.items() if use.tensor == tensor and use.operand and use not in made
            }
            if len(quantized) > 1:
                operands |= zip(quantized, _in_one_pass(list(quantized.values())))
        for slot in self.recipe.slots:
            if slot.tensor in tensors and slot.tensor not in amaxes:
                observed = self._is_observed(slot.tensor)
                x = tensors[slot.tensor]
                amaxes[slot.tensor] = self._amax(slot.tensor, x, late=True) if observed else jnp.zeros((), jnp.float32)
        return operands, amaxes

    def dequantized(self, use: Use, operands: Mapping[Use, QArray | jax.Array]) -> jax.Array:
        """The operand of a use of what other codes mean."""
        assert use.origin is not None
        codes = operands[use.origin]
        assert isinstance(codes, QArray)
        x = codes.dequantize().astype(self.recipe.compute)
        return x if use.layout is None else to_matrices(x, use.layout)

    def joined(self, amaxes: Mapping[str, jax.Array]) -> jax.Array:
        """The observed amaxes, float32 of the shape of `scale`, from what calls returned of all tensors."""
        found = [amaxes[slot.tensor] for slot in self.recipe.slots]
        if self.scale.ndim == 1:
            return maxima.joined(found)
        by_device = [jnp.broadcast_to(amax if amax.ndim else amax[None], self.scale.shape[:1]) for amax in found]
        return jnp.stack(by_device, axis=1) if found else jnp.zeros(self.scale.shape, jnp.float32)

    def _amax(self, tensor: str, x: jax.Array, late: bool = False) -> jax.Array:
        """An array whose maximum is max |x|: by row, or one number where it comes late in the program; or by device."""
        if self.scale.ndim == 2:
            return amax_by_device(x, self.shardings.home(tensor), self.scale.shape[0])
        return maxima.amax(x) if late else maxima.amax_of_rows(x)

    def _with_amax(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A gradient, and its amax.

        A GPU finds it while it writes the gradient, and makes codes in both layouts in one read of that. No kernel of
        XLA:GPU both transposes and reduces; left to itself it may compute the gradient once for each.
        """
        at_once = lambda x: lax.optimization_barrier((x, self._amax("grad", x)))
        return lax.platform_dependent(x, cuda=at_once, rocm=at_once, default=lambda x: (x, self._amax("grad", x)))

    def _encode(self, use: Use, x: jax.Array, amaxes: dict[str, jax.Array]) -> QArray | jax.Array:
        operand = use.operand
        if operand is None:
            x = x.astype(self.recipe.compute)
            return x if use.layout is None else to_matrices(x, use.layout)
        x = x if use.layout is None else to_matrices(x, use.layout)
        if self._keeps_scale(use):
            scale, meaning = self._kept_scale(use, x, amaxes)
        else:
            scale = meaning = self._current_scale(use, x, amaxes)
        key = None
        if operand.rounding == "stochastic" and self.key is not None:
            key = own_key(jax.random.fold_in(self.key, self.uses.index(use)), x)
        codes = encode(x, scale, operand.qtype, rounding=operand.rounding, key=key)
        if self.recipe.scales == "e8m0":
            meaning = scale_to_e8m0(meaning)
        return QArray(codes, meaning, qtype=operand.qtype)

    def _keeps_scale(self, use: Use) -> bool:
        """Whether the scale of a use is that of the state, not the tensor's own."""
        return use.operand is not None and use.operand.keeps_scale and not self.calibrating

    def _all_kept(self, tensor: str, uses: Sequence[Use]) -> bool:
        scaled = [use for use in uses if use.tensor == tensor and use.operand is not None]
        return bool(scaled) and all(map(self._keeps_scale, scaled))

    def _is_observed(self, tensor: str) -> bool:
        """Whether the scaling state wants a tensor's amax; static scaling does in calibration only."""
        return any(slot.tensor == tensor and (self.calibrating or not slot.is_static) for slot in self.recipe.slots)

    def _kept_scale(self, use: Use, x: jax.Array, amaxes: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The scale that codes are made with, and the one that they mean: NaN if the format has none and x has one.

        Apart, so that a tensor's codes need not wait for its amax, which may be found in the same pass.
        """
        assert use.operand is not None
        slot = Slot.of(use.tensor, use.operand)
        scales = scaling.readable(self.scale)
        scale = (scales if scales.ndim == 1 else scales[0])[self.recipe.slots.index(slot)]
        if use.tensor not in amaxes and (self._is_observed(use.tensor) or not slot.format.has_nan):
            # That of a weight in FP8 comes with its update, which XLA:GPU splits as it likes.
            late = use.tensor == "rhs" and slot.format.has_nan
            amaxes[use.tensor] = self._amax(use.tensor, x, late)
        meaning = scale
        if not slot.format.has_nan:
            has_nan = jnp.any(jnp.isnan(amaxes[use.tensor]))
            meaning = jnp.where(has_nan, jnp.float32(jnp.nan), scale)
            # From memory, or XLA:GPU would compute both from one kernel, and codes would wait for the amax after all.
            scale = _in_memory(scale)
        return jnp.reshape(scale, (1,) * x.ndim), jnp.reshape(meaning, (1,) * x.ndim)

    def _current_scale(self, use: Use, x: jax.Array, amaxes: dict[str, jax.Array]) -> jax.Array:
        assert use.operand is not None
        fmt = use.operand.format
        groups = use.scale_shape(x.shape)
        finite, largest = extremes(x, groups, keep_nan=not fmt.has_nan)
        if use.tensor not in amaxes and groups[-1:] != x.shape[-1:]:
            # Along rows the second result comes with the first, along columns it would not.
            amaxes[use.tensor] = maxima.amax(largest)
        if use.operand.scaling == "unit":
            return jnp.where(jnp.isnan(finite), finite, jnp.float32(1))
        return scale_from_amax(finite, fmt, margin=self.recipe.margin, scale_format=self.recipe.scales)


def _in_one_pass(quantized: list) -> list:
    """The same quantizations of one tensor; a TPU makes them in one read of it, not one each when it is needed."""
    return lax.platform_dependent(quantized, tpu=lax.optimization_barrier, default=lambda same: same)


def _in_memory(x: jax.Array) -> jax.Array:
    """The same array, which a GPU reads from memory."""
    return lax.platform_dependent(
        x, cuda=lax.optimization_barrier, rocm=lax.optimization_barrier, default=lambda same: same
    )


@jax.custom_batching.custom_vmap
def own_key(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `key`; under vmap, a key of its own for each example, also where all share `key`.

    Args:
      key: a PRNG key or an array of them.
      x: what is rounded; where examples share it, they share its key.
    """
    del x
    return key


@own_key.def_vmap
def _own_key_vmap(axis_size, in_batched, key, x):
    key_batched, x_batched = in_batched
    # What other vmaps there are around this one is decided by one example.
    key = own_key(key, x[0] if x_batched else x)
    if key_batched or not x_batched:
        return key, key_batched
    return _split(key, axis_size), True


def _split(keys: jax.Array, count: int) -> jax.Array:
    """Splits each of an array of keys; the new axis comes first."""
    if keys.ndim == 0:
        return jax.random.split(keys, count)
    return jax.vmap(lambda key: _split(key, count), out_axes=1)(keys)
