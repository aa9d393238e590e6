"""Tables as LaTeX, with the rules of booktabs."""

from __future__ import annotations

import re
from typing import Any

from experiments.plots.plot import Table

_SPECIAL = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "×": r"$\times$",
    "→": r"$\to$",
}
_NUMBER = r"[+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?"
_NUMBERS = re.compile(rf"{_NUMBER}|\[{_NUMBER}, {_NUMBER}\]")


def latex(table: Table) -> str:
    r"""A tabular, to stand in a table of the paper; what it shows is a comment above it."""
    cells = [[str(value) for value in row] for row in table.rows]
    numeric = [all(_is_numeric(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = [
        f"% {table.title}. {table.caption}",
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{@{{}}{''.join('r' if is_numeric else 'l' for is_numeric in numeric)}@{{}}}}",
        r"\toprule",
        _row(table.columns),
        r"\midrule",
        *map(_row, cells),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Any) -> str:
    return " & ".join(map(_cell, cells)) + r" \\"


def _is_numeric(cell: str) -> bool:
    return cell == "–" or _NUMBERS.fullmatch(cell) is not None


def _cell(cell: str) -> str:
    if _NUMBERS.fullmatch(cell):
        # As mathematics a hyphen is a minus; a comma within a number takes no space.
        power = lambda found: rf" \times 10^{{{int(found[1])}}}"
        return "$" + re.sub(r"e([+-]?\d+)", power, re.sub(r",(?=\d)", "{,}", cell)) + "$"
    return escaped(cell)


def escaped(text: str) -> str:
    """Text in which nothing is a command."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)
