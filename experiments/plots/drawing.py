"""A drawing before it is saved, and the files that it becomes: PDF, SVG and PNG without a date or a chance name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from experiments.plots.plot import Picture, Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.plots.style import Venue

_DPI = 300
# What would name the day or the place.
_METADATA: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "ModDate": None},
    "svg": {"Date": None},
    "png": {},
}


@dataclasses.dataclass(frozen=True)
class Drawing(Picture):
    """A picture as a figure of matplotlib.

    Attributes:
      figure: in its final size.
    """

    figure: Figure

    def saved(self) -> tuple[Plot, dict[str, bytes]]:
        """The plot, and what its files hold, by suffix; call it under the style that the figure was made in."""
        import matplotlib

        files = {}
        # Once for all files, so that all look the same.
        self.figure.set_dpi(_DPI)
        if (layout := self.figure.get_layout_engine()) is not None:
            layout.execute(self.figure)
            # Not "none", which lays out before each file, to no effect.
            self.figure.set_layout_engine(None)
        for suffix, metadata in _METADATA.items():
            buffer = io.BytesIO()
            # The salt stands in for chance in the ids of an SVG.
            with matplotlib.rc_context({"svg.hashsalt": self.name}):
                self.figure.savefig(buffer, format=suffix, dpi=_DPI, metadata=metadata)
            files[suffix] = buffer.getvalue()
        return Plot(self.name, self.title, self.caption, self.runs, self.numbers, files["svg"]), files


@contextlib.contextmanager
def style(venue: Venue) -> Iterator[None]:
    """Settings of matplotlib for a venue, whatever the user's own are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = venue.settings
        matplotlib.rcParams.update(settings)
        yield


def slug(text: str) -> str:
    """For a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
