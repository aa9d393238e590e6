"""A clock that is set forward and back, while a run trains and between two starts of it."""

from __future__ import annotations

from pathlib import Path

from experiments.drills import judging
from experiments.drills.lab import STOPPED, Lab
from experiments.drills.outcomes import Outcome
from experiments.runs.files import read_json

_ON_PATH = Path(__file__).with_name("jumping")
_YEARS_APART = 15


def clock_jumps(lab: Lab) -> Outcome:
    """The clock of two starts jumps by ten years, forward or back every half second, and between them back by more."""
    reference = lab.reference
    workdir = lab.directory("clock")
    first, second = (
        lab.start(workdir, *flags, environment={"PYTHONPATH": str(_ON_PATH), "DRILL_YEARS": years}).wait()
        for flags, years in (((f"--stop_after={STOPPED}",), "10,20"), ((), "-20,-10"))
    )
    problems = judging.answer(first, 0) + judging.answer(second, 0, "going on after step")
    problems += judging.losses(reference, workdir) + _order(workdir)
    problems += [warning for session in (first, second) if (warning := session.said("warning: "))]
    years = [int(session["start_time"][:4]) for session in read_json(workdir / "env.json")["sessions"]]
    if years[0] - years[1] < _YEARS_APART:
        problems.append(f"the clock did not jump: the starts were in {years}")
    said = second.said("going on after step")
    return Outcome(f"clock that jumps (starts in {years[0]}, then {years[1]})", 1, said, problems, ())


def _order(workdir: Path) -> list[str]:
    """TensorBoard takes the files of a run in the order of their names."""
    names = sorted(path.name for path in (workdir / "tensorboard").iterdir())
    numbers = [int(name.rpartition(".")[2]) for name in names]
    return [] if numbers == list(range(len(numbers))) else [f"TensorBoard reads {', '.join(names)} in this order"]
