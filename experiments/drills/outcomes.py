"""What came of a fault, and the table of all."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one fault.

    Attributes:
      fault: what was done.
      times: how often.
      said: the sentence that the run said about it.
      problems: what was lost, or went otherwise than it has to; empty where nothing did.
      seconds: lost for each time, until the run was further than before the fault.
      details: of each time, where there is more to tell.
    """

    fault: str
    times: int
    said: str
    problems: Sequence[str]
    seconds: Sequence[float]
    details: Sequence[dict[str, Any]] = ()


def table(outcomes: Sequence[Outcome]) -> str:
    """In Markdown."""
    lines = [
        "| fault | times | what the run said | nothing lost | seconds lost, median (most) |",
        "|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        verdict = "no: " + "; ".join(outcome.problems) if outcome.problems else "yes"
        seconds = f"{statistics.median(outcome.seconds):.1f} ({max(outcome.seconds):.1f})" if outcome.seconds else "0"
        cells = outcome.fault, str(outcome.times), outcome.said or "nothing", verdict, seconds
        lines.append(f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |")
    return "\n".join(lines)
