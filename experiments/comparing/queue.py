"""The queue of a study's runs, each in a process of its own.

What is done and what is left stands on disk alone, in the directories of the runs, so that it does not matter how this
process or one of its own ended, or who else ran a part: whatever has a summary or has diverged is left alone, what
another process holds is looked at again later, and everything else is started, which takes it up where it was left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.comparing import ondisk
from experiments.comparing.contention import Contention
from experiments.comparing.display import Display
from experiments.comparing.places import without_places
from experiments.comparing.plan import PlannedRun
from experiments.comparing.slots import Slot
from experiments.comparing.tasks import DIVERGED, ELSEWHERE, FAILED, FINISHED, PAUSED, RUNNING, WAITING, Task
from experiments.runs.cleanexit import StopSignal
from experiments.runs.errors import RunError, disk_reason

_TRIES = 3  # of a run that something else stops
_LOOK_AGAIN = 2.0  # seconds until a run that another process holds is looked at
_LONGEST_REASON = 300


@dataclasses.dataclass
class _Child:
    task: Task
    slot: Slot
    process: subprocess.Popen
    log: Path
    offset: int
    started: datetime.datetime
    contention: Contention


class Queue:
    """Runs what is left of a study.

    Args:
      out: the study's directory, claimed by this process.
      slots: room for runs, one each.
      program: how pretrain is started, before its flags.
      revision: of the code, for the record.
      stop: says when to leave.
      display: shows where it all stands.
      after_run: called when a run has ended by itself.
      pause: seconds between looks at the processes.
    """

    def __init__(
        self,
        out: Path,
        slots: Sequence[Slot],
        program: Sequence[str],
        revision: str | None,
        stop: StopSignal,
        display: Display,
        after_run: Callable[[], object],
        pause: float = 0.2,
    ):
        self._out = out
        self._slots = slots
        self._program = program
        self._revision = revision
        self._stop = stop
        self._display = display
        self._after_run = after_run
        self._pause = pause
        self._children: list[_Child] = []
        self._looked = 0.0

    def work(self, goals: Mapping[str, int], runs: Sequence[PlannedRun]) -> list[Task]:
        """Takes runs to their goals, in order, unless told to stop; returns where each stands then.

        Args:
          goals: by name of the run, the step to train it to.
          runs: in the order in which they are started.

        Raises:
          RunError: the study's directory cannot be written.
        """
        tasks = [Task(run, goals[run.name]) for run in runs]
        for task in tasks:
            task.look()
            if task.state == ELSEWHERE:
                self._display.elsewhere(task)
        self._display.show(tasks)
        told = False
        try:
            while True:
                self._reap()
                if not self._stop.requested:
                    self._look_again(tasks)
                    self._fill(tasks)
                elif not told:
                    told = True
                    count = len(self._children)
                    self._display.note(f"{self._stop.requested}: {count} run{'s' * (count != 1)} told to save and stop")
                    self._signal(signal.SIGTERM)
                for child in self._children:
                    child.task.step, child.task.loss = ondisk.position(child.task.run.path)
                self._display.show(tasks)
                left = any(task.state in (WAITING, ELSEWHERE) for task in tasks)
                if not self._children and (self._stop.requested or not left):
                    return tasks
                time.sleep(self._pause)
        except BaseException as error:
            # A second Ctrl-C is of somebody who will not wait; a run survives being killed.
            self._signal(signal.SIGKILL if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
            for child in self._children:
                code = child.process.wait()
                with contextlib.suppress(RunError):
                    self._ended(child, code)
            raise

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children:
            child.process.send_signal(number)

    def _look_again(self, tasks: Sequence[Task]) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_AGAIN:
            return
        self._looked = now
        for task in tasks:
            if task.state == ELSEWHERE:
                task.look()
                if task.state in (FINISHED, DIVERGED):
                    self._display.elsewhere(task)
                    self._after_run()

    def _fill(self, tasks: Sequence[Task]) -> None:
        """Starts runs while there is room; what a process of this machine runs already takes a slot too."""
        for task in tasks:
            elsewhere = sum(t.state == ELSEWHERE and t.holder is not None and t.holder.is_here for t in tasks)
            if len(self._children) + elsewhere >= len(self._slots):
                return
            if task.state == WAITING:
                task.look()
                if task.state == WAITING:
                    self._start(task)
                elif task.state == ELSEWHERE:
                    self._display.elsewhere(task)

    def _start(self, task: Task) -> None:
        taken = [child.slot for child in self._children]
        slot = next(slot for slot in self._slots if not any(slot is other for other in taken))
        run = task.run
        command = [*self._program, *run.arguments, *([f"--stop_after={task.goal}"] if task.pauses else [])]
        log = self._out / "logs" / f"{run.name}.log"
        with ondisk.writing(log):
            log.parent.mkdir(exist_ok=True)
            file = open(log, "ab", buffering=0)  # noqa: SIM115
        with file:
            with ondisk.writing(log):
                file.write(f"$ {shlex.join(command)}\n".encode())
            offset = file.tell()
            try:
                with slot.entered():
                    # In a group of its own, or Ctrl-C would reach it from the terminal as well as from here.
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **slot.environment},
                        process_group=0,
                    )
            except OSError as error:
                raise RunError(f"{run.name} cannot be started ({disk_reason(error)}); lower --jobs") from error
        task.state, task.began, task.since = RUNNING, task.step, time.monotonic()
        task.tries += 1
        now = datetime.datetime.now(datetime.UTC)
        self._children.append(_Child(task, slot, process, log, offset, now, Contention()))
        self._display.started(task)

    def _reap(self) -> None:
        for child in list(self._children):
            code = child.process.poll()
            if code is not None:
                self._children.remove(child)
                self._ended(child, code)

    def _ended(self, child: _Child, code: int) -> None:
        """Records an attempt, and sets where its run stands now."""
        task = child.task
        task.look()
        outcome, task.reason = self._judged(child, code)
        if outcome == FAILED:
            task.state = FAILED
        seconds = time.monotonic() - task.since
        record = {
            "run": task.run.name,
            "started": child.started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "exit": code,
            "outcome": outcome,
            "reason": task.reason,
            "jobs": len(self._slots),
            "others": round(child.contention.others(), 3) if len(self._slots) == 1 else None,
            "revision": self._revision,
        }
        ondisk.append(self._out / ondisk.ATTEMPTS, record)
        self._display.ended(task, seconds)
        if task.state in (FINISHED, DIVERGED):
            self._after_run()

    def _judged(self, child: _Child, code: int) -> tuple[str, str]:
        """(outcome, reason) of an attempt whose run has been looked at since."""
        task = child.task
        if task.state == FINISHED:
            return "finished", ""
        if task.state == DIVERGED:
            return "diverged", ondisk.divergence(task.run.path)
        if task.state == ELSEWHERE:
            return "interrupted", f"{task.holder} runs it"
        if code > 0 and code != os.EX_TEMPFAIL:  # with which a run ends that a signal stopped
            return "failed", self._last_words(child) or f"exit code {code}"
        if task.state == PAUSED:
            return "interrupted", f"stopped after step {task.goal}, as planned"
        reason = f"stopped by {signal.Signals(-code).name}" if code < 0 else "stopped by a signal, and saved"
        if self._stop.requested or task.tries < _TRIES:
            return "interrupted", reason
        return "failed", f"{reason}, {_TRIES} times"

    def _last_words(self, child: _Child) -> str:
        """The last line that a process wrote."""
        with open(child.log, "rb") as file:
            file.seek(child.offset)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        text = without_places(lines[-1].removeprefix("pretrain: "), self._out) if lines else ""
        return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
