"""Data shards that are damaged or vanish, between two starts and while a run reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from experiments.drills import judging
from experiments.drills.lab import STOPPED, Lab
from experiments.drills.outcomes import Outcome
from experiments.drills.sessions import Session, seconds_lost
from experiments.drills.storage import flip


def damaged_between_starts(lab: Lab) -> Outcome:
    """One bit of a shard is another when the run is started again."""
    return _between(lab, "data shard with a flipped byte, between starts", flip, "has changed")


def gone_between_starts(lab: Lab) -> Outcome:
    """A shard is not there when the run is started again."""
    return _between(lab, "data shard gone, between starts", Path.unlink, "is gone")


def damaged_in_use(lab: Lab) -> Outcome:
    """A shard is cut short while the run reads it."""

    def spoil(path: Path) -> None:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)

    reference = lab.reference
    workdir, before = lab.stopped("shard-truncated-in-use")
    shard = lab.shards["train"][1]
    during = lab.start(workdir)

    def fault() -> Session:
        if during.until(lambda: during.reached > STOPPED):
            spoil(shard)
        return during.wait()

    said, problems = _spoilt(shard, fault, "was changed while it was in use")
    return _recovered(
        lab, "data shard truncated while it is read", said, problems, reference, workdir, [before, during]
    )


def _between(lab: Lab, fault: str, spoil: Callable[[Path], None], how: str) -> Outcome:
    reference = lab.reference
    workdir, before = lab.stopped(fault.replace(" ", "-"))
    shard = lab.shards["train"][1]
    refused: list[Session] = []

    def start() -> Session:
        spoil(shard)
        refused.append(lab.start(workdir).wait())
        return refused[0]

    said, problems = _spoilt(shard, start, how)
    return _recovered(lab, fault, said, problems, reference, workdir, [before, *refused])


def _spoilt(shard: Path, fault: Callable[[], Session], how: str) -> tuple[str, list[str]]:
    """What a run said that a fault ended, which has to name the shard; the shard is restored."""
    whole = shard.read_bytes()
    try:
        session = fault()
    finally:
        shard.write_bytes(whole)
    words = "pretrain: ", shard.name, how
    return session.said(*words), judging.answer(session, 1, *words)


def _recovered(
    lab: Lab, fault: str, said: str, problems: list[str], reference: Path, workdir: Path, sessions: list[Session]
) -> Outcome:
    """With the shard restored the same command ends as if nothing had been."""
    again = lab.start(workdir).wait()
    problems = problems + judging.answer(again, 0, "going on after step") + judging.losses(reference, workdir)
    return Outcome(fault, 1, said, problems, seconds_lost([*sessions, again])[-1:])
