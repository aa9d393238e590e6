"""Run directories as values, read without JAX: `read_run` gives one, its metrics column by column.

Directories come as pretrain leaves them, or archived: without checkpoints, and with `metrics.jsonl` and
`telemetry.jsonl` gzipped.
"""

from __future__ import annotations

import dataclasses
import fcntl
import glob as globs
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

CONFIG, ENVIRONMENT, SUMMARY, DIVERGED = "config.json", "env.json", "summary.json", "diverged.json"
METRICS, TELEMETRY = "metrics.jsonl", "telemetry.jsonl"
_LOCK = ".lock"
# Of a run; large, and no run lies inside.
_INNER = {"checkpoints", "tensorboard", "profile"}
# As much text as keeps its records in the processor's cache; of more, reading takes half as long again.
_CHUNK = 1 << 18
# Columns of the metrics that are.
_NUMBERS = {"step", "loss", "eval_loss", "tokens_per_second"}


class LoadError(ValueError):
    """A run directory cannot be read; its text is one sentence that names the file and the fix."""


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """A run directory.

    Attributes:
      path: of the directory.
      name: its last part.
      config: every flag by name, and what it was resolved to.
      sessions: what each start ran on.
      metrics: by column, "step" among them, each of one length: float64, NaN where a line has no number; "step" int64.
      summary: None unless the run is finished.
      diverged: its last step and the reason, if the loss or the gradient became non-finite, else None.
      running: whether a process holds the directory.
    """

    path: Path
    name: str
    config: dict[str, Any]
    sessions: list[dict[str, Any]]
    metrics: dict[str, np.ndarray]
    summary: dict[str, Any] | None
    diverged: dict[str, Any] | None
    running: bool

    @property
    def outcome(self) -> Literal["finished", "diverged", "running", "unfinished"]:
        if self.summary is not None:
            return "finished"
        return "running" if self.running else "diverged" if self.diverged is not None else "unfinished"

    @property
    def precision(self) -> str:
        """As the user wrote it."""
        return self.config.get("precision_schedule") or self.config["precision"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def initialisation(self) -> str | None:
        """A digest of the parameters that it began with; None of a run of before it was written down."""
        return self.sessions[0].get("initialisation") if self.sessions else None

    @property
    def tokens(self) -> np.ndarray:
        """Trained on, up to each step of the metrics."""
        return self.metrics["step"] * (self.config["batch_size"] * self.config["seq_len"])

    @property
    def telemetry(self) -> list[dict[str, Any]]:
        """A record per telemetry step; empty without telemetry. It is large, and read anew each time.

        Raises:
          LoadError: the file is damaged, or that of a finished run ends early.
        """
        path = present(self.path / TELEMETRY)
        found = records(path, whole=self.summary is not None) if path else []
        every = self.config.get("telemetry_every")
        if path and self.summary is not None and every and set(self.config.get("telemetry", ())) - {"model"}:
            last, reached = self.config["steps"] // every * every or 1, found[-1]["step"] if found else 0
            if reached != last:
                raise LoadError(
                    f"{path} is truncated, it ends at step {reached} of {last}: restore it, or leave the run out."
                )
        return found


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Reads a run directory, whether finished or not; of one that is not, half a last line is left out.

    Raises:
      LoadError: it is no run directory, or a file in it is missing, damaged or truncated.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise LoadError(f"{folder} is no directory: give the directory of a run.")
    if not (folder / CONFIG).exists():
        raise LoadError(f"{folder} holds no {CONFIG}: give the directory of a run.")
    config = _json(folder / CONFIG)
    absent = [name for name in ("precision", "seed", "batch_size", "seq_len", "steps", "recipes") if name not in config]
    if absent:
        raise LoadError(f"{folder / CONFIG} does not say {absent[0]}: give the directory of a run.")
    summary, diverged, environment = (
        _json(folder / name) if (folder / name).exists() else None for name in (SUMMARY, DIVERGED, ENVIRONMENT)
    )
    sessions = (environment or {}).get("sessions", [])
    if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
        raise LoadError(f"{folder / ENVIRONMENT} holds no sessions: restore it, or leave the run out.")
    for name in ("eval_loss", "eval_loss_average", "tokens_per_second", "peak_memory_bytes", "eval_gap_bf16"):
        if not isinstance((summary or {}).get(name), int | float | None):
            raise LoadError(f"{name} in {folder / SUMMARY} is no number: restore it, or leave the run out.")
    return RunRecord(
        path=folder,
        name=folder.resolve().name,
        config=config,
        sessions=sessions,
        metrics=_metrics(folder, config["steps"] if summary is not None else None),
        summary=summary,
        diverged=diverged if summary is None else None,
        running=summary is None and _is_locked(folder / _LOCK),
    )


def find_runs(pattern: str | os.PathLike[str]) -> list[Path]:
    """The run directories at, or anywhere under, what a path or glob names, sorted.

    Raises:
      LoadError: there is none.
    """
    found = [path.parent for path in find_files(pattern, CONFIG)]
    if not found:
        raise LoadError(f"{pattern} holds no run, that is a directory with a {CONFIG}: give a directory of runs.")
    return found


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Of run directories: their last parts if these differ, else the paths below what all have in common."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(common).as_posix() for path in paths]


def find_files(pattern: str | os.PathLike[str], name: str) -> list[Path]:
    """The files of a name anywhere under what a path or glob names, sorted.

    Raises:
      LoadError: the path does not exist, or the glob matches nothing.
    """
    wanted = os.path.expanduser(os.fspath(pattern))
    places = {Path(place) for place in ([wanted] if os.path.exists(wanted) else globs.glob(wanted, recursive=True))}
    if not places:
        raise LoadError(f"{pattern} does not exist: give a directory of runs, or a glob that matches some.")
    found = set()
    # What lies inside another is walked with it.
    for place in (place for place in places if places.isdisjoint(place.parents)):
        for folder, inner, files in os.walk(place):
            inner[:] = [entry for entry in inner if entry not in _INNER and not entry.startswith(".")]
            if name in files:
                found.add(Path(folder, name))
    return sorted(found)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise LoadError(f"{path} cannot be read ({error.strerror}): restore it.") from error
    except ValueError as error:
        raise LoadError(f"{path} is damaged ({error}): restore it, or leave the run out.") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds no object: restore it, or leave the run out.")
    return value


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def present(path: Path) -> Path | None:
    """The file, or what it was compressed to."""
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.exists()), None)


