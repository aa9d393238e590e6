"""Scaling state: observed in the graph, updated once per step.

A dot reads the scales of its recipe's slots as one vector, and the *cotangent of that vector is the vector of amaxes
that the dot observed*, in the forward and in the backward pass. `observing` gives the vector Flax's dtype fm32, whose
cotangents JAX accumulates by max instead of sum, so that under jit, grad, scan, checkpoint, microbatches and sharding
several uses of a layer combine by max; `shared_amax` does the same for vmap. `update` then turns (state, amaxes)
into the next state for all tensors of a model at once, outside autodiff.

Why not the other public ways out of a backward pass (tried on jax 0.10.2 and 0.12): a plain float32 cotangent sums over
uses, so a shared layer doubles its scale every step; a mutable reference raises under vmap when it is not batched, and
would have to be threaded through Flax's transforms. What fm32 cannot do is run outside jit: `jax.grad` of an observing
function must be under `jax.jit`, and the Flax wrappers do that themselves.

A state's window is strict: the scale of step t comes from the amaxes of steps t-H … t-1. A step whose amax was zero or
not finite leaves a hole (stored as 0) in the history; a window of holes keeps the last scale.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.fp8_ops import fm32
from jax import lax

from q8jax.qarray import scale_from_amax
from q8jax.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalingState:
    """Scales and amax history of one dot, or of a stack of L dots.

    Invariants: `scale` is finite and > 0; `history` is finite and >= 0, most recent first, 0 where nothing was observed.

    Attributes:
      scale: float32 [..., S], one per slot of `recipe.slots`; what the next step's dot multiplies codes with.
      history: float32 [..., S, H].
      recipe: the recipe that the state belongs to.
    """

    scale: jax.Array
    history: jax.Array
    recipe: Recipe = dataclasses.field(metadata={"static": True})


def init(recipe: Recipe) -> ScalingState:
    """Returns the state before any observation: scale 1, empty history. Calibrate before training with it."""
    slots = len(recipe.slots)
    return ScalingState(jnp.ones(slots, jnp.float32), jnp.zeros((slots, recipe.history), jnp.float32), recipe)


def observing(scale: jax.Array) -> jax.Array:
    """Gives a scale vector the dtype whose cotangents combine by max.

    Call it once, inside the function that is differentiated and jitted, on every scale of the model.
    """
    return scale if scale.dtype == fm32 else lax.convert_element_type(scale, fm32)


def readable(scale: jax.Array) -> jax.Array:
    """The float32 values of a scale vector, observing or not."""
    return lax.convert_element_type(scale, jnp.float32) if scale.dtype == fm32 else scale


def _is_state(node: object) -> bool:
    return isinstance(node, ScalingState)


def combine(first: object, second: object) -> object:
    """Combines the observed amaxes of two backward passes of one step (two microbatches, two hosts) by max."""
    return jax.tree.map(jnp.maximum, first, second)


def update(states: object, amaxes: object) -> object:
    """The next scaling state of a whole model.

    The states are laid out as one array per (history length), so that the number of kernels does not grow with depth.

    Args:
      states: pytree of ScalingState.
      amaxes: pytree of the same structure with, for each ScalingState, its observed amaxes, float32 [..., S]: the
        cotangents of the states' `scale`. Where nothing was observed it holds 0.

    Returns:
      A pytree like `states`.
    """
    leaves, treedef = jax.tree.flatten(states, is_leaf=_is_state)
    observed = treedef.flatten_up_to(amaxes)
    result = list(leaves)
    for history in sorted({state.recipe.history for state in leaves}):
        group = [i for i, s in enumerate(leaves) if s.recipe.history == history and s.recipe.slots]
        if not group:
            continue
        updated = _update_group([leaves[i] for i in group], [observed[i] for i in group])
        for i, state in zip(group, updated, strict=True):
            result[i] = state
    return treedef.unflatten(result)


def _update_group(states: list[ScalingState], amaxes: list[jax.Array]) -> list[ScalingState]:
    history_length = states[0].recipe.history
    amax = jnp.concatenate([jnp.ravel(a) for a in amaxes])
    history = jnp.concatenate([jnp.reshape(s.history, (-1, history_length)) for s in states])
    scale = jnp.concatenate([jnp.ravel(s.scale) for s in states])
    rules = [rule for s in states for rule in _slot_rules(s.recipe) * (s.scale.size // len(s.recipe.slots))]
    history = push(history, amax)
    scale = _scales(history, scale, rules)

    following, offset = [], 0
    for state in states:
        part = slice(offset, offset + state.scale.size)
        offset = part.stop
        own = jnp.reshape(scale[part], state.scale.shape), jnp.reshape(history[part], state.history.shape)
        following.append(ScalingState(*own, state.recipe))
    return following


def push(history: jax.Array, amax: jax.Array) -> jax.Array:
    """Enters a step's amaxes, [..., S], into a history, [..., S, H]; what is not finite or not > 0 leaves a hole."""
    amax = jnp.where(jnp.isfinite(amax) & (amax > 0), amax, jnp.float32(0))
    return jnp.concatenate([amax[..., None], history[..., :-1]], axis=-1)


