"""F1 of every class, a mark for each of several runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.plots.drawing import Drawing, slug
from experiments.plots.style import Venue, looks
from experiments.scoring.classes import AVERAGES, Scores

_ROW, _FRAME, _LEGEND = 0.16, 0.55, 0.2  # inches
_SPREAD = 0.5  # of a row, over which the marks of one class lie


def draw(scores: Mapping[str, Scores], runs: Mapping[str, str], venue: Venue) -> Drawing:
    """A figure of F1 by class and averaged.

    Args:
      scores: of each arm, by its name; all of the same task.
      runs: the name of each arm's run.
      venue: whose columns to fit.
    """
    from matplotlib.figure import Figure

    arms, what = list(scores), next(iter(scores.values())).what
    names = list(dict.fromkeys(row.name for of_arm in scores.values() for row in of_arm.classes))
    height = _FRAME + _ROW * (len(names) + len(AVERAGES)) + _LEGEND * (len(arms) > 1)
    figure: Any = Figure(figsize=(venue.column, height), layout="constrained")
    axes, look = figure.subplots(), looks(arms)
    numbers: list[dict[str, Any]] = []
    support: dict[str, int] = {}
    for i, arm in enumerate(arms):
        rows = [*scores[arm].classes, *scores[arm].averages]
        support |= {row.name: row.support for row in scores[arm].classes}
        # Averages stand below, and a class may be called like one.
        at = [*(names.index(row.name) for row in scores[arm].classes), *range(len(names), len(names) + len(AVERAGES))]
        shift = _SPREAD * ((i + 0.5) / len(arms) - 0.5)
        known = [row for row in rows if row.f1 is not None]
        places = [shift + place for place, row in zip(at, rows, strict=True) if row.f1 is not None]
        style = {name: look[arm][name] for name in ("color", "marker")}
        axes.hlines(places, 0, [row.f1 for row in known], color=style["color"], linewidth=0.8)
        axes.plot([row.f1 for row in known], places, linestyle="", label=arm, **style)
        numbers += [
            {"arm": arm, "run": runs[arm], "class": row.name, "f1": row.f1, "support": row.support} for row in rows
        ]
    axes.axhline(len(names) - 0.5, color="black", linewidth=0.6)
    labels = [f"{name} ({support.get(name, 0):,})" if support.get(name) else f"{name} (no support)" for name in names]
    axes.set(yticks=range(len(names) + len(AVERAGES)), yticklabels=[*labels, *AVERAGES], xlabel="F1")
    axes.set(xlim=(0, 1.02), ylim=(len(names) + len(AVERAGES) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    if len(arms) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return Drawing(
        name=f"f1_{slug(what)}",
        title=f"F1 of {what} by class",
        caption=f"F1 of {what} on the test split by class, with the support of each, and averaged below.",
        figure=figure,
        runs=tuple(dict.fromkeys(runs[arm] for arm in arms)),
        numbers=tuple(numbers),
    )
