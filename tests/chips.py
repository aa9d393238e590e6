"""Devices that are not there, as far as placing and projecting look at them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is read of a jax.Device; of a platform whose order stays as it is."""

    device_kind: str
    id: int = 0
    coords: tuple[int, ...] = (0, 0, 0)
    slice_index: int = 0
    process_index: int = 0
    platform: str = "gpu"


def chips(kind, count, slices=1):
    """So many in a row, in equal slices."""
    each = count // slices
    return tuple(Chip(kind, i, (i % each, 0, 0), i // each) for i in range(count))
