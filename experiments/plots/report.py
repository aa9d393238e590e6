"""One HTML file with all plots, tables and their numbers.

It opens from disk and asks nothing of a network, which its Content-Security-Policy forbids: the script is allowed by
its SHA-256, so markup in a title could not run either. The same input gives the same text. Plotted numbers travel as
JSON beside their plot and become a table when a reader opens it, so a page with a hundred thousand of them stays light.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.plots import markup
from experiments.plots.inline import inline
from experiments.plots.plot import Plot, Table

_ASSETS = Path(__file__).parent / "assets"
_ZOOM = (
    "<p>Plots zoom by their buttons, by pinching, and by Ctrl and the wheel. Drag to pan, double click to reset.</p>"
)


def render(
    title: str,
    plots: Sequence[Plot],
    tables: Sequence[Table],
    provenance: Mapping[str, Any],
    missing: Sequence[str],
) -> str:
    """The whole document.

    Args:
      title: of the page.
      plots: in the order in which they are shown.
      tables: shown before the plots.
      provenance: what it was made of and with, of JSON's types. A mapping of mappings becomes a table, and whatever
        is called like one of its keys, runs above all, leads to that row.
      missing: sentences on what could not be drawn.
    """
    runs = {name for plot in plots for name in plot.runs} | {n for table in tables for row in table.runs for n in row}
    links = {key: _row_anchor(name, i) for name, rows in _tabular(provenance).items() for i, key in enumerate(rows)}
    sections = [
        _section("missing", "What is missing", markup.sentences(missing)) if missing else "",
        _section("tables", "Tables", *[_table_section(table, links) for table in tables]) if tables else "",
        _section("plots", "Plots", _ZOOM, *[_plot_section(plot, links) for plot in plots]) if plots else "",
        _section("provenance", "Provenance", _provenance(provenance)),
    ]
    made = f"{markup.count(plots, 'plot')} and {markup.count(tables, 'table')}"
    asset = lambda name: (_ASSETS / name).read_text(encoding="utf-8")
    script = asset("report.js")
    return string.Template(asset("report.html")).substitute(
        title=escape(title),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=asset("report.css"),
        contents=_contents(plots, tables, bool(missing)),
        summary=f"{made} of {markup.count(runs, 'run')}. Every number names the runs that it comes from.",
        sections="\n".join(filter(None, sections)),
        script=script,
    )


def _contents(plots: Sequence[Plot], tables: Sequence[Table], missing: bool) -> str:
    entry = lambda target, text, inner="": f'<li><a href="#{target}">{escape(text)}</a>{inner}</li>'
    part = lambda items: "<ul>" + "".join(entry(_anchor(item), item.title) for item in items) + "</ul>"
    entries = [
        entry("missing", "What is missing") if missing else "",
        entry("tables", "Tables", part(tables)) if tables else "",
        entry("plots", "Plots", part(plots)) if plots else "",
        entry("provenance", "Provenance"),
    ]
    return f"<ul>{''.join(entries)}</ul>"


def _anchor(item: Plot | Table) -> str:
    kind = "plot" if isinstance(item, Plot) else "table"
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_-]', '-', item.name)}"


def _section(anchor: str, heading: str, *parts: str) -> str:
    body = "\n".join(parts)
    return f"""<section id="{anchor}" aria-labelledby="{anchor}-h">
<h2 id="{anchor}-h">{heading}</h2>
{body}
</section>"""


def _plot_section(plot: Plot, links: Mapping[str, str]) -> str:
    anchor = _anchor(plot)
    described = {"role": "img", "aria-labelledby": f"{anchor}-h", "aria-describedby": f"{anchor}-caption"}
    svg, width, height = inline(plot.svg, f"{anchor}-svg", described)
    help_text = escape(f"{plot.title}: plus and minus zoom, arrows pan, 0 resets")
    return f"""<article id="{anchor}" class="plot" aria-labelledby="{anchor}-h">
<h3 id="{anchor}-h">{escape(plot.title)}</h3>
<figure>
<div class="frame">
<div class="view" tabindex="0" role="group" aria-label="{help_text}" style="--width:{width:g};--height:{height:g}">
{svg}
</div>
<div class="tools" hidden>
<output aria-label="Zoom">100 %</output>
<button type="button" data-do="out" aria-label="Zoom out">−</button>
<button type="button" data-do="in" aria-label="Zoom in">+</button>
<button type="button" data-do="reset">Reset</button>
<button type="button" data-do="enlarge">Enlarge</button>
</div>
</div>
<figcaption id="{anchor}-caption">{markup.sentence(plot.caption)}</figcaption>
</figure>
{_numbers(plot)}{markup.runs(plot.runs, links)}
</article>"""


def _numbers(plot: Plot) -> str:
    if not plot.numbers:
        return ""
    # No "</script>" or "<!--" can end the element early.
    data = json.dumps(_columns(plot.numbers), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<details class="numbers">
<summary>Numbers ({markup.count(plot.numbers, "row")})</summary>
<script type="application/json" data-file="{escape(plot.name)}.csv">{data}</script>
<noscript><p>The table of numbers needs JavaScript; they stand as JSON in this page's source.</p></noscript>
</details>
"""


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows by columns; a column of anything but numbers as codes into the values that occur in it."""
    columns: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [markup.plain(row.get(name)) for row in rows]
        if all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values):
            columns.append({"name": name, "values": values})
            continue
        keys = [json.dumps(value) for value in values]
        levels = dict(zip(keys, values, strict=True))
        codes = {key: code for code, key in enumerate(levels)}
        columns.append({"name": name, "levels": list(levels.values()), "codes": [codes[key] for key in keys]})
    return columns


def _table_section(table: Table, links: Mapping[str, str]) -> str:
    anchor = _anchor(table)
    runs = [markup.runs(names, links) for names in table.runs]
    return f"""<article id="{anchor}" aria-labelledby="{anchor}-h">
<h3 id="{anchor}-h">{escape(table.title)}</h3>
<p>{markup.sentence(table.caption)}</p>
{markup.table(table.title, table.columns, table.rows, runs=runs)}
</article>"""


def _provenance(provenance: Mapping[str, Any]) -> str:
    """Whatever has rows as a table under a heading of its own, after the rest."""
    tabular = _tabular(provenance)
    single = {_heading(name): value for name, value in provenance.items() if name not in tabular}
    parts = [markup.definitions(single)] if single else []
    for name, rows in tabular.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        shown = markup.table(
            _heading(name),
            ["name", *(column.replace("_", " ") for column in columns)],
            [[key, *(row.get(column) for column in columns)] for key, row in rows.items()],
            anchors=[_row_anchor(name, i) for i in range(len(rows))],
        )
        parts.append(f"<h3>{escape(_heading(name))}</h3>\n{shown}")
    return "\n".join(parts)


def _tabular(provenance: Mapping[str, Any]) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    is_rows = lambda value: isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values())
    return {name: value for name, value in provenance.items() if is_rows(value)}


def _row_anchor(name: str, row: int) -> str:
    return f"provenance-{name}-{row}"


def _heading(name: str) -> str:
    return name.replace("_", " ").capitalize()
