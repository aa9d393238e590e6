"""What a person sees while a study runs: a live table on a terminal, plain lines in a log file."""

from __future__ import annotations

import collections
import datetime
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.comparing import ondisk
from experiments.comparing.pace import Pace
from experiments.comparing.tasks import DIVERGED, ELSEWHERE, FAILED, FINISHED, PAUSED, RUNNING, Task

_REFRESH = 0.5  # seconds between pictures


class Display:
    """Shows every arm of a study, and what happens to its runs.

    Args:
      title: stands above it all.
      jobs: runs at once.
      metric: the entry of the summary that is told of a finished run.
      console: where to, standard output unless given.
    """

    def __init__(self, title: str, jobs: int, metric: str, console: Console | None = None):
        self.title = title
        self._pace = Pace(jobs)
        self._metric = metric
        self._console = console or Console(highlight=False)
        self._tasks: Sequence[Task] = ()
        self._shown = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._draw()
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Writes a line of its own, above the table if there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def started(self, task: Task) -> None:
        """Tells that a run was started."""
        took_up = f" again after step {task.step}" if task.step else ""
        self.note(f"{task.run.name}: started{took_up}")

    def ended(self, task: Task, seconds: float) -> None:
        """Tells how an attempt ended, and what is left."""
        self._pace.add(task, seconds)
        lines = {
            FINISHED: lambda: f"finished, {_loss(ondisk.result(task.run.path, self._metric))}",
            DIVERGED: lambda: f"diverged, {task.reason}",
            PAUSED: lambda: f"paused after step {task.step}, {_loss(task.loss)}",
            FAILED: lambda: f"failed, {task.reason}",
        }
        told = lines.get(task.state, lambda: f"interrupted, {task.reason}")()
        self.note(f"{task.run.name}: {told}, in {_clock(seconds)}; {self._totals()}")

    def elsewhere(self, task: Task) -> None:
        """Tells that another process runs it, or has run it."""
        what = f"in use by {task.holder}, looked at again later" if task.holder else f"{task.state} in another process"
        self.note(f"{task.run.name}: {what}")

    def show(self, tasks: Sequence[Task]) -> None:
        """Takes note of where all runs stand; cheap enough for every look."""
        self._tasks = tasks
        if self._live is not None and time.monotonic() - self._shown > _REFRESH:
            self._shown = time.monotonic()
            self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def _totals(self) -> str:
        counts = collections.Counter(task.state for task in self._tasks)
        done = counts[FINISHED] + counts[DIVERGED] + counts[PAUSED]
        parts = [f"{done} of {len(self._tasks)} runs done"]
        parts += [f"{counts[state]} {state}" for state in (DIVERGED, FAILED) if counts[state]]
        left = self._pace.left(self._tasks, time.monotonic())
        if left != 0:
            parts.append("time left unknown" if left is None else f"{_clock(left)} left")
        return ", ".join(parts)

    def _picture(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("arm")
        for name in ("done", DIVERGED, FAILED):
            table.add_column(name, justify="right")
        table.add_column("running", ratio=1, no_wrap=True)
        arms: dict[str, list[Task]] = {}
        for task in self._tasks:
            arms.setdefault(task.run.arm, []).append(task)
        # Where not all fit the screen, those with something to see.
        room = max(1, self._console.height - 5)
        names = list(arms)
        if len(names) > room:
            names = sorted(names, key=lambda name: not any(task.state == RUNNING for task in arms[name]))[:room]
        for name in names:
            counts = collections.Counter(task.state for task in arms[name])
            done = counts[FINISHED] + counts[DIVERGED] + counts[PAUSED]
            table.add_row(
                Text(name),
                f"{done}/{len(arms[name])}",
                *(Text(str(counts[state] or ""), style="red") for state in (DIVERGED, FAILED)),
                "  ".join(_running(task) for task in arms[name] if task.state in (RUNNING, ELSEWHERE)),
            )
        rest = [Text(f"and {len(arms) - len(names)} more arms", style="dim")] if len(names) < len(arms) else []
        return Group(Text(f"{self.title}: {self._totals()}", style="bold"), table, *rest)


def _running(task: Task) -> str:
    where = "" if task.state == RUNNING else " elsewhere"
    loss = "" if task.loss is None else f" loss {task.loss:.4f}"
    return f"seed {task.run.seed}{where}: {task.step}/{task.goal}{loss}"


def _loss(loss: float | None) -> str:
    return "loss unknown" if loss is None else f"loss {loss:.4f}"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
