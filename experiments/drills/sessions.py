"""One start of pretrain in a process of its own: what it said, and when it had taken which step."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Of a machine that is busy with other things.
_PATIENCE_SECONDS = 1800.0
_POLL_SECONDS = 0.002
# A line of pretrain's, of several processes with its number in front.
_STEP = re.compile(r"(?:\[\d+\] )?step (\d+)/")


class Session:
    """A start of a program.

    Attributes:
      started, ended: seconds of the monotonic clock.
      lines: what it said, standard error included, each with the time it was read.
      code: with which it ended, once `wait` or `kill` is back.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], directory: Path):
        self.lines: list[tuple[float, str]] = []
        self.ended = float("inf")
        self.code: int | None = None
        self._command = shlex.join(command)
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that Ctrl-C reaches it by `stop` alone
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def steps(self) -> list[tuple[float, int]]:
        """(time, step) of every step that it logged."""
        found = ((when, _STEP.match(line)) for when, line in list(self.lines))
        return [(when, int(match[1])) for when, match in found if match]

    @property
    def reached(self) -> int:
        """The last step that it logged, 0 before the first."""
        steps = self.steps
        return steps[-1][1] if steps else 0

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def said(self, *words: str) -> str:
        """The last line with all of these words; empty where there is none."""
        found = [line for _, line in list(self.lines) if all(word in line for word in words)]
        return found[-1] if found else ""

    def transcript(self) -> str:
        """The command, and what it said with the seconds at which it did."""
        said = [f"{when - self.started:8.3f}  {line}\n" for when, line in self.lines]
        return f"$ {self._command}\n{''.join(said)}ended with {self.code} after {self.seconds:.3f} s\n"

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for a condition; False if the process ended before.

        Raises:
          TimeoutError: neither came.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            if self._process.poll() is not None:
                return condition()
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing more came of {self._command} for {_PATIENCE_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        return True

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> Session:
        """kill -9."""
        self._process.kill()
        return self.wait()

    def wait(self) -> Session:
        """Waits for the end, which `until` can put a limit to."""
        self.code = self._process.wait()
        self.ended = min(self.ended, time.monotonic())
        self._reader.join()
        return self

    def stop(self) -> None:
        """Ends it with all that it started, if it has not ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.lines.append((time.monotonic(), line.rstrip("\n")))


def seconds_lost(sessions: Sequence[Session]) -> list[float]:
    """Of each start but the first of one run, how long it took to get further than the ones before it.

    That is what the fault before it cost: the restart, and the steps that were taken again. A start that never got
    further, because the run was at its end or because it was killed too, is lost whole.
    """
    lost, reached = [], 0
    for number, session in enumerate(sessions):
        new = [when for when, step in session.steps if step > reached]
        if number:
            lost.append(min([session.ended, *new]) - session.started)
        reached = max(reached, session.reached)
    return lost
