"""What a benchmark found, as values that go to JSON and back."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import q8jax
from experiments.benchmarks.timing import Spread, spread
from q8jax.devices import get_device
from q8jax.formats import FORMATS
from q8jax.report import EMULATED, NATIVE, WRONG
from q8jax.report import Gemm as AuditedGemm


def bits(dtype: str) -> int:
    """Of a number of a format, or of one of NumPy's or JAX's dtypes."""
    return FORMATS[dtype].bits if dtype in FORMATS else np.dtype(dtype).itemsize * 8


def kind_of(dtype: str) -> str:
    """The kind of number that peaks are stated for: FP8, INT8, BF16, FP32 and so on."""
    prefix = "INT" if "int" in dtype else "BF" if dtype.startswith("bfloat") else "FP"
    return f"{prefix}{bits(dtype)}"


def peak(kind: str, device_kind: str) -> float | None:
    """Operations/s of one chip; None where nothing is known of them."""
    device = get_device(device_kind)
    return None if device is None else {"FP8": device.fp8, "INT8": device.int8, "BF16": device.bf16}.get(kind)


def multiplied(gemm: AuditedGemm, device_kind: str) -> str:
    """The kind of number that the unit multiplies, which is that of the wider operand or wider still."""
    kind = kind_of(max(gemm.operands, key=bits))
    is_widened = kind in ("FP8", "INT8") and get_device(device_kind) is not None and peak(kind, device_kind) is None
    return "BF16" if is_widened else kind


@dataclasses.dataclass(frozen=True)
class Program:
    """What a contender was compiled to: one pass on one device.

    Attributes:
      products: how many matrix products multiply which kind of number, after the audit.
      units: how many of them are run by what.
      verdict: of the audit, the worst of all products.
      flops: operations of the products by kind.
      bytes: moved to and from the device's memory, as the audit counts them.
      kernels: launched.
      temp_bytes: of temporary memory; None where the compiler does not tell.
      memory_bytes: arguments, results and temporary memory; None likewise.
      estimated_cycles: the compiler's own, where it gives them.
    """

    products: dict[str, int]
    units: dict[str, int]
    verdict: str
    flops: dict[str, float]
    bytes: int
    kernels: int
    temp_bytes: int | None = None
    memory_bytes: int | None = None
    estimated_cycles: int | None = None

    @classmethod
    def of(
        cls, report: q8jax.Report, memory_bytes: int | None = None, flops: Mapping[str, float] | None = None
    ) -> "Program":
        """The program that a report is about.

        Args:
          report: the audit.
          memory_bytes: as the attribute.
          flops: by kind, where what counts as work is not all that the program multiplies.
        """
        products: collections.Counter[str] = collections.Counter()
        units: collections.Counter[str] = collections.Counter()
        work: collections.Counter[str] = collections.Counter()
        for gemm in report.gemms:
            kind = multiplied(gemm, report.device_kind)
            products[kind] += gemm.times
            units[gemm.executed_by] += gemm.times
            work[kind] += gemm.flops
        verdicts = [gemm.verdict for gemm in report.gemms]
        worst = max(verdicts, key=(NATIVE, EMULATED, WRONG).index, default=NATIVE)
        costs = report.costs
        return cls(
            dict(products),
            dict(units),
            worst if report.ok else WRONG,
            dict(work if flops is None else flops),
            costs.bytes,
            costs.kernels,
            report.temp_bytes,
            memory_bytes,
            costs.estimated_cycles,
        )

    def __str__(self) -> str:
        """What is multiplied, and whether that was asked."""
        most_first = sorted(self.products.items(), key=lambda item: -item[1])
        return f"{', '.join(f'{count} {kind}' for kind, count in most_first)}, {self.verdict}"

    def least_seconds(self, device_kind: str) -> float | None:
        """How long the products take at the chip's peaks; None where one of them has none."""
        peaks = {kind: peak(kind, device_kind) for kind in self.flops}
        if not self.flops or None in peaks.values():
            return None
        return sum(work / (peaks[kind] or 1.0) for kind, work in self.flops.items())


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Contenders at one piece of work.

    Attributes:
      work: its name.
      sizes: its shapes, by name.
      flops: of its products, counted from the shapes, on all devices together.
      reference: the contender that others are compared with; it is in `programs`.
      programs: by contender.
      failures: why other contenders did not run, by name.
      seconds: by contender, of each round; empty where nothing was timed.
      losses: likewise, where there is a loss; None for one that is not finite.
      calls: in a row, of which `seconds` is the mean.
      devices: over which the work was split.
    """

    work: str
    sizes: dict[str, int]
    flops: float
    reference: str
    programs: dict[str, Program]
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    losses: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    calls: int = 1
    devices: int = 1

    def median(self, name: str) -> float:
        return spread(self.seconds[name]).middle

    def ratio(self, name: str, reference: str | None = None) -> Spread:
        """Of the time to that of another contender, by default the reference, taken within each round."""
        own, others = (np.asarray(self.seconds[n]) for n in (name, reference or self.reference))
        return spread(own / others)

    def rate(self, name: str) -> float:
        """FLOP/s of one device."""
        return self.flops / self.devices / self.median(name)

    def intensity(self, name: str) -> float:
        """FLOP of the work for each byte that the program moves."""
        return self.flops / self.devices / self.programs[name].bytes

    def share_of_peak(self, name: str, device_kind: str) -> float | None:
        """Of what the chip could do in the kinds of number that are really multiplied; None where that is not known."""
        least = self.programs[name].least_seconds(device_kind)
        return None if least is None else least / self.median(name)


def total(work: str, parts: Sequence[Measurement]) -> Measurement:
    """Pieces of work one after the other, for the contenders that did them all."""
    first = parts[0]
    names = [name for name in first.programs if all(name in part.programs for part in parts)]
    failures = {name: reason for part in parts for name, reason in part.failures.items()}
    rounds = {name: np.sum([part.seconds[name] for part in parts], axis=0).tolist() for name in names}
    programs = {name: _joined([part.programs[name] for part in parts]) for name in names}
    flops = sum(part.flops for part in parts)
    return Measurement(work, first.sizes, flops, first.reference, programs, failures, rounds, devices=first.devices)


def _joined(programs: Sequence[Program]) -> Program:
    def summed(name: str) -> Any:
        counts: collections.Counter[str] = collections.Counter()
        for program in programs:
            counts.update(getattr(program, name))
        return dict(counts)

    verdict = max((p.verdict for p in programs), key=(NATIVE, EMULATED, WRONG).index)
    moved, kernels = (sum(getattr(p, name) for p in programs) for name in ("bytes", "kernels"))
    return Program(summed("products"), summed("units"), verdict, summed("flops"), moved, kernels)


def pays_from(sweep: Sequence[Measurement], name: str) -> str | None:
    """The work from which on a contender is faster than the reference: also in the upper quartile of its ratios.

    Args:
      sweep: by ascending size.
      name: of the contender.

    Returns:
      The name of the smallest such work; None if the largest that the contender did is none.
    """
    found = None
    for measurement in reversed([m for m in sweep if name in m.seconds]):
        if measurement.ratio(name).high >= 1:
            break
        found = measurement.work
    return found


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What bounds a device.

    Attributes:
      peaks: FLOP/s by kind of number.
      bandwidth: bytes/s of the main memory.
      source: where these are from.
    """

    peaks: dict[str, float]
    bandwidth: float
    source: str


@dataclasses.dataclass(frozen=True)
class Results:
    """A run of the program.

    Attributes:
      level: 'gemm', 'layer', 'step' or 'scaling'.
      device_kind: of the devices.
      rounds: of each contender; 0 where nothing was timed.
      environment: command, versions and devices.
      measurements: of the level's work.
      sweep: over square sizes, ascending.
      notes: sentences.
      roofs: of the device, where a roofline is drawn.
    """

    level: str
    device_kind: str
    rounds: int
    environment: dict[str, Any]
    measurements: list[Measurement]
    sweep: list[Measurement] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    roofs: Roofs | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """Inverse of `to_json`."""
        values = json.loads(text)
        for name in ("measurements", "sweep"):
            values[name] = [_measurement(found) for found in values[name]]
        if values["roofs"] is not None:
            values["roofs"] = Roofs(**values["roofs"])
        return cls(**values)


def _measurement(values: dict[str, Any]) -> Measurement:
    programs = {name: Program(**found) for name, found in values["programs"].items()}
    return Measurement(**{**values, "programs": programs})


def check_folder(folder: Path) -> None:
    """Raises ValueError unless a folder for results is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out={folder} is there already and not an empty folder: give another.")
