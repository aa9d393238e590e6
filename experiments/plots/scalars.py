"""What training logs of the model as a whole: gradient norm, logits, residual stream, updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.plots.bands import drawn, limits, on_thinning, thinning
from experiments.plots.drawing import Drawing
from experiments.plots.panels import legend
from experiments.plots.study import Study, common_steps, names, values_at
from experiments.plots.style import Venue, looks, tokens_scale

_SPEED = "tokens_per_second"
# Title and unit.
_SCALARS = {
    "gradient_norm": ("Gradient norm", "L2 norm"),
    "update_ratio": ("Update of the weights", "norm of update / of weights"),
    "attention_logit_max": ("Largest attention logit", "logit"),
    "log_z": ("Log Z of the output", "nats"),
    "residual_amax": ("Residual stream", "largest magnitude"),
    _SPEED: ("Training speed", "tokens/s"),
}
_COLUMNS = 3


def draw(study: Study, venue: Venue) -> Iterator[Drawing]:
    """Yields a figure with a panel for each scalar that was logged."""
    from matplotlib.figure import Figure

    logged = {
        name: words
        for name, words in _SCALARS.items()
        if any(
            len(common_steps(list(arm.finished.values()), name)) and (name != _SPEED or study.has_timing(arm))
            for arm in study.arms
        )
    }
    if not logged:
        return
    rows = -(-len(logged) // _COLUMNS)
    figure: Any = Figure(figsize=(venue.page, 1.7 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, min(_COLUMNS, len(logged)), sharex=True, squeeze=False).ravel()
    look = looks([arm.name for arm in study.arms])
    unit, label = tokens_scale(max(float(run.tokens[-1]) for run in study.runs if len(run.tokens)))
    numbers: list[dict[str, Any]] = []
    longest = 0
    for axes, (scalar, (title, y_label)) in zip(panels, logged.items()):
        centers, ends = [], []
        for arm in study.arms:
            runs = list(arm.finished.values())
            steps = common_steps(runs, scalar)
            if not len(steps) or (scalar == _SPEED and not study.has_timing(arm)):
                continue
            kept, mean, low, high = drawn(values_at(runs, scalar, steps))
            tokens = steps[kept] * runs[0].config["batch_size"] * runs[0].config["seq_len"]
            every = max(1, len(kept) // 5)
            axes.plot(tokens / unit, mean, label=arm.label, markevery=every, **{**look[arm.name], "markersize": 2.5})
            axes.fill_between(tokens / unit, low, high, color=look[arm.name]["color"], alpha=0.12, linewidth=0)
            centers.append(mean)
            ends += [low, high]
            longest = max(longest, len(steps))
            constant = {"arm": arm.name, "runs": list(names(runs)), "scalar": scalar}
            constant |= thinning(len(steps), len(kept))
            numbers += [
                {**constant, "tokens": at, "value": value}
                for at, value in zip(tokens.tolist(), mean.tolist(), strict=True)
            ]
        # What is never negative has an interval that is not either.
        least = 0.0 if min(map(np.nanmin, centers)) >= 0 else -np.inf
        axes.set_ylim(limits(np.concatenate(centers), np.maximum(np.concatenate(ends), least)))
        axes.set_title(title)
        axes.set_ylabel(y_label)
    for axes in panels[len(logged) :]:
        axes.remove()
    for axes in panels[max(0, len(logged) - _COLUMNS) : len(logged)]:
        axes.set_xlabel(label)
        axes.xaxis.set_tick_params(labelbottom=True)
    legend(figure, panels[0])
    yield Drawing(
        name="scalars",
        title="Model and optimizer",
        caption="Scalars of the training step by precision: means over seeds that did not diverge, with 95 % "
        "confidence intervals (Student's t)."
        f"{on_thinning(longest)}",
        figure=figure,
        runs=names(study.runs),
        numbers=tuple(numbers),
    )
