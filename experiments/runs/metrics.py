"""`metrics.jsonl`: the numbers of a run, one JSON line per logging event, each step once.

The file is the truth; the TensorBoard events beside it are a view. A run that is killed leaves
lines newer than its last checkpoint, and perhaps half a line. Those steps are computed again after
the restart, so the writer first cuts the file back to the checkpoint.

That works only if no checkpoint is newer than the file: **log every step up to S, then `sync`, then
save checkpoint S.**
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.runs.errors import RunError, unwritable
from experiments.runs.events import EventFile
from experiments.runs.files import strict_json, write_atomic

METRICS = "metrics.jsonl"
TELEMETRY = "telemetry.jsonl"
EVENTS = "tensorboard"


class MetricsWriter:
    """Appends to `metrics.jsonl`, or a file like it, and to TensorBoard event files.

    Invariant: every line in the file is strict JSON with an integer `step`, and the steps increase
    strictly.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int | None,
        *,
        name: str = METRICS,
        primary: bool = True,
    ):
        """Opens the files and drops what the run will compute again.

        Args:
          workdir: the run directory, which exists and is locked by this process.
          resume_step: the step of the restored checkpoint, whose line is kept; None starts over.
          name: of the file.
          primary: False on every process of a multi-process run but the first: nothing is written.

        Raises:
          RunError: a line that is to be kept is damaged, or the files cannot be written.
        """
        self._path = Path(workdir) / name
        self._file = None
        if not primary:
            return
        self._last_step: int | None = None
        try:
            write_atomic(self._path, self._kept(resume_step))
            purge_step = 0 if resume_step is None else resume_step + 1
            self._events = EventFile(Path(workdir) / EVENTS, purge_step)
            # Unbuffered: a line that the disk refused must not be tried again when the file closes.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise unwritable(self._path, error) from error

    def _kept(self, resume_step: int | None) -> Iterator[bytes]:
        """The lines up to a step, of a file that may be larger than memory."""
        if resume_step is None or not self._path.exists():
            return
        for record, line in _records(self._path, last_step=resume_step):
            self._last_step = record["step"]
            yield line

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line, complete on return even if the process is killed the moment after.

        Args:
          step: larger than that of every line so far.
          values: name to None, bool, int, str or scalar array (float32 values read back exactly), or a
            mapping or list of these, of which TensorBoard gets the numbers but not lists of lists;
            NaN and infinities are written as null, since JSON has no word for them. All that is known
            about a step goes into the one call.

        Raises:
          ValueError: the step was written before; that is an error of the caller.
          RunError: the disk refuses the line.
        """
        if self._file is None:
            return
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step} was logged")
        text = strict_json({"step": step, **values})
        data = text.encode() + b"\n"
        scalars = dict(_scalars(json.loads(text), ""))
        try:
            if self._file.write(data) != len(data):  # how a disk that has just filled up answers
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._events.write(step, scalars)
        except OSError as error:
            raise unwritable(self._path, error) from error
        self._last_step = step

    def sync(self) -> None:
        """Forces everything written so far to the disk; call it before saving a checkpoint."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
            self._events.flush()
        except OSError as error:
            raise unwritable(self._path, error) from error

    def close(self) -> None:
        """Closes the files.

        Raises:
          RunError: the disk refuses the last events.
        """
        if self._file is None:
            return
        self._file.close()
        self._file = None
        try:
            self._events.close()
        except OSError as error:
            raise unwritable(self._path, error) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _scalars(values: Any, prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested values by their path, the step left out."""
    for name, value in values.items():
        if isinstance(value, list) and not any(isinstance(item, list) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and (prefix or name != "step"):
            yield f"{prefix}{name}", value


def read_metrics(workdir: str | os.PathLike[str], name: str = METRICS) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, or of the file of that name, in order; a half last line is left out.

    Raises:
      RunError: there is no such file, or a line is damaged.
    """
    path = Path(workdir) / name
    if not path.exists():
        raise RunError(f"{path} does not exist; give the --workdir of a run")
    return [record for record, _ in _records(path)]


def _records(path: Path, last_step: int | None = None) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(record, line) of each whole line up to `last_step`, whatever comes after it.

    Raises:
      RunError: a line is damaged.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                past = record["step"] > (math.inf if last_step is None else last_step)
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(f"line {number} of {path} is damaged; repair it, or use another --workdir") from error
            if past:
                return
            yield record, line
