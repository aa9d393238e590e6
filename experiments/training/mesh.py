"""The device mesh, and where a run's arrays are on it."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.models import shardings
from experiments.models.config import TransformerConfig
from experiments.models.shardings import AXES, ModelShardings
from q8jax.devices import get_device

if TYPE_CHECKING:
    from experiments.training.step import Trainer


class Placement:
    """Where arrays go: the batch along `data` and `fsdp`, parameters along `fsdp` and `tensor`, the rest everywhere.

    Attributes:
      mesh: of the axes in `AXES`.
      devices: in the mesh's order.
      size: their number.
      parts: into how many the batch is split.
      replicated: sharding of what is on every device.
      batch: sharding of tokens [microbatch, row, token].
      rows: sharding of a matrix by rows.
    """

    def __init__(self, devices: Sequence[jax.Device], fsdp: int = 1, tensor: int = 1):
        """A mesh of all the devices, as many along `data` as the other axes leave."""
        self.mesh = Mesh(_arranged(devices, fsdp, tensor), AXES)
        self.devices = tuple(self.mesh.devices.flat)
        self.size = len(devices)
        self.parts = self.size // tensor
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.batch = shardings.place(self.mesh, ("", "batch", ""))
        self.rows = shardings.place(self.mesh, ("batch", ""))

    def __str__(self) -> str:
        """The `--mesh` that says so."""
        shown = [f"{axis}:{size}" for axis, size in self.mesh.shape.items() if size > 1]
        return ",".join(shown) or "data:1"

    @classmethod
    def parse(
        cls,
        text: str,
        rows: int,
        devices: Sequence[jax.Device] | None = None,
        config: TransformerConfig | None = None,
    ) -> "Placement":
        """The placement that `--mesh` asks for.

        Args:
          text: axes with their sizes, 'data:2,fsdp:2,tensor:2', or 'auto' for the most devices that divide the batch,
            with parameters split among as few of them as leave half of their memory for other things.
          rows: rows of one microbatch.
          devices: to choose from; by default those that are there.
          config: of the model; without it 'auto' splits no parameters.

        Raises:
          ValueError: a misspelt axis, more than there are devices, a size that does not divide the batch, or one that
            leaves a process without a device.
        """
        devices = jax.devices() if devices is None else devices
        processes = len({device.process_index for device in devices})
        if text == "auto":
            counts = (n for n in range(len(devices), 0, -1) if rows % n == 0)
            shared = next((chosen for n in counts if (chosen := _shared(devices, n))), None)
            if shared is None:
                raise ValueError(
                    f"--mesh=auto finds no part of the {rows} rows of a microbatch (--batch_size over --accumulate) "
                    f"for each of {processes} processes: make them a multiple of {processes}, best of {len(devices)}."
                )
            return cls(shared, _parts_of_parameters(shared, config) if config else 1)
        sizes = _sizes(text)
        size = math.prod(sizes.values())
        if size > len(devices):
            raise ValueError(f"--mesh={text} needs {size} devices, but there are {len(devices)}: lower it or use auto.")
        split = sizes["data"] * sizes["fsdp"]
        if rows % split:
            divisors = ", ".join(str(n) for n in range(1, len(devices) + 1) if rows % n == 0)
            named = " times ".join(axis for axis in ("data", "fsdp") if sizes[axis] > 1)
            raise ValueError(
                f"--mesh={text} does not divide the {rows} rows of a microbatch (--batch_size over --accumulate): "
                f"choose {named} from {divisors}."
            )
        chosen = _shared(devices, size)
        if chosen is None:
            raise ValueError(
                f"--mesh={text} takes {size} of {len(devices)} devices, which are not as many of each of {processes} "
                "processes: give sizes whose product is a multiple of that, best all devices."
            )
        return cls(chosen, sizes["fsdp"], sizes["tensor"])

    def of_model(self, text: str, config: TransformerConfig, seq_len: int) -> ModelShardings:
        """Where a transformer's arrays are.

        Raises:
          ValueError: the mesh, `--mesh=text`, does not divide it.
        """
        shardings.check(self.mesh, text, config, seq_len)
        return ModelShardings.of(self.mesh)

    def of(self, tree: Any) -> Any:
        """The sharding of each leaf of a tree of arrays or their shapes: parameters are known by their paths."""
        by_path = lambda path, leaf: shardings.parameter(self.mesh, _joined(path), leaf.ndim)
        return jax.tree_util.tree_map_with_path(by_path, tree)

    def shapes(self, tree: Any) -> Any:
        """Shapes with their shardings."""
        with_sharding = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(with_sharding, tree, self.of(tree))

    def local_rows(self, rows: int) -> np.ndarray:
        """Which of so many rows of a microbatch this process's devices hold, in ascending order."""
        indices = self.batch.addressable_devices_indices_map((1, rows, 1)).values()
        return np.unique(np.concatenate([np.arange(rows)[index[1]] for index in indices if index is not None]))

    def place(self, local_AxBxT: np.ndarray, rows: int) -> jax.Array:
        """Puts microbatches on the devices.

        Args:
          local_AxBxT: of each the rows that `local_rows` names.
          rows: of a whole microbatch.
        """
        held = self.local_rows(rows)
        shape = local_AxBxT.shape[0], rows, *local_AxBxT.shape[2:]

        def part(index: Any) -> np.ndarray:
            here = np.searchsorted(held, np.arange(rows)[index[1]])
            return local_AxBxT[index[0], here[0] : here[-1] + 1]

        return jax.make_array_from_callback(shape, self.batch, part)

    def replicate(self, x: np.ndarray) -> jax.Array:
        """Puts on every device what every process has."""
        return jax.make_array_from_callback(x.shape, self.replicated, lambda index: x[index])

    def lower(self, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> jax.stages.Lowered:
        """Lowers a function of arrays, or of their shapes; its results are placed as `of` says."""
        results = self.of(jax.eval_shape(function, *arguments))
        return jax.jit(function, out_shardings=results, donate_argnums=donate).lower(*arguments)

    def lower_step(self, trainer: "Trainer", tokens: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """Lowers a training step for a batch of this shape, with nothing allocated."""
        return self.lower(trainer.step, self.shapes(jax.eval_shape(trainer.init)), tokens, donate=(0,))


# Of a parameter: itself, its gradient and two moments, all float32.
_STATE_BYTES = 16


def _parts_of_parameters(devices: Sequence[jax.Device], config: TransformerConfig) -> int:
    """Among how many devices parameters have to be split, within a slice; as many as can be if that does not do."""
    device = get_device(devices[0].device_kind)
    if device is None:
        return 1
    together = len(devices) // len({slice_of(device) for device in devices})
    divisors = [n for n in range(1, together + 1) if together % n == 0 and config.d_model % n == 0]
    enough = (n for n in divisors if 2 * _STATE_BYTES * config.params <= n * device.memory)
    return next(enough, divisors[-1])


def _shared(devices: Sequence[jax.Device], count: int) -> list[jax.Device] | None:
    """So many of the devices, of each process as many; None where that cannot be."""
    own: dict[int, list[jax.Device]] = {}
    for device in devices:
        own.setdefault(device.process_index, []).append(device)
    each, rest = divmod(count, len(own))
    if rest or each > min(map(len, own.values())):
        return list(devices) if count == len(devices) else None
    chosen = {device for some in own.values() for device in some[:each]}
    return [device for device in devices if device in chosen]


def _arranged(devices: Sequence[jax.Device], fsdp: int, tensor: int) -> np.ndarray:
    """Devices as [data, fsdp, tensor]; of TPUs those of one axis near each other, and slices apart along data alone."""
    shape = len(devices) // (fsdp * tensor), fsdp, tensor
    slices = {slice_of(device) for device in devices}
    if not _is_box(devices, len(slices)) or shape[0] % len(slices):
        return np.array(devices).reshape(shape)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within, between = (shape[0] // len(slices), fsdp, tensor), (len(slices), 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def _is_box(devices: Sequence[Any], slices: int) -> bool:
    """Whether these are all the devices of equal boxes of a torus, one in each slice."""
    if devices[0].platform != "tpu":
        return False
    places = {(slice_of(device), *device.coords) for device in devices}
    sides = [len(set(along)) for along in zip(*places, strict=True)]
    return len(places) == math.prod(sides) and sides[0] == slices


def slice_of(device: Any) -> int:
    """Which of several slices a TPU is in."""
    return getattr(device, "slice_index", 0)


def _joined(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _sizes(text: str) -> dict[str, int]:
    """The size of each axis that a `--mesh` names, 1 of the others.

    Raises:
      ValueError: it cannot be read.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+):([1-9]\d*)", part.strip())
        if not match or match[1] not in AXES or match[1] in sizes:
            raise ValueError(
                f"--mesh={text} must be auto or sizes of some of {', '.join(AXES)}, as in data:2,fsdp:2,tensor:2."
            )
        sizes[match[1]] = int(match[2])
    return dict.fromkeys(AXES, 1) | sizes
