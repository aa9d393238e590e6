"""Loss against tokens and time, with bands over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.comparing.arms import BASELINE, CONTROL
from experiments.loading import RunRecord
from experiments.plots import panels
from experiments.plots.bands import on_thinning
from experiments.plots.drawing import Drawing
from experiments.plots.panels import Curve
from experiments.plots.study import Arm, Study, common_steps, values_at
from experiments.plots.style import Venue, looks, seconds_scale, tokens_scale

HELD_OUT, TRAINING = "eval_loss", "loss"
BAND = "Lines are means over seeds, bands their 95 % confidence intervals (Student's t)."
UNTIMED = "other work shared the machine, or the run did not go in one go, so its time does not count"
# Where the zoom begins, as a share of the run.
_ZOOM = 2 / 3


@dataclasses.dataclass(frozen=True)
class _Figure:
    """Which figure is drawn.

    Attributes:
      name: of its files.
      metric: column of the metrics.
      title: what the metric is.
      over_time: whether x is time.
    """

    name: str
    metric: str
    title: str
    over_time: bool = False

    def x(self, runs: Sequence[RunRecord], steps: np.ndarray) -> np.ndarray:
        """Tokens, or the mean over runs of the seconds of training, up to each step."""
        if not self.over_time:
            return tokens(runs, steps)
        return np.mean([_elapsed(run)[np.searchsorted(run.metrics["step"], steps)] for run in runs], axis=0)


def draw(study: Study, venue: Venue) -> Iterator[Drawing | str]:
    """Yields the figures, and sentences on what is missing."""
    timed = [arm for arm in study.arms if study.has_timing(arm)]
    for what, arms in (
        (_Figure("loss_tokens", HELD_OUT, "Held-out loss"), study.arms),
        (_Figure("loss_time", HELD_OUT, "Held-out loss", over_time=True), timed),
        (_Figure("training_loss_tokens", TRAINING, "Training loss"), study.arms),
    ):
        curves = [(arm, curve) for arm in arms for curve in _curves(study, arm, what)]
        if curves:
            yield _drawing(study, curves, venue, what)
    if untimed := [arm.name for arm in study.arms if arm not in timed]:
        yield f"Loss against time is not drawn of {', '.join(untimed)}: {UNTIMED}."


def tokens(runs: Sequence[RunRecord], steps: np.ndarray) -> np.ndarray:
    """Trained on up to each step."""
    return steps * float(runs[0].config["batch_size"] * runs[0].config["seq_len"])


def _elapsed(run: RunRecord) -> np.ndarray:
    return np.cumsum(np.diff(run.tokens, prepend=0) / run.metrics["tokens_per_second"])


def _curves(study: Study, arm: Arm, what: _Figure) -> Iterator[Curve]:
    """The mean of the runs that finished, and each that diverged."""
    look = looks([arm.name for arm in study.arms])[arm.name]
    label = arm.label
    finished = list(arm.finished.values())
    for runs in (finished, *([run] for run in arm.diverged.values())):
        steps = common_steps(runs, what.metric)
        if len(steps):
            x, values = what.x(runs, steps), values_at(runs, what.metric, steps)
            yield Curve.through(arm.name, label, look, runs, x, values, diverged=runs is not finished)
            label = ""


def _drawing(study: Study, found: list[tuple[Arm, Curve]], venue: Venue, what: _Figure) -> Drawing:
    curves = [curve for _, curve in found]
    largest = max(curve.x[-1] for curve in curves)
    unit, x_label = seconds_scale(largest) if what.over_time else tokens_scale(largest)
    arms = list(dict.fromkeys(arm.name for arm, _ in found))
    if len(arms) > panels.MOST_TOGETHER:
        figure = _apart(found, arms, unit, venue, x_label)
        how = " Grey: the baseline."
    else:
        figure = _together(found, unit, venue, x_label, f"{what.title.lower()} (nats per token)")
        how = ""
    if what.over_time:
        how += " Time is that of the training steps and of telemetry, without compilation, evaluation and checkpoints."
        how += "" if study.is_timed else " Nothing is known of what else ran on the machine."
    return Drawing(
        name=what.name,
        title=f"{what.title} against {'time' if what.over_time else 'tokens'}",
        caption=f"{what.title} by precision, nats per token. {BAND}{divergence(study.arms)}{how}"
        f"{on_thinning(max(curve.of for curve in curves))}",
        figure=figure,
        runs=tuple(dict.fromkeys(run for curve in curves for run in curve.runs)),
        numbers=tuple(
            row for curve in curves for row in curve.numbers("seconds" if what.over_time else "tokens", what.metric)
        ),
    )


def _together(found: list[tuple[Arm, Curve]], unit: float, venue: Venue, x_label: str, y_label: str) -> Any:
    curves = [curve for _, curve in found]
    figure, (whole, end) = panels.side_by_side(venue, 2)
    for axes, title in ((whole, "Whole run"), (end, "Last third")):
        for curve in curves:
            panels.plot(axes, curve, unit)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
    panels.limit(whole, curves, unit)
    # Of the runs that end where the others do: a control may lie far above.
    near = [curve for arm, curve in found if arm.role != CONTROL and not curve.diverged]
    panels.limit(end, near or curves, unit, _ZOOM)
    panels.legend(figure, whole)
    return figure


def _apart(found: list[tuple[Arm, Curve]], arms: list[str], unit: float, venue: Venue, x_label: str) -> Any:
    figure, each = panels.grid(venue, len(arms))
    baselines = [curve for arm, curve in found if arm.role == BASELINE]
    for axes, name in zip(each, arms, strict=True):
        own = [curve for arm, curve in found if arm.name == name]
        for curve in baselines:
            axes.plot(curve.x / unit, curve.mean, color="0.7", linewidth=2)
        for curve in own:
            panels.plot(axes, curve, unit)
        panels.limit(axes, [*own, *baselines], unit)
        axes.set(title=panels.wrapped(own[0].label))
    figure.supxlabel(x_label, fontsize="medium")
    figure.supylabel("loss (nats per token)", fontsize="medium")
    return figure


def divergence(arms: Sequence[Arm]) -> str:
    """A sentence on runs that diverged, if any did."""
    counts = [f"{len(arm.diverged)} of {len(arm.runs)} of {arm.name}" for arm in arms if arm.diverged]
    return f" Diverged, and drawn as thin lines that end in a cross: {', '.join(counts)}." if counts else ""
