"""Where the operands of a dot are while its GEMMs multiply them, and its results afterwards, on automatic mesh axes.

A tensor that is split along an axis over which it is summed, or that each device needs whole, has to travel first. What
travels are its codes, as bytes: the compiler is told where they have to be after they are made and before they are
multiplied, and not where the tensor has to be that they are made of. What each device has summed is scaled and rounded
to the result's dtype before it is added to what others have, unless scales change along the axis that is summed over.

The amax of a tensor would travel as well, a few bytes for each tensor of each layer. Given a scale vector for each
device, all alike, a dot observes amaxes by device, and their maximum waits for `scaling.over_devices`, which takes that
of all dots at once.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from q8jax.contraction import Layout
from q8jax.groups import extremes
from q8jax.maxima import amax
from q8jax.qarray import QArray


@dataclasses.dataclass(frozen=True)
class DotShardings:
    """Where the tensors of a dot are; None leaves it to the compiler.

    Attributes:
      lhs, rhs, grad: operands, while they are multiplied.
      fwd, dlhs, drhs: results of the three GEMMs.
    """

    lhs: NamedSharding | None = None
    rhs: NamedSharding | None = None
    grad: NamedSharding | None = None
    fwd: NamedSharding | None = None
    dlhs: NamedSharding | None = None
    drhs: NamedSharding | None = None

    def home(self, tensor: str) -> NamedSharding | None:
        """Where a tensor is before it is sent anywhere: where its gradient, or it as a result, is wanted."""
        return {"lhs": self.dlhs, "rhs": self.drhs, "grad": self.fwd}[tensor]


ANYWHERE = DotShardings()


def amax_by_device(x: jax.Array, sharding: NamedSharding | None, devices: int) -> jax.Array:
    """float32 [devices]: `maxima.amax` of what each device of a mesh has of an array, found where it is.

    Args:
      x: that is where `sharding` says.
      sharding: None if it is not known.
      devices: of the mesh.
    """
    if sharding is None:
        return jnp.broadcast_to(amax(x), (devices,))
    mesh, axes = sharding.mesh, [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    split = [
        _names(axis) if size % _parts(sharding, axis) == 0 else () for axis, size in zip(axes, x.shape, strict=True)
    ]
    sizes = [[mesh.shape[name] for name in names] for names in split]
    largest = extremes(x, tuple(map(math.prod, sizes)), keep_nan=True)[1]
    names = [name for some in split for name in some]
    order = sorted(range(len(names)), key=lambda i: mesh.axis_names.index(names[i]))
    along = lax.transpose(largest.reshape([size for some in sizes for size in some]), order)
    missing = tuple(i for i, name in enumerate(mesh.axis_names) if name not in names)
    everywhere = jnp.broadcast_to(lax.expand_dims(along, missing), tuple(mesh.shape.values())).reshape(-1)
    return placed(everywhere, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def placed(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """The same array, where the sharding says."""
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)


def gathered(operand: QArray | jax.Array, sharding: NamedSharding | None, layout: Layout | None) -> QArray | jax.Array:
    """An operand of a GEMM where its sharding says; of a quantized one the codes travel, and its scales.

    Args:
      operand: as the GEMM takes it.
      sharding: of the tensor before it was flattened.
      layout: as which it was flattened, if it was.
    """
    if sharding is None:
        return operand
    if not isinstance(operand, QArray):
        return placed(operand, _of(sharding, layout, operand.shape))
    codes = operand.qvalue
    narrow = jnp.issubdtype(codes.dtype, jnp.floating)
    sent = lax.bitcast_convert_type(codes, jnp.uint8) if narrow and codes.dtype.itemsize == 1 else codes
    # Without the barrier XLA:CPU takes the bytes for the FP8 values they are, and sends these as float16.
    sent = placed(lax.optimization_barrier(sent), _of(sharding, layout, codes.shape))
    received = lax.bitcast_convert_type(sent, codes.dtype) if sent.dtype != codes.dtype else sent
    return dataclasses.replace(
        operand, qvalue=received, scale=placed(operand.scale, _of(sharding, layout, operand.scale.shape))
    )


def split_axis(x: QArray | jax.Array, axis: int, parts: int) -> QArray:
    """A quantized array, its scales constant along an axis, with that axis as two: parts, and what each has."""
    assert isinstance(x, QArray)
    shape = x.qvalue.shape
    codes = lax.reshape(x.qvalue, (*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :]))
    return dataclasses.replace(x, qvalue=codes, scale=lax.expand_dims(x.scale, (axis,)))


def added_over(parts: jax.Array, names: tuple[str, ...], sharding: NamedSharding) -> jax.Array:
    """The sum over axis 0, which lies along these axes of the mesh, in the dtype of the parts, placed.

    Along an axis that splits the sum as well each device gets its share, and adds no more than that along the others.
    """
    spec = [_names(axis) for axis in sharding.spec]
    shares = {}
    for position, along in enumerate(spec):
        # Only of the last axes of the mesh are the shares those that the result has.
        own = tuple(name for name in along if name in names)
        if own and along[-len(own) :] == own:
            shares[position] = own
    rest = tuple(name for name in names if not any(name in own for own in shares.values()))

    def add(part: jax.Array) -> jax.Array:
        total = lax.squeeze(part, (0,))
        for position, own in shares.items():
            total = lax.psum_scatter(total, own, scatter_dimension=position, tiled=True)
        return lax.psum(total, rest)

    before = [tuple(name for name in along if name not in names) or None for along in spec]
    after = [tuple(name for name in along if name not in rest) or None for along in spec]
    each = jax.shard_map(
        add, mesh=sharding.mesh, in_specs=PartitionSpec(names, *before), out_specs=PartitionSpec(*after)
    )
    # Without the barrier XLA:GPU pipelines the sums of a loop, and a layer's temporaries stand beside the head's.
    return placed(lax.optimization_barrier(each(parts)), sharding)


def _of(sharding: NamedSharding, layout: Layout | None, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array that was flattened; axes that it does not divide are whole."""
    axes = [*sharding.spec, *[None] * (len(shape) if layout is None else sum(map(len, layout)))]
    if layout is not None:
        # Of axes that became one, the first tells where it is, if no other is split.
        heads = [[axes[axis] for axis in group] for group in layout]
        axes = [head[0] if head and not any(head[1:]) else None for head in heads]
    spec = [axis if size % _parts(sharding, axis) == 0 else None for axis, size in zip(axes, shape, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def parts_along(sharding: NamedSharding | None, axis: int) -> int:
    """Into how many an axis of a tensor is split."""
    return 1 if sharding is None else _parts(sharding, names_along(sharding, axis))


def _parts(sharding: NamedSharding, axis: str | tuple[str, ...] | None) -> int:
    """Into how many an axis of a tensor is split that lies along these axes of the mesh."""
    return math.prod(sharding.mesh.shape[name] for name in _names(axis))


def names_along(sharding: NamedSharding | None, axis: int) -> tuple[str, ...]:
    """The axes of the mesh along which an axis of a tensor is split."""
    spec = () if sharding is None else sharding.spec
    return _names(spec[axis]) if axis < len(spec) else ()


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()
