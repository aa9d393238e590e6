"""Flax Linen: a `dot_general_cls`, and training with Flax's own TrainState.

The scaling state lives in the collection `_overwrite_with_gradient`, which Linen training loops already carry beside
`params`: what the backward pass returns for it *is* its next value. That value, for one use of a layer in one step, is

    scale    the scale that the step used
    history  the history with the observed amax pushed in
    uses     1

and max over uses makes the right one of all three. The scale of a step is worked out of scale and history when the
step begins.

Differentiate with `value_and_grad` from here: its cotangents of the collection combine by max. Plain
`jax.value_and_grad` sums them, which is right for a layer that is used once a step; for one used k times `uses`
becomes k, and the next step's scales are NaN: loud, where a doubled scale would be silent.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from q8jax import dot, scaling
from q8jax.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Calibrating:
    """Stands in for a `uses` leaf while calibrating: the structure tells the module to take current scales."""

    uses: jax.Array


class QuantizedDot(nn.Module):
    """State of one quantized dot; called by `DotGeneral` and `EinsumOp`.

    Attributes:
      recipe: a Recipe or its string. Stochastic rounding draws from the RNG stream 'rounding'.
    """

    recipe: Recipe | str = "fp8"

    def _arithmetic(self) -> dict[str, Any]:
        recipe = Recipe.parse(self.recipe) if isinstance(self.recipe, str) else self.recipe
        initial = scaling.init(recipe)
        scale = self.variable(OVERWRITE_WITH_GRADIENT, "scale", lambda: initial.scale).value
        history = self.variable(OVERWRITE_WITH_GRADIENT, "history", lambda: initial.history).value
        uses = self.variable(OVERWRITE_WITH_GRADIENT, "uses", lambda: jnp.ones((), jnp.float32)).value
        if isinstance(uses, _Calibrating):
            effective = _begin(recipe, scale, history, uses.uses)
            recipe = recipe.with_scaling("current")
        else:
            effective = _begin(recipe, scale, history, uses)
        key = self.make_rng("rounding") if recipe.needs_key else None
        return {"recipe": recipe, "scale": effective, "key": key}


class DotGeneral(QuantizedDot):
    """For `dot_general_cls=` of nn.Dense and nn.DenseGeneral: `nn.Dense(8, dot_general_cls=dot_general_cls('fp8'))`."""

    @nn.compact
    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None) -> jax.Array:
        del precision  # the recipe says
        return dot.dot_general(
            lhs, rhs, dimension_numbers, preferred_element_type=preferred_element_type, **self._arithmetic()
        )


class EinsumOp(QuantizedDot):
    """A stateful two-operand `jnp.einsum`."""

    @nn.compact
    def __call__(self, subscripts, lhs, rhs, precision=None, preferred_element_type=None) -> jax.Array:
        del precision
        return dot.einsum(subscripts, lhs, rhs, preferred_element_type=preferred_element_type, **self._arithmetic())


def dot_general_cls(recipe: Recipe | str) -> Callable[[], DotGeneral]:
    """The `dot_general_cls` of a recipe.

    Args:
      recipe: a Recipe or its string.

    Raises:
      ValueError: a misspelt recipe.
    """
    return functools.partial(DotGeneral, recipe=Recipe.parse(recipe) if isinstance(recipe, str) else recipe)


class Einsum(nn.Einsum):
    """`nn.Einsum` in a recipe's arithmetic: Flax's own has no `dot_general_cls`.

    Attributes:
      recipe: a Recipe or its string; the others, and the parameters, are those of nn.Einsum.
    """

    recipe: Recipe | str = "fp8"

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        einsum_str = nn.merge_param("einsum_str", self.einsum_str, einsum_str).replace(" ", "")
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        bias = None
        if self.use_bias:
            shape, broadcast_shape = self._get_bias_shape(einsum_str, inputs, kernel)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        out = EinsumOp(self.recipe, name="einsum_op")(
            einsum_str, inputs, kernel, preferred_element_type=self.preferred_element_type
        )
        return out if bias is None else out + jnp.reshape(bias, broadcast_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _begin(recipe: Recipe, scale: jax.Array, history: jax.Array, uses: jax.Array) -> jax.Array:
    """The scales of this step; its cotangents are the collection's next values."""
    effective = _effective(recipe, scale, history, uses)
    return effective if scale.dtype == jnp.float32 else scaling.observing(effective)


