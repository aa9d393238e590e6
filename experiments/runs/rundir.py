"""The directory of one run, `--workdir`.

It belongs to one configuration, written down in `config.json`, and to one process at a time, which
holds a lock on `.lock` for as long as it lives (the kernel drops the lock however the process
ends, so a killed run never has to be unlocked by hand).

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
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from experiments.runs.errors import RunError, disk_reason
from experiments.runs.files import TEMPORARY_SUFFIX, read_json, write_json

CONFIG = "config.json"
ENVIRONMENT = "env.json"
SUMMARY = "summary.json"
DIVERGENCE = "diverged.json"
LOCK = ".lock"
_DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class RunDir:
    """An open run directory.

    Invariant: while it is open, `config.json` in `path` holds exactly `config`, and (on the primary
    process, and of one that was opened to look) this process holds the lock.

    Attributes:
      path: the absolute directory.
      config: the configuration, as it reads back from JSON (tuples are lists).
      resumed: whether the directory already held this run.
      changed: the flags that may change and did since it was last opened, name to (stored, now) as text.
      primary: whether this process writes; the others of a multi-process run, and who looks, only read.
    """

    path: Path
    config: dict[str, Any]
    resumed: bool
    changed: dict[str, tuple[str, str]]
    primary: bool
    _lock: BinaryIO | None

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
          path: the value of `--workdir`; parents are created.
          config: flag name to JSON value, nested mappings allowed, NaN not.
          may_change: top-level keys that do not define the run (how often to log, how long to
            train); they may differ from the stored ones, and the new value is then stored unless the
            run is finished.
          primary: False on every process of a multi-process run but the first.

        Raises:
          RunError: the directory is in use, belongs to another configuration or to something
            else, or cannot be written. Nothing on disk has been changed.
        """
        if re.match(r"[a-z0-9]+://", os.fspath(path)):
            raise RunError(
                f"--workdir={path} is not a directory on a mounted file system, which locks and"
                " atomic renames need; mount the bucket or give a path"
            )
        directory = Path(path).expanduser().absolute()
        wanted = json.loads(json.dumps(dict(config), allow_nan=False))
        if not primary:
            return cls(directory, wanted, resumed=False, changed={}, primary=False, _lock=None)
        with contextlib.ExitStack() as undo:
            try:
                _refuse_foreign(directory)
                directory.mkdir(parents=True, exist_ok=True)
                lock = _acquire(directory)
                undo.callback(lock.close)
                resumed = (directory / CONFIG).exists()
                stored = read_json(directory / CONFIG) if resumed else wanted
                _refuse_other_config(directory, stored, wanted, may_change)
                if (directory / SUMMARY).exists():
                    wanted = stored
                elif not resumed or stored != wanted:
                    write_json(directory / CONFIG, wanted)
            except OSError as error:
                raise RunError(
                    f"--workdir={path} cannot be used ({disk_reason(error)}); give a directory that can be written"
                ) from error
            undo.pop_all()
        changed = config_differences(stored, wanted)
        return cls(directory, wanted, resumed, changed, primary=True, _lock=lock)

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
            _refuse_other_config(directory, read_json(directory / CONFIG), wanted, ())
            lock = _acquire_shared(directory)
        except OSError as error:
            raise RunError(
                f"--workdir={path} cannot be read ({disk_reason(error)}); give a directory that can be"
            ) from error
        return cls(directory, wanted, resumed=True, changed={}, primary=False, _lock=lock)

    @property
    def checkpoints(self) -> Path:
        """Where `Checkpoints` keeps the checkpoints."""
        return self.path / "checkpoints"

    def record_session(self, environment: Mapping[str, Any]) -> None:
        """Appends what this start ran on to `env.json`; earlier sessions stay."""
        if not self.primary:
            return
        path = self.path / ENVIRONMENT
        sessions = read_json(path)["sessions"] if path.exists() else []
        write_json(path, {"sessions": [*sessions, dict(environment)]})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json` atomically, in the given order; non-finite values become null."""
        if self.primary:
            write_json(self.path / SUMMARY, summary, sort_keys=False)
            (self.path / DIVERGENCE).unlink(missing_ok=True)

    def write_divergence(self, step: int, reason: str) -> None:
        """Writes `diverged.json`; a run that is taken up again and ends otherwise removes it by `write_summary`."""
        if self.primary:
            write_json(self.path / DIVERGENCE, {"step": step, "reason": reason})

    def summary(self) -> dict[str, Any] | None:
        """What `write_summary` wrote: not None if the run is finished.

        Raises:
          RunError: the file is damaged.
        """
        path = self.path / SUMMARY
        return read_json(path) if path.exists() else None

    def close(self) -> None:
        """Gives up the lock. The end of the process does so too."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration in a stored `config.json`, for `--config=RUN/config.json`.

    Raises:
      RunError: the file is absent, a directory, or not the configuration of a run.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise RunError(f"--config={path} is a directory; give --config={file / CONFIG}")
    if not file.exists():
        raise RunError(f"--config={path} does not exist; give the {CONFIG} of a run")
    try:
        config = read_json(file)
    except RunError as error:
        raise RunError(f"--config={path}: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"--config={path} does not hold flags; give the {CONFIG} of a run")
    return config


def config_differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], may_change: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """The flags on which two configurations differ: name to (stored, wanted) as text.

    Nested mappings are compared entry by entry under dotted names. A key that one side lacks counts
    as null there, and both show as "unset": a flag that is newer than the run does not part them.
    """
    old, new = _flat(stored), _flat(wanted)
    return {
        key: (_show(old.get(key)), _show(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if key.split(".")[0] not in may_change and old.get(key) != new.get(key)
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            entries.update(_flat(value, f"{prefix}{key}."))
        else:
            entries[f"{prefix}{key}"] = value
    return entries


def _show(value: Any) -> str:
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)


def _refuse_foreign(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RunError(f"--workdir={directory} is a file; give a directory")
    if not directory.exists() or (directory / CONFIG).exists():
        return
    # A start that was killed before it wrote config.json leaves only these.
    own = {LOCK, f".{CONFIG}{TEMPORARY_SUFFIX}"}
    if any(entry.name not in own for entry in directory.iterdir()):
        raise RunError(
            f"--workdir={directory} is not empty and holds no {CONFIG}, so it belongs to something"
            " else; give a new or empty directory"
        )


def _refuse_other_config(directory: Path, stored: Any, wanted: Mapping[str, Any], may_change: Collection[str]) -> None:
    if not isinstance(stored, dict):
        raise RunError(f"{directory / CONFIG} does not hold flags; use another --workdir")
    differences = config_differences(stored, wanted, may_change)
    if not differences:
        return
    shown = list(differences.items())[:_DIFFERENCES_SHOWN]
    listed = ", ".join(f"--{key}={old} (here {new})" for key, (old, new) in shown)
    hidden = len(differences) - len(shown)
    more = f" and {hidden} more that differ" if hidden else ""
    raise RunError(f"--workdir={directory} holds a run with {listed}{more}; use another --workdir or repeat the flags")


def _acquire(directory: Path) -> BinaryIO:
    """Locks the directory for this process; the lock lasts as long as the returned file is open."""
    with contextlib.ExitStack() as undo:
        # Append mode creates the file without emptying it: it may name the process that holds it.
        file = undo.enter_context(open(directory / LOCK, "a+b", buffering=0))
        _lock(file, fcntl.LOCK_EX, directory)
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
        _lock(file, fcntl.LOCK_SH, directory)
        undo.pop_all()
    return file


def _lock(file: BinaryIO, kind: int, directory: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file.fileno(), 32, 0).decode(errors="replace")
        by = f" by process {holder}" if holder.isdigit() else ""
        raise RunError(f"--workdir={directory} is in use{by}; wait for it to end or give another --workdir") from error
