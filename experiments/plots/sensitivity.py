"""Which layers suffer from which recipe, from what experiments.whatif wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.loading import LoadError
from experiments.plots.drawing import Drawing, slug
from experiments.plots.study import SENSITIVITY, Study
from experiments.plots.style import Venue, looks
from experiments.plots.telemetry import short

_MOST_ROWS = 24
_ROW, _FRAME = 0.15, 0.75  # inches


def draw(study: Study, venue: Venue) -> Iterator[Drawing | str]:
    """Yields a figure for each file under --runs, or a sentence where there is none."""
    places = {place: path for place, path in study.others.items() if path.name == SENSITIVITY}
    if not places:
        yield (
            f"There is no {SENSITIVITY} among the runs, which experiments.whatif writes with --out: which layers are "
            "sensitive is not drawn."
        )
    for place, path in places.items():
        name = "sensitivity" if len(places) == 1 else f"sensitivity_{slug(str(Path(place).parent))}"
        yield _figure(_read(path), name, place, venue)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        for row in found["rows"]:
            _label(row), row["recipe"], float(row["error"]), float(row["loss_change"])
        found["run"], found["checkpoint"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} is damaged ({error!r}): make it again, or remove it.") from error
    return found


def _label(row: dict[str, Any]) -> str:
    return f"{short(row['layer'])}, depth {row['depth']}"


def _figure(found: dict[str, Any], name: str, place: str, venue: Venue) -> Drawing:
    from matplotlib.figure import Figure

    run, rows = found["run"], found["rows"][:_MOST_ROWS]
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    look = looks(recipes)
    figure: Any = Figure(figsize=(venue.page, _FRAME + _ROW * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, factor, title, label in (
        (panels[0], "error", 100.0, "Worst of the three products", "relative error (%)"),
        (panels[1], "loss_change", 1e3, "Loss, to first order", "change (thousandths of a nat per token)"),
    ):
        for recipe in recipes:
            at = [i for i, row in enumerate(rows) if row["recipe"] == recipe]
            lengths = [factor * rows[i][key] for i in at]
            color = look[recipe]["color"]
            axes.hlines(at, 0, lengths, color=color, linewidth=1.5)
            axes.plot(lengths, at, color=color, marker=look[recipe]["marker"], linestyle="", label=recipe)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set(xlabel=label)
        axes.set_title(title)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="y", length=0)
    panels[0].set_xlim(left=0)
    panels[0].set(yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
    panels[0].set_yticklabels([_label(row) for row in rows])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(recipes))
    some = f", the first {len(rows)} of {len(found['rows'])}" if len(rows) < len(found["rows"]) else ""
    return Drawing(
        name=name,
        title="Sensitivity of layers",
        caption=f"What each recipe would do in one layer, all others in 16 bits, on one batch at step "
        f"{found['checkpoint']} of {run}: relative error of the layer's worst product, by which it is ranked{some}, "
        "and what the forward error changes the loss by.",
        figure=figure,
        runs=tuple(dict.fromkeys((run, place))),
        numbers=tuple({"run": run, **row} for row in found["rows"]),
    )
