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
not finite, or that did not use the layer, leaves a hole (stored as 0) in the history; a window of holes keeps the last
scale. Static scaling takes the first amax that it sees and keeps it. Its dots observe none but in calibration, which
must come first.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.fp8_ops import fm32
from jax import lax

from q8jax.meshes import varying_axes
from q8jax.qarray import scale_from_amax
from q8jax.recipe import Recipe

_SMALLEST_AMAX = np.float32(2.0**-126)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalingState:
    """Scales and amax history of one dot, or of a stack of L dots.

    Invariants: `scale` is finite and > 0; `history` is finite and >= 0, most recent first, 0 where nothing was
    observed.

    Attributes:
      scale: float32 [..., S], one per slot of `recipe.slots`; what the next step's dot multiplies codes with.
      history: float32 [..., S, H].
      recipe: the recipe that the state belongs to.
    """

    scale: jax.Array
    history: jax.Array
    recipe: Recipe = dataclasses.field(metadata={"static": True})


def init(recipe: Recipe, stack: tuple[int, ...] = ()) -> ScalingState:
    """Returns the state before any observation: scale 1, empty history. Calibrate before training with it.

    Args:
      recipe: the recipe of the dot.
      stack: leading axes, for the dots of a stack of layers.
    """
    slots = (*stack, len(recipe.slots))
    return ScalingState(jnp.ones(slots, jnp.float32), jnp.zeros((*slots, recipe.history), jnp.float32), recipe)


def begin_with(state: ScalingState, tensor: str, amax: jax.Array) -> ScalingState:
    """The state before any observation, of dots of which one tensor, a weight, is known: its integers have its scale.

    At scale 1 the integers of most weights are all zero, where a floating-point format loses little. The history stays
    empty: calibrate all the same, before training and after loading other weights.

    Args:
      state: as `init` returns it.
      tensor: 'lhs', 'rhs' or 'grad'.
      amax: float32 of the shape of the stack: max |x|; one that is 0 or not finite changes nothing.
    """
    known = np.array([slot.tensor == tensor and slot.format.kind == "int" for slot in state.recipe.slots])
    found = jnp.where(known, amax[..., None], jnp.float32(0))[..., None]
    rules = _rules(state.recipe) * math.prod(state.scale.shape[:-1])
    scale = _scales(_or_hole(found).reshape(-1, 1), state.scale.reshape(-1), rules)
    return dataclasses.replace(state, scale=scale.reshape(state.scale.shape))


def for_devices(scale: jax.Array, devices: int) -> jax.Array:
    """[..., S] for each of so many devices, [..., N, S]; a dot given these observes amaxes by device."""
    return jnp.repeat(jnp.expand_dims(scale, -2), devices, axis=-2)


def observing(scale: jax.Array) -> jax.Array:
    """Gives a scale vector the dtype whose cotangents combine by max.

    Call it once, inside the function that is differentiated and jitted, on every scale of the model.

    Args:
      scale: float32 [..., S], or already observing.

    Returns:
      The same values; their cotangent is float32 [..., S]. Where nothing was observed, as in a branch that was not
      taken, it is -inf, the zero of a maximum, or 0.

    Raises:
      ValueError: outside jax.jit, where JAX cannot add such cotangents.
    """
    return scale if scale.dtype == fm32 else _observing(scale)


@jax.custom_vjp
def _observing(scale: jax.Array) -> jax.Array:
    converted = lax.convert_element_type(scale, fm32)
    if not isinstance(converted, jax.core.Tracer):
        raise ValueError("Amaxes are observed under jit only: wrap the differentiated function in jax.jit.")
    return converted


def _observing_fwd(scale: jax.Array) -> tuple[jax.Array, None]:
    return _observing(scale), None


def _observing_bwd(_: None, amaxes: jax.Array) -> tuple[jax.Array]:
    return (readable(amaxes),)


