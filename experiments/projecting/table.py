"""The table of whole pods: which steps are in it, and how they are shown."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.runs.files import write_atomic

PRECISIONS = ("bf16", "fp8", "int8")
_LLAMA = ("--vocab=128256", "--remat")
FILE = "pods.jsonl"


@dataclasses.dataclass(frozen=True)
class Pod:
    """A step that every precision takes.

    Attributes:
      target, model, mesh: as the flags say it.
      rows: of each part of the batch.
      seq_len: tokens of a row.
      parts: into how many the batch is split.
    """

    target: str
    model: str
    mesh: str
    parts: int
    rows: int
    seq_len: int

    def flags(self, precision: str) -> tuple[str, ...]:
        """Those of experiments.audit."""
        return (
            *(f"--target={self.target}", f"--model={self.model}", f"--mesh={self.mesh}", f"--precision={precision}"),
            *(f"--batch_size={self.parts * self.rows}", f"--seq_len={self.seq_len}", *_LLAMA),
        )


PODS = (
    Pod("h100:8", "1b", "fsdp:8", 8, 4, 2048),
    Pod("v5e:16x16", "1b", "data:16,fsdp:16", 256, 1, 2048),
    Pod("v5e:16x16:2", "1b", "data:32,fsdp:16", 512, 1, 2048),
    Pod("v6e:16x16", "1b", "data:16,fsdp:16", 256, 2, 2048),
    Pod("v5p:8x8x8", "1b", "data:64,fsdp:8", 512, 4, 2048),
    Pod("tpu7x:4x4x4", "1b", "data:16,fsdp:8", 128, 4, 2048),
    Pod("h100:8", "8b", "fsdp:8", 8, 1, 2048),
    Pod("v5e:16x16", "8b", "fsdp:256", 256, 1, 2048),
    Pod("v5e:16x16:2", "8b", "data:2,fsdp:256", 512, 1, 2048),
    Pod("v6e:16x16", "8b", "fsdp:256", 256, 2, 2048),
    Pod("v5p:8x8x8", "8b", "data:8,fsdp:64", 512, 2, 2048),
    Pod("v5p:8x8x8", "8b", "data:8,fsdp:32,tensor:2", 256, 4, 2048),
    Pod("tpu7x:4x4x4", "8b", "data:4,fsdp:32", 128, 2, 2048),
)


def kept(
    flags: Sequence[str], audited: dict[str, Any], versions: dict[str, str], revision: str | None
) -> dict[str, Any]:
    """What of an audit's object is kept in `FILE`, beside what it was found with."""
    verdicts: collections.Counter[str] = collections.Counter()
    for gemm in audited["gemms"]:
        verdicts[gemm["verdict"]] += gemm["times"]
    sent: collections.Counter[str] = collections.Counter()
    for collective in audited["collectives"]:
        sent[f"{collective['op']} {collective['dtype']}"] += collective["bytes"]
    return {
        "flags": list(flags),
        "title": audited["title"],
        "gemms": dict(verdicts),
        "sent": dict(sent),
        "estimated_cycles": audited["estimated_cycles"],
        "bytes": audited["bytes"],
        "projection": audited["projection"],
        "versions": versions,
        "revision": revision,
    }


def read(directory: Path) -> list[dict[str, Any]]:
    """The lines of `FILE`, but for half a last one of a program that was stopped."""
    path = directory / FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write(directory: Path, found: Iterable[dict[str, Any]]) -> None:
    """Replaces `FILE` by these lines, in the order of the table."""
    order = {pod.flags(precision): place for place, (pod, precision) in enumerate(itertools.product(PODS, PRECISIONS))}
    lines = sorted(found, key=lambda step: order.get(tuple(step["flags"]), len(order)))
    write_atomic(directory / FILE, [json.dumps(step).encode() + b"\n" for step in lines])


def rows(found: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Of each step one row: the device's memory, what it sends, the projected step and utilization."""
    by_flags = {tuple(step["flags"]): step for step in found}
    head = (
        *("target", "model", "mesh", "batch", "precision", "resident GiB", "to spare", "sent GB", "of that 8-bit"),
        *("step ms", "MFU %", "cycles ÷ bf16"),
    )
    table: list[tuple[str, ...]] = [head]
    for pod in PODS:
        reference = by_flags.get(pod.flags(PRECISIONS[0]))
        for precision in PRECISIONS:
            step = by_flags.get(pod.flags(precision))
            if step is not None:
                table.append((*_cells(pod), precision, *_numbers(step), _ratio(step, reference)))
    return table


def _cells(pod: Pod) -> tuple[str, ...]:
    return pod.target, pod.model, pod.mesh, f"{pod.parts * pod.rows} × {pod.seq_len}"


def _numbers(step: dict[str, Any]) -> tuple[str, ...]:
    projection, sent = step["projection"], step["sent"]
    spare = 1 - projection["resident"] / projection["available"]
    total = sum(sent.values())
    narrow = sum(size for name, size in sent.items() if name.split()[1] in ("u8", "s8"))
    low, high = projection["mfu"]
    return (
        f"{projection['resident'] / 2**30:.2f}",
        f"{100 * spare:.0f} %",
        f"{total / 1e9:.2f}",
        f"{100 * narrow / total:.0f} %",
        f"{1e3 * projection['fastest']:.0f}–{1e3 * projection['slowest']:.0f}",
        f"{100 * low:.0f}–{100 * high:.0f}",
    )


def _ratio(step: dict[str, Any], reference: dict[str, Any] | None) -> str:
    if reference is None or not step["estimated_cycles"] or not reference["estimated_cycles"]:
        return "–"
    return f"{step['estimated_cycles'] / reference['estimated_cycles']:.2f}"
