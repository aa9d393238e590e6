"""Groups of values that share a scale.

The shape of the scales says everything: it has the rank of the array, and each of its axes is 1
(the axis is shared), the full size n (one scale per index), or n / tile.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax import choices

GRANULARITIES = ("tensor", "channel", "row", "tile", "block")


def granularity(word: str, ndim: int, size: int = 128) -> dict[str, Any]:
    """Returns the `channelwise_axes` and `tiled_axes` that a granularity means.

    For arrays [..., rows, features], as activations [..., tokens, in] and weights [in, out] are:
    'tensor' has one scale; 'channel' one per index of the last axis (a weight's output channel);
    'row' one per row (a token); 'tile' one per 1×size piece of a row; 'block' one per size×size
    block of the last two axes, with leading axes apart.

    Args:
      word: one of GRANULARITIES.
      ndim: rank of the array.
      size: edge K of tiles and blocks.

    Raises:
      ValueError: unknown word, or a rank too low for it.
    """
    choices.check("granularity", word, GRANULARITIES)
    needed = {"tensor": 0, "block": 2}.get(word, 1)
    if ndim < needed:
        raise ValueError(f"Granularity {word!r} needs rank {needed} or more, not {ndim}: use 'tensor'.")
    last = ndim - 1
    leading = tuple(range(last))
    axes: dict[str, tuple[tuple[int, ...], dict[int, int]]] = {
        "tensor": ((), {}),
        "channel": ((last,), {}),
        "row": (leading, {}),
        "tile": (leading, {last: size}),
        "block": (leading[:-1], {last - 1: size, last: size}),
    }
    channelwise_axes, tiled_axes = axes[word]
    return {"channelwise_axes": channelwise_axes, "tiled_axes": tiled_axes}


def scale_shape(
    shape: Sequence[int],
    channelwise_axes: Sequence[int] = (),
    tiled_axes: Mapping[int, int] | None = None,
) -> tuple[int, ...]:
    """Returns the shape of the scales of an array of shape `shape`.

    Raises:
      ValueError: an axis is out of range or named twice, or a tile does not divide its axis.
    """
    result = [1] * len(shape)
    named: set[int] = set()
    for axis, tile in [*((axis, 1) for axis in channelwise_axes), *(tiled_axes or {}).items()]:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"channelwise_axes or tiled_axes name axis {axis} of rank {len(shape)}: "
                f"choose from {-len(shape)} to {len(shape) - 1}."
            )
        if axis % len(shape) in named:
            raise ValueError(f"channelwise_axes and tiled_axes name axis {axis} twice: leave it in one of them.")
        named.add(axis % len(shape))
        if tile < 1 or shape[axis] % tile:
            raise ValueError(
                f"tiled_axes: a tile of {tile} does not divide axis {axis} of size {shape[axis]}: "
                f"choose from {divisors(shape[axis])}, or pad the array."
            )
        result[axis] = shape[axis] // tile
    return tuple(result)


def divisors(size: int) -> str:
    """The tile sizes that divide an axis: the powers of two from 8 on, or where there is none all of them."""
    found = [tile for tile in range(1, size + 1) if size % tile == 0]
    powers = [tile for tile in found if tile >= 8 and tile.bit_count() == 1]
    return ", ".join(map(str, powers or found or [1]))


def check_scale_shape(shape: Sequence[int], groups: Sequence[int]) -> None:
    """Raises ValueError unless `groups` can be the shape of the scales of an array of `shape`."""
    fits = len(shape) == len(groups) and all(
        group in (1, n) or (group > 0 and n % group == 0) for n, group in zip(shape, groups, strict=True)
    )
    if not fits:
        raise ValueError(
            f"A scale of shape {tuple(groups)} does not fit values of shape {tuple(shape)}: "
            "give it the same rank, and each axis 1, the full size, or a divisor of it."
        )


def reduce(reduction: Callable[..., jax.Array], x: jax.Array, groups: Sequence[int]) -> jax.Array:
    """Reduces each group of x, starting from 0, to an array of shape `groups`.

    On CPUs a float maximum or minimum loses NaN: see `extremes`.
    """
    shape, axes = _reduction(x.shape, groups)
    return reduction(x.reshape(shape), axis=axes, initial=0).reshape(groups)


def per_group(operation: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, values: jax.Array) -> jax.Array:
    """Returns operation(x, value of its group), elementwise; `values` has one entry per group."""
    split = _split(x.shape, values.shape)
    if all(len(sizes) == 1 for sizes in split):
        return operation(x, values)
    narrow = [(group, 1) if len(sizes) == 2 else (group,) for sizes, group in zip(split, values.shape, strict=True)]
    wide = x.reshape(sum(split, ()))
    return operation(wide, values.reshape(sum(narrow, ()))).reshape(x.shape)


def _split(shape: Sequence[int], groups: Sequence[int]) -> list[tuple[int, ...]]:
    # A tiled axis n becomes (n / tile, tile); the others stay whole.
    return [(g, n // g) if 1 < g < n else (n,) for n, g in zip(shape, groups, strict=True)]


def _reduction(shape: Sequence[int], groups: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape, and the axes of it, whose reduction leaves one value per group."""
    split = _split(shape, groups)
    axes = []
    position = -1
    for sizes, group in zip(split, groups, strict=True):
        position += len(sizes)
        if len(sizes) == 2 or sizes[0] != group:
            axes.append(position)
    return sum(split, ()), tuple(axes)


def amax(
    x: jax.Array,
    *,
    channelwise_axes: Sequence[int] = (),
    tiled_axes: Mapping[int, int] | None = None,
    keep_nan: bool = False,
) -> jax.Array:
    """Returns the largest finite |x| of each group.

    Args:
      x: floating-point array of any shape.
      channelwise_axes: axes that keep one value per index.
      tiled_axes: axis to tile size, for one value per tile.
      keep_nan: whether a NaN makes its group's result NaN, for formats without a NaN code.

    Returns:
      float32 of shape `scale_shape(...)`; 0 for a group that is empty or has no finite entry.
    """
    return extremes(x, scale_shape(x.shape, channelwise_axes, tiled_axes), keep_nan=keep_nan)[0]


def as_float32(x: jax.Array) -> jax.Array:
    """The values of x, float32.

    What rounded them to bfloat16, XLA:CPU may take together with this conversion for the identity, in one program and
    not in another; so there they are rounded once more, explicitly.
    """
    wide = x.astype(jnp.float32)
    if x.dtype != jnp.bfloat16:
        return wide
    rounded = lambda wide: lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
    return lax.platform_dependent(wide, cpu=rounded, default=lambda same: same)


def extremes(x: jax.Array, groups: Sequence[int], *, keep_nan: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the largest finite |x| of each group, and the largest |x|, where NaN > Inf.

    Bit patterns are compared, as integers in the same order, because a float maximum can lose NaN: that of XLA:CPU does
    in all but the smallest reductions, and what joins those of several GPUs need not keep it. XLA defines it to be
    kept; for TPUs, where only floats are compared in the same pass that quantizes, it is taken at its word, as no TPU
    was at hand.

    Args:
      x: floating-point array of any shape.
      groups: shape of the results.
      keep_nan: as in `amax`, for the first result.

    Returns:
      Two float32 arrays of shape `groups`; 0 for an empty group.
    """
    magnitude = jnp.abs(as_float32(x))
    hidden = magnitude == jnp.inf if keep_nan else ~(magnitude < jnp.inf)
    finite = jnp.where(hidden, jnp.float32(0), magnitude)
    shape, axes = _reduction(x.shape, groups)
    zero = np.int32(0)

    def separately(*both: jax.Array) -> list[jax.Array]:
        return [lax.reduce(bits, zero, lax.max, axes) for bits in both]

    def as_floats(*both: jax.Array) -> list[jax.Array]:
        floats = [lax.bitcast_convert_type(bits, jnp.float32) for bits in both]
        found = [lax.reduce(x, np.float32(0), lax.max, axes) for x in floats]
        return [lax.bitcast_convert_type(x, jnp.int32) for x in found]

    def together(*both: jax.Array) -> list[jax.Array]:
        # On CPUs four times faster than one integer maximum, which the barrier keeps XLA from
        # making of it where one result is not used; but not along columns.
        if len(shape) - 1 not in axes:
            return separately(*both)
        larger = lambda a, b: [lax.max(a[0], b[0]), lax.max(a[1], b[1])]
        return lax.optimization_barrier(lax.reduce(list(both), [zero, zero], larger, axes))

    both = [lax.bitcast_convert_type(m, jnp.int32).reshape(shape) for m in (finite, magnitude)]
    found = lax.platform_dependent(*both, cpu=together, tpu=as_floats, default=separately)
    first, second = (lax.bitcast_convert_type(bits, jnp.float32).reshape(groups) for bits in found)
    return first, second
