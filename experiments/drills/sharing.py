"""Several processes: of one run, of which one is killed, and of two runs in one directory."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from experiments.drills import judging
from experiments.drills.lab import Lab, finished
from experiments.drills.outcomes import Outcome
from experiments.drills.sessions import Session, seconds_lost

END_SECONDS = 120.0
_STEPS, _KILLED_AFTER = 60, 20
_LAUNCH = (sys.executable, "-m", "launch.local", "--processes=2", "--devices=1", "--")
# Runs a command and leaves in $1 its process and, unless it is killed itself, its exit code.
_NOTED = (
    'notes=$1; shift; "$@" & echo $! > "$notes/process.$JAX_PROCESS_ID"; wait $!; code=$?; '
    'echo $code > "$notes/code.$JAX_PROCESS_ID"; exit $code'
)


def one_of_two_killed(lab: Lab) -> Outcome:
    """kill -9 of the first process, and in another run of the second."""
    alone = _workdir(lab, "two-uninterrupted")
    lab.say("two processes that meet no fault")
    finished(_start(lab, alone))
    problems: list[str] = []
    seconds: list[float] = []
    details: list[dict[str, Any]] = []
    said = ""
    for victim in (0, 1):
        workdir = _workdir(lab, f"two-{victim}-killed")
        first = _start(lab, workdir)
        if not first.until(functools.partial(_has_reached, first)):
            problems += judging.answer(first.wait(), 0)
            continue
        lab.say(f"kill of process {victim} of two at step {first.reached}")
        process = _noted(workdir, f"process.{victim}")
        assert process is not None
        os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        first.wait()
        ended = first.ended - killed
        codes = [_noted(workdir, f"code.{process}") for process in (0, 1)]
        if first.code == 0 or 0 in codes or None in codes or ended > END_SECONDS:
            problems.append(f"of process {victim} killed: all ended {ended:.0f} s later, with exit codes {codes}")
        again = _start(lab, workdir).wait()
        problems += judging.answer(again, 0, "going on after step") + judging.losses(alone, workdir)
        seconds += [ended + lost for lost in seconds_lost([first, again])]
        details.append({"victim": victim, "all_ended_after_seconds": ended, "exit_codes": codes})
        said = again.said("going on after step")
    return Outcome("one of two processes killed", 2, said, problems, seconds, details)


def _workdir(lab: Lab, name: str) -> Path:
    workdir = lab.directory(name)
    workdir.with_suffix(".notes").mkdir(parents=True)
    return workdir


def _start(lab: Lab, workdir: Path) -> Session:
    around = (*_LAUNCH, "sh", "-c", _NOTED, "sh", str(workdir.with_suffix(".notes")))
    return lab.start(workdir, steps=_STEPS, mesh="data:2", around=around)


def _has_reached(session: Session) -> bool:
    return session.reached >= _KILLED_AFTER


def _noted(workdir: Path, name: str) -> int | None:
    path = workdir.with_suffix(".notes") / name
    return int(path.read_text()) if path.exists() else None


def two_runs_in_one_directory(lab: Lab) -> Outcome:
    """The second start is refused, while the first is held up for it, and the first ends as if there had been none."""
    reference = lab.reference
    workdir = lab.directory("shared")
    first = lab.start(workdir)
    first.until(lambda: first.reached > 0)
    first.send(signal.SIGSTOP)
    second = lab.start(workdir).wait()
    first.send(signal.SIGCONT)
    words = "--workdir=", "is in use by process"
    problems = judging.answer(second, 1, *words) + judging.answer(first.wait(), 0)
    problems += judging.losses(reference, workdir)
    return Outcome("two runs started in one directory", 1, second.said(*words), problems, ())