def _effective(recipe: Recipe, scale, history, uses) -> jax.Array:
    scale, history, uses = map(scaling.readable, (scale, history, uses))
    effective = scaling.scale_of(history, scale, recipe)
    return jnp.where(uses == 1, effective, jnp.float32(jnp.nan))


def _begin_fwd(recipe, scale, history, uses):
    return _begin(recipe, scale, history, uses), (scale, history, uses)


def _begin_bwd(recipe, residuals, amaxes):
    scale, history, _ = residuals
    effective = _effective(recipe, *residuals)
    following = scaling.push(scaling.readable(history), scaling.readable(amaxes))
    as_cotangent = scaling.observing if scale.dtype != jnp.float32 else lambda x: x
    return as_cotangent(effective), as_cotangent(following), as_cotangent(jnp.ones((), jnp.float32))


_begin.defvjp(_begin_fwd, _begin_bwd)


def value_and_grad(
    fun: Callable[..., Any], argnums: int = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad` for a function of Linen variables, in which several uses of a layer combine by max.

    Args:
      fun: function of pytrees of arrays; argument `argnums` is a mapping of collections, `params` and
        `_overwrite_with_gradient` among them, all of them differentiable.
      argnums: which argument.
      has_aux: whether `fun` returns (loss, aux).

    Returns:
      A function that returns (value, grads) as `jax.value_and_grad` does; grads of `_overwrite_with_gradient` are its
      next value (the present one for a layer that the step did not use), so Flax's TrainState takes them as they are.
      It compiles itself, and may be called inside jit as well.
    """

    @jax.jit
    def run(*args):
        def armed(variables, *args):
            args = list(args)
            args.insert(argnums, _map_state(scaling.observing, variables))
            return fun(*args)

        others = [arg for i, arg in enumerate(args) if i != argnums]
        value, grads = jax.value_and_grad(armed, has_aux=has_aux)(args[argnums], *others)
        return value, _keep_unused(args[argnums], grads)

    return run


def _map_state(function: Callable[[Any], Any], variables: Any) -> Any:
    def visit(path, leaf):
        inside = any(getattr(part, "key", None) == OVERWRITE_WITH_GRADIENT for part in path)
        return function(leaf) if inside else leaf

    return jax.tree_util.tree_map_with_path(visit, variables)


def _keep_unused(variables: Any, grads: Any) -> Any:
    if isinstance(grads, Mapping):
        if set(grads) == {"scale", "history", "uses"}:
            stack = grads["uses"].ndim
            return {
                name: jnp.where(jnp.reshape(grads["uses"], grads["uses"].shape + (1,) * (grad.ndim - stack)) > 0, grad, old)
                for (name, grad), old in zip(grads.items(), (variables[n] for n in grads), strict=True)
            }
        return type(grads)({name: _keep_unused(variables[name], grad) for name, grad in grads.items()})
    return grads


class TrainState(train_state.TrainState):
    """Flax's TrainState, except that collections beside `params` and the scaling state survive `apply_gradients`."""

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        following = super().apply_gradients(grads=grads, **kwargs)
        if OVERWRITE_WITH_GRADIENT not in grads:
            return following
        return following.replace(params={**self.params, **following.params})


def calibrate(fun: Callable[..., Any], variables: Mapping[str, Any], *args: Any, has_aux: bool = False) -> dict[str, Any]:
    """Warm start: the variables with scales from one forward and backward pass with every tensor's own scale.

    Args:
      fun: the loss, a function of (variables, *args).
      variables: mapping of collections.
      *args: the first global batch.
      has_aux: whether `fun` returns (loss, aux).
    """
    calibrating = _map_uses(_Calibrating, variables)
    _, grads = value_and_grad(fun, has_aux=has_aux)(calibrating, *args)
    observed = _map_uses(lambda uses: uses.uses, grads)
    return {**variables, OVERWRITE_WITH_GRADIENT: observed[OVERWRITE_WITH_GRADIENT]}


def _map_uses(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return type(tree)(
            {n: function(v) if n == "uses" and set(tree) == {"scale", "history", "uses"} else _map_uses(function, v) for n, v in tree.items()}
        )
    return tree
