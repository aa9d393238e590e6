"""The directory of one run, `--workdir`.

It belongs to one configuration, written down in `config.json`, and to one process at a time, which
holds a lock on `.lock` for as long as it lives (the kernel drops the lock however the process
ends, so a killed run never has to be unlocked by hand). A run directory in a bucket, `gs://BUCKET/FOLDER`,
holds the same files: `mirror` says how they come there, and `lease` what the lock is.

    config.json      every resolved flag and recipe, as given to `RunDir.open`
    env.json         {"sessions": [...]}: versions, machine, command line of every start
    metrics.jsonl    experiments.runs.metrics
    telemetry.jsonl  the same for --telemetry, and fallback.json what --fallback did
    summary.json     written once, at the end
    diverged.json    instead of it, if the loss or the gradient was not finite: step and reason
    checkpoints/     experiments.runs.checkpoint
    tensorboard/     event files, a view of metrics.jsonl
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from experiments.bucket import Bucket, is_url
from experiments.runs.config import CONFIG, config_differences, refuse_other_config
from experiments.runs.errors import RunError, disk_reason
from experiments.runs.files import TEMPORARY_SUFFIX, read_json, write_json, write_of_run
from experiments.runs.lease import LOCK, Lease
from experiments.runs.mirror import CHECKPOINTS, Mirror

ENVIRONMENT = "env.json"
SUMMARY = "summary.json"
DIVERGENCE = "diverged.json"


@dataclass(frozen=True)
class RunDir:
    """An open run directory.

    Invariant: while it is open, `config.json` in `path` holds exactly `config`, and (on the primary
    process, and of one that was opened to look) this process holds the lock.

    Attributes:
      place: the absolute directory, or the URL of the place in a bucket.
      path: the directory; of one in a bucket a local one, whose files `push` copies there.
      config: the configuration, as it reads back from JSON (tuples are lists).
      resumed: whether the directory already held this run.
      changed: the flags that may change and did since it was last opened, name to (stored, now) as text.
      primary: whether this process writes; the others of a multi-process run, and who looks, only read.
    """

    place: str
    path: Path
    config: dict[str, Any]
    resumed: bool
    changed: dict[str, tuple[str, str]]
    primary: bool
    _lock: BinaryIO | Lease | None
    _mirror: Mirror | None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        may_change: Collection[str] = (),
        primary: bool = True,
    ) -> RunDir:
        """Creates the run directory, or reopens it for the same configuration.

        Call it after everything else that can be checked has been, so that a mistyped command
        leaves no directory behind.

        Args:
          path: the value of `--workdir`; parents are created. Of one in a bucket the files are copied
            to a local directory, on every process.
          config: flag name to JSON value, nested mappings allowed, NaN not.
          may_change: top-level keys that do not define the run (how often to log, how long to
            train); they may differ from the stored ones, and the new value is then stored unless the
            run is finished.
          primary: False on every process of a multi-process run but the first.

        Raises:
          RunError: the directory is in use, belongs to another configuration or to something
            else, or cannot be written. Nothing in it has been changed.
        """
        wanted = json.loads(json.dumps(dict(config), allow_nan=False))
        with contextlib.ExitStack() as undo:
            try:
                mirror, place, directory = None, os.fspath(path), Path(path)
                if is_url(path):
                    mirror = Mirror(Bucket.connect(path))
                    undo.callback(mirror.close)
                    place, directory = mirror.bucket.url, mirror.folder
                else:
                    directory = directory.expanduser().absolute()
                    place = str(directory)
                if not primary:
                    if mirror is not None:
                        mirror.pull()
                    undo.pop_all()
                    return cls(place, directory, wanted, False, {}, primary=False, _lock=None, _mirror=mirror)
                lock = _lock_directory(directory, undo) if mirror is None else _lock_bucket(mirror, undo)
                resumed = (directory / CONFIG).exists()
                stored = read_json(directory / CONFIG) if resumed else wanted
                refuse_other_config(place, stored, wanted, may_change)
                if (directory / SUMMARY).exists():
                    wanted = stored
                elif not resumed or stored != wanted:
                    write_json(directory / CONFIG, wanted)
                if mirror is not None:
                    mirror.push()
            except OSError as error:
                fix = "correct it, or give a directory" if is_url(path) else "give a directory that can be written"
                raise RunError(f"--workdir={path} cannot be used ({disk_reason(error)}); {fix}") from error
            undo.pop_all()
        changed = config_differences(stored, wanted)
        return cls(place, directory, wanted, resumed, changed, primary=True, _lock=lock, _mirror=mirror)

    @classmethod
    def look(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunDir:
        """Opens a run directory to read it: nothing in it changes, and no process writes to it until it is closed.

        Args:
          path: a directory that holds a run.
          config: as for `open`.

        Raises:
          RunError: a process writes to the directory, it belongs to another configuration, or it cannot be read.
        """
        directory = Path(path).expanduser().absolute()
        wanted = json.loads(json.dumps(dict(config), allow_nan=False))
        try:
            refuse_other_config(str(directory), read_json(directory / CONFIG), wanted, ())
            lock = _acquire_shared(directory)
        except OSError as error:
            raise RunError(
                f"--workdir={path} cannot be read ({disk_reason(error)}); give a directory that can be"
            ) from error
        return cls(str(directory), directory, wanted, True, {}, primary=False, _lock=lock, _mirror=None)

    @property
    def checkpoints(self) -> str:
        """Where `Checkpoints` keeps the checkpoints."""
        return f"{self.place}/{CHECKPOINTS}"

    def check(self) -> None:
        """Makes sure that a run in a bucket is still this process's; in a directory the lock cannot be lost.

        Raises:
          RunError: another process has taken it over.
          OSError: the bucket cannot be reached.
        """
        if isinstance(self._lock, Lease):
            self._lock.check()

    def push(self) -> None:
        """Copies what has changed to the bucket, if the run stands in one, and if it is still this process's.

        Raises:
          RunError: another process has taken it over.
          OSError: the bucket cannot be reached or written.
        """
        if self._mirror is not None and self.primary:
            self.check()
            self._mirror.push()

    def record_session(self, environment: Mapping[str, Any]) -> None:
        """Appends what this start ran on to `env.json`; earlier sessions stay.

        Raises:
          RunError: the disk refuses it, as in `write_summary` and `write_divergence`.
        """
        if not self.primary:
            return
        path = self.path / ENVIRONMENT
        sessions = read_json(path)["sessions"] if path.exists() else []
        write_of_run(path, {"sessions": [*sessions, dict(environment)]})
        self._push_now()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json` atomically, in the given order; non-finite values become null."""
        if self.primary:
            write_of_run(self.path / SUMMARY, summary, sort_keys=False)
            (self.path / DIVERGENCE).unlink(missing_ok=True)
            self._push_now()

    def write_divergence(self, step: int, reason: str) -> None:
        """Writes `diverged.json`; a run that is taken up again and ends otherwise removes it by `write_summary`."""
        if self.primary:
            write_of_run(self.path / DIVERGENCE, {"step": step, "reason": reason})
            self._push_now()

    def summary(self) -> dict[str, Any] | None:
        """What `write_summary` wrote: not None if the run is finished.

        Raises:
          RunError: the file is damaged.
        """
        path = self.path / SUMMARY
        return read_json(path) if path.exists() else None

    def close(self) -> None:
        """Gives up the lock. The end of the process does so too, of one in a bucket after a while."""
        if isinstance(self._lock, Lease):
            self._lock.release()
        elif self._lock is not None:
            self._lock.close()
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if kind is None:
                self._push_now()
        finally:
            self.close()

    def _push_now(self) -> None:
        """`push`, whose failure is a sentence."""
        try:
            self.push()
        except OSError as error:
            raise RunError(
                f"--workdir={self.place} cannot be written ({disk_reason(error)}); repeat the command, which goes on"
                " from the last checkpoint there"
            ) from error


