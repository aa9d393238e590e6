"""What a compiled step takes: memory, and the least time that data sheets allow."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.projecting.links import bandwidth
from q8jax import Report
from q8jax.devices import get_device

ASSUMPTIONS = (
    "one kernel after the other, at its format's peak or at main memory's bandwidth, whichever takes longer; every "
    "collective as a ring on all links of its axes; from all of that hidden behind the kernels to nothing of it"
)


@dataclasses.dataclass(frozen=True)
class Projection:
    """Of one step on one device.

    Attributes:
      resident: bytes that it holds.
      available: bytes that it has.
      products, memory, kernels: seconds, as in `q8jax.hlo.roofline.Roofline`.
      network: seconds that it sends.
      flops: that the model needs by definition, `TransformerConfig.flops_per_token` times its share of the tokens.
      tokens: its share of them.
      peak: FLOP/s in 16 bits, which the utilization is of in every precision.
    """

    resident: int
    available: int
    products: float
    memory: float
    kernels: float
    network: float
    flops: float
    tokens: float
    peak: float

    @property
    def fits(self) -> bool:
        return self.resident <= self.available

    @property
    def fastest(self) -> float:
        """Seconds, if all that is sent is sent while kernels run."""
        return max(self.kernels, self.network)

    @property
    def slowest(self) -> float:
        """Seconds, if nothing is."""
        return self.kernels + self.network

    @property
    def utilization(self) -> tuple[float, float]:
        """MFU of the slowest and of the fastest step."""
        return self.flops / self.peak / self.slowest, self.flops / self.peak / self.fastest

    def lines(self) -> dict[str, str]:
        """What a table says of it."""
        low, high = (f"{100 * share:.0f} %" for share in self.utilization)
        free = 100 * (1 - self.resident / self.available)
        return {
            "fits": f"{'yes' if self.fits else 'no'}, {self.resident / 2**30:.2f} of {self.available / 2**30:.2f} GiB"
            + (f", {free:.0f} % to spare" if self.fits else ""),
            "projected step": f"{1e3 * self.fastest:,.1f} to {1e3 * self.slowest:,.1f} ms, MFU {low} to {high}",
            "of that": f"kernels {1e3 * self.kernels:,.1f} ms (products alone {1e3 * self.products:,.1f}, main memory "
            f"alone {1e3 * self.memory:,.1f}), network {1e3 * self.network:,.1f}",
            "which assumes": ASSUMPTIONS,
        }

    def to_json(self) -> dict[str, Any]:
        low, high = self.utilization
        derived = {"fits": self.fits, "fastest": self.fastest, "slowest": self.slowest, "mfu": [low, high]}
        return {**dataclasses.asdict(self), **derived}


def project(report: Report, devices: Sequence[Any], flops: float, tokens: int) -> Projection | None:
    """The projection of an audited step; None for devices of which too little is known.

    Args:
      report: of the step.
      devices: of its mesh, in its order.
      flops: of the model, over all devices.
      tokens: of the step, over all devices.
    """
    device = get_device(devices[0].device_kind)
    rates = [bandwidth(devices, collective.group) for collective in report.costs.collectives]
    if device is None or report.roofline is None or report.resident_bytes is None:
        return None
    network = 0.0
    for collective, rate in zip(report.costs.collectives, rates, strict=True):
        if rate is None:
            return None
        network += collective.bytes / rate
    return Projection(
        report.resident_bytes,
        device.memory,
        report.roofline.products,
        report.roofline.memory,
        report.roofline.kernels,
        network,
        flops / len(devices),
        tokens / len(devices),
        device.bf16,
    )
