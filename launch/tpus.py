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
      axes: of a topology.
    """

    type: str | None
    runtime: str | None
    gke: str
    axes: int


# https://cloud.google.com/tpu/docs/runtimes and https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
GENERATIONS = MappingProxyType(
    {
        "v4": Generation("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
        "v5e": Generation("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2),
        "v5p": Generation("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
        "v6e": Generation("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", 2),
        "tpu7x": Generation(None, None, "tpu7x", 3),
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
          LaunchError: an unknown kind, or a topology that it cannot have.
        """
        name, _, topology = text.partition(":")
        if name not in GENERATIONS:
            raise LaunchError(f"--tpu={text} must begin with one of {', '.join(GENERATIONS)}, as in v5p:4x4x4")
        generation = GENERATIONS[name]
        if not re.fullmatch("x".join([r"[1-9]\d*"] * generation.axes), topology):
            example = "x".join(["4"] * generation.axes)
            raise LaunchError(f"--tpu={text} must name a topology of {generation.axes} axes, as in {name}:{example}")
        found = cls(generation, topology)
        if found.chips % found.chips_per_host:
            raise LaunchError(
                f"--tpu={text} has {found.chips} chips, not a multiple of the 4 of a host: choose another"
            )
        return found
