"""TensorBoard event files, as a view of `metrics.jsonl`.

tensorboardX's SummaryWriter hands events to a thread through a bounded queue; when the disk is full
the thread dies and the training loop then waits on the queue for ever. So the records are written
here, in the caller's thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FLUSH_SECONDS = 5.0


class EventFile:
    """One event file of a run; every start of the run opens another in the same directory."""

    def __init__(self, directory: str | os.PathLike[str], purge_step: int):
        """Creates the file.

        Args:
          directory: `tensorboard/` in the run directory, created if absent.
          purge_step: TensorBoard hides what earlier files hold from this step on.

        Raises:
          OSError: the file cannot be written.
        """
        # 0.3 s to import, which programs that only read metrics need not pay.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory = Path(directory)
        directory.mkdir(exist_ok=True)
        # TensorBoard reads the files of a run in the order of their names; two starts may fall into
        # the same second, and a clock may have been set back since the last one.
        earlier = [int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.*.*")]
        name = f"events.out.tfevents.{max([int(time.time()), *earlier]):010d}.{len(earlier):04d}"
        self._records = RecordWriter(str(directory / name))
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=purge_step, session_log=start)
        self.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per entry; they reach the disk within seconds, or at `flush`."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=scalars))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Forces everything to the disk."""
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
