"""How figures look: sizes of the venues' columns, and for every precision one colour, line and marker everywhere.

Colours are those of Okabe and Ito (2008), which the usual kinds of colour blindness tell apart, with darker and
lighter ones of the same hue for variants. Lines and markers differ too, so that a figure can be read in grey.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Venue:
    """Where a figure is printed.

    Attributes:
      column: width of a column, inches.
      page: width of the text, inches.
      font: that matplotlib brings along, close to that of the text.
      size: of the letters, points.
      small: of the smallest letters.
    """

    column: float
    page: float
    font: str = "STIXGeneral"
    size: float = 8
    small: float = 7

    @property
    def settings(self) -> dict[str, Any]:
        """Of matplotlib."""
        return {
            "font.family": self.font,
            "mathtext.fontset": "stix" if self.font == "STIXGeneral" else "dejavusans",
            "font.size": self.size,
            "axes.titlesize": self.size,
            "axes.labelsize": self.size,
            "figure.titlesize": self.size + 1,
            "legend.fontsize": self.small,
            "xtick.labelsize": self.small,
            "ytick.labelsize": self.small,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "xtick.minor.width": 0.4,
            "ytick.minor.width": 0.4,
            "xtick.major.size": 2.5,
            "ytick.major.size": 2.5,
            "xtick.minor.size": 1.5,
            "ytick.minor.size": 1.5,
            "lines.linewidth": 1.2,
            "lines.markersize": 3.5,
            "grid.linewidth": 0.4,
            "grid.alpha": 0.3,
            "figure.constrained_layout.wspace": 0.05,
            "legend.frameon": False,
            "legend.handlelength": 2.6,
            "figure.constrained_layout.h_pad": 0.03,
            "figure.constrained_layout.w_pad": 0.03,
            # Type 3 fonts, the default, are refused by some venues.
            "pdf.fonttype": 42,
            # Letters as outlines need no font on the reader's side.
            "svg.fonttype": "path",
        }


# Of the authors' instructions of 2025.
VENUES = MappingProxyType(
    {
        "icml": Venue(3.25, 6.75),
        "neurips": Venue(5.5, 5.5),
        "iclr": Venue(5.5, 5.5),
        "acl": Venue(3.03, 6.3),
        "ieee": Venue(3.5, 7.16),
        "acm": Venue(3.33, 7.0),
        "nature": Venue(3.5, 7.2, "DejaVu Sans", 6.5, 5.5),
    }
)

_BLACK, _GREY, _LIGHT = "#000000", "#4d4d4d", "#a8a8a8"
_BLUE, _SKY, _GREEN, _VERMILLION, _ORANGE, _PURPLE = "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7"
_DASHED, _DOTTED, _DASH_DOT = (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2))
_LONG, _DASH_DOT_DOT, _SPARSE = (0, (8, 2)), (0, (4, 1.2, 1, 1.2, 1, 1.2)), (0, (1, 2.5))

Look = dict[str, Any]


def _look(color: str, linestyle: Any, marker: str) -> Look:
    return {"color": color, "linestyle": linestyle, "marker": marker}


# Fixed, so that a precision looks the same in all figures of all studies.
LOOKS = MappingProxyType(
    {
        "fp32": _look(_BLACK, _DOTTED, "s"),
        "bf16": _look(_GREY, "-", "o"),
        "fp16": _look(_BLACK, _DASH_DOT, "p"),
        "bf16-perturbed": _look(_LIGHT, _LONG, "o"),
        "fp8": _look(_BLUE, _DASHED, "^"),
        "fp8-hybrid": _look("#00664a", _LONG, "<"),
        "fp8-current": _look(_SKY, _DASH_DOT, "v"),
        "fp8-row": _look("#004a75", _LONG, "<"),
        "fp8-block": _look("#3c9dc9", _DASH_DOT_DOT, ">"),
        "fp8-e3m4": _look(_PURPLE, _DASHED, "P"),
        "mxfp8": _look(_GREEN, _DASHED, "h"),
        "fp8-unscaled": _look("#7d5ba6", _SPARSE, "*"),
        "int8": _look(_VERMILLION, _DASH_DOT, "D"),
        "int8-row": _look(_ORANGE, _LONG, "d"),
        "int8-block": _look("#8f3f00", _DASH_DOT_DOT, "H"),
        "int8-switchback": _look("#b8860b", _DASHED, "X"),
        "int8-tensor": _look("#7a1f3d", _SPARSE, "8"),
    }
)
# Of arms without a row above, a sweep's for instance.
_COLORS = (_BLUE, _VERMILLION, _GREEN, _ORANGE, _PURPLE, _SKY, "#004a75", "#8f3f00", "#00664a", "#7a1f3d", _GREY)
_LINES = (_DASHED, _DASH_DOT, _LONG, _DASH_DOT_DOT, _DOTTED)
_MARKERS = "^DhdPvsX<>p"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Colour, line and marker by the name of an arm."""
    taken = {LOOKS[name]["color"] for name in names if name in LOOKS}
    # Those that no preset here has first.
    colors = sorted(_COLORS, key=lambda color: color in taken)
    invented = map(_look, itertools.cycle(colors), itertools.cycle(_LINES), itertools.cycle(_MARKERS))
    others = (look for look in invented if look not in LOOKS.values())
    return {name: LOOKS.get(name) or next(others) for name in names}


def tokens_scale(largest: float) -> tuple[float, str]:
    """What to divide tokens by for an axis, and the axis' label."""
    for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= unit:
            return unit, f"tokens ({name})"
    return 1.0, "tokens"


def seconds_scale(largest: float) -> tuple[float, str]:
    """What to divide seconds by for an axis, and the axis' label."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if largest >= 2 * unit:
            return unit, f"training time ({name})"
    return 1.0, "training time (seconds)"
