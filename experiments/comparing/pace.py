"""How long what is left of a study will take."""

from collections.abc import Sequence

from experiments.comparing.tasks import ELSEWHERE, RUNNING, WAITING, Task


class Pace:
    """Seconds per step of each arm, by the attempts of this process, compilation included.

    Args:
      jobs: runs at once.
    """

    def __init__(self, jobs: int):
        self._jobs = jobs
        self._spent: dict[str, tuple[float, int]] = {}

    def add(self, task: Task, seconds: float) -> None:
        """Takes an attempt that has ended into account."""
        if task.step > task.began:
            spent, steps = self._spent.get(task.run.arm, (0.0, 0))
            self._spent[task.run.arm] = spent + seconds, steps + task.step - task.began

    def left(self, tasks: Sequence[Task], now: float) -> float | None:
        """Seconds until all have reached their goals; None as long as nothing has taken a step.

        Args:
          tasks: all of them.
          now: of the monotonic clock.
        """
        spent = dict(self._spent)
        for task in tasks:
            if task.state == RUNNING and task.step > task.began:
                spent.setdefault(task.run.arm, (now - task.since, task.step - task.began))
        open_tasks = [task for task in tasks if task.state in (WAITING, RUNNING, ELSEWHERE)]
        if not spent or not open_tasks:
            return None if open_tasks else 0.0
        mean = sum(seconds for seconds, _ in spent.values()) / sum(steps for _, steps in spent.values())
        rates = {arm: seconds / steps for arm, (seconds, steps) in spent.items()}
        work = [max(0, task.goal - task.step) * rates.get(task.run.arm, mean) for task in open_tasks]
        # One run is not spread over two slots.
        return max(sum(work) / self._jobs, max(work))
