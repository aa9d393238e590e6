"""The device mesh, and where a run's arrays are on it."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.models import shardings
from experiments.models.config import TransformerConfig
from experiments.models.shardings import AXES, ModelShardings

if TYPE_CHECKING:
    from experiments.training.step import Trainer


class Placement:
    """Where arrays go: the batch along `data` and `fsdp`, parameters along `fsdp` and `tensor`, the rest everywhere.

    Attributes:
      mesh: of the axes in `AXES`.
      size: number of devices.
      replicated: sharding of what is on every device.
      batch: sharding of tokens [microbatch, row, token].
      rows: sharding of a matrix by rows.
    """

    def __init__(self, devices: Sequence[jax.Device], fsdp: int = 1, tensor: int = 1):
        """A mesh of all the devices, as many along `data` as the other axes leave."""
        self.mesh = Mesh(np.array(devices).reshape(-1, fsdp, tensor), AXES)
        self.size = len(devices)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.batch = shardings.place(self.mesh, ("", "batch", ""))
        self.rows = shardings.place(self.mesh, ("batch", ""))

    def __str__(self) -> str:
        """The `--mesh` that says so."""
        shown = [f"{axis}:{size}" for axis, size in self.mesh.shape.items() if size > 1]
        return ",".join(shown) or "data:1"

    @classmethod
    def parse(cls, text: str, rows: int, devices: Sequence[jax.Device] | None = None) -> "Placement":
        """The placement that `--mesh` asks for.

        Args:
          text: 'auto' for the most devices that divide the batch, or axes with their sizes, 'data:2,fsdp:2,tensor:2'.
          rows: rows of one microbatch.
          devices: to choose from; by default those that are there.

        Raises:
          ValueError: a misspelt axis, more than there are devices, or a size that does not divide the batch.
        """
        devices = jax.devices() if devices is None else devices
        if text == "auto":
            return cls(devices[: max(n for n in range(1, len(devices) + 1) if rows % n == 0)])
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
        return cls(devices[:size], sizes["fsdp"], sizes["tensor"])

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
