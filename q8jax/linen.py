"""Flax Linen: a `dot_general_cls`, and training with Flax's own TrainState.

The scaling state lives in the collection `_overwrite_with_gradient`, which Linen training loops already carry beside
`params`: what the backward pass returns for it *is* its next value. For each dot that value is a `DotState`, the state
that the step began with and the amaxes that it observed, in which max over several uses, or over microbatches, is the
right way to join every field. The next step begins by turning it into scales.

    loss, grads = q8jax.linen.value_and_grad(loss_fn)(state.params, batch)
    state = state.apply_gradients(grads=grads)

`value_and_grad` from here joins the cotangents of the collection by max. Plain `jax.value_and_grad` sums them, which is
right where every layer is used exactly once a step; a layer used k times, or not at all, gets k for its `uses`, and
from then on its scales are NaN: loud, where a scale that doubles every step would be silent. Adding the gradients of
several microbatches does the same. Outside jit `TrainState` from here, `calibrate` and `scaling_states` say so.

Not supported: observing inside `jax.shard_map(..., check_vma=False)`, which hides from JAX what has to be summed (it
raises TypeError), and differentiating with respect to `_overwrite_with_gradient` more than once.
"""

import functools
import string
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax import lax

from q8jax import dot, maxima, scaling
from q8jax.meshes import multiply
from q8jax.recipe import Recipe
from q8jax.recompute import recomputing
from q8jax.scaling import ScalingState


class DotState(struct.PyTreeNode):
    """What one dot, or a stack of L dots, keeps from one step to the next.

    Attributes:
      scale: float32 [..., S], the scales that the last step used; finite and > 0.
      history: float32 [..., S, H], the amaxes of the steps before that one.
      amax: float32 [..., S], the amaxes that it observed, not finite where a tensor was not, -inf without any use.
      uses: float32 [...], 1; otherwise plain `jax.value_and_grad` has summed the other fields over as many uses.
      recipe: the recipe that the state belongs to.
      calibrating: whether the dot is to take current scales.
    """

    scale: jax.Array
    history: jax.Array
    amax: jax.Array
    uses: jax.Array
    recipe: Recipe = struct.field(pytree_node=False)
    calibrating: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def init(cls, recipe: Recipe, rhs: jax.Array) -> "DotState":
        """The state before any step of a dot with this right operand."""
        state = scaling.begin_with(scaling.init(recipe), "rhs", maxima.amax(rhs))
        return cls(state.scale, state.history, jnp.zeros_like(state.scale), jnp.ones((), jnp.float32), recipe)


def _is_state(node: object) -> bool:
    return isinstance(node, DotState)


def _map_states(function: Callable[[DotState], Any], tree: Any) -> Any:
    return jax.tree.map(lambda leaf: function(leaf) if _is_state(leaf) else leaf, tree, is_leaf=_is_state)


def _states_by_path(tree: Any) -> list[tuple[str, DotState]]:
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_state)[0]
    return [("/".join(part.key for part in path[:-1]), leaf) for path, leaf in found if _is_state(leaf)]


def _check_uses(tree: Any) -> None:
    """Raises ValueError if a DotState of a collection is a sum over other than one use; where it is concrete."""
    for path, state in _states_by_path(tree):
        if isinstance(state.uses, jax.core.Tracer) or not getattr(state.uses, "is_fully_addressable", True):
            continue
        uses = np.ravel(state.uses)
        if (uses != 1).any():
            raise ValueError(
                f"The scaling state of {path} is a sum over {uses[uses != 1][0]:g} uses of the layer, and its scales "
                "would be NaN: differentiate by q8jax.linen.value_and_grad, and join the "
                f"{OVERWRITE_WITH_GRADIENT} of microbatches by q8jax.scaling.combine."
            )


def _begin(tree: Any) -> Any:
    """Turns what the last step observed into the scales of this one, for every DotState of a tree at once."""
    states = [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(leaf)]
    amaxes = [state.amax for state in states]
    updated = iter(scaling.update([ScalingState(s.scale, s.history, s.recipe) for s in states], amaxes))

    def begun(state: DotState) -> DotState:
        following = next(updated)
        scale = jnp.where(state.uses[..., None] == 1, following.scale, jnp.float32(jnp.nan))
        return DotState(scale, following.history, jnp.zeros_like(scale), jnp.ones_like(state.uses), state.recipe)

    return _map_states(begun, tree)


