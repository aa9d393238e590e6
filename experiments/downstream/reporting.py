"""What a run leaves of its scores: report.txt, report.json, and figures of F1 by class."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from experiments.downstream.heads import Report
from experiments.runs.files import write_atomic, write_json

TEXT, JSON = "report.txt", "report.json"


def write(folder: Path, report: Report, *, arm: str, run: str) -> list[str]:
    """Writes a report.

    Args:
      folder: of the run.
      report: what to write.
      arm: the run in a figure's legend.
      run: its name.

    Returns:
      Names of the files; without matplotlib there are no figures.
    """
    write_atomic(folder / TEXT, [report.text.encode(), b"\n"])
    write_json(
        folder / JSON, {"metric": report.metric, "value": report.value, "scores": report.scores}, sort_keys=False
    )
    written = [TEXT, JSON]
    if not report.by_class or importlib.util.find_spec("matplotlib") is None:
        return written
    from experiments.plots import class_scores
    from experiments.plots.drawing import style
    from experiments.plots.style import VENUES

    venue = VENUES["icml"]
    with style(venue):
        for scores in report.by_class.values():
            plot, files = class_scores.draw({arm: scores}, {arm: run}, venue).saved()
            for suffix, data in files.items():
                write_atomic(folder / f"{plot.name}.{suffix}", [data])
                written.append(f"{plot.name}.{suffix}")
    return written
