"""Flax NNX: quantized dots as modules, layers, and whole-model quantization.

A layer is quantized by the module in its `dot_general` (or `einsum_op`) attribute; its parameters are untouched, so
they stay interchangeable with the float model's. One training step is

    loss, grads, amaxes = q8jax.nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    q8jax.nnx.update_scaling(model, amaxes)
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q8jax import dot, scaling
from q8jax.policy import Policy
from q8jax.recipe import Recipe
from q8jax.scaling import ScalingState


class Scale(nnx.Variable):
    """float32 [..., S]: the scales of a dot's slots. Its cotangent is the vector of observed amaxes."""


class AmaxHistory(nnx.Variable):
    """float32 [..., S, H]: the amaxes of the last H steps, most recent first."""


class RoundingKey(nnx.Variable):
    """uint32 [..., 2]: data of the key for stochastic rounding; `update_scaling` advances it."""


class QuantizedDot(nnx.Module):
    """State of one quantized dot; called by `DotGeneral` and `EinsumOp`.

    Args:
      recipe: a Recipe or its string.
      stack: leading axes, for the dots of a stack of layers made by `nnx.vmap`.
      rngs: for recipes with stochastic rounding; takes one key of stream 'rounding'.

    Raises:
      ValueError: a recipe with stochastic rounding without rngs.
    """

    def __init__(self, recipe: Recipe | str, *, stack: tuple[int, ...] = (), rngs: nnx.Rngs | None = None):
        self.recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
        self.calibrating = False
        state = scaling.init(self.recipe)
        self.scale = Scale(jnp.broadcast_to(state.scale, (*stack, *state.scale.shape)))
        self.history = AmaxHistory(jnp.broadcast_to(state.history, (*stack, *state.history.shape)))
        if self.recipe.needs_key:
            if rngs is None:
                raise ValueError("A recipe with stochastic rounding needs rngs=, for example nnx.Rngs(rounding=0).")
            keys = jax.random.split(rngs.rounding(), math.prod(stack)) if stack else rngs.rounding()
            self.rounding_key = RoundingKey(jax.random.key_data(keys).reshape(*stack, -1))

    def _arithmetic(self) -> dict[str, Any]:
        # Calibration observes what the model computes before any scale is known, so it takes current scales.
        recipe = self.recipe.with_scaling("current") if self.calibrating else self.recipe
        key = jax.random.wrap_key_data(self.rounding_key[...]) if self.recipe.needs_key else None
        return {"recipe": recipe, "scale": self.scale[...], "key": key}

    @property
    def state(self) -> ScalingState:
        return ScalingState(self.scale[...], self.history[...], self.recipe)


class DotGeneral(QuantizedDot):
    """A stateful `jax.lax.dot_general` for the `dot_general` of NNX layers."""

    def __call__(
        self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None
    ) -> jax.Array:
        del precision, out_sharding  # the recipe says how precisely, the compiler where
        return dot.dot_general(
            lhs, rhs, dimension_numbers, preferred_element_type=preferred_element_type, **self._arithmetic()
        )


class EinsumOp(QuantizedDot):
    """A stateful two-operand `jnp.einsum` for the `einsum_op` of NNX layers."""

    def __call__(self, subscripts, lhs, rhs, precision=None, preferred_element_type=None, out_sharding=None) -> jax.Array:
        del precision, out_sharding
        return dot.einsum(subscripts, lhs, rhs, preferred_element_type=preferred_element_type, **self._arithmetic())


