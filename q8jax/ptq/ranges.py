"""Range calibration: which range of values codes must reach, from any number of batches of them.

A `Calibrator` is four pure functions over a state of constant size:

    state = calibrator.init()
    state = calibrator.update(state, x)             # for each batch; under jit, scan or vmap
    state = calibrator.merge(state, other)          # of another device or run, in any order
    scale, zero_point = calibrator.finish(state)

A value that is not finite never enters a range, and is seen: `state.nonfinite`. A batch without a finite nonzero value
says nothing about a range, and is left out of an average of ranges.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from q8jax.ptq.target import Target

Scales = tuple[jax.Array, jax.Array | None]


class Calibrator(NamedTuple):
    """How a range is found; see the module.

    Attributes:
      init: () -> state.
      update: (state, x) -> state; x is floating-point [..., channels].
      merge: (state, state) -> state.
      finish: state -> scale, float32, and zero point, int32 or None; of shape [], or [channels] by channel.
    """

    init: Callable[[], Any]
    update: Callable[[Any, jax.Array], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Scales]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Range:
    """The extremes of what was seen, or sums of them.

    Attributes:
      low, high: float32 [] or [channels], low <= 0 <= high; times `weight`.
      weight: float32, like these; 0 where nothing was seen.
      nonfinite: bool [], whether a value that is not finite was seen.
    """

    low: jax.Array
    high: jax.Array
    weight: jax.Array
    nonfinite: jax.Array


def min_max(target: Target, channels: int | None = None) -> Calibrator:
    """The range of all that was seen.

    Args:
      target: whose scale, or scale and zero point, is sought; a symmetric one takes the larger magnitude of both
        ends, which is the absmax.
      channels: size of the last axis, for a range of each channel; None for one range.
    """
    return Calibrator(lambda: _nothing(channels), _update_extremes, _join_extremes, lambda s: _finish(target, s))


def moving_average(target: Target, decay: float = 0.9, channels: int | None = None) -> Calibrator:
    """The mean of the ranges of batches, those of the past weighing `decay` less with each batch.

    Weights are divided by their sum, so the first batches are not drawn towards zero. Merging takes two states to be of
    the same age, as those of devices are.

    Args:
      target, channels: as in `min_max`.
      decay: from 0, the last batch alone, to below 1.

    Raises:
      ValueError: decay out of range.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and less than 1, not {decay}.")

    def update(state: Range, x: jax.Array) -> Range:
        batch = _range_of(x, state.low.ndim)
        seen = batch.weight > 0
        fade = lambda old, new: jnp.where(seen, jnp.float32(decay) * old + jnp.float32(1 - decay) * new, old)
        return Range(
            fade(state.low, batch.low),
            fade(state.high, batch.high),
            fade(state.weight, batch.weight),
            state.nonfinite | batch.nonfinite,
        )

    def merge(first: Range, second: Range) -> Range:
        # Of booleans the sum is the disjunction.
        return jax.tree.map(jnp.add, first, second)

    return Calibrator(lambda: _nothing(channels), update, merge, lambda s: _finish(target, s))


def _nothing(channels: int | None) -> Range:
    zero = jnp.zeros(() if channels is None else channels, jnp.float32)
    return Range(zero, zero, zero, jnp.zeros((), bool))


def _range_of(x: jax.Array, rank: int) -> Range:
    axes = tuple(range(x.ndim - rank))
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x.astype(jnp.float32), jnp.float32(0))
    low, high = jnp.min(x, axes, initial=0), jnp.max(x, axes, initial=0)
    return Range(low, high, (low < high).astype(jnp.float32), ~jnp.all(finite))


def _update_extremes(state: Range, x: jax.Array) -> Range:
    return _join_extremes(state, _range_of(x, state.low.ndim))


def _join_extremes(first: Range, second: Range) -> Range:
    return Range(
        jnp.minimum(first.low, second.low),
        jnp.maximum(first.high, second.high),
        jnp.maximum(first.weight, second.weight),
        first.nonfinite | second.nonfinite,
    )


def _finish(target: Target, state: Range) -> Scales:
    weight = jnp.where(state.weight > 0, state.weight, jnp.float32(1))
    return target.scales_of_range(state.low / weight, state.high / weight)