def scale_of(history: jax.Array, last_scale: jax.Array, recipe: Recipe) -> jax.Array:
    """The scales that one dot's history gives.

    Args:
      history: float32 [S, H], most recent first, 0 where nothing was observed.
      last_scale: float32 [S], kept where the whole window is empty and where scaling is static.
      recipe: the recipe whose slots these are.

    Returns:
      float32 [S], finite and > 0.
    """
    return _scales(history, last_scale, _slot_rules(recipe))


@dataclasses.dataclass(frozen=True)
class _SlotRule:
    """How one slot's scale follows from its history."""

    qtype: str
    margin: int
    scales: str
    amax: str
    static: bool


def _slot_rules(recipe: Recipe) -> list[_SlotRule]:
    return [
        _SlotRule(slot.qtype, recipe.margin, recipe.scales, recipe.amax, recipe.is_static(slot)) for slot in recipe.slots
    ]


def _scales(history: jax.Array, last_scale: jax.Array, rules: list[_SlotRule]) -> jax.Array:
    # Each distinct rule is evaluated for all slots and selected by a constant mask: a few vectors fuse into one
    # kernel, where slices and concatenations of single slots would not.
    scale = last_scale
    for rule in dict.fromkeys(rules):
        if rule.static:
            continue
        if rule.amax == "max":
            amax = jnp.max(history, axis=-1)
        else:
            newest = jnp.argmax(history > 0, axis=-1, keepdims=True)
            amax = jnp.squeeze(jnp.take_along_axis(history, newest, axis=-1), -1)
        candidate = scale_from_amax(amax, rule.qtype, margin=rule.margin, scale_format=rule.scales)
        chosen = np.array([other == rule for other in rules]) & (amax > 0)
        scale = jnp.where(chosen, candidate, scale)
    return scale


@jax.custom_batching.custom_vmap
def shared_amax(scale: jax.Array, amax: jax.Array) -> jax.Array:
    """Returns `amax`; under vmap, its max over the batch unless the scale is batched as well.

    A batched tensor that shares one unbatched scale is one tensor, as in the run without vmap. Left to itself, vmap
    would give each example an amax and sum them.

    Args:
      scale: the scale vector that the amax belongs to.
      amax: float32 scalar.
    """
    del scale
    return amax


@shared_amax.def_vmap
def _shared_amax_vmap(axis_size, in_batched, scale, amax):
    scale_batched, amax_batched = in_batched
    if scale_batched:
        amax = amax if amax_batched else jnp.broadcast_to(amax, (axis_size,))
        return jax.vmap(shared_amax)(scale, amax), True
    return shared_amax(scale, jnp.max(amax, axis=0) if amax_batched else amax), False
