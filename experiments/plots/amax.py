"""Histories of the largest values, with the largest number that the scale of the time could hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.plots.drawing import Drawing, slug
from experiments.plots.layers import LayerGrid, not_quantized
from experiments.plots.study import Arm
from experiments.plots.style import Venue
from experiments.plots.telemetry import Telemetry, shown

_MOST_STEPS = 400
_OF_SCALE: dict[str, Any] = {"linestyle": (0, (3, 1.5))}


def draw(arm: Arm, telemetry: Telemetry, venue: Venue) -> Drawing:
    """A panel per layer and tensor, a pair of lines per depth, of the first seed."""
    from matplotlib.lines import Line2D

    grid = LayerGrid(telemetry, venue, sharex=True, sharey="row")
    numbers: list[dict[str, Any]] = []
    for tensor, title, row in grid.rows():
        for axes, layer in row:
            amax, scale = (telemetry.values.get((layer, tensor, name)) for name in ("amax", "scale"))
            if amax is None:
                not_quantized(axes)
                continue
            steps = shown(range(len(telemetry.steps)), _MOST_STEPS)
            largest = None if scale is None else scale[0] * _largest(telemetry.formats.get((layer, tensor)))
            for depth, look in grid.depths(amax.shape[2]):
                x = telemetry.steps[steps]
                axes.plot(x, amax[0, steps, depth], **look)
                if largest is not None:
                    axes.plot(x, largest[steps, depth], drawstyle="steps-mid", **{**look, **_OF_SCALE})
                numbers += _numbers(arm, telemetry, layer, tensor, depth, steps)
            axes.set_yscale("log", base=2)
            axes.grid(True)
        row[0][0].set_ylabel(f"largest |{tensor}|\n{title[:-2]}")
    handles = [Line2D([], [], color="0.3", linewidth=0.8, label="amax")]
    if any(telemetry.formats.values()):
        handles.append(Line2D([], [], color="0.3", label="largest number at its scale", **_OF_SCALE))
    grid.finish(f"{arm.name}: largest values and their scales", "step", handles)
    layers, looks = len(telemetry.layers), len(telemetry.steps)
    some = f" Of {layers} layers, {len(grid.layers)}." if len(grid.layers) < layers else ""
    some += f" Of {looks} steps with telemetry, {_MOST_STEPS} at equal distances." if looks > _MOST_STEPS else ""
    return Drawing(
        name=f"amax_{slug(arm.name)}",
        title=f"Largest values and their scales, {arm.name}",
        caption=f"Largest magnitude of each tensor in {telemetry.runs[0]} by step, and, dashed, the largest number of "
        f"its format times its scale: above it values are clipped.{some}",
        figure=grid.figure,
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
