"""Products on meshes whose axes are part of the arrays' types.

Along a *manual* axis, inside `jax.shard_map`, an array varies or is replicated. The rules of a custom_vjp must return
cotangents that vary as the operands do, and cannot know where to sum. So operands are cast to vary alike before the
rules see them, and JAX sums the cotangent of the replicated one.

Along an *explicit* axis, as `jax.make_mesh` makes them, a dimension is sharded by type, and a dot whose contracting
dimensions are sharded needs to be told its result's sharding. That is so in the backward pass of every data-parallel
dot. So the product runs with these axes in auto mode, and its result gets the sharding that the plain product has.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax


def varying_axes(arrays: Iterable[jax.Array]) -> tuple[str, ...]:
    """The manual mesh axes along which any of the arrays varies; none outside `jax.shard_map`."""
    return tuple(sorted({axis for x in arrays for axis in jax.typeof(x).manual_axis_type.varying}))


def multiply(
    product: Callable[..., jax.Array],
    plain: Callable[..., jax.Array],
    lhs: Any,
    rhs: Any,
    scale: jax.Array | None,
    key: jax.Array | None,
    out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
) -> jax.Array:
    """Runs a quantized product on whatever mesh its operands are on.

    Args:
      product: function of (lhs, rhs, scale=, key=).
      plain: the same product of (lhs, rhs) as JAX has it, which says how the result is sharded.
      lhs, rhs, scale, key: what `product` takes, operands also as pytrees of arrays; where a mesh axis is manual, each
        device gets a key of its own.
      out_sharding: of the result, on explicit axes; by default that of `plain`.
    """
    operands = _vary_alike(lhs, rhs)
    if key is not None:
        axes = tuple(axis for axis in varying_axes(jax.tree.leaves(operands)) if axis not in varying_axes([key]))
        key = jax.random.fold_in(key, lax.axis_index(axes)) if axes else key
    run: Callable[..., jax.Array] = lambda lhs, rhs, scale, key: product(lhs, rhs, scale=scale, key=key)
    leaves = jax.tree.leaves(operands)
    explicit = tuple(sorted({axis for x in leaves for axis in jax.typeof(x).sharding.mesh.explicit_axes}))
    if explicit:
        sharding = jax.eval_shape(plain, *operands).sharding if out_sharding is None else out_sharding
        run = jax.sharding.auto_axes(run, axes=explicit, out_sharding=sharding)
    return run(*operands, scale, key)


def _vary_alike(*operands: Any) -> tuple[Any, ...]:
    axes = varying_axes(jax.tree.leaves(operands))

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in varying_axes([x]))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, operands)
