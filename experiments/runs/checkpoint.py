"""Checkpoints that are written in the background and verified before they are used.

    checkpoints/100/             complete, whenever it has this name
        state/                   the arrays, as Orbax's StandardCheckpointer writes and reads them
        metadata.json            step, the caller's metadata, dtype and shape of every leaf
        digests.json             size and SHA-256 of every file above
    checkpoints/150.partial/     being written or deleted; rubbish once the process is gone
    checkpoints/50.corrupt/      failed its verification; kept for whoever wants to look

A step directory gets its name by one rename, after its files and their digests are on the disk, so
that a process killed at any moment leaves complete checkpoints or rubbish, never something between.
Orbax's CheckpointManager publishes a step before a digest of it could be taken, and its retention
knows nothing of digests; hence the AsyncCheckpointer below it is used directly.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.runs import leaves
from experiments.runs.agreement import first_process_says
from experiments.runs.digests import damage, write_digests
from experiments.runs.errors import CheckpointError, disk_reason
from experiments.runs.files import fsync_directory, plain, read_json, write_json

_STATE = "state"
_METADATA = "metadata.json"
_PARTIAL = ".partial"
_CORRUPT = ".corrupt"
# What the first process tells the others: a step, or one of these.
_PRESENT, _ABSENT, _UNUSABLE = 0, -1, -2
_ELSEWHERE = "the first process cannot use the checkpoints, and says why"


class Restored(NamedTuple):
    """A checkpoint as it was saved."""

    step: int
    tree: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every process of a multi-process run makes every call."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        warn: Callable[[str], None] | None = None,
        tidy: bool = True,
    ):
        """Touches nothing on disk yet.

        Args:
          directory: of one run that this process has locked, on a file system that all processes
            share.
          keep: how many of the newest checkpoints stay. With 1 there is none to fall back on.
          warn: gets a sentence about every damaged checkpoint and failed save, from whatever
            thread finds out; prints to standard error unless given.
          tidy: False leaves what is unfinished or damaged as it is, for one who only restores.
        """
        # Half a second to import, which a wrong flag or --help need not wait for.
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints; give at least 1")
        _silence_orbax()
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._tidy = tidy
        self._warn = warn or _print_warning
        self._primary = jax.process_index() == 0
        self._save_args, self._restore_args = ocp.args.StandardSave, ocp.args.StandardRestore
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[str | None] | None = None

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Starts to write a checkpoint and returns as soon as the arrays have been copied.

        They may be donated or overwritten at once. Waits first for the previous save to end. A save
        that fails, on a full disk for one, is reported through `warn` and leaves older checkpoints
        as they are; training can go on. A step that has a checkpoint is not written again.

        Args:
          step: of the state that is saved, at least 0.
          tree: any pytree of jax or NumPy arrays of any dtype in `q8jax` and any sharding; typed
            PRNG keys as their `jax.random.key_data`.
          metadata: JSON values to restore with it.

        Raises:
          TypeError: a leaf is not an array, or the metadata are not JSON values.
        """
        self._finish_pending()
        named = leaves.named_leaves(tree)
        record = {
            "step": step,
            "metadata": plain(dict(metadata or {}), "metadata"),
            "leaves": {name: leaves.describe(leaf) for name, leaf in named.items()},
        }
        partial = self._directory / f"{step}{_PARTIAL}"
        # Orbax refuses arrays without elements; their shape says all there is to know.
        arrays = {name: leaves.to_storage(leaf) for name, leaf in named.items() if leaf.size}
        try:
            if not self._prepare(step, partial):
                return
            self._orbax.save(partial / _STATE, args=self._save_args(arrays))
        except OSError as error:
            self._pending = concurrent.futures.Future()
            self._pending.set_result(self._failed(step, partial, error))
            return
        self._pending = self._worker.submit(self._complete, step, partial, record)

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          CheckpointError: it failed (`warn` has been told, too).
        """
        failure = self._finish_pending()
        if first_process_says(int(failure is not None)):
            raise CheckpointError(failure or _ELSEWHERE)

    def latest_good(self, target: Any, shardings: Any = None) -> Restored | None:
        """Restores the newest checkpoint whose files are what was written.

        Removes what a killed process left unfinished. A damaged checkpoint is renamed to
        `<step>.corrupt` and reported through `warn`, and the one before it is used. Without
        `tidy` nothing is removed or renamed.

        Args:
          target: the tree to restore: ndarrays where ndarrays are wanted, elsewhere jax arrays or
            `jax.ShapeDtypeStruct`s. Only dtypes, shapes and shardings are read. Or a function from
            the step of the checkpoint to that tree.
          shardings: a sharding for every leaf, or a tree of them; None takes the leaf's own, or
            the first local device where it has none.

        Returns:
          The checkpoint, or None if the run never completed one.

        Raises:
          CheckpointError: there are checkpoints, but no good one, or the newest good one has other
            leaves, shapes or dtypes than `target`.
        """
        self._finish_pending()
        step = self._agree_on_step()
        if step is None:
            return None
        directory = self._directory / str(step)
        record = read_json(directory / _METADATA)
        if callable(target):
            target = target(step)
        wanted = leaves.named_leaves(target)
        different = leaves.mismatch(record["leaves"], {name: leaves.describe(leaf) for name, leaf in wanted.items()})
        if different is not None:
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} does not fit this run ({different});"
                " repeat the flags it was written with (--model, --precision and what they imply)"
                " or use another --workdir"
            )
        specs = leaves.storage_targets(target, shardings)
        arrays = self._orbax.restore(
            directory / _STATE,
            args=self._restore_args({name: spec for name, spec in specs.items() if spec.size}),
        )
        restored = [leaves.from_storage(arrays.get(name, specs[name]), leaf) for name, leaf in wanted.items()]
        tree = jax.tree.unflatten(jax.tree.structure(target), restored)
        return Restored(step, tree, record["metadata"])

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self._finish_pending()
        self._worker.shutdown()
        self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _finish_pending(self) -> str | None:
        return None if self._pending is None else self._pending.result()

    def _prepare(self, step: int, partial: Path) -> bool:
        """Makes an empty `partial`; False if the checkpoint is already there."""
        failure, verdict = None, _ABSENT
        if self._primary:
            try:
                if step in self.steps():
                    verdict = _PRESENT
                else:
                    _remove(partial)
                    partial.mkdir(parents=True)
            except OSError as error:
                failure, verdict = error, _UNUSABLE
        verdict = first_process_says(verdict)
        if verdict == _UNUSABLE:
            raise failure or OSError(_ELSEWHERE)
        return verdict == _ABSENT

    def _complete(self, step: int, partial: Path, record: dict[str, Any]) -> str | None:
        """Publishes what Orbax wrote to `partial`; the reason as a sentence if that fails."""
        try:
            self._orbax.wait_until_finished()
            if self._primary:
                write_json(partial / _METADATA, record, sort_keys=False)
                write_digests(partial)
                published = partial.rename(self._directory / str(step))
                fsync_directory(self._directory)
                problem = damage(published, contents=False)
                if problem is not None:
                    raise OSError(problem)
                for old in self.steps()[: -self._keep]:
                    _remove(self._directory / str(old))
        except Exception as error:
            return self._failed(step, partial, error)
        return None

    def _failed(self, step: int, partial: Path, error: Exception) -> str:
        if self._primary:
            shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its space back
        complete = self.steps()
        left = f"step {complete[-1]} is the newest" if complete else "there is none yet"
        failure = (
            f"the checkpoint of step {step} could not be written to {self._directory}"
            f" ({disk_reason(error)}; {left}); make room there or"
            " give a --workdir that can be written"
        )
        self._warn(failure)
        return failure

    def _agree_on_step(self) -> int | None:
        failure, step = None, _ABSENT
        if self._primary:
            try:
                newest = self._newest_good_step()
                step = _ABSENT if newest is None else newest
            except CheckpointError as error:
                failure, step = error, _UNUSABLE
        step = first_process_says(step)
        if step == _UNUSABLE:
            raise failure or CheckpointError(_ELSEWHERE)
        return None if step == _ABSENT else step

    def _newest_good_step(self) -> int | None:
        if not self._directory.is_dir():
            return None
        if self._tidy:
            for path in self._directory.glob(f"*{_PARTIAL}"):
                shutil.rmtree(path, ignore_errors=True)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                problem = damage(self._directory / str(step))
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {step} in {self._directory} cannot be read"
                    f" ({disk_reason(error)}); make --workdir readable"
                ) from error
            if problem is None:
                self._set_aside(damaged, step)
                return step
            damaged[step] = problem
        reasons = [f"{step}: {problem}" for step, problem in damaged.items()]
        reasons += sorted(path.name for path in self._directory.glob(f"*{_CORRUPT}*"))
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self._directory} is good ({', '.join(reasons)}); put a good"
                " copy there, or remove the directory to start from step 0"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        for step, problem in damaged.items():
            if not self._tidy:
                self._warn(f"checkpoint {step} in {self._directory} is damaged ({problem}); step {good} is used")
                continue
            aside = self._directory / f"{step}{_CORRUPT}"
            number = 1
            while aside.exists():
                number += 1
                aside = self._directory / f"{step}{_CORRUPT}{number}"
            (self._directory / str(step)).rename(aside)
            self._warn(
                f"checkpoint {step} in {self._directory} is damaged ({problem}); it is now"
                f" {aside.name}, and the run goes on from step {good}"
            )


def _remove(directory: Path) -> None:
    """Deletes a checkpoint; killed halfway, it leaves a `.partial`, not half a checkpoint."""
    if not directory.exists():
        return
    if not directory.name.endswith(_PARTIAL):
        directory = directory.rename(directory.with_name(f"{directory.name}{_PARTIAL}"))
    shutil.rmtree(directory)


def _print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _silence_orbax() -> None:
    """Keeps Orbax from logging a traceback about each failed save; `Checkpoints` says it better."""
    logger = logging.getLogger("absl")
    if _from_elsewhere not in logger.filters:
        logger.addFilter(_from_elsewhere)


def _from_elsewhere(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
