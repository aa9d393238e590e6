"""The leaves of a checkpointed tree: their names, their types, and how Orbax is given them.

Orbax (through TensorStore) has no word for some of the dtypes that low precision needs and none for
an array without elements. Such leaves travel as unsigned integers, or not at all, and come back as
what they were.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

_BY_BITS = frozenset({np.dtype(ml_dtypes.float8_e4m3)})  # 8 bits wide, stored as their bit pattern
_BY_VALUE = frozenset({np.dtype(ml_dtypes.uint4), np.dtype(ml_dtypes.uint2)})


def named_leaves(tree: Any) -> dict[str, Any]:
    """Path of each leaf (keys joined by dots) to the leaf, in the order of `jax.tree.leaves`.

    Raises:
      TypeError: a leaf is not an array (plain Python values belong in a checkpoint's metadata), or
        is a typed PRNG key (checkpoint its `jax.random.key_data`).
      ValueError: two leaves have the same path.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ValueError(f"two leaves of the checkpointed tree are called {name}")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"leaf {name} of the checkpointed tree is a {type(leaf).__name__}, not an array;"
                " put plain values in the metadata"
            )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"leaf {name} of the checkpointed tree is a typed PRNG key; give its jax.random.key_data")
        leaves[name] = leaf
    return leaves


def describe(leaf: Any) -> str:
    """dtype and shape, such as `float32[4,128]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def mismatch(stored: dict[str, str], wanted: dict[str, str]) -> str | None:
    """How two maps from leaf name to `describe` differ, in part of a sentence; None if equal."""
    lost = [name for name in stored if name not in wanted]
    new = [name for name in wanted if name not in stored]
    changed = [name for name in wanted if name in stored and stored[name] != wanted[name]]
    if changed:
        name = changed[0]
        text = f"{name} is {stored[name]} there and {wanted[name]} here"
    elif new:
        text = f"it lacks {new[0]}"
    elif lost:
        text = f"it has {lost[0]}, which this run has not"
    else:
        return None
    others = len(lost) + len(new) + len(changed) - 1
    return f"{text}, and {others} more differ" if others else text


def to_storage(leaf: Any) -> jax.Array | np.ndarray:
    """`leaf` as an array that Orbax can write, of the same shape and sharding."""
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if array.dtype in _BY_BITS:
        if isinstance(array, jax.Array):
            return jax.lax.bitcast_convert_type(array, jnp.uint8)
        return array.view(np.uint8)
    return array.astype(np.uint8) if array.dtype in _BY_VALUE else array


def storage_targets(target: Any, shardings: Any = None) -> dict[str, Any]:
    """What to ask Orbax for: an ndarray for each ndarray of `target`, a sharded spec for the rest.

    `shardings` is one for every leaf, or a tree of them; None takes the leaf's own, or the first
    local device where it has none.
    """
    named = named_leaves(target)
    if shardings is None:
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        each = [getattr(leaf, "sharding", None) or default for leaf in named.values()]
    elif isinstance(shardings, jax.sharding.Sharding):
        each = [shardings] * len(named)
    else:
        each = jax.tree.leaves(shardings)
    targets: dict[str, Any] = {}
    for (name, leaf), sharding in zip(named.items(), each, strict=True):
        dtype = np.uint8 if leaf.dtype in _BY_BITS | _BY_VALUE else leaf.dtype
        if isinstance(leaf, (np.ndarray, np.generic)):
            targets[name] = np.empty(leaf.shape, dtype)
        else:
            targets[name] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
    return targets


def from_storage(stored: Any, target: Any) -> Any:
    """The leaf of the dtype of `target` that `to_storage` made `stored` of.

    `stored` may also be the storage target itself, of an array without elements.
    """
    if isinstance(stored, jax.ShapeDtypeStruct):
        stored = jax.device_put(jnp.zeros(stored.shape, stored.dtype), stored.sharding)
    if target.dtype in _BY_BITS:
        if isinstance(stored, jax.Array):
            return jax.lax.bitcast_convert_type(stored, target.dtype)
        return stored.view(target.dtype)
    return stored.astype(target.dtype) if target.dtype in _BY_VALUE else stored