class Linear(nnx.Linear):
    """`nnx.Linear` in a recipe's arithmetic.

    Args:
      in_features, out_features: sizes of the kernel.
      recipe: a Recipe or its string.
      rngs: as for nnx.Linear, and stream 'rounding' for stochastic rounding.
      **kwargs: as for nnx.Linear.
    """

    def __init__(self, in_features: int, out_features: int, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs):
        super().__init__(in_features, out_features, rngs=rngs, dot_general=DotGeneral(recipe, rngs=rngs), **kwargs)


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` in a recipe's arithmetic; arguments as `Linear`."""

    def __init__(self, in_features, out_features, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs):
        super().__init__(in_features, out_features, rngs=rngs, dot_general=DotGeneral(recipe, rngs=rngs), **kwargs)


class Einsum(nnx.Einsum):
    """`nnx.Einsum` in a recipe's arithmetic; arguments as `Linear`."""

    def __init__(self, einsum_str: str, kernel_shape, bias_shape=None, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs):
        op = EinsumOp(recipe, rngs=rngs)
        super().__init__(einsum_str, kernel_shape, bias_shape, rngs=rngs, einsum_op=op, **kwargs)


def _layers(model: nnx.Module) -> dict[str, nnx.Module]:
    """The layers that can be quantized, by path; those inside nnx.MultiHeadAttention are LinearGenerals."""
    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
    return {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, kinds)}


def _stack(layer: Any) -> tuple[int, ...]:
    """Leading axes that `nnx.vmap` gave to a layer's kernel."""
    if isinstance(layer, nnx.Linear):
        own = 2
    elif isinstance(layer, nnx.LinearGeneral):
        own = len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
    else:
        own = len(layer.kernel_shape)
    shape = layer.kernel[...].shape
    return shape[: len(shape) - own]


def quantize_model(model: nnx.Module, policy: Policy | Recipe | str, *, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """Makes an NNX model's layers run in the recipes of a policy, in place.

    Args:
      model: a model with `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum` layers at any depth, also inside
        `nnx.MultiHeadAttention` and in stacks made by `nnx.vmap`.
      policy: a Policy, a Recipe for every layer, or the string of either.
      rngs: for recipes with stochastic rounding.

    Returns:
      The same model. Its parameters are as before; each quantized layer has gained scaling state.

    Raises:
      ValueError: no layer to quantize, or a rule that matches none.
    """
    if isinstance(policy, str):
        policy = Policy.parse(policy)
    elif isinstance(policy, Recipe):
        policy = Policy(((".*", policy),))
    layers = _layers(model)
    if not layers:
        raise ValueError("quantize_model found no nnx.Linear, nnx.LinearGeneral or nnx.Einsum in the model.")
    for path, recipe in policy.resolve(layers).items():
        layer: Any = layers[path]
        if isinstance(layer, nnx.Einsum):
            layer.einsum_op = nnx.data(EinsumOp(recipe, stack=_stack(layer), rngs=rngs))
        else:
            layer.dot_general = nnx.data(DotGeneral(recipe, stack=_stack(layer), rngs=rngs))
    return model


def _dots(model: nnx.Module) -> Iterator[tuple[tuple, QuantizedDot]]:
    return ((path, module) for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedDot))


def scaling_states(model: nnx.Module) -> dict[str, ScalingState]:
    """The scaling state of every quantized dot, by path."""
    return {"/".join(map(str, path)): module.state for path, module in _dots(model)}


def value_and_grad(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., tuple[Any, Any, Any]]:
    """Differentiates a loss with respect to a model's parameters, and observes its amaxes.

    Args:
      loss_fn: function of (model, *args), args being pytrees of arrays, that returns a scalar, or (scalar, aux).
      has_aux: whether it returns aux.

    Returns:
      A function of (model, *args) that returns (loss, grads, amaxes), or ((loss, aux), grads, amaxes): `grads` is the
      nnx.State of the nnx.Param's gradients, `amaxes` that of the Scale's observed amaxes, all uses of a layer
      combined by max. Other state that the loss changes is updated in the model. It compiles itself, and may be
      called inside jit as well.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(graphdef, params, scales, rest, args):
        def pure(params, scales):
            model = nnx.merge(graphdef, params, jax.tree.map(scaling.observing, scales), rest)
            result = loss_fn(model, *args)
            loss, aux = result if has_aux else (result, None)
            changed = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, Scale)))
            return loss, (aux, changed)

        return jax.value_and_grad(pure, argnums=(0, 1), has_aux=True)(params, scales)

    def wrapped(model, *args):
        graphdef, params, scales, rest = nnx.split(model, nnx.Param, Scale, ...)
        (loss, (aux, changed)), (grads, amaxes) = run(graphdef, params, scales, rest, args)
        nnx.update(model, changed)
        return ((loss, aux) if has_aux else loss), grads, amaxes

    return wrapped


def update_scaling(model: nnx.Module, amaxes: nnx.State) -> None:
    """Turns the amaxes of one step into the model's next scaling state, in place, for all layers at once.

    Args:
      model: the model.
      amaxes: as `value_and_grad` returned them; of several microbatches, combined by `q8jax.scaling.combine`.
    """
    dots = dict(_dots(model))
    observed = {path: _at(amaxes, (*path, "scale")) for path in dots}
    states = scaling.update({path: module.state for path, module in dots.items()}, observed)
    for path, module in dots.items():
        module.scale[...] = states[path].scale
        module.history[...] = states[path].history
        if module.recipe.needs_key:
            data = module.rounding_key[...]
            advance = lambda data: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(data), 1))
            module.rounding_key[...] = jnp.vectorize(advance, signature="(n)->(n)")(data)


def _at(state: nnx.State, path: tuple) -> jax.Array:
    node: Any = state
    for part in path:
        node = node[part]
    return node[...] if isinstance(node, nnx.Variable) else node


def calibrate(model: nnx.Module, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False) -> None:
    """Warm start: sets the scales from one forward and backward pass in which every scale is the tensor's own.

    Args:
      model: the model, changed in place.
      loss_fn, has_aux: as for `value_and_grad`.
      *args: the first global batch.
    """
    with calibrating(model):
        _, _, amaxes = value_and_grad(loss_fn, has_aux=has_aux)(model, *args)
    update_scaling(model, amaxes)


class calibrating:
    """Context in which a model's dots scale each tensor by its own amax, whatever their recipe says."""

    def __init__(self, model: nnx.Module):
        self._model = model

    def __enter__(self) -> None:
        self._set(True)

    def __exit__(self, *_: object) -> None:
        self._set(False)

    def _set(self, value: bool) -> None:
        for _, module in _dots(self._model):
            module.calibrating = value
