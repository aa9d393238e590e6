"""Where each run of a study stands."""

from __future__ import annotations

import dataclasses

from experiments.comparing import ondisk
from experiments.comparing.plan import PlannedRun

# 'elsewhere' is in a process that this one did not start, 'paused' at a goal that is not the end.
STATES = ("waiting", "running", "elsewhere", "paused", "finished", "diverged", "failed")
WAITING, RUNNING, ELSEWHERE, PAUSED, FINISHED, DIVERGED, FAILED = STATES


@dataclasses.dataclass
class Task:
    """A run and where it stands.

    Attributes:
      run: what to run.
      goal: the step to reach now.
      state: one of STATES.
      step, loss: of the last line of metrics.
      began, since: the step at which the last process took it up, and when by the monotonic clock.
      tries: how often it was started.
      reason: why it failed.
      holder: who has it, if it is elsewhere.
    """

    run: PlannedRun
    goal: int
    state: str = WAITING
    step: int = 0
    loss: float | None = None
    began: int = 0
    since: float = 0.0
    tries: int = 0
    reason: str = ""
    holder: ondisk.Holder | None = None

    @property
    def pauses(self) -> bool:
        return self.goal < self.run.steps

    def look(self) -> None:
        """Sets where it stands by what is on disk."""
        self.step, self.loss = ondisk.position(self.run.path)
        ended = ondisk.outcome(self.run.path)
        self.holder = None if ended else ondisk.holder(self.run.path)
        if ended:
            self.state = ended
        elif self.holder:
            self.state = ELSEWHERE
        else:
            self.state = PAUSED if self.pauses and self.step >= self.goal else WAITING
