"""Loss less the baseline's of the same seed, against tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.comparing.arms import CONTROL
from experiments.plots import panels
from experiments.plots.bands import on_thinning
from experiments.plots.curves import BAND, HELD_OUT, tokens
from experiments.plots.drawing import Drawing
from experiments.plots.panels import Curve
from experiments.plots.study import Arm, Study, common_steps, counted, values_at
from experiments.plots.style import Venue, looks, tokens_scale

_Y_LABEL = "difference to the baseline (%)"


def draw(study: Study, venue: Venue) -> Iterator[Drawing | str]:
    """Yields the figure, or a sentence on why there is none."""
    found = [(arm, curve) for arm in study.arms if (curve := _curve(study, arm))]
    if not found:
        yield "No seed is finished both in the baseline and in another precision: no difference is drawn."
        return
    unit, x_label = tokens_scale(max(curve.x[-1] for _, curve in found))
    draw_them = _apart if len(found) > panels.MOST_TOGETHER else _together
    yield Drawing(
        name="difference_tokens",
        title="Difference to the baseline during training",
        caption=f"Held-out loss less that of the baseline's run with the same seed, in percent of that one. {BAND} "
        "Dotted: the margins. Seeds with which a run diverged are left out."
        f"{on_thinning(max(curve.of for _, curve in found))}",
        figure=draw_them(study, found, unit, venue, x_label),
        runs=tuple(dict.fromkeys(run for _, curve in found for run in curve.runs)),
        numbers=tuple(row for _, curve in found for row in curve.numbers("tokens", "difference_percent")),
    )


def _curve(study: Study, arm: Arm) -> Curve | None:
    """The mean of the differences of pairs; None if there is none."""
    pairs = study.pairs(arm)
    both = [run for pair in pairs for run in pair]
    steps = common_steps(both, HELD_OUT)
    if not len(steps):
        return None
    own, others = (values_at([pair[i] for pair in pairs], HELD_OUT, steps) for i in (0, 1))
    look = looks([arm.name for arm in study.arms])[arm.name]
    label = f"{arm.name} ({counted(len(pairs), 'pair')})"
    return Curve.through(arm.name, label, look, both, tokens(both, steps), 100 * (own - others) / others)


def _together(study: Study, found: list[tuple[Arm, Curve]], unit: float, venue: Venue, x_label: str) -> Any:
    controls = [curve for arm, curve in found if arm.role == CONTROL]
    others = [curve for arm, curve in found if arm.role != CONTROL]
    groups = [(curves, title) for curves, title in ((others, "Candidates"), (controls, "Controls")) if curves]
    figure, side_by_side = panels.side_by_side(venue, len(groups))
    for axes, (curves, title) in zip(side_by_side, groups, strict=True):
        for curve in curves:
            panels.plot(axes, curve, unit)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel=x_label, ylabel=_Y_LABEL, title=title)
        margins = study.margins if curves is others else {"none": 0.0}
        if curves is others:
            panels.draw_margins(axes, margins)
        panels.limit(axes, curves, unit, margins=tuple(margins.values()))
    panels.legend(figure, *side_by_side)
    return figure


def _apart(study: Study, found: list[tuple[Arm, Curve]], unit: float, venue: Venue, x_label: str) -> Any:
    figure, each = panels.grid(venue, len(found))
    near = [curve for arm, curve in found if arm.role != CONTROL]
    for axes, (arm, curve) in zip(each, found, strict=True):
        panels.plot(axes, curve, unit)
        axes.axhline(0, color="black", linewidth=0.6)
        # All but the controls on one scale.
        shown = [curve] if arm.role == CONTROL else near
        for percent in study.margins.values():
            axes.axhline(percent, color="black", linewidth=0.6, linestyle=(0, (1, 1.5)))
        panels.limit(axes, shown, unit, margins=tuple(study.margins.values()))
        axes.set(title=panels.wrapped(curve.label))
    figure.supxlabel(x_label, fontsize="medium")
    figure.supylabel(_Y_LABEL, fontsize="medium")
    return figure