_observing.defvjp(_observing_fwd, _observing_bwd)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Context for differentiating with observing scales: says in words what JAX cannot do with their dtype."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if "fp8_meta" not in str(error):
            raise
        raise TypeError(
            "JAX cannot differentiate an operation on the scales that observe amaxes: take a layer out of a stack by "
            "jax.lax.scan or jax.lax.dynamic_index_in_dim, not by stack[i], and leave check_vma of jax.shard_map True."
        ) from error


def readable(scale: jax.Array) -> jax.Array:
    """The float32 values of a scale vector, observing or not."""
    return lax.convert_element_type(scale, jnp.float32) if scale.dtype == fm32 else scale


def _is_state(node: object) -> bool:
    return isinstance(node, ScalingState)


def combine(first: Any, second: Any) -> Any:
    """Combines the observed amaxes of two backward passes of one step (two microbatches, two hosts) by max."""
    return jax.tree.map(jnp.maximum, first, second)


def over_devices(amaxes: Any) -> Any:
    """What all devices observed together, of dots that were given their scales by `for_devices`.

    Args:
      amaxes: pytree of float32 [..., N, S]; those of several microbatches have been combined.

    Returns:
      A pytree of float32 [..., S], by one reduction for all of it; infinite where a device has seen a NaN.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(amaxes)
    if not leaves:
        return amaxes
    flat = [jnp.reshape(jnp.moveaxis(leaf, -2, 0), (leaf.shape[-2], -1)) for leaf in leaves]
    together = jnp.concatenate(flat, axis=1)
    largest = jnp.max(jnp.where(jnp.isnan(together), jnp.float32(jnp.inf), together), axis=0)
    ends = np.cumsum([part.shape[1] for part in flat])[:-1]
    shapes = [(*leaf.shape[:-2], leaf.shape[-1]) for leaf in leaves]
    parts = jnp.split(largest, ends)
    return treedef.unflatten([jnp.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)])


def update(states: Any, amaxes: Any) -> Any:
    """The next scaling state of a whole model.

    All dots with the same history length are computed as one array, so that histories are reduced by the same few
    kernels whatever the depth. What grows is one kernel per array of the result, which has a buffer of its own; where
    layers are stacked, nothing does.

    Args:
      states: pytree of ScalingState.
      amaxes: pytree of the same structure with, for each ScalingState, its observed amaxes, float32 [..., S]: the
        cotangents of the states' `scale`. Where nothing was observed it holds 0 or -inf.

    Returns:
      A pytree like `states`.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(states, is_leaf=_is_state)
    observed = treedef.flatten_up_to(amaxes)
    result = list(leaves)
    for length in {state.recipe.history: None for state in leaves}:
        group = [i for i, state in enumerate(leaves) if state.recipe.history == length]
        updated = _update_alike([leaves[i] for i in group], [observed[i] for i in group])
        for i, state in zip(group, updated, strict=True):
            result[i] = state
    return treedef.unflatten(result)


def _update_alike(states: list[ScalingState], amaxes: list[jax.Array]) -> list[ScalingState]:
    """`update` for states of one history length."""
    stacks = [(state.recipe, math.prod(state.scale.shape[:-1])) for state in states]
    rules = [rule for recipe, count in stacks for rule in _rules(recipe) * count]
    if not rules:
        return states
    history = jnp.concatenate([jnp.reshape(s.history, (-1, s.history.shape[-1])) for s in states])
    is_static = np.array([slot.is_static for recipe, count in stacks for slot in recipe.slots * count])
    history = _push(history, jnp.concatenate([jnp.ravel(amax) for amax in amaxes]), is_static)
    scale = _scales(history, jnp.concatenate([jnp.ravel(s.scale) for s in states]), rules)

    following, start = [], 0
    for state in states:
        own = slice(start, start + state.scale.size)
        start = own.stop
        parts = jnp.reshape(scale[own], state.scale.shape), jnp.reshape(history[own], state.history.shape)
        following.append(ScalingState(*parts, state.recipe))
    return following


