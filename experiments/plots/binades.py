"""Histograms of values in binades, each tensor in the units of its scale, over the grid of its format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.plots.drawing import Drawing, slug
from experiments.plots.layers import LayerGrid, not_quantized
from experiments.plots.study import Arm
from experiments.plots.style import Venue
from experiments.plots.telemetry import Telemetry, short_format

if TYPE_CHECKING:
    from q8jax.formats import Format

_LEAST = 1e-3  # percent
_SPARSE, _OUTSIDE = "#e69f00", "#dcdcdc"
_FAR = (-1000, 1000)
_OUTSIDE_SHOWN = 6  # binades below


def draw(arm: Arm, telemetry: Telemetry, venue: Venue) -> Drawing:
    """A panel per layer and tensor, a line per depth, of the first seed's last telemetry step that quantized it."""
    from matplotlib.patches import Patch

    from q8jax.formats import get_format

    grid = LayerGrid(telemetry, venue, sharex="row", sharey=True)
    numbers: list[dict[str, Any]] = []
    steps = set()
    for tensor, title, row in grid.rows():
        formats: list[Format] = []
        used: Any = False
        edges = np.zeros(0)
        for axes, layer in row:
            qtype = telemetry.formats.get((layer, tensor))
            if qtype is None or (layer, tensor) not in telemetry.binades:
                not_quantized(axes)
                continue
            step, counts = telemetry.binades[layer, tensor]
            steps.add(step)
            formats.append(get_format(qtype))
            _grid(axes, formats[-1])
            shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            edges = telemetry.first_binade + np.arange(shares.shape[1] + 1)
            used = used | (shares >= _LEAST).any(axis=0)
            for depth, look in grid.depths(len(shares)):
                axes.stairs(shares[depth], edges, **look)
                constant = {"arm": arm.name, "run": telemetry.runs[0], "layer": layer, "tensor": tensor}
                numbers += [
                    {**constant, "depth": depth, "binade": binade, "percent": share}
                    for binade, share in zip(edges.tolist(), shares[depth].tolist())
                    if share
                ]
            axes.annotate(
                short_format(qtype), (0.5, 0.98), xycoords="axes fraction", ha="center", va="top", fontsize="small"
            )
        first = row[0][0]
        first.set_ylabel(f"share (%)\n{title}")
        if formats:
            first.set(yscale="log", ylim=(_LEAST, 100))
            _limits([axes for axes, _ in row], formats, edges, used)
    handles = [
        Patch(color=_SPARSE, alpha=0.6, label="fewer numbers to a binade"),
        Patch(color=_OUTSIDE, label="becomes zero, or is clipped"),
    ]
    grid.finish(f"{arm.name}: values in binades of their scale", "binade of |value| / scale", handles)
    when = (
        f"step {max(steps)}" if len(steps) == 1 else f"the last step that quantized it, of {min(steps)} to {max(steps)}"
    )
    return Drawing(
        name=f"binades_{slug(arm.name)}",
        title=f"Values in binades, {arm.name}",
        caption=f"Where the nonzero values of each tensor lie on the grid of its format, in {telemetry.runs[0]} at "
        f"{when}: shares by binade, floor(log2(|value| / scale)).",
        figure=grid.figure,
        runs=telemetry.runs[:1],
        numbers=tuple(numbers),
    )


def _grid(axes: Any, found: Format) -> None:
    """Shades what the format cannot hold, and where its numbers are sparse."""
    # Below half the smallest number everything becomes zero.
    bottom, top = np.log2(found.smallest_subnormal) - 1, np.log2(found.max)
    axes.axvspan(_FAR[0], bottom, color=_OUTSIDE, linewidth=0, zorder=0)
    axes.axvspan(top, _FAR[1], color=_OUTSIDE, linewidth=0, zorder=0)
    full = 2.0 ** min(found.mantissa_bits, 3)
    for binade in range(round(bottom), int(np.ceil(top))):
        axes.axvline(binade, color="0.85", linewidth=0.3, zorder=0.5)
        step = max(found.smallest_subnormal, 2.0**binade / full)
        if (lacking := 1 - 2.0**binade / step / full) > 0:
            axes.axvspan(binade, min(binade + 1, top), color=_SPARSE, alpha=lacking**2, linewidth=0, zorder=0)


def _limits(row: Any, formats: list[Format], edges: np.ndarray, used: np.ndarray) -> None:
    """Of a row of panels: the range of its formats, and what lies outside.

    Args:
      row: panels.
      formats: in them.
      edges: of the bins.
      used: whether a bin has values in some panel.
    """
    filled = np.flatnonzero(used)
    bottom = min(np.log2(found.smallest_subnormal) - 1 for found in formats)
    low = min(bottom, edges[filled[0]])
    high = max([np.log2(found.max) for found in formats] + [edges[filled[-1] + 1]])
    row[0].set_xlim(max(low, bottom - _OUTSIDE_SHOWN) - 1, high + 1)