def records(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, gzipped or not; half a last line is left out, or an error if `whole`.

    Raises:
      LoadError: the file is damaged.
    """
    return [record for chunk in _chunks(path, whole=whole) for record in chunk]


def _metrics(folder: Path, last_step: int | None) -> dict[str, np.ndarray]:
    """Columns of the metrics, which if `last_step` is given must reach it."""
    path = present(folder / METRICS)
    if path is None:
        if last_step is not None:
            raise LoadError(f"{folder} is finished, but has no {METRICS}: restore it, or leave the run out.")
        return {"step": np.zeros(0, np.int64)}
    columns: dict[str, list[np.ndarray]] = {"step": []}
    rows = 0
    for chunk in _chunks(path, whole=last_step is not None):
        for name in sorted(set().union(*chunk) | columns.keys()):
            if name not in columns:
                columns[name] = [np.full(rows, np.nan)] if rows else []
            columns[name].append(_column([record.get(name) for record in chunk]))
        rows += len(chunk)
    metrics = {}
    for name in list(columns):
        # One at a time, so that a large file is held once and not twice.
        parts = columns.pop(name)
        metrics[name] = np.concatenate(parts) if parts else np.zeros(0)
        if name in _NUMBERS and metrics[name].dtype != np.float64:
            raise LoadError(f"a {name} in {path} is no number: restore it, or leave the run out.")
    step = metrics["step"] = metrics["step"].astype(np.int64)
    if np.any(out_of_order := np.diff(step) <= 0):
        line = int(np.argmax(out_of_order)) + 2
        raise LoadError(f"line {line} of {path} goes back to step {step[line - 1]}: restore it, or leave the run out.")
    if last_step is not None and (not rows or step[-1] != last_step):
        reached = step[-1] if rows else 0
        raise LoadError(
            f"{path} is truncated, it ends at step {reached} of a finished run of {last_step}: restore it, or leave "
            "the run out."
        )
    return metrics


def _column(values: list[Any]) -> np.ndarray:
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError):
        column = np.empty(len(values), object)
        column[:] = values
        return column


def _chunks(path: Path, *, whole: bool) -> Iterator[list[dict[str, Any]]]:
    """The records of a file of JSON lines, a thousand or so at a time.

    Args:
      path: of the file; gzipped if it ends so.
      whole: whether half a line at its end is an error, or is left out.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            while lines := file.readlines(_CHUNK):
                if not lines[-1].endswith(b"\n"):
                    if whole:
                        last = number + len(lines)
                        raise LoadError(f"line {last} of {path} ends in the middle: restore it, or leave the run out.")
                    lines.pop()
                if lines:
                    yield _parsed(lines, path, number)
                number += len(lines)
    except (OSError, EOFError, zlib.error) as error:
        raise LoadError(f"{path} cannot be read ({error}): restore it, or leave the run out.") from error


def _parsed(lines: list[bytes], path: Path, number: int) -> list[dict[str, Any]]:
    """The records of lines, before which the file has `number` others."""
    found: list[dict[str, Any]] = []
    try:
        for record in map(orjson.loads, lines):
            if not isinstance(record["step"], int):
                break
            found.append(record)
    except (ValueError, TypeError, KeyError):
        pass
    if len(found) < len(lines):
        line = number + len(found) + 1
        raise LoadError(f"line {line} of {path} is damaged: restore it, or leave the run out.")
    return found
