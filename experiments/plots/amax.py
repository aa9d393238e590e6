"""Histories of the largest values, with the largest number that the scale of the time could hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.plots.drawing import Drawing, slug
from experiments.plots.study import Arm
from experiments.plots.style import Venue
from experiments.plots.telemetry import TENSORS, Telemetry, short, shown

_COLUMNS, _DEPTHS = 4, 4
_MOST_STEPS = 400
_OF_SCALE: dict[str, Any] = {"linewidth": 0.7, "linestyle": (0, (3, 1.5))}


def draw(arm: Arm, telemetry: Telemetry, venue: Venue) -> Drawing:
    """A panel per layer and tensor, a pair of lines per depth, of the first seed."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    layers = shown(telemetry.layers, _COLUMNS)
    figure: Any = Figure(figsize=(venue.page, 1.25 * len(TENSORS) + 0.95), layout="constrained")
    panels = figure.subplots(len(TENSORS), len(layers), sharex=True, sharey="row", squeeze=False)
    colors = matplotlib.colormaps["viridis"]
    numbers: list[dict[str, Any]] = []
    drawn: dict[int, Any] = {}
    for row, (tensor, title) in zip(panels, TENSORS.items(), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            amax, scale = (telemetry.values.get((layer, tensor, name)) for name in ("amax", "scale"))
            if amax is None:
                axes.annotate("not quantized", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
                continue
            steps = shown(range(len(telemetry.steps)), _MOST_STEPS)
            largest = None if scale is None else scale[0] * _largest(telemetry.formats.get((layer, tensor)))
            for depth in shown(range(amax.shape[2]), _DEPTHS):
                color = drawn.setdefault(depth, colors(0.85 * depth / max(1, amax.shape[2] - 1)))
                x = telemetry.steps[steps]
                axes.plot(x, amax[0, steps, depth], color=color, linewidth=0.8)
                if largest is not None:
                    axes.plot(x, largest[steps, depth], color=color, drawstyle="steps-mid", **_OF_SCALE)
                numbers += _numbers(arm, telemetry, layer, tensor, depth, steps)
            axes.set_yscale("log", base=2)
            axes.grid(True)
        row[0].set_ylabel(f"largest |{tensor}|\n{title[:-2]}")
    for axes, layer in zip(panels[0], layers, strict=True):
        axes.set_title(short(layer))
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles: list[Any] = [Line2D([], [], color=color, label=f"depth {depth}") for depth, color in sorted(drawn.items())]
    handles.append(Line2D([], [], color="0.3", linewidth=0.8, label="amax"))
    if any(telemetry.formats.values()):
        handles.append(Line2D([], [], color="0.3", label="largest number at its scale", **_OF_SCALE))
    figure.suptitle(f"{arm.name}: largest values and their scales")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    some = f" Of {len(telemetry.layers)} layers, {len(layers)}." if len(layers) < len(telemetry.layers) else ""
    return Drawing(
        name=f"amax_{slug(arm.name)}",
        title=f"Largest values and their scales, {arm.name}",
        caption=f"Largest magnitude of each tensor in {telemetry.runs[0]} by step, and, dashed, the largest number of "
        f"its format times its scale: above it values are clipped.{some}",
        figure=figure,
        runs=telemetry.runs[:1],
        numbers=tuple(numbers),
    )


def _largest(qtype: str | None) -> float:
    from q8jax.formats import get_format

    return np.nan if qtype is None else get_format(qtype).max


def _numbers(
    arm: Arm, telemetry: Telemetry, layer: str, tensor: str, depth: int, steps: list[int]
) -> list[dict[str, Any]]:
    constant = {"arm": arm.name, "run": telemetry.runs[0], "layer": layer, "tensor": tensor}
    found = [telemetry.values.get((layer, tensor, name)) for name in ("amax", "scale")]
    columns = [np.full(len(steps), np.nan) if values is None else values[0, steps, depth] for values in found]
    return [
        {**constant, "depth": depth, "step": step, "amax": amax, "scale": scale}
        for step, amax, scale in zip(telemetry.steps[steps].tolist(), *map(np.ndarray.tolist, columns), strict=True)
    ]
