"""The device mesh: so far one axis, `data`, over which the batch is split."""

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data",)


def parse_mesh(text: str, devices: int, rows: int) -> int:
    """The size of the data axis that `--mesh` asks for.

    Args:
      text: 'auto' for the most devices that divide the batch, or 'data:N'.
      devices: devices at hand.
      rows: rows of one microbatch.

    Raises:
      ValueError: a misspelt axis, more than there are devices, or a size that does not divide the batch.
    """
    if text == "auto":
        return max(n for n in range(1, devices + 1) if rows % n == 0)
    match = re.fullmatch(r"data:([1-9]\d*)", text)
    if not match:
        raise ValueError(f"--mesh={text} must be auto or data:N, N being a number of devices.")
    size = int(match[1])
    if size > devices:
        raise ValueError(f"--mesh={text} needs {size} devices, but there are {devices}: lower it or use auto.")
    if rows % size:
        raise ValueError(
            f"--mesh={text} does not divide the {rows} rows of a microbatch (--batch_size over --accumulate): choose a "
            "divisor."
        )
    return size


class Placement:
    """Where arrays go: the batch split over the data axis, everything else on every device."""

    def __init__(self, size: int):
        mesh = Mesh(np.array(jax.devices()[:size]), AXES)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        # [microbatch, row, token]
        self.batch = NamedSharding(mesh, PartitionSpec(None, "data"))

    def put_batch(self, tokens_AxBxT1: np.ndarray) -> jax.Array:
        return jax.device_put(tokens_AxBxT1, self.batch)
