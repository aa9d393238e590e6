"""What the directory of a run says of it, whoever runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.loading import present, records
from experiments.runs.errors import RunError, disk_reason
from experiments.runs.files import read_json, strict_json
from experiments.runs.lease import LOCK
from experiments.runs.metrics import METRICS
from experiments.runs.rundir import DIVERGENCE, SUMMARY

# Of a study: what every attempt at a run came to.
ATTEMPTS = "attempts.jsonl"
_TAIL = 4096  # bytes that hold the last line of metrics.jsonl and more


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that works on a directory.

    Attributes:
      process: its id, or None while it has not written it down.
      is_here: whether it runs on this machine.
    """

    process: int | None
    is_here: bool

    def __str__(self) -> str:
        return f"process {self.process}" if self.process else "another process"


def outcome(run: Path) -> str | None:
    """'finished' or 'diverged' if the run has ended."""
    if (run / SUMMARY).exists():
        return "finished"
    return "diverged" if (run / DIVERGENCE).exists() else None


def divergence(run: Path) -> str:
    """Why a diverged run ended."""
    return str(read_json(run / DIVERGENCE)["reason"])


def result(run: Path, metric: str) -> float | None:
    """An entry of a finished run's summary."""
    return read_json(run / SUMMARY).get(metric)


def position(run: Path) -> tuple[int, float | None]:
    """(step, loss) of the last line of metrics; (0, None) before the first."""
    try:
        with open(run / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().rpartition(b"\n")[0].splitlines()
        record = json.loads(lines[-1])
        return record["step"], record.get("loss")
    except (OSError, IndexError, KeyError, ValueError):
        return 0, None  # not there yet, or being cut back to a checkpoint


def lines(run: Path) -> list[dict[str, Any]]:
    """All lines of metrics; none before the first."""
    path = present(run / METRICS)
    return records(path) if path else []


def holder(directory: Path) -> Holder | None:
    """Who has the lock of a directory."""
    try:
        with open(directory / LOCK, "rb") as file:
            try:
                # Shared, so that looking does not stop another from looking.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read(32).decode(errors="replace")
                process = int(text) if text.isdigit() else None
                return Holder(process, process is not None and _is_here(process))
    except FileNotFoundError:
        pass
    return None


def _is_here(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Keeps a study to this process; the lock ends with it, however it ends.

    Raises:
      RunError: another process has it, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK, "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise RunError(f"--out={directory} cannot be written ({disk_reason(error)}); give another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            by = holder(directory) or "another process"
            raise RunError(f"--out={directory} is in use by {by}; wait for it to end, or give another --out") from error
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        yield


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses within it into a sentence.

    Raises:
      RunError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written ({disk_reason(error)}); make room, and repeat the command") from error


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line, after cutting off what a killed writer left of one.

    Raises:
      RunError: the disk refuses it.
    """
    with writing(path), open(path, "a+b") as file:
        file.seek(0)
        lines, newline, half = file.read().rpartition(b"\n")
        if half:
            file.truncate(len(lines) + len(newline))
        file.write(strict_json(record).encode() + b"\n")
