"""What Google Cloud calls the slices of TPUs that `--tpu=v5p:4x4x4` names."""

import dataclasses
import math
import re
from types import MappingProxyType

from launch.commands import LaunchError


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU.

    Attributes:
      type: as `gcloud compute tpus` writes it with a topology; None where only GKE has it.
      runtime: the software of a TPU VM.
      gke: the node label's accelerator.
      topologies: below a cube of 4x4x4, or all of a kind with two axes.
      most: chips of its largest slice of whole cubes, 0 where there are none.
    """

    type: str | None
    runtime: str | None
    gke: str
    topologies: tuple[str, ...]
    most: int = 0

    def has(self, topology: str) -> bool:
        """Whether there are slices of a topology."""
        if topology in self.topologies:
            return True
        if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){2}", topology, re.ASCII):
            return False
        sides = [int(side) for side in topology.split("x")]
        return sides == sorted(sides) and not any(side % 4 for side in sides) and math.prod(sides) <= self.most


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# https://cloud.google.com/tpu/docs/runtimes and https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus;
# the largest slices: https://cloud.google.com/tpu/docs/v4, v5p and tpu7x
GENERATIONS = MappingProxyType(
    {
        "v4": Generation("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", _DEEP, 4096),
        "v5e": Generation("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", _FLAT),
        "v5p": Generation("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", _DEEP, 6144),
        "v6e": Generation("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", _FLAT),
        "tpu7x": Generation(None, None, "tpu7x", _DEEP, 9216),
    }
)
_LARGEST_HOST = 4


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPUs.

    Attributes:
      generation: its kind.
      topology: its chips along each axis, as in '4x4x4'.
    """

    generation: Generation
    topology: str

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips_per_host(self) -> int:
        """Of one host, four but in a slice of fewer chips. Slices of v5e and v6e on one host of eight are not used."""
        return min(self.chips, _LARGEST_HOST)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """The slice that a `--tpu` names.

        Raises:
          LaunchError: an unknown kind, or a topology that it does not have.
        """
        name, _, topology = text.partition(":")
        if name not in GENERATIONS:
            raise LaunchError(f"--tpu={text} must begin with one of {', '.join(GENERATIONS)}, as in v5p:4x4x4")
        generation = GENERATIONS[name]
        if not generation.has(topology):
            cubes = (
                f", and multiples of 4 in ascending order of up to {generation.most} chips" if generation.most else ""
            )
            raise LaunchError(
                f"--tpu={text} is no topology of {name}, which has {', '.join(generation.topologies)}{cubes}"
            )
        return cls(generation, topology)
