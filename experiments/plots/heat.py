"""Heat maps of telemetry, layer by step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.plots.drawing import Drawing, slug
from experiments.plots.study import Arm
from experiments.plots.style import Venue
from experiments.plots.telemetry import GEMMS, TENSORS, Telemetry, short

# More cannot be told apart in a third of a page.
_MOST_COLUMNS = 100
_ROW, _FRAME = 0.085, 1.1  # inches
_LEAST_SHARE = 1e-4  # percent
_MOST_OCTAVES = 3.0


@dataclasses.dataclass(frozen=True)
class Statistic:
    """What a heat map shows.

    Attributes:
      name: in the telemetry.
      title: of the figure.
      unit: what the colour bar says.
      scale: 'linear', 'log' or 'ratio', which is centred on 1.
      colors: of matplotlib.
      worst: of several steps in one cell.
      factor: from the telemetry's unit to that of the figure.
      panels: tensors or GEMMs, with their titles.
    """

    name: str
    title: str
    unit: str
    scale: str
    colors: str
    worst: np.ufunc
    factor: float = 1.0
    panels: Mapping[str, str] = dataclasses.field(default_factory=lambda: TENSORS)


STATISTICS = (
    Statistic("sqnr", "Signal to quantization noise", "SQNR (dB)", "linear", "viridis", np.fmin),
    Statistic("underflow", "Underflow", "nonzero values that became zero (%)", "log", "cividis", np.fmax, 100.0),
    Statistic("saturation", "Saturation", "values that were clipped (%)", "log", "cividis", np.fmax, 100.0),
    Statistic("staleness", "Staleness of scales", "true amax / amax of the scale", "ratio", "PuOr_r", np.fmax),
    Statistic("error", "Error of the products", "relative error (%)", "log", "cividis", np.fmax, 100.0, GEMMS),
)
Maps = dict[str, np.ndarray]


def draw(telemetry: Sequence[tuple[Arm, Telemetry]], venue: Venue) -> Iterator[Drawing]:
    """Yields a figure per statistic and arm."""
    for statistic in STATISTICS:
        for arm, of_arm in telemetry:
            if maps := _maps(of_arm, statistic):
                yield _figure(arm, of_arm, statistic, maps, venue)


def _maps(telemetry: Telemetry, statistic: Statistic) -> Maps:
    """By tensor or GEMM: float64 [layers × depth, S]."""
    maps = {}
    for panel in statistic.panels:
        rows = [telemetry.mean(layer, panel, statistic.name) for layer in telemetry.layers]
        depths = _depths(telemetry)
        if any(row is not None for row in rows):
            empty = [np.full((len(telemetry.steps), depth), np.nan) for depth in depths]
            filled = [blank if row is None else row for row, blank in zip(rows, empty, strict=True)]
            maps[panel] = statistic.factor * np.concatenate(filled, axis=1).T
    return maps


def _depths(telemetry: Telemetry) -> list[int]:
    """How many rows each layer has."""
    sizes: dict[str, int] = {}
    for (layer, _, _), values in telemetry.values.items():
        sizes[layer] = values.shape[2]
    return [sizes[layer] for layer in telemetry.layers]


def _norm(statistic: Statistic, values: np.ndarray) -> tuple[Any, str]:
    """Which values the colours stand for, and at which ends there are more."""
    from matplotlib import colors

    values = values[np.isfinite(values)]
    if statistic.scale == "linear":
        return colors.Normalize(values.min(), values.max()), "neither"
    if statistic.scale == "ratio":
        octaves = float(np.abs(np.log2(values[values > 0])).max(initial=0.1))
        far = min(octaves, _MOST_OCTAVES)
        return colors.LogNorm(2.0**-far, 2.0**far), "both" if octaves > far else "neither"
    high = max(float(values.max()), 10 * _LEAST_SHARE)
    return colors.LogNorm(max(float(values[values > 0].min(initial=high / 10)), _LEAST_SHARE), high), "min"


def _figure(arm: Arm, telemetry: Telemetry, statistic: Statistic, maps: Maps, venue: Venue) -> Drawing:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    depths = _depths(telemetry)
    norm, extend = _norm(statistic, np.concatenate([cells.ravel() for cells in maps.values()]))
    figure: Any = Figure(figsize=(venue.page, min(8.5, _FRAME + max(1.2, _ROW * sum(depths)))), layout="constrained")
    panels = figure.subplots(1, len(statistic.panels), sharey=True, squeeze=False)[0]
    colors = matplotlib.colormaps[statistic.colors].with_extremes(under="#ececec", bad="white")
    ends = np.cumsum(depths)
    numbers: list[dict[str, Any]] = []
    image = None
    for axes, (panel, title) in zip(panels, statistic.panels.items(), strict=True):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.tick_params(axis="y", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if panel not in maps:
            axes.annotate("not quantized", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="0.4")
            axes.set(xticks=[])
            continue
        steps, cells = _binned(telemetry.steps, maps[panel], statistic.worst)
        shown = np.where(cells == 0, norm.vmin / 10, cells) if statistic.scale == "log" else cells
        edges = _edges(steps)
        # Cells as an image: viewers draw hairlines between those of a vector drawing.
        image = axes.pcolormesh(edges, np.arange(ends[-1] + 1), shown, norm=norm, cmap=colors, rasterized=True)
        axes.hlines(ends[:-1], edges[0], edges[-1], color="white", linewidth=1.2)
        known = cells[np.isfinite(cells)]
        if np.all(known == known[0]):
            axes.annotate(f"{known[0]:g} everywhere", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
        numbers += _numbers(arm, telemetry, statistic, panel, steps, cells, depths)
    panels[0].set(yticks=ends - np.array(depths) / 2, ylim=(ends[-1], 0), ylabel="layer, first block on top")
    panels[0].set_yticklabels([short(layer) for layer in telemetry.layers])
    bar = figure.colorbar(image, ax=list(panels), label=statistic.unit, extend=extend, pad=0.01, aspect=25)
    bar.outline.set_visible(False)
    if statistic.scale != "linear":
        bar.ax.yaxis.set_major_locator(FixedLocator(_ticks(norm, is_ratio=statistic.scale == "ratio")))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(f"{arm.name}: {statistic.title[0].lower()}{statistic.title[1:]}")
    binned = len(telemetry.steps) > _MOST_COLUMNS
    seeds = len(telemetry.runs)
    mean = f", the mean of {seeds} seeds{'' if telemetry.is_even else ', of those that got so far'}."
    return Drawing(
        name=f"{statistic.name}_{slug(arm.name)}",
        title=f"{statistic.title}, {arm.name}",
        caption=f"{statistic.title} in {arm.name} by layer, depth and step"
        + (mean if seeds > 1 else ", of one seed.")
        + (" A cell shows the worst of the steps that it covers." if binned else "")
        + (" Light grey: none, or less than the scale shows." if statistic.scale == "log" else ""),
        figure=figure,
        runs=telemetry.runs,
        numbers=tuple(numbers),
    )


def _binned(steps: np.ndarray, cells: np.ndarray, worst: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """At most _MOST_COLUMNS columns, each the worst of some in a row."""
    if len(steps) <= _MOST_COLUMNS:
        return steps, cells
    starts = np.linspace(0, len(steps), _MOST_COLUMNS, endpoint=False).astype(int)
    return steps[starts], worst.reduceat(cells, starts, axis=1)


def _edges(steps: np.ndarray) -> np.ndarray:
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _ticks(norm: Any, *, is_ratio: bool) -> list[float]:
    """Round numbers, evenly spread on a logarithmic axis."""
    decades = float(np.log10(norm.vmax / norm.vmin))
    if not is_ratio:
        digits = (1, 2, 5) if decades < 2.5 else (1,)
        powers = range(math.floor(np.log10(norm.vmin)), math.ceil(np.log10(norm.vmax)) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in digits]
    elif decades < 0.08:
        ticks = [0.92, 0.96, 1, 1.04, 1.08]
    elif decades < 0.2:
        ticks = [0.8, 0.9, 1, 1.1, 1.25]
    elif decades < 0.6:
        ticks = [0.5, 0.6, 0.8, 1, 1.25, 1.6, 2]
    else:
        step = math.ceil(decades / 1.8)
        ticks = [2.0**power for power in range(-20 * step, 20 * step + 1, step)]
    return [tick for tick in ticks if norm.vmin <= tick <= norm.vmax]


def _numbers(
    arm: Arm,
    telemetry: Telemetry,
    statistic: Statistic,
    panel: str,
    steps: np.ndarray,
    cells: np.ndarray,
    depths: Sequence[int],
) -> list[dict[str, Any]]:
    rows = []
    at = [(layer, depth) for layer, count in zip(telemetry.layers, depths, strict=True) for depth in range(count)]
    runs = list(telemetry.runs)
    for (layer, depth), row in zip(at, cells.tolist(), strict=True):
        constant = {"arm": arm.name, "runs": runs, "layer": layer, "tensor": panel}
        rows += [
            {**constant, "depth": depth, "step": step, statistic.name: value}
            for step, value in zip(steps.tolist(), row, strict=True)
        ]
    return rows