@jax.custom_vjp
def _scale_of_step(state: DotState) -> jax.Array:
    """The scales of a step that `value_and_grad` did not begin; its cotangent is the next DotState."""
    return _begin(state).scale


def _scale_of_step_fwd(state: DotState) -> tuple[jax.Array, DotState]:
    begun = _begin(state)
    return begun.scale, begun


def _scale_of_step_bwd(begun: DotState, amax: jax.Array) -> tuple[DotState]:
    return (begun.replace(amax=amax),)


_scale_of_step.defvjp(_scale_of_step_fwd, _scale_of_step_bwd)


class QuantizedDot(nn.Module):
    """State of one quantized dot; called by `DotGeneral` and `EinsumOp`. A recipe that quantizes nothing has none.

    Attributes:
      recipe: a Recipe or its string. Stochastic rounding draws from the RNG stream 'rounding'.
    """

    recipe: Recipe | str = "fp8"

    @nn.nowrap
    def _multiply(self, product: Callable, plain: Callable, lhs, rhs, preferred_element_type) -> jax.Array:
        recipe = Recipe.parse(self.recipe) if isinstance(self.recipe, str) else self.recipe
        scale = key = None
        calibrating = False
        if recipe.slots:
            state = self.variable(OVERWRITE_WITH_GRADIENT, "state", DotState.init, recipe, rhs).value
            if state.recipe != recipe:
                raise ValueError(
                    f"{self.path[-1]} has recipe {recipe}, but its state was made for {state.recipe}: take the "
                    f"collection {OVERWRITE_WITH_GRADIENT} from init, and calibrate."
                )
            calibrating = state.calibrating
            scale = _scale_of_step(state) if state.scale.dtype == jnp.float32 else state.scale
        if recipe.needs_key:
            key = self.make_rng("rounding")
        options = {"preferred_element_type": preferred_element_type, "calibrating": calibrating}
        product = functools.partial(product, recipe=recipe, **options)
        return multiply(product, plain, lhs, rhs, scale, key)


class DotGeneral(QuantizedDot):
    """For `dot_general_cls=` of nn.Dense and nn.DenseGeneral: `nn.Dense(8, dot_general_cls=dot_general_cls('fp8'))`."""

    @nn.compact
    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None) -> jax.Array:
        del precision  # the recipe says
        product = functools.partial(dot.dot_general, dimension_numbers=dimension_numbers)
        plain = functools.partial(lax.dot_general, dimension_numbers=dimension_numbers)
        return self._multiply(product, plain, lhs, rhs, preferred_element_type)


class EinsumOp(QuantizedDot):
    """A stateful two-operand `jnp.einsum`."""

    @nn.compact
    def __call__(self, subscripts, lhs, rhs, precision=None, preferred_element_type=None) -> jax.Array:
        del precision
        product, plain = functools.partial(dot.einsum, subscripts), functools.partial(jnp.einsum, subscripts)
        return self._multiply(product, plain, lhs, rhs, preferred_element_type)


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
        """Applies the layer.

        Args:
          inputs: the left operand.
          einsum_str: where the attribute is None, the equation, with two operands and '->'.

        Raises:
          ValueError: an equation that has not two operands or no '->'.
        """
        einsum_str = nn.merge_param("einsum_str", self.einsum_str, einsum_str).replace(" ", "")
        broadcast_shape = _bias_shape(einsum_str, inputs.ndim, tuple(self.shape))
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        bias = None
        if self.use_bias:
            shape = [size for size in broadcast_shape if size is not None]
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        lhs, rhs, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        operation = EinsumOp(self.recipe, name="einsum_op")
        out = operation(einsum_str, lhs, rhs, preferred_element_type=self.preferred_element_type)
        return out if bias is None else out + jnp.reshape(bias, [size or 1 for size in broadcast_shape])


