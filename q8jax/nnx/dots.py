"""A quantized dot as a module, and the variables in which it keeps its state."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from q8jax import clipping, conv, dot, scaling
from q8jax.calibration import MIN_SCALE, scale_from_amax
from q8jax.contraction import DimensionNumbers
from q8jax.meshes import multiply
from q8jax.naming import path_scope
from q8jax.recipe import Recipe, Slot
from q8jax.scaling import ScalingState
from q8jax.shardings import DotShardings
from q8jax.telemetry import Probe


class Scale(nnx.Variable):
    """float32 [..., S]: the scales of a dot's slots. Its cotangent is the vector of observed amaxes."""


class AmaxHistory(nnx.Variable):
    """float32 [..., S, H]: the amaxes of the last H steps, most recent first."""


class RoundingKey(nnx.Variable):
    """uint32 [..., K]: data of the key for stochastic rounding; `update_scaling` advances it."""


class KernelCodes(nnx.Variable):
    """Codes and amax of a kernel, or of a stack of them, that `prequantize` made."""


class Range(nnx.Param):
    """float32 [...]: the largest magnitude of a dot's left operand that its codes reach, which is trained."""


class ProbeVariable(nnx.Variable):
    """A Probe, whose cotangent is what a dot saw."""


class QuantizedDot(nnx.Module):
    """State of one quantized dot; called by what multiplies with it. A recipe that quantizes nothing has none.

    Args:
      recipe: a Recipe or its string.
      stack: leading axes, for the dots of a stack of layers made by `nnx.vmap`.
      path: of its layer in the model, by which `q8jax.audit` names it; '' if not known.
      rngs: for recipes with stochastic rounding; takes one key of stream 'rounding'.

    Raises:
      ValueError: a recipe with stochastic rounding without rngs.
    """

    def __init__(
        self, recipe: Recipe | str, *, stack: tuple[int, ...] = (), path: str = "", rngs: nnx.Rngs | None = None
    ):
        self.path = path
        self.stack = stack
        self.recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
        self.calibrating = False
        if self.recipe.slots:
            state = scaling.init(self.recipe, stack)
            self.scale = Scale(state.scale)
            self.history = AmaxHistory(state.history)
        if self.recipe.needs_key:
            if rngs is None:
                raise ValueError("A recipe with stochastic rounding needs rngs=, for example nnx.Rngs(rounding=0).")
            key = rngs.rounding()
            self.key_impl = jax.random.key_impl(key)
            key_data = jax.random.key_data(jax.random.split(key, stack) if stack else key)
            self.rounding_key: nnx.Variable = RoundingKey(key_data)

    probe: nnx.Variable | None = None
    learned_range: nnx.Variable | None = None

    def watch(self, kinds: tuple[str, ...], recipe: Recipe | None = None) -> None:
        """Gives every call a probe for these kinds of telemetry, of its own recipe or of another."""
        self.probe = ProbeVariable(Probe.of(kinds, self.stack, recipe))

    @property
    def state(self) -> ScalingState:
        if not self.recipe.slots:
            return scaling.init(self.recipe)
        return ScalingState(self.scale[...], self.history[...], self.recipe)

    def _key(self) -> jax.Array:
        return jax.random.wrap_key_data(self.rounding_key[...], impl=self.key_impl)

    def folded_key_data(self, number: int | jax.Array) -> jax.Array:
        """Data, uint32 [..., K], of the rounding key with a number folded into it."""
        fold = jnp.vectorize(lambda key: jax.random.fold_in(key, number), signature="()->()")
        return jax.random.key_data(fold(self._key()))

    def _multiply(
        self, product: Callable, plain: Callable, lhs, rhs, preferred_element_type, out_sharding
    ) -> jax.Array:
        # Calibration observes what the model computes before any scale is known, so it takes current scales.
        options = {"preferred_element_type": preferred_element_type, "calibrating": self.calibrating}
        if self.recipe.backward == "codes" and not self.calibrating:
            lhs, rhs = self._within("lhs", lhs), self._within("rhs", rhs)
        scale: Any = self.scale[...] if self.recipe.slots else None
        if self.probe is None:
            product = functools.partial(product, recipe=self.recipe, **options)
        else:
            scale = scale, self.probe.get_value()
            product = functools.partial(_probed, functools.partial(product, recipe=self.recipe, **options))
        key = self._key() if self.recipe.needs_key else None
        with path_scope(self.path) if self.path else contextlib.nullcontext():
            return multiply(product, plain, lhs, rhs, scale, key, out_sharding)

    def _within(self, tensor: str, x: Any) -> Any:
        """An operand whose gradient ends where its codes do, if its range is not its own."""
        operand = self.recipe.fwd.first if tensor == "lhs" else self.recipe.fwd.second
        if operand is None or not operand.keeps_scale:
            return x
        if isinstance(x, dot.Prequantized):
            return dataclasses.replace(x, value=self._within(tensor, x.value))
        slot = Slot.of(tensor, operand)
        if tensor == "lhs" and self.learned_range is not None:
            bound = self.learned_range[...]
        else:
            scales = lax.stop_gradient(scaling.readable(self.scale[...]))
            bound = jnp.max(scales[..., self.recipe.slots.index(slot)]) * jnp.float32(slot.format.max)
        return clipping.within(x, bound)

    def prequantized(
        self, kernel: jax.Array, dimension_numbers: DimensionNumbers, stack: int, devices: int | None
    ) -> dot.Prequantized:
        """Codes for products with these numbers of a kernel, or of a stack of kernels along so many leading axes."""
        key = self._key() if self.recipe.needs_key else None

        def one(kernel, scale, key):
            options = {"key": key, "calibrating": self.calibrating, "shardings": getattr(self, "shardings", None)}
            return dot.prequantize(kernel, dimension_numbers, self.recipe, scale, **options)

        for _ in range(stack):
            one = jax.vmap(one)
        scale = self.scale[...]
        return one(kernel, scale if devices is None else scaling.for_devices(scale, devices), key)

    def follow(self, state: ScalingState) -> None:
        """Enters the next step: takes its scaling state and another rounding key."""
        scale = state.scale
        if self.learned_range is not None:
            [slot] = [i for i, slot in enumerate(self.recipe.slots) if slot.tensor == "lhs" and slot.is_static]
            fmt = self.recipe.slots[slot].format
            if self.calibrating:
                self.learned_range.set_value(scale[..., slot] * jnp.float32(fmt.max))
            else:
                bound = jnp.maximum(self.learned_range[...], MIN_SCALE)
                scale = scale.at[..., slot].set(scale_from_amax(bound, fmt))
        self.scale.set_value(scale)
        self.history.set_value(state.history)
        if self.recipe.needs_key:
            self.rounding_key.set_value(self.folded_key_data(1))


