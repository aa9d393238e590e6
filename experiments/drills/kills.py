"""kill -9 at random moments, every other one while a checkpoint is being written."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from experiments.drills import judging
from experiments.drills.lab import Lab, finished, saving
from experiments.drills.outcomes import Outcome
from experiments.drills.sessions import Session, seconds_lost

# Of the kills that are aimed at a save some come too late; of all kills so many must not.
LEAST_IN_A_SAVE = 0.25
# A kill that is aimed at a save takes one of the next so many.
_SAVES_TO_CHOOSE_FROM = 4


def killed_at_random_moments(lab: Lab, times: int) -> Outcome:
    """Kills one run until it has ended all the same, then another, and so on."""
    reference = lab.reference
    details: list[dict[str, Any]] = []
    problems: list[str] = []
    seconds: list[float] = []
    said = ""
    number = 0
    while len(details) < times:
        workdir = lab.directory(f"killed-{number}")
        sessions: list[Session] = []
        while len(details) < times and not (workdir / "summary.json").exists():
            aimed = len(details) % 2 == 0
            session = lab.start(workdir)
            sessions.append(session)
            if not (_wait_for_a_save if aimed else _wait)(lab, session, workdir):
                problems += judging.answer(session.wait(), 0)
                break
            session.kill()
            if session.code != -signal.SIGKILL:  # it ended at the same moment
                problems += judging.answer(session, 0)
                break
            death = {"after_seconds": session.seconds, "step": session.reached, "in_a_save": _saves(session, workdir)}
            details.append(death)
            where = " in a save" if death["in_a_save"] else ""
            lab.say(f"kill {len(details)} of {times}: after {session.seconds:.1f} s at step {session.reached}{where}")
        if sessions[-1].code != 0:
            sessions.append(finished(lab.start(workdir)))
        lost = zip(sessions, seconds_lost(sessions), strict=False)
        seconds += [cost for session, cost in lost if session.code == -signal.SIGKILL]
        said = next((line for s in sessions if (line := s.said("going on after step"))), said)
        problems += [f"{workdir.name}: {problem}" for problem in judging.losses(reference, workdir)]
        number += 1
    hits = sum(death["in_a_save"] for death in details)
    if hits < int(times * LEAST_IN_A_SAVE):
        problems.append(f"only {hits} of {times} kills came in a save")
    details = [death | {"seconds_lost": lost} for death, lost in zip(details, seconds, strict=True)]
    return Outcome(f"kill -9, {hits} of them in a save, {number} runs", times, said, problems, seconds, details)


def _wait(lab: Lab, session: Session, workdir: Path) -> bool:
    """Until a moment anywhere in the time that a run takes; False if this one ended before."""
    del workdir
    moment = session.started + lab.random.uniform(0, lab.seconds)
    return session.until(lambda: time.monotonic() > moment)


def _wait_for_a_save(lab: Lab, session: Session, workdir: Path) -> bool:
    """Until a moment in a save that begins; False if the run ended before."""
    for _ in range(int(lab.random.integers(_SAVES_TO_CHOOSE_FROM))):
        if not session.until(lambda: _saves(session, workdir)) or not session.until(lambda: not saving(workdir)):
            return False
    if not session.until(lambda: _saves(session, workdir)):
        return False
    time.sleep(lab.random.uniform(0, lab.save_seconds))
    return True


def _saves(session: Session, workdir: Path) -> bool:
    """Whether it is in a save of its own; before its first step it removes what the start before left unfinished."""
    return bool(session.steps) and saving(workdir)