def _push(history: jax.Array, amax: jax.Array, is_static: np.ndarray) -> jax.Array:
    """Enters a step's amaxes, [N], into a history, [N, H]; zero, and what is not finite, leaves a hole."""
    pushed = jnp.concatenate([_or_hole(amax)[:, None], history[:, :-1]], axis=1)
    calibrated = is_static & jnp.any(history > 0, axis=1)
    return jnp.where(calibrated[:, None], history, pushed)


def _or_hole(amax: jax.Array) -> jax.Array:
    """Amaxes, or 0 for those that are not finite, or subnormal, which most devices flush to zero."""
    return jnp.where(jnp.isfinite(amax) & (amax >= _SMALLEST_AMAX), amax, jnp.float32(0))


class _Rule(NamedTuple):
    """How a slot's scale follows from its history."""

    qtype: str
    amax: str
    margin: int
    scales: str


def _rules(recipe: Recipe) -> list[_Rule]:
    """Of a recipe's slots."""
    return [_Rule(slot.qtype, recipe.amax, recipe.margin, recipe.scales) for slot in recipe.slots]


def _scales(history: jax.Array, last_scale: jax.Array, rules: list[_Rule]) -> jax.Array:
    """The scales of N slots from their history, [N, H]; the last scale where the window is empty."""
    # Each distinct rule is evaluated for all slots and selected by a constant mask: a few vectors fuse into one
    # kernel, where slices and concatenations of single slots would not.
    scale = last_scale
    for rule in dict.fromkeys(rules):
        if rule.amax == "max":
            amax = jnp.max(history, axis=1)
        elif rule.amax == "average":
            observed = jnp.sum((history > 0).astype(jnp.float32), axis=1)
            amax = jnp.sum(history / jnp.maximum(observed, 1)[:, None], axis=1)
        else:
            newest = jnp.argmax(history > 0, axis=1, keepdims=True)
            amax = jnp.take_along_axis(history, newest, axis=1)[:, 0]
        candidate = scale_from_amax(amax, rule.qtype, margin=rule.margin, scale_format=rule.scales)
        chosen = np.array([other == rule for other in rules]) & (amax > 0)
        scale = jnp.where(chosen, candidate, scale)
    return scale


def shared_amax(scale: jax.Array, amax: jax.Array) -> jax.Array:
    """Returns the amaxes of the whole tensors that one vector of scales is for.

    A tensor batched by vmap that shares one unbatched scale is one tensor, as in the run without vmap, and so is one
    that shard_map splits. Left to themselves, each example and each device would have an amax, and JAX would sum them.

    Args:
      scale: float32 [S], the scale vector that the amaxes belong to.
      amax: float32 [S]; of one example under vmap, of one device's part under shard_map.
    """
    amax = _over_examples(scale, amax)
    axes = tuple(axis for axis in varying_axes([amax]) if axis not in varying_axes([scale]))
    return _from_bits(lax.pmax(_bits(amax), axes)) if axes else amax


def _bits(amax: jax.Array) -> jax.Array:
    """Integers in the order of magnitudes, in which NaN is the largest; a float max loses it on some backends."""
    return lax.bitcast_convert_type(jnp.abs(amax), jnp.int32)


def _from_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_batching.custom_vmap
def _over_examples(scale: jax.Array, amax: jax.Array) -> jax.Array:
    """For scale and amax [..., S], where the leading axes are those of vmaps that both are under."""
    del scale
    return amax


@_over_examples.def_vmap
def _over_examples_vmap(axis_size, in_batched, scale, amax):
    scale_batched, amax_batched = in_batched
    if scale_batched:
        amax = amax if amax_batched else jnp.broadcast_to(amax, (axis_size, *amax.shape))
        return _over_examples(scale, amax), True
    return _over_examples(scale, _from_bits(jnp.max(_bits(amax), axis=0)) if amax_batched else amax), False
