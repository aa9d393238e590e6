"""How each precision did in the end: its difference to the baseline, alone and against its speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.comparing.arms import BASELINE, CANDIDATE, CONTROL, NOISE
from experiments.plots.bands import limits
from experiments.plots.curves import UNTIMED
from experiments.plots.drawing import Drawing
from experiments.plots.panels import legend, side_by_side
from experiments.plots.study import Arm, Study, counted, names
from experiments.plots.style import Look, Venue, looks

_ROW, _FRAME = 0.24, 0.7  # inches
_TITLE_PAD = 12  # points, above the names of the margins
_SMALL = {"va": "center", "fontsize": "small"}


def draw(study: Study, venue: Venue) -> Iterator[Drawing | str]:
    """Yields the figures, and sentences on what is missing."""
    judged = [arm for arm in study.arms if arm.role != BASELINE and arm.name in study.comparison]
    judged = [arm for arm in judged if study.comparison[arm.name]["seeds"] or study.comparison[arm.name]["diverged"]]
    if not judged:
        yield "Nothing is compared with a baseline: neither final difference nor speed against quality is drawn."
        return
    yield _final(study, judged, venue)
    measured = [arm for arm in judged if arm.role == CANDIDATE and study.comparison[arm.name]["seeds"]]
    timed = [arm for arm in measured if study.has_timing(arm)]
    if timed:
        yield _speed(study, timed, venue)
    if untimed := [arm.name for arm in measured if arm not in timed]:
        yield f"Speed against quality is not drawn of {', '.join(untimed)}: {UNTIMED}."


def _final(study: Study, arms: list[Arm], venue: Venue) -> Drawing:
    from matplotlib.figure import Figure

    groups = [[arm for arm in arms if (arm.role == CONTROL) is is_control] for is_control in (False, True)]
    groups = [group for group in groups if group]
    height = sum(_FRAME + _ROW * len(group) for group in groups)
    figure: Any = Figure(figsize=(venue.page, height), layout="constrained")
    ratios = [_FRAME + _ROW * len(group) for group in groups]
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=ratios)[:, 0]
    look = looks([arm.name for arm in study.arms])
    numbers: list[dict[str, Any]] = []
    for panel, group in zip(panels, groups, strict=True):
        is_controls = group[0].role == CONTROL
        margins = {} if is_controls else study.margins
        panel.set_xlim(_limits(study, group, margins))
        for row, arm in enumerate(group):
            numbers += _interval(panel, row, study, arm, look[arm.name])
        has_noise = any(arm.role == NOISE for arm in group)
        title = "Controls, which must fail" if is_controls else "Candidates" + " and noise floor" * has_noise
        panel.set_title(title, loc="left", pad=_TITLE_PAD if margins else None)
        panel.set(yticks=range(len(group)), ylim=(len(group) - 0.5, -0.5), xlabel="difference to the baseline (%)")
        panel.set_ylabel("precision")
        panel.set_yticklabels([arm.name for arm in group])
        panel.tick_params(axis="y", length=0)
        panel.axvline(0, color="black", linewidth=0.6)
        for name, percent in margins.items():
            panel.axvline(percent, color="black", linewidth=0.6, linestyle=(0, (1, 1.5)))
            # To either side, since the lines may be close.
            side = "right" if percent == min(margins.values()) else "left"
            where = {"xy": (percent, 1), "xycoords": ("data", "axes fraction"), "ha": side, "va": "bottom"}
            panel.annotate(f"{name} +{percent:g} %", **where, fontsize="small")
    return Drawing(
        name="difference_final",
        title="Final difference to the baseline",
        caption=f"Final held-out loss ({study.metric}) less that of the baseline's run with the same seed. "
        "Points are means, thick bars 90 % and thin bars 95 % confidence intervals (Student's t), small points single "
        "seeds. Dotted: the margins that the upper end of a one-sided 95 % interval must stay below, which is that of "
        "the thick bar. Bars with an arrow go on.",
        figure=figure,
        runs=names(study.runs),
        numbers=tuple(numbers),
    )


def _limits(study: Study, arms: list[Arm], margins: Mapping[str, float]) -> tuple[float, float]:
    results = [study.comparison[arm.name] for arm in arms]
    singles = [run["delta_percent"] for result in results for run in result["runs"].values()]
    known = [value for value in singles if value is not None]
    ends = [end for result in results for end in result["ci95"] or ()]
    return limits([0.0, *margins.values(), *known], ends, max(margins.values(), default=0.0))


def _interval(axes: Any, row: int, study: Study, arm: Arm, look: Look) -> list[dict[str, Any]]:
    """Draws a row; returns its numbers."""
    result = study.comparison[arm.name]
    color, pairs = look["color"], study.pairs(arm)
    percent = [result["runs"][str(run.seed)]["delta_percent"] for run, _ in pairs]
    axes.plot(
        percent, np.full(len(percent), row + 0.22), ".", color=color, markersize=2.5, alpha=0.7, markeredgewidth=0
    )
    for name, width in (("ci95", 0.8), ("ci90", 2.2)):
        if result[name] is not None:
            axes.plot(result[name], [row, row], color=color, linewidth=width, solid_capstyle="butt")
            for edge, end, arrow in zip(axes.get_xlim(), result[name], "<>", strict=True):
                if (end < edge) if arrow == "<" else (end > edge):
                    axes.plot(edge, row, arrow, color=color, markersize=3.5, clip_on=False)
    if pairs:
        marker = {"marker": look["marker"], "color": color, "markeredgecolor": "white", "markeredgewidth": 0.5}
        axes.plot(result["delta_percent"], row, **marker, markersize=5)
    count = counted(len(pairs), "pair") + (f", {result['diverged']} diverged" if result["diverged"] else "")
    so_far = " so far" if len(result["judged"]) < result["planned"] else ""
    axes.annotate(f"{result['verdict']}{so_far} ({count})", (1.01, row), xycoords=("axes fraction", "data"), **_SMALL)
    mean = {"arm": arm.name, "runs": list(names(run for pair in pairs for run in pair)) or list(arm.names)}
    mean |= {name: result[name] for name in ("delta_percent", "upper95")}
    for name in ("ci90", "ci95"):
        ends: tuple[Any, Any] = result[name] or (None, None)
        mean |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    singles = [
        {"arm": arm.name, "runs": [run.name, other.name], "seed": run.seed, "delta_percent": value}
        for (run, other), value in zip(pairs, percent, strict=True)
    ]
    return [mean, *singles]


def _speed(study: Study, arms: list[Arm], venue: Venue) -> Drawing:
    figure, (axes,) = side_by_side(venue, 1)
    look = looks([arm.name for arm in study.arms])
    numbers = []
    baselines = [arm for arm in study.arms if arm.role == BASELINE and arm.finished and study.has_timing(arm)]
    shown: list[tuple[Arm, float, list[float] | None]] = [(arm, 0.0, None) for arm in baselines]
    shown += [(arm, study.comparison[arm.name]["delta_percent"], study.comparison[arm.name]["ci95"]) for arm in arms]
    for arm, percent, interval in shown:
        speed = float(np.median([run.summary["tokens_per_second"] for run in arm.finished.values() if run.summary]))
        style = {name: value for name, value in look[arm.name].items() if name != "linestyle"}
        axes.plot(speed / 1e3, percent, linestyle="", label=arm.name, **style)
        low, high = interval or (None, None)
        if interval:
            axes.vlines(speed / 1e3, *interval, color=style["color"], linewidth=0.8)
        constant = {"arm": arm.name, "runs": list(arm.names), "tokens_per_second": speed}
        numbers.append({**constant, "difference_percent": percent, "ci95_low": low, "ci95_high": high})
    ends = [end for _, _, interval in shown if interval for end in interval]
    axes.set_ylim(limits([0.0, *(percent for _, percent, _ in shown)], ends, study.margins["parity"]))
    axes.axhline(0, color="black", linewidth=0.6, zorder=0)
    axes.set(xlabel="training speed (thousand tokens/s)", ylabel="difference to the baseline (%)")
    axes.set_title("Speed against quality")
    axes.margins(x=0.1)
    legend(figure, axes)
    return Drawing(
        name="speed_quality",
        title="Speed against quality",
        caption="Difference of the final held-out loss to the baseline's, with 95 % confidence intervals (Student's "
        f"t), against the median speed of training{' of runs that had the machine to themselves' * study.is_timed}.",
        figure=figure,
        runs=tuple(name for arm, _, _ in shown for name in arm.names),
        numbers=tuple(numbers),
    )
