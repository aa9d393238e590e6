"""How fast devices send to each other, from the vendors' data sheets.

A TPU has two links along each axis of its slice's torus, and sends on all links of the axes along which its group lies;
each axis counts as wrapped around, which those of a part of a pod may not be. GPUs of one host send through one switch.
Between slices, and between hosts of GPUs, there is the network.
"""

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from experiments.training.mesh import slice_of
from q8jax.devices import DEVICES_PER_CHIP


@dataclasses.dataclass(frozen=True)
class Links:
    """Of one chip, in bytes/s one way.

    Attributes:
      link: one link of a TPU, or all that a GPU has to the switch.
      network: to other slices or hosts.
    """

    link: float
    network: float


# In 10⁹ bytes/s; names are the beginnings of jax.Device.device_kind.
_GIGA = {
    "TPU v4": (50, 6.25),
    "TPU v5 lite": (50, 3.125),
    "TPU v5": (100, 6.25),
    "TPU v6 lite": (100, 12.5),
    "TPU7x": (100, 12.5),
    "NVIDIA A100": (300, 25),
    "NVIDIA H100": (450, 50),
    "NVIDIA H200": (450, 50),
    "NVIDIA B200": (900, 50),
}
LINKS = MappingProxyType({name: Links(link * 1e9, network * 1e9) for name, (link, network) in _GIGA.items()})


def bandwidth(devices: Sequence[Any], group: Sequence[int]) -> float | None:
    """Bytes/s that each device of a group sends to the others; None for devices of which nothing is known.

    Args:
      devices: of the mesh, in its order.
      group: positions of those that communicate.
    """
    kind = max((name for name in LINKS if devices[0].device_kind.startswith(name)), key=len, default=None)
    if kind is None:
        return None
    members = [devices[position] for position in group]
    links, shared = LINKS[kind], DEVICES_PER_CHIP[kind]
    if not kind.startswith("TPU"):
        return links.network if len({member.process_index for member in members}) > 1 else links.link
    if len({slice_of(member) for member in members}) > 1:
        return links.network / shared
    axes = sum(len(set(along)) > 1 for along in zip(*(member.coords for member in members), strict=True))
    # The two devices of one chip, which no data sheet tells of, count as neighbours on an axis.
    return 2 * max(axes, 1) * links.link / shared
