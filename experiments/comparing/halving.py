"""Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): most candidates stop early, the best go on."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.comparing import ondisk
from experiments.comparing.arms import CANDIDATE, Arm
from experiments.comparing.plan import PlannedRun

_RUNGS = 2


@dataclasses.dataclass(frozen=True)
class Rung:
    """A step at which candidates are chosen.

    Attributes:
      factor: one in so many goes on.
      depth: how often it is divided by before the end of a run.
    """

    factor: int
    depth: int

    def __str__(self) -> str:
        return f"the first 1/{self.factor**self.depth} of the steps"

    def step(self, run: PlannedRun) -> int:
        """The step at which a run is looked at."""
        return max(1, round(run.steps / self.factor**self.depth))

    def has(self, run: PlannedRun) -> bool:
        """Whether a run need not be trained further for this rung."""
        return ondisk.outcome(run.path) is not None or ondisk.position(run.path)[0] >= self.step(run)

    def losses(self, runs: Sequence[PlannedRun]) -> dict[str, float]:
        """The loss of each arm there, a mean over its seeds, infinite if a run of it has none; the best first.

        It is the held-out loss, unless one of the runs was not stopped there; then it is the training loss of all.
        """
        reached: dict[str, dict[str, Any]] = {}  # the last line up to the rung, of the runs that got there
        for run in runs:
            lines = ondisk.lines(run.path)
            if lines and lines[-1]["step"] >= self.step(run):
                reached[run.name] = ([line for line in lines if line["step"] <= self.step(run)] or lines[:1])[-1]
        there = [(reached[run.name], self.step(run)) for run in runs if run.name in reached]
        stopped = all(line["step"] == step and "eval_loss" in line for line, step in there)
        name = "eval_loss" if stopped else "loss"
        found: dict[str, list[float]] = {}
        for run in runs:
            loss = reached.get(run.name, {}).get(name)
            found.setdefault(run.arm, []).append(math.inf if loss is None else loss)
        means = {arm: statistics.fmean(losses) for arm, losses in found.items()}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def kept(self, arms: Sequence[Arm], losses: dict[str, float]) -> list[Arm]:
        """The best candidates, and of the other arms those that are compared with one of these."""
        candidates = {arm.name: arm for arm in arms if arm.role == CANDIDATE}
        ranked = [name for name in losses if name in candidates]
        best = set(ranked[: math.ceil(len(ranked) / self.factor)])
        baselines = {candidates[name].baseline for name in best}
        of_best = lambda arm: arm.role != CANDIDATE and (arm.baseline or arm.name) in baselines
        return [arm for arm in arms if arm.name in best or of_best(arm)]


def rungs(factor: int, arms: Sequence[Arm]) -> list[Rung]:
    """The rungs before the end of the runs.

    Raises:
      ValueError: a factor that does not choose, or nothing to choose from.
    """
    if factor == 0:
        return []
    if factor < 2:
        raise ValueError(f"--halving={factor} must be at least 2, as in --halving=3, which keeps the best third.")
    candidates = sum(arm.role == CANDIDATE for arm in arms)
    if candidates < 2:
        raise ValueError(f"--halving={factor} has {candidates or 'no'} candidate to choose from: sweep something.")
    return [Rung(factor, depth) for depth in range(_RUNGS, 0, -1)]
