"""The device mesh: so far one axis, `data`, over which the batch is split."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from experiments.training.step import Trainer

AXES = ("data",)


class Placement:
    """Where arrays go: the batch split over the data axis, everything else on every device.

    Attributes:
      size: number of devices.
      replicated: sharding of what is on every device.
      batch: sharding of tokens [microbatch, row, token].
      rows: sharding of a matrix by rows.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        mesh = Mesh(np.array(devices), AXES)
        self.size = len(devices)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch = NamedSharding(mesh, PartitionSpec(None, "data"))
        self.rows = NamedSharding(mesh, PartitionSpec("data"))

    def __str__(self) -> str:
        """The `--mesh` that says so."""
        return f"data:{self.size}"

    @classmethod
    def parse(cls, text: str, rows: int, devices: Sequence[jax.Device] | None = None) -> "Placement":
        """The placement that `--mesh` asks for.

        Args:
          text: 'auto' for the most devices that divide the batch, or 'data:N'.
          rows: rows of one microbatch.
          devices: to choose from; by default those that are there.

        Raises:
          ValueError: a misspelt axis, more than there are devices, or a size that does not divide the batch.
        """
        devices = jax.devices() if devices is None else devices
        return cls(devices[: _size(text, len(devices), rows)])

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
        """Lowers a function of arrays, or of their shapes, whose results are wanted on every device."""
        return jax.jit(function, out_shardings=self.replicated, donate_argnums=donate).lower(*arguments)

    def lower_step(self, trainer: "Trainer", tokens: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """Lowers a training step for a batch of this shape, with nothing allocated."""
        on_devices = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated)
        return self.lower(trainer.step, jax.tree.map(on_devices, jax.eval_shape(trainer.init)), tokens, donate=(0,))


def _size(text: str, devices: int, rows: int) -> int:
    divisors = [n for n in range(1, devices + 1) if rows % n == 0]
    if text == "auto":
        return max(divisors)
    match = re.fullmatch(r"data:([1-9]\d*)", text)
    if not match:
        raise ValueError(f"--mesh={text} must be auto or data:N, N being a number of devices.")
    size = int(match[1])
    if size > devices:
        raise ValueError(f"--mesh={text} needs {size} devices, but there are {devices}: lower it or use auto.")
    if size not in divisors:
        raise ValueError(
            f"--mesh={text} does not divide the {rows} rows of a microbatch (--batch_size over --accumulate): choose "
            f"N from {', '.join(map(str, divisors))}."
        )
    return size
