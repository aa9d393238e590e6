"""Before and after in tables: for the terminal, and as JSON, LaTeX and HTML."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.plots.latex import latex
from experiments.plots.markup import plain
from experiments.plots.plot import Table
from experiments.plots.report import render
from experiments.quantizing.measuring import Quality, Speed
from experiments.runs.files import write_atomic
from q8jax.report import Report, aligned

_NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class Side:
    """A model as it was measured.

    Attributes:
      quality: how good it is.
      disk, memory: bytes of its weights.
      speeds: by rows of a batch.
      audit: of its forward pass; None if it was not asked for.
    """

    quality: Quality
    disk: int
    memory: int
    speeds: Mapping[int, Speed]
    audit: Report | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """What became of one layer.

    Attributes:
      path, depth: which; depth in a stack.
      precision: what meets what.
      sqnr: of its kernel, in dB.
      output_error: relative, on the inputs seen; NaN if none were.
      strength: of smoothing or scaling; NaN for none.
      runs: how its product runs, as the audit says.
    """

    path: str
    depth: int
    precision: str
    sqnr: float
    output_error: float
    strength: float
    runs: str


def tables(before: Side, after: Side, layers: Sequence[Layer], what: str) -> list[Table]:
    """Before and after, and layer by layer."""
    names = ("float", what)
    rows: list[tuple[Any, ...]] = []
    for label, value in _facts(before).items():
        rows.append((label, value, _facts(after).get(label, _NOTHING)))
    rows.append(("size of float", "1", f"{after.disk / before.disk:.3f}"))
    rows.append(("memory of float", "1", f"{after.memory / before.memory:.3f}"))
    for count, speed in after.speeds.items():
        ratios = speed.seconds / before.speeds[count].seconds
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        rows.append((f"time of float, {count} rows", "1", f"{middle:.2f} ({low:.2f} to {high:.2f})"))
    whole = Table(
        name="quantized",
        title="Before and after",
        caption=f"{after.quality.metric} with its 95 % interval; latency is the median time of a batch, ratios are "
        "taken turn by turn, with their quartiles.",
        columns=("", *names),
        rows=tuple(rows),
        runs=((),) * len(rows),
    )
    if not layers:
        return [whole]
    each = Table(
        name="layers",
        title="Layer by layer",
        caption="Signal to quantization noise of each kernel, the relative error of its outputs on calibration inputs, "
        "and how its product runs.",
        columns=("layer", "precision", "SQNR (dB)", "output error", "strength", "runs"),
        rows=tuple(
            (
                layer.path + f" [{layer.depth}]" * (layer.depth > 0),
                layer.precision,
                _number(layer.sqnr, ".1f"),
                _number(layer.output_error, ".4f"),
                _number(layer.strength, ".2f"),
                layer.runs,
            )
            for layer in layers
        ),
        runs=((),) * len(layers),
    )
    return [whole, each]


def _facts(side: Side) -> dict[str, str]:
    quality = side.quality
    facts = {quality.metric: f"{quality.value:.4f} ({quality.low:.4f} to {quality.high:.4f})"}
    if quality.worst is not None:
        facts["least"] = f"{quality.worst:.4f}"
    facts |= {"weights on disk (MB)": f"{side.disk / 1e6:.2f}", "weights in memory (MB)": f"{side.memory / 1e6:.2f}"}
    for rows, speed in side.speeds.items():
        label = f"{rows} {'row' if rows == 1 else 'rows'} of {speed.length}"
        facts[f"latency (ms), {label}"] = f"{1e3 * speed.median:.2f}"
        facts[f"rows/s, {label}"] = f"{rows / speed.median:,.0f}"
    if side.audit is not None:
        facts["GFLOPs of products"] = f"{sum(gemm.flops for gemm in side.audit.gemms) / 1e9:.2f}"
        facts["MB moved"] = f"{side.audit.costs.bytes / 1e6:.1f}"
    return facts


def text(made: Sequence[Table], audit: Report | None) -> str:
    """The tables for a terminal."""
    parts = []
    for table in made:
        rows = [table.columns, *([""] * len(table.columns),), *table.rows]
        parts.append("\n".join([table.title, "", *aligned([[str(cell) for cell in row] for row in rows])]))
    return "\n\n".join([*parts, *([audit.summary()] if audit is not None else [])])


def write(folder: Path, made: Sequence[Table], before: Side, after: Side, provenance: Mapping[str, Any]) -> None:
    """Writes report.txt, report.json, report.html, and a .tex file for each table.

    Raises:
      ValueError: the folder cannot be written.
    """
    audit = after.audit
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "report.txt", [text(made, audit).encode(), b"\n"])
        found = {"before": _as_dict(before), "after": _as_dict(after), "provenance": provenance}
        found["tables"] = {
            table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in made
        }
        write_atomic(folder / "report.json", [json.dumps(found, indent=1, allow_nan=False).encode(), b"\n"])
        page = render("Quantization", [], made, provenance, [])
        write_atomic(folder / "report.html", [page.encode()])
        for table in made:
            write_atomic(folder / f"{table.name}.tex", [latex(table).encode()])
    except OSError as error:
        raise ValueError(f"--out={folder} cannot be written ({error.strerror}): choose another folder.") from error


def _as_dict(side: Side) -> dict[str, Any]:
    quality = {f.name: getattr(side.quality, f.name) for f in dataclasses.fields(Quality) if f.name != "embeddings"}
    speeds = {str(rows): {"length": s.length, "seconds": s.seconds.tolist()} for rows, s in side.speeds.items()}
    audit = None if side.audit is None else json.loads(side.audit.to_json())
    found = {"quality": quality, "disk": side.disk, "memory": side.memory, "speeds": speeds, "audit": audit}
    return {name: plain(value) if not isinstance(value, dict) else value for name, value in found.items()}


def _number(value: float, spec: str) -> str:
    return _NOTHING if value != value else format(value, spec)
