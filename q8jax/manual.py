"""Inside `jax.shard_map` the type of an array says along which manual mesh axes it varies.

A rule of `custom_vjp` must return cotangents that vary as the operands do, and it cannot know where to sum. So a dot
casts its operands to vary alike before the rule sees them; JAX then sums the cotangent of the replicated one.
"""

from collections.abc import Iterable

import jax
from jax import lax


def varying_axes(arrays: Iterable[jax.Array]) -> tuple[str, ...]:
    """The manual mesh axes along which any of the arrays varies; none outside `jax.shard_map`."""
    return tuple(sorted({axis for x in arrays for axis in jax.typeof(x).manual_axis_type.varying}))


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Casts arrays to vary along the same manual mesh axes; the cotangent of a cast one is summed over the new axes."""
    axes = varying_axes(arrays)
    casts = [tuple(axis for axis in axes if axis not in varying_axes([x])) for x in arrays]
    return tuple(lax.pcast(x, new, to="varying") if new else x for x, new in zip(arrays, casts, strict=True))


def own_key(key: jax.Array, arrays: Iterable[jax.Array]) -> jax.Array:
    """A key of its own for every shard of the arrays, where all devices hold the same `key`."""
    axes = tuple(axis for axis in varying_axes(arrays) if axis not in varying_axes([key]))
    return jax.random.fold_in(key, lax.axis_index(axes)) if axes else key
