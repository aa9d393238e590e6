"""What the programs that draw hand on: a picture with its numbers, and a table, each with its runs."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Picture:
    """What a picture shows, in whatever form it is there.

    Attributes:
      name: stem of its files, e.g. "loss_tokens".
      title: what it is called.
      caption: what is shown, with n and the kind of band.
      runs: names of the run directories that it is made of.
      numbers: the plotted numbers as rows; each names its run ("run"), or its runs ("runs").
    """

    name: str
    title: str
    caption: str
    runs: tuple[str, ...]
    numbers: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Plot(Picture):
    """A picture as a file.

    Attributes:
      svg: the vector picture, as saved.
    """

    svg: bytes


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
      name: stem of its files.
      title: what it is called.
      caption: what is shown.
      columns: names of the columns.
      rows: as many values each as there are columns.
      runs: for each row, names of the run directories that it is made of.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    runs: tuple[tuple[str, ...], ...]
