"""A grid of panels, a row per tensor and a column per layer, in which each depth has its colour and width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.plots.style import Venue
from experiments.plots.telemetry import TENSORS, Telemetry, short, shown

_COLUMNS, _DEPTHS = 4, 4
# Beside the colour, for who cannot see it, the deeper on top; dashes mean something else in these panels.
_WIDTHS = (2.0, 1.4, 0.9, 0.5)


class LayerGrid:
    """An empty grid.

    Args:
      telemetry: whose layers get columns, the first few of them.
      venue: whose page it fills.
      sharex, sharey: as of `Figure.subplots`.

    Attributes:
      figure: of matplotlib.
      layers: those that have a column.
    """

    def __init__(self, telemetry: Telemetry, venue: Venue, **share: Any):
        import matplotlib
        from matplotlib.figure import Figure

        self.layers = shown(telemetry.layers, _COLUMNS)
        self.figure: Any = Figure(figsize=(venue.page, 1.25 * len(TENSORS) + 0.95), layout="constrained")
        self._panels = self.figure.subplots(len(TENSORS), len(self.layers), squeeze=False, **share)
        self._colors = matplotlib.colormaps["viridis"]
        self._drawn: dict[int, Any] = {}

    def rows(self) -> Iterator[tuple[str, str, list[tuple[Any, str]]]]:
        """(tensor, its title, (axes, layer) from left to right) from top to bottom."""
        for row, (tensor, title) in zip(self._panels, TENSORS.items(), strict=True):
            yield tensor, title, list(zip(row, self.layers, strict=True))

    def depths(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(depth, look of its line) of those that are drawn of `count`."""
        for place, depth in enumerate(shown(range(count), _DEPTHS)):
            color = self._colors(0.85 * depth / max(1, count - 1))
            yield depth, self._drawn.setdefault(depth, {"color": color, "linewidth": _WIDTHS[place % len(_WIDTHS)]})

    def finish(self, title: str, x_label: str, handles: list[Any]) -> None:
        """Titles, labels, and below all a legend of the depths and of `handles`."""
        from matplotlib.lines import Line2D

        for axes, layer in zip(self._panels[0], self.layers, strict=True):
            axes.set_title(short(layer))
        for axes in self._panels[-1]:
            axes.set_xlabel(x_label)
        of_depths = [Line2D([], [], **self._drawn[depth], label=f"depth {depth}") for depth in sorted(self._drawn)]
        self.figure.suptitle(title)
        self.figure.legend(handles=of_depths + handles, loc="outside lower center", ncols=len(of_depths) + len(handles))


def not_quantized(axes: Any) -> None:
    """Says so in an empty panel."""
    axes.annotate("not quantized", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