def _probed(product: Callable, lhs: Any, rhs: Any, scale: Any, key: Any) -> jax.Array:
    scale, probe = scale
    return product(lhs, rhs, scale=scale, key=key, probe=probe)


def _value_of(rhs: jax.Array | dot.Prequantized) -> jax.Array:
    return rhs.value if isinstance(rhs, dot.Prequantized) else rhs


class DotGeneral(QuantizedDot):
    """A stateful `jax.lax.dot_general` for the `dot_general` of NNX layers.

    Attributes:
      shardings: where its tensors are, on a mesh of automatic axes; set it on a layer's dot where it matters.
    """

    shardings: DotShardings | None = None

    def __call__(
        self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None
    ) -> jax.Array:
        del precision  # the recipe says
        product = functools.partial(dot.dot_general, dimension_numbers=dimension_numbers, shardings=self.shardings)
        plain = lambda lhs, rhs: lax.dot_general(lhs, _value_of(rhs), dimension_numbers)
        return self._multiply(product, plain, lhs, rhs, preferred_element_type, out_sharding)


class EinsumOp(QuantizedDot):
    """A stateful two-operand `jnp.einsum` for the `einsum_op` of NNX layers."""

    def __call__(
        self, subscripts, lhs, rhs, precision=None, preferred_element_type=None, out_sharding=None
    ) -> jax.Array:
        del precision
        product = functools.partial(dot.einsum, subscripts)
        plain = lambda lhs, rhs: jnp.einsum(subscripts, lhs, _value_of(rhs))
        return self._multiply(product, plain, lhs, rhs, preferred_element_type, out_sharding)


class ConvGeneralDilated(QuantizedDot):
    """A stateful `jax.lax.conv_general_dilated` for the `conv_general_dilated` of NNX layers."""

    def __call__(
        self,
        lhs,
        rhs,
        window_strides,
        padding,
        *,
        precision=None,
        preferred_element_type=None,
        out_sharding=None,
        **geometry,
    ) -> jax.Array:
        del precision
        geometry |= {"window_strides": window_strides, "padding": padding}
        product = functools.partial(conv.conv_general_dilated, **geometry)
        plain = functools.partial(lax.conv_general_dilated, **geometry)
        return self._multiply(product, plain, lhs, rhs, preferred_element_type, out_sharding)


OPERATIONS: dict[str, type[QuantizedDot]] = {
    "dot_general": DotGeneral,
    "einsum_op": EinsumOp,
    "conv_general_dilated": ConvGeneralDilated,
}


def dots_of(model: nnx.Module) -> dict[tuple, QuantizedDot]:
    """A model's quantized dots, by path."""
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedDot)}
