"""Checkpoints that are written in the background and verified before they are used.

Orbax's CheckpointManager publishes a step before a digest of it could be taken, and its retention knows nothing of
digests; hence the AsyncCheckpointer below it is used directly. `steps` says what a complete checkpoint is, in a
directory and in a bucket.
"""

from __future__ import annotations

import concurrent.futures
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from experiments.runs import leaves
from experiments.runs.agreement import first_process_says
from experiments.runs.errors import CheckpointError, RunError, disk_reason
from experiments.runs.files import plain
from experiments.runs.quiet import silence_orbax
from experiments.runs.steps import storage

# Orbax measures by the clock on the wall, and would give a save up when that is set forward. What does hang is known by
# other signs: a process whose save failed ends, and of one that has ended JAX tells the others.
_NEVER_SECONDS = 100 * 365 * 24 * 3600
# What the first process tells the others: a step, or one of these.
_PRESENT, _ABSENT, _UNUSABLE = 0, -1, -2
_ELSEWHERE = "the first process cannot use the checkpoints, and says why"


class Restored(NamedTuple):
    """A checkpoint as it was saved."""

    step: int
    tree: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every process of a multi-process run makes every call.

    Where a save fails, a run of one process goes on. Of several the one that it failed on ends with the next save or
    wait, and with it the run: the others wait for what it did not write.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        warn: Callable[[str], None] | None = None,
        check: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None,
        tidy: bool = True,
    ):
        """Touches nothing on disk yet.

        Args:
          directory: of one run that this process has locked, on a file system that all processes
            share, or a URL of a place in a bucket.
          keep: how many of the newest checkpoints stay. With 1 there is none to fall back on.
          warn: gets a sentence about every damaged checkpoint and failed save, from whatever
            thread finds out; prints to standard error unless given.
          check: called on the first process before a save changes anything; an OSError fails the
            save, a RunError ends the run.
          before: the same before a checkpoint becomes complete, in the background.
          tidy: False leaves what is unfinished or damaged as it is, for one who only restores.

        Raises:
          CheckpointError: the bucket cannot be reached.
        """
        # Half a second to import, which a wrong flag or --help need not wait for.
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints; give at least 1")
        silence_orbax()
        self._where, self._steps = storage(directory)
        self._keep = keep
        self._check, self._before, self._tidy = check, before, tidy
        self._warn = warn or _print_warning
        self._primary = jax.process_index() == 0
        self._save_args, self._restore_args = ocp.args.StandardSave, ocp.args.StandardRestore
        self._orbax = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_NEVER_SECONDS,
                create_directories_asynchronously=False,  # which has a time limit of its own
            ),
        )
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[str | None] | None = None

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return self._steps.complete()

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Starts to write a checkpoint and returns as soon as the arrays have been copied.

        They may be donated or overwritten at once. Waits first for the previous save to end. A save
        that fails, on a full disk for one, is reported through `warn` and leaves older checkpoints
        as they are; a run of one process can go on. A step that has a checkpoint is not written again.

        Args:
          step: of the state that is saved, at least 0.
          tree: any pytree of jax or NumPy arrays of any dtype in `q8jax` and any sharding; typed
            PRNG keys as their `jax.random.key_data`.
          metadata: JSON values to restore with it.

        Raises:
          TypeError: a leaf is not an array, or the metadata are not JSON values.
          RunError: the run is another process's by now.
          CheckpointError: the save before failed on this process of several.
        """
        failure = self._finish_pending()
        if failure is not None and jax.process_count() > 1:
            raise CheckpointError(failure)
        named = leaves.named_leaves(tree)
        record = {
            "step": step,
            "metadata": plain(dict(metadata or {}), "metadata"),
            "leaves": {name: leaves.describe(leaf) for name, leaf in named.items()},
        }
        # Orbax refuses arrays without elements; their shape says all there is to know.
        arrays = {name: leaves.to_storage(leaf) for name, leaf in named.items() if leaf.size}
        try:
            place = self._prepare(step)
            if place is None:
                return
            self._orbax.save(place, args=self._save_args(arrays))
        except RunError:
            raise
        except Exception as error:  # an OSError of a disk, but of a bucket whatever its libraries raise
            self._pending = concurrent.futures.Future()
            self._pending.set_result(self._failed(step, error))
            return
        self._pending = self._worker.submit(self._complete, step, record)

    @property
    def writing(self) -> bool:
        """Whether a save is still on its way to the disk."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          CheckpointError: it failed (`warn` has been told, too).
          RunError: the run is another process's by now.
        """
        failure = self._finish_pending()
        if failure is not None:
            raise CheckpointError(failure)
        first_process_says(0)  # who publishes it, and otherwise ends, and with it the others

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
        record = self._read(step)
        if callable(target):
            target = target(step)
        wanted = leaves.named_leaves(target)
        different = leaves.mismatch(record["leaves"], {name: leaves.describe(leaf) for name, leaf in wanted.items()})
        if different is not None:
            raise CheckpointError(
                f"checkpoint {step} in {self._where} does not fit this run ({different});"
                " repeat the flags it was written with (--model, --precision and what they imply)"
                " or use another --workdir"
            )
        specs = leaves.storage_targets(target, shardings)
        arrays = self._orbax.restore(
            self._steps.state(step),
            args=self._restore_args({name: spec for name, spec in specs.items() if spec.size}),
        )
        restored = [leaves.from_storage(arrays.get(name, specs[name]), leaf) for name, leaf in wanted.items()]
        tree = jax.tree.unflatten(jax.tree.structure(target), restored)
        return Restored(step, tree, record["metadata"])

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        try:
            self._finish_pending()
        finally:
            self._worker.shutdown()
            self._orbax.close()
            self._steps.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _finish_pending(self) -> str | None:
        return None if self._pending is None else self._pending.result()

    def _prepare(self, step: int) -> str | None:
        """Where to write, made ready; None if the checkpoint is already there."""
        failure: Exception | None = None
        verdict = _ABSENT
        if self._primary:
            try:
                self._check()
                if step in self._steps.complete():
                    verdict = _PRESENT
                else:
                    self._steps.begin(step)
            except (OSError, RunError) as error:
                failure, verdict = error, _UNUSABLE
        verdict = first_process_says(verdict)
        if verdict == _UNUSABLE:
            raise failure or OSError(_ELSEWHERE)
        return self._steps.unfinished(step) if verdict == _ABSENT else None

    def _complete(self, step: int, record: dict[str, Any]) -> str | None:
        """Publishes what Orbax wrote; the reason as a sentence if that fails."""
        try:
            self._orbax.wait_until_finished()
            if self._primary:
                self._before()
                self._steps.publish(step, record)
                for old in self._steps.complete()[: -self._keep]:
                    self._steps.remove(old)
        except RunError:
            raise
        except Exception as error:
            return self._failed(step, error)
        return None

    def _failed(self, step: int, error: Exception) -> str:
        if self._primary:
            self._steps.abandon(step)
        failure = (
            f"the checkpoint of step {step} could not be written to {self._where}"
            f" ({disk_reason(error)}; {self._newest()}); make room there or"
            " give a --workdir that can be written"
        )
        self._warn(failure)
        return failure

    def _newest(self) -> str:
        try:
            complete = self._steps.complete()
        except OSError:
            return "older ones are as they were"
        return f"step {complete[-1]} is the newest" if complete else "there is none yet"

    def _agree_on_step(self) -> int | None:
        failure, step = None, _ABSENT
        if self._primary:
            try:
                newest = self._newest_good_step()
                step = _ABSENT if newest is None else newest
            except CheckpointError as error:
                failure, step = error, _UNUSABLE
            except OSError as error:
                reason = (
                    f"the checkpoints in {self._where} cannot be read ({disk_reason(error)}); make --workdir readable"
                )
                failure, step = CheckpointError(reason), _UNUSABLE
        step = first_process_says(step)
        if step == _UNUSABLE:
            raise failure or CheckpointError(_ELSEWHERE)
        return None if step == _ABSENT else step

    def _newest_good_step(self) -> int | None:
        if self._tidy:
            self._steps.sweep()
        damaged: dict[int, str] = {}
        for step in reversed(self._steps.complete()):
            try:
                problem = self._steps.damage(step)
            except OSError as error:
                raise self._unreadable(step, error) from error
            if problem is None:
                self._set_aside(damaged, step)
                return step
            damaged[step] = problem
        reasons = [f"{step}: {problem}" for step, problem in damaged.items()] + self._steps.aside()
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self._where} is good ({', '.join(reasons)}); put a good"
                " copy there, or remove the directory to start from step 0"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        for step, problem in damaged.items():
            if not self._tidy:
                self._warn(f"checkpoint {step} in {self._where} is damaged ({problem}); step {good} is used")
                continue
            aside = self._steps.set_aside(step)
            self._warn(
                f"checkpoint {step} in {self._where} is damaged ({problem}); it is now"
                f" {aside}, and the run goes on from step {good}"
            )

    def _read(self, step: int) -> dict[str, Any]:
        try:
            return self._steps.metadata(step)
        except OSError as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {step} in {self._where} cannot be read ({disk_reason(error)}); make --workdir readable"
        )


def _print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