def _refuse_foreign(place: str, names: Collection[str]) -> None:
    # A start that was killed before it wrote config.json leaves only these.
    own = {LOCK, f".{CONFIG}{TEMPORARY_SUFFIX}"}
    if CONFIG not in names and not own.issuperset(names):
        raise RunError(
            f"--workdir={place} is not empty and holds no {CONFIG}, so it belongs to something"
            " else; give a new or empty directory"
        )


def _lock_bucket(mirror: Mirror, undo: contextlib.ExitStack) -> Lease:
    """Takes the lease of a run in a bucket and copies its files here."""
    _refuse_foreign(mirror.bucket.url, mirror.bucket.sizes())
    lease = Lease.take(mirror.bucket, lambda text: print(text, file=sys.stderr, flush=True))
    undo.callback(lease.release)
    mirror.pull()
    return lease


def _lock_directory(directory: Path, undo: contextlib.ExitStack) -> BinaryIO:
    if directory.exists():
        if not directory.is_dir():
            raise RunError(f"--workdir={directory} is a file; give a directory")
        _refuse_foreign(str(directory), [entry.name for entry in directory.iterdir()])
    directory.mkdir(parents=True, exist_ok=True)
    lock = _acquire(directory)
    undo.callback(lock.close)
    return lock


def _acquire(directory: Path) -> BinaryIO:
    """Locks the directory for this process; the lock lasts as long as the returned file is open."""
    with contextlib.ExitStack() as undo:
        # Append mode creates the file without emptying it: it may name the process that holds it.
        file = undo.enter_context(open(directory / LOCK, "a+b", buffering=0))
        _lock(file, fcntl.LOCK_EX, f"--workdir={directory}", "give another --workdir")
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        undo.pop_all()
    return file


def _acquire_shared(directory: Path) -> BinaryIO | None:
    """Keeps those from locking the directory who write; None where no one ever has, as in an archive."""
    with contextlib.ExitStack() as undo:
        try:
            file = undo.enter_context(open(directory / LOCK, "rb", buffering=0))
        except FileNotFoundError:
            return None
        _lock(file, fcntl.LOCK_SH, f"the run in {directory}", "give the --config of a copy of it")
        undo.pop_all()
    return file


def _lock(file: BinaryIO, kind: int, what: str, otherwise: str) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file.fileno(), 32, 0).decode(errors="replace")
        by = f" by process {holder}" if holder.isdigit() else ""
        raise RunError(f"{what} is in use{by}; wait for it to end or {otherwise}") from error
