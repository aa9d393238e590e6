"""What a person sees while a run trains: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import datetime
import sys
from typing import TextIO

from tqdm import tqdm


class Progress:
    """A bar when `out` is a terminal, else one line per `log`:

    step 50/300  loss 2.4312  31,204 tok/s  0:01:12 left
    """

    def __init__(
        self,
        total: int,
        start: int,
        tokens_per_step: int,
        *,
        out: TextIO | None = None,
        primary: bool = True,
        unit: str = "tok",
    ):
        """Starts the display.

        Args:
          total: the step at which the run ends.
          start: the step it starts or resumes from.
          tokens_per_step: over all processes; with the speed it gives the time left.
          out: where to, standard output unless given.
          primary: False on every process of a multi-process run but the first: nothing is shown.
          unit: in the place of tokens, where something else is counted.
        """
        self._total = total
        self._unit = unit
        self._tokens_per_step = tokens_per_step
        self._out = (out or sys.stdout) if primary else None
        self._bar = None
        if self._out is not None and self._out.isatty():
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._out,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
            )

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; cheap enough for every step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, tokens_per_second: float, **values: float) -> None:
        """Shows the values of a logging event (`loss=2.4312, eval_loss=…`), speed and time left."""
        seconds = (self._total - step) * self._tokens_per_step / max(tokens_per_second, 1e-9)
        parts = [f"{name} {value:.4f}" for name, value in values.items()]
        parts.append(f"{tokens_per_second:,.0f} {self._unit}/s")
        parts.append(f"{_clock(seconds)} left")
        if self._bar is not None:
            self._bar.set_description_str("  ".join(parts), refresh=False)
            self.advance(step)
            self._bar.refresh()
        else:
            self.note("  ".join([f"step {step}/{self._total}", *parts]))

    def note(self, text: str) -> None:
        """Writes a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._out)
        elif self._out is not None:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands and the cursor on a new line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _clock(seconds: float) -> str:
    """`seconds` as 0:01:12, or as "3 days, 4:05:06"."""
    if seconds > 1e8:  # nothing has been measured yet
        return "?"
    return str(datetime.timedelta(seconds=round(seconds)))
