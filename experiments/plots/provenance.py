"""Where the figures come from: runs and their files, revisions and versions; and the numbers in them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.loading import RunRecord
from experiments.plots.plot import Plot, Table

DIGITS = 6
_PACKAGES = ("q8jax", "matplotlib", "numpy", "scipy")
_FILES = (
    *("config.json", "env.json", "metrics.jsonl", "telemetry.jsonl"),
    *("summary.json", "diverged.json", "fallback.json"),
)


def provenance(runs: Sequence[RunRecord], others: Mapping[str, Path], venue: str) -> dict[str, Any]:
    """What everything is made of and with; no path and no date.

    Args:
      runs: that are drawn.
      others: further files that are, by the name under which plots give them as their runs.
      venue: as flagged.
    """
    return {
        "venue": venue,
        "drawn_with": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in _PACKAGES}},
        "runs": {run.name: _of_run(run) for run in sorted(runs, key=lambda run: run.name)},
        "files": {name: {"sha256": _sha256(path)} for name, path in sorted(others.items())},
    }


def outputs(found: Mapping[str, Any], files: Mapping[str, tuple[bytes, Sequence[str]]]) -> dict[str, dict[str, Any]]:
    """Of each figure and table, its files, the runs that it is made of and a digest of what those hold.

    Args:
      found: what `provenance` returned.
      files: contents and names of runs, by name; names that differ in the suffix alone are one figure.
    """
    digests = {name: entry["files"] for name, entry in found["runs"].items()} | found["files"]
    entries: dict[str, dict[str, Any]] = {}
    for name, (content, runs) in sorted(files.items()):
        inputs = json.dumps([[run, digests.get(run)] for run in sorted(runs)], sort_keys=True)
        entry = entries.setdefault(
            name.rpartition(".")[0],
            {"runs": sorted(runs), "inputs_sha256": hashlib.sha256(inputs.encode()).hexdigest(), "files": {}},
        )
        entry["files"][name] = hashlib.sha256(content).hexdigest()
    return entries


def _of_run(run: RunRecord) -> dict[str, Any]:
    sessions = run.sessions
    each = lambda value: ", ".join(dict.fromkeys(text for session in sessions if (text := value(session))))
    devices = lambda session: session.get("devices") or {}
    return {
        "precision": run.precision,
        "seed": run.seed,
        "outcome": run.outcome,
        "revision": each(lambda session: _revision(session.get("git"))) or None,
        "device": each(lambda s: f"{devices(s).get('count')} × {devices(s).get('kind')}" if devices(s) else ""),
        "python": each(lambda session: session.get("python")),
        "versions": each(lambda s: ", ".join(f"{name} {v}" for name, v in sorted(s.get("versions", {}).items()))),
        "data_sha256": run.config.get("data_sha256"),
        "files": {name: _sha256(path) for name in _FILES if (path := _stored(run.path / name))},
    }


def _revision(git: Mapping[str, Any] | None) -> str:
    return "" if git is None else git["revision"] + (" with changes" if git["dirty"] else "")


def _stored(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.exists()), None)


def _sha256(path: Path) -> str:
    """Of what a file holds, whether or not it is compressed: a run that is archived stays the same."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def numbers(plots: Iterable[Plot], tables: Iterable[Table]) -> str:
    """All plotted numbers and all cells as JSON, rounded, so that they can be made again and compared exactly.

    The rows of a plot that differ in numbers alone are one entry, their numbers in columns.
    """
    drawn = {plot.name: [_line(group) for group in _grouped(plot.numbers)] for plot in plots}
    shown = {t.name: [_line(t.columns), *(_line([*row, list(of)]) for row, of in zip(t.rows, t.runs))] for t in tables}
    return f'{{\n "digits": {DIGITS},\n "plots": {_lists(drawn)},\n "tables": {_lists(shown)}\n}}\n'


def _lists(lists: Mapping[str, Sequence[str]]) -> str:
    """An object of lists, an item to a line."""
    entries = [f"  {_line(name)}: [\n   " + ",\n   ".join(lines) + "\n  ]" for name, lines in lists.items()]
    return "{\n" + ",\n".join(entries) + "\n }"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _grouped(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        constant = {name: value for name, value in row.items() if not _is_number(value)}
        varying = {name: value for name, value in row.items() if _is_number(value)}
        key = json.dumps([constant, list(varying)])
        group = groups.setdefault(key, {**constant, "columns": {name: [] for name in varying}})
        for name, value in varying.items():
            group["columns"][name].append(rounded(value))
    return list(groups.values())


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def rounded(value: float | None) -> float | None:
    """To the digits that are stated; None if it is not finite."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
