"""Values, lists and tables as HTML, with every text escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

_NOTHING = "–"
_TALL = 20  # rows; a longer table scrolls in its box
_PROSE = 24  # characters; a longer text is broken into lines
_NUMERIC = re.compile(r"[\[(<>≤≥±+\-−\s]*\d[^a-zA-Z]*(e[+-]\d+)?|–")


def table(
    label: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    runs: Sequence[str] = (),
    anchors: Sequence[str] = (),
) -> str:
    """A table in a box that scrolls by itself.

    Args:
      label: what the box is called.
      columns: names, one for every value of a row.
      rows: values; the first of a row is its heading.
      runs: markup for a column after the first, where no screen is too narrow for it.
      anchors: ids of the rows.
    """
    kinds = [_kind([text(row[i]) for row in rows]) for i in range(len(columns))]
    heads = [f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(columns, kinds, strict=True)]
    heads[1:1] = ['<th scope="col">runs</th>'] if runs else []
    lines = []
    for i, row in enumerate(rows):
        cells = [f"<td{kind}>{shown(value)}</td>" for value, kind in zip(row, kinds, strict=True)]
        cells[0] = f'<th scope="row"{kinds[0]}>{shown(row[0])}</th>'
        cells[1:1] = [f"<td>{runs[i]}</td>"] if runs else []
        opening = f'<tr id="{anchors[i]}">' if anchors else "<tr>"
        lines.append(f"{opening}{''.join(cells)}</tr>")
    body = "\n".join(lines)
    kind = "scroll tall" if len(rows) > _TALL else "scroll"
    return f"""<div class="{kind}" role="region" tabindex="0" aria-label="{escape(label)}">
<table>
<thead><tr>{"".join(heads)}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>"""


def _kind(texts: Sequence[str]) -> str:
    """How a column is set: numbers to the right, sentences in lines."""
    if all(map(_NUMERIC.fullmatch, texts)):
        return ' class="number"'
    return ' class="prose"' if max(map(len, texts)) > _PROSE else ""


def runs(names: Sequence[str], links: Mapping[str, str]) -> str:
    """Names of runs behind their number; `links` has the ids of those that the page says more about."""
    if not names:
        return _NOTHING
    linked = lambda name: f'<a href="#{links[name]}">{escape(name)}</a>' if name in links else escape(name)
    items = "".join(f"<li>{linked(name)}</li>" for name in names)
    return f'<details class="runs"><summary>{count(names, "run")}</summary><ul>{items}</ul></details>'


def definitions(values: Mapping[str, Any]) -> str:
    """Names with their values, which may be mappings in turn."""
    nested = lambda value: definitions(value) if isinstance(value, Mapping) and value else shown(value)
    pairs = [f"<dt>{escape(name)}</dt><dd>{nested(value)}</dd>" for name, value in values.items()]
    return f"<dl>{''.join(pairs)}</dl>"


def sentence(words: str) -> str:
    """Text whose percent signs stay with their numbers."""
    return escape(words).replace(" %", "&nbsp;%")


def sentences(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{sentence(words)}</li>" for words in texts) + "</ul>"


def count(things: Collection[Any], noun: str) -> str:
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"


def shown(value: Any) -> str:
    """A value as markup; what was left of a number's digits is told on hovering over it, a mapping opens on a click."""
    if isinstance(value, Mapping) and value:
        return f"<details><summary>{count(value, 'item')}</summary>{definitions(value)}</details>"
    short, value = text(value), plain(value)
    whole = isinstance(value, float) and float(short) != value
    return f'<span title="{value!r}">{short}</span>' if whole else escape(short)


def text(value: Any) -> str:
    """A value as it is read, a float with six digits."""
    value = plain(value)
    if value in (None, "", [], {}):
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format(value, ".6g")
    if isinstance(value, list):
        return ", ".join(map(text, value))
    return str(value)


def plain(value: Any) -> Any:
    """One of JSON's types: NumPy's scalars as Python's, and nothing for a number that is not finite."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
