"""Panels with curves: how one is drawn, all in one panel or each in its own, and the legend below."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.loading import RunRecord
from experiments.plots.bands import drawn, limits, thinning
from experiments.plots.study import names
from experiments.plots.style import Look, Venue

# Bands of more cannot be told apart in one panel.
MOST_TOGETHER = 8
_COLUMNS = 4
# Inches, in a legend.
_HANDLE_WIDTH, _LETTER_WIDTH, _LEGEND_HEIGHT = 0.5, 0.055, 0.15
_TITLE_LETTERS = 28


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is drawn of some runs: a mean over them and its band, float64 [points] all.

    Attributes:
      arm: whose runs these are.
      label: in the legend; empty for a further curve of an arm.
      look: colour, line and marker.
      runs: that it is made of.
      x, mean, low, high: in the units of the numbers; the band is NaN for a single run.
      of: how many points these are chosen from.
      diverged: whether it ends because the run diverged.
    """

    arm: str
    label: str
    look: Look
    runs: tuple[str, ...]
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    of: int
    diverged: bool = False

    @classmethod
    def through(
        cls, arm: str, label: str, look: Look, runs: Sequence[RunRecord], x: np.ndarray, values: np.ndarray, **more: Any
    ) -> Curve:
        """The curve of values [seeds, points], with as many points as can be seen."""
        kept, mean, low, high = drawn(values)
        return cls(arm, label, look, names(runs), x[kept], mean, low, high, len(x), **more)

    def numbers(self, x: str, y: str) -> list[dict[str, Any]]:
        """A row per point."""
        constant = {"arm": self.arm, "runs": list(self.runs), **thinning(self.of, len(self.x))}
        columns = (column.tolist() for column in (self.x, self.mean, self.low, self.high))
        return [{**constant, x: at, y: mean, "low": low, "high": high} for at, mean, low, high in zip(*columns)]


def side_by_side(venue: Venue, count: int) -> tuple[Any, Any]:
    """A figure, and panels in a row: a column wide if there is one, else as wide as the page."""
    from matplotlib.figure import Figure

    width = venue.column if count == 1 else venue.page
    figure: Any = Figure(figsize=(width, max(1.9, 0.3 * width)), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def grid(venue: Venue, count: int) -> tuple[Any, Any]:
    """A figure as wide as the page, and many small panels."""
    from matplotlib.figure import Figure

    rows = math.ceil(count / _COLUMNS)
    figure: Any = Figure(figsize=(venue.page, 1.3 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def plot(axes: Any, curve: Curve, unit: float) -> None:
    """Draws a curve with its band, x divided by `unit`."""
    x, color = curve.x / unit, curve.look["color"]
    # A marker at a few points, or a band of many would be all markers.
    every = max(1, len(x) // 8)
    (line,) = axes.plot(x, curve.mean, label=curve.label or "_", markevery=every, **curve.look)
    if curve.diverged:
        line.set(linewidth=0.6, marker="")
        axes.plot(x[-1:], curve.mean[-1:], "x", color=color, markersize=7, markeredgewidth=1.5)
    elif np.isfinite(curve.low).all():
        axes.fill_between(x, curve.low, curve.high, facecolor=color, alpha=0.12, linewidth=0)
        # Edges, since bands lie on one another.
        for edge in (curve.low, curve.high):
            axes.plot(x, edge, color=color, linestyle=curve.look["linestyle"], linewidth=0.4)


def limit(axes: Any, curves: Sequence[Curve], unit: float, start: float = 0.0, margins: Sequence[float] = ()) -> None:
    """Shows curves from a share of their length on, and margins with zero."""
    parts = [curve.x >= start * curve.x[-1] for curve in curves]
    of = lambda name: [getattr(curve, name)[part] for curve, part in zip(curves, parts, strict=True)]
    x = np.concatenate(of("x")) / unit
    levels = [0.0, *margins] if margins else []
    axes.set_xlim(limits(x, x))
    axes.set_ylim(
        limits(np.concatenate([*of("mean"), levels]), np.concatenate([*of("low"), *of("high")]), max(levels, default=0))
    )


def draw_margins(axes: Any, margins: Mapping[str, float]) -> None:
    """Draws margins; the name of the least stands below its line, where that of the next cannot be."""
    for name, percent in margins.items():
        axes.axhline(percent, color="black", linewidth=0.6, linestyle=(0, (1, 1.5)))
        is_least = percent == min(margins.values())
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        where |= {"xytext": (2, -2), "va": "top"} if is_least else {"xytext": (2, 1), "va": "bottom"}
        box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.3}
        axes.annotate(f"{name} +{percent:g} %", (0, percent), fontsize="small", bbox=box, **where)


def wrapped(label: str) -> str:
    """As the title of a panel of a grid."""
    if len(label) <= _TITLE_LETTERS:
        return label
    name, count = label.rsplit(" ", 2)[0], " ".join(label.rsplit(" ", 2)[1:])
    return "\n".join([*textwrap.wrap(name, _TITLE_LETTERS), count])


def legend(figure: Any, *panels: Any) -> None:
    """Below all panels, in rows of equal length; the figure grows by its height."""
    found = [panel.get_legend_handles_labels() for panel in panels]
    handles, labels = ([item for pair in found for item in pair[i]] for i in (0, 1))
    width = _HANDLE_WIDTH + _LETTER_WIDTH * max(map(len, labels))
    fitting = max(1, int(figure.get_figwidth() / width))
    rows = math.ceil(len(labels) / fitting)
    figure.set_figheight(figure.get_figheight() + _LEGEND_HEIGHT * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows))