def _bias_shape(einsum_str: str, ndim: int, kernel_shape: tuple[int, ...]) -> list[int | None]:
    """For each axis of the result its size if it comes from the kernel, else None."""
    operands, arrow, result = einsum_str.partition("->")
    if not arrow or operands.count(",") != 1:
        raise ValueError(f"einsum_str {einsum_str!r} must have two operands and '->', as in 'ab,bc->ac'.")
    subscripts = operands.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in einsum_str]
    ndims = (ndim, len(kernel_shape))
    # What '...' stands for, aligned to the right as broadcasting is.
    ellipses = [
        "".join(reversed(spare[: n - len(part.replace("...", ""))])) for n, part in zip(ndims, subscripts, strict=True)
    ]
    sizes = dict(zip(subscripts[1].replace("...", ellipses[1]), kernel_shape, strict=True))
    return [sizes.get(letter) for letter in result.replace("...", max(ellipses, key=len))]


def value_and_grad(fun: Callable[..., Any], argnums: int = 0, has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad` for a function of Linen variables, in which several uses of a layer are joined by max.

    Args:
      fun: function of pytrees of arrays; argument `argnums` is a mapping of collections, `params` and
        `_overwrite_with_gradient` among them, all of them differentiable.
      argnums: which argument.
      has_aux: whether `fun` returns (loss, aux).

    Returns:
      A function that returns (value, grads) as `jax.value_and_grad` does; grads of `_overwrite_with_gradient` are its
      next value, so Flax's TrainState takes them as they are. Of several microbatches, add the gradients of `params`
      and join those of `_overwrite_with_gradient` by `q8jax.scaling.combine`. It compiles itself, once for each `fun`,
      and may be called inside jit as well.
    """
    return functools.partial(_value_and_grad, fun, argnums, has_aux, False)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _value_and_grad(fun, argnums, has_aux, calibrating, *args):
    begun = _begin(args[argnums])

    def observing(state: DotState) -> DotState:
        # Calibration observes what the model computes before any scale is known, so it takes current scales.
        return state.replace(scale=scaling.observing(state.scale), calibrating=calibrating)

    def observed(variables):
        return fun(*args[:argnums], _map_states(observing, variables), *args[argnums + 1 :])

    with scaling.explained():
        value, grads = jax.value_and_grad(recomputing(observed), has_aux=has_aux)(begun)
    following = lambda state, grad: state.replace(amax=grad.scale) if _is_state(state) else grad
    return value, jax.tree.map(following, begun, grads, is_leaf=_is_state)


def calibrate(fun: Callable[..., Any], variables: Mapping[str, Any], *args: Any, has_aux: bool = False) -> Any:
    """Warm start: the variables with scales from one forward and backward pass with every tensor's own scale.

    Args:
      fun: the loss, a function of (variables, *args).
      variables: mapping of collections.
      *args: the first global batch.
      has_aux: whether `fun` returns (loss, aux).

    Returns:
      The variables, of which only the scaling state has changed.

    Raises:
      ValueError: outside jit, the scaling state of a step that plain `jax.value_and_grad` summed over uses.
    """
    _check_uses(variables.get(OVERWRITE_WITH_GRADIENT, {}))
    _, grads = _value_and_grad(fun, 0, has_aux, True, variables, *args)
    following = lambda old, grad: grad if _is_state(old) else old
    return jax.tree.map(following, variables, grads, is_leaf=_is_state)


def scaling_states(variables: Mapping[str, Any]) -> dict[str, ScalingState]:
    """The scaling state of every quantized dot, as the next step will begin with it, by path.

    Raises:
      ValueError: as `calibrate`.
    """
    collection = variables.get(OVERWRITE_WITH_GRADIENT, {})
    _check_uses(collection)
    states = _states_by_path(_begin(collection))
    return {path: ScalingState(state.scale, state.history, state.recipe) for path, state in states}


class TrainState(train_state.TrainState):
    """Flax's TrainState, except that collections beside `params` and the scaling state survive `apply_gradients`.

    Outside jit, `apply_gradients` raises ValueError if the scaling state in `grads` is a sum over uses.
    """

    def apply_gradients(self, *, grads: Mapping[str, Any], **kwargs: Any) -> "TrainState":
        _check_uses(grads.get(OVERWRITE_WITH_GRADIENT, {}))
        following = super().apply_gradients(grads=grads, **kwargs)
        if OVERWRITE_WITH_GRADIENT not in grads:
            return following
        return following.replace(params={**self.params, **following.params})
