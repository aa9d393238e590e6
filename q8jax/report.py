"""What an audit found: every matrix product of a compiled step, what the whole program costs, and both as text."""

import collections
import dataclasses
import json
from collections.abc import Sequence

from q8jax.formats import bits_of
from q8jax.hlo.collectives import Collective
from q8jax.hlo.costs import Costs
from q8jax.hlo.roofline import Roofline

NATIVE, EMULATED, WRONG = "native", "emulated exactly", "not what was asked"


@dataclasses.dataclass(frozen=True)
class Gemm:
    """One matrix product of a step.

    Attributes:
      path: of the layer, as far as names tell.
      role: 'fwd', 'dlhs' or 'drhs'.
      asked: formats of the operands that were asked for; None where nothing tells.
      operands: formats in the compiled program.
      accumulator: dtype of the sums.
      executed_by: the library or the unit that runs it.
      verdict: NATIVE, EMULATED or WRONG.
      reasons: why it is not native.
      times: in one step.
      flops: of all times together.
    """

    path: str
    role: str
    asked: tuple[str, str] | None
    operands: tuple[str, str]
    accumulator: str
    executed_by: str
    verdict: str
    reasons: tuple[str, ...]
    times: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step does.

    Attributes:
      device_kind: of the devices that it was compiled for.
      gemms: all its matrix products, those of one path and role that are alike as one.
      costs: of the whole program, on one device.
      temp_bytes: of temporary memory, on one device; None where the backend does not tell.
      resident_bytes: of all that one device holds, the program and its arguments and results included; None likewise.
      roofline: least times by the chip's data sheet; None for a chip of which nothing is known.
      unmatched: rules of the policy that no product's path matches.
    """

    device_kind: str
    gemms: tuple[Gemm, ...]
    costs: Costs
    temp_bytes: int | None
    resident_bytes: int | None = None
    roofline: Roofline | None = None
    unmatched: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every product is what was asked, and every rule has one."""
        return not self.unmatched and all(gemm.verdict != WRONG for gemm in self.gemms)

    @property
    def is_native(self) -> bool:
        return self.ok and all(gemm.verdict == NATIVE for gemm in self.gemms)

    def summary(self) -> str:
        """One line: how the GEMMs run that were asked in at most 8 bits, or all if none was, and what is wrong."""
        narrow = [gemm for gemm in self.gemms if gemm.asked and any(bits_of(name) <= 8 for name in gemm.asked)]
        of = narrow or self.gemms
        counts: collections.Counter[str] = collections.Counter()
        for gemm in of:
            counts[gemm.verdict] += gemm.times
        total, flops = counts.total(), sum(gemm.flops for gemm in self.gemms)
        share = f" with {sum(gemm.flops for gemm in of) / flops:.0%} of the FLOPs" if len(of) < len(self.gemms) else ""
        found = [verdict for verdict in (NATIVE, EMULATED, WRONG) if counts[verdict]]
        parts = [f"{'all' if counts[verdict] == total else counts[verdict]} {verdict}" for verdict in found]
        reasons = dict.fromkeys(reason for gemm in of for reason in gemm.reasons)
        why = f" ({'; '.join(reasons)})" if reasons else ""
        missing = "".join(f"; no GEMM matches {rule!r}" for rule in self.unmatched)
        kind = "8-bit GEMMs" if narrow else "GEMMs"
        return f"audit on {self.device_kind}: {total} {kind}{share}, {', '.join(parts) or 'none'}{why}{missing}"

    def table(self) -> str:
        """The report for a person."""
        total = sum(gemm.flops for gemm in self.gemms) or 1
        rows = [("GEMM", "role", "times", "asked", "runs", "sums", "by", "FLOPs", "verdict")]
        for gemm in self.gemms:
            rows.append(
                (
                    gemm.path or "(no name)",
                    gemm.role,
                    str(gemm.times),
                    _pair(gemm.asked) if gemm.asked else "?",
                    _pair(gemm.operands),
                    gemm.accumulator,
                    gemm.executed_by,
                    f"{gemm.flops / total:.1%}",
                    gemm.verdict + (f": {', '.join(gemm.reasons)}" if gemm.reasons else ""),
                )
            )
        whole = self.costs
        facts = {
            "bytes moved": f"{whole.bytes:,}",
            "kernels": f"{whole.kernels:,}, with loop bodies counted once {whole.distinct_kernels:,}, of them "
            f"{whole.distinct_calls:,} fusions and library calls",
            "copies": f"{whole.copies:,}",
            "temporary memory": _bytes(self.temp_bytes),
            "resident memory": _bytes(self.resident_bytes),
            "estimated cycles": "unknown" if whole.estimated_cycles is None else f"{whole.estimated_cycles:,}",
            "collectives": "; ".join(map(_collective, whole.collectives)) or "none",
        }
        of_program = (f"{name:<18}{value}" for name, value in facts.items())
        return "\n".join([*aligned(rows), "", *of_program, "", self.summary()])

    def to_json(self) -> str:
        """The report for a program: an object with the fields of this and of its costs."""
        whole = dataclasses.asdict(self.costs)
        return json.dumps(
            {
                "device_kind": self.device_kind,
                "ok": self.ok,
                "gemms": [dataclasses.asdict(gemm) for gemm in self.gemms],
                **whole,
                "temp_bytes": self.temp_bytes,
                "resident_bytes": self.resident_bytes,
                "roofline": dataclasses.asdict(self.roofline) if self.roofline else None,
                "unmatched": self.unmatched,
            },
            indent=1,
        )


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,} bytes"


def _collective(found: Collective) -> str:
    return f"{found.times} × {found.op} {found.dtype} among {len(found.group)}, {found.bytes:,} bytes sent"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines, their cells below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _pair(names: Sequence[str]) -> str:
    return " × ".join(name.removeprefix("float8_") for name in names)
