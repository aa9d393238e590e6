"""The benchmark's contenders under the roofline of their device, from what experiments.benchmark wrote.

See experiments.benchmarks.roofline, which measures the roofs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.loading import LoadError
from experiments.plots.drawing import Drawing, slug
from experiments.plots.study import BENCHMARK, Study
from experiments.plots.style import Venue, looks

_MARKERS = "os^DvP*X<>"
# A library's points are filled in their own way.
_FILLS: tuple[Any, ...] = ("none", "full", "left", "top", "right", "bottom")
_HOLLOW = {"markerfacecoloralt": "white", "markersize": 4.5}


def draw(study: Study, venue: Venue) -> Iterator[Drawing | str]:
    """Yields a figure for each benchmark under --runs, or a sentence where there is none."""
    places = {place: path for place, path in study.others.items() if path.name == BENCHMARK}
    if not places:
        yield f"There is no {BENCHMARK} among the runs, which experiments.benchmark writes: no roofline is drawn."
    for place, path in places.items():
        results = _read(path)
        if results["roofs"] is None:
            yield f"{place} has no roofs, as of --level=scaling and --target=: nothing is drawn of it."
        else:
            name = "roofline" if len(places) == 1 else f"roofline_{slug(str(Path(place).parent))}"
            yield _figure(results, name, place, venue)


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_bytes())
        _points(results), results["roofs"], results["level"], results["device_kind"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} is damaged ({error!r}): make it again, or remove it.") from error
    return results


def _points(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Intensity and rate of each contender at each piece of work, as of experiments.benchmarks.results.Measurement."""
    points = []
    for found in results["measurements"]:
        flops = found["flops"] / found["devices"]
        for contender, seconds in found["seconds"].items():
            rate = flops / float(np.median(seconds))
            intensity = flops / found["programs"][contender]["bytes"]
            points.append({"contender": contender, "work": found["work"], "intensity": intensity, "rate": rate})
    return points


def _precision(contender: str) -> str:
    """The precision of a contender such as 'q8jax fp8-row'."""
    return contender.rpartition(" ")[2]


def _library(contender: str) -> str:
    return contender.partition(" ")[0]


def _figure(results: dict[str, Any], name: str, source: str, venue: Venue) -> Drawing:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points = _points(results)
    roofs = results["roofs"]
    contenders = list(dict.fromkeys(point["contender"] for point in points))
    works = dict(zip(dict.fromkeys(point["work"] for point in points), itertools.cycle(_MARKERS)))
    look = looks([_precision(contender) for contender in contenders])
    fills = dict(zip(dict.fromkeys(map(_library, contenders)), itertools.cycle(_FILLS)))
    mark: dict[str, Any] = {"marker": "s", "linestyle": "", **_HOLLOW}
    figure: Any = Figure(figsize=(venue.page, 0.5 * venue.page), layout="constrained")
    axes = figure.subplots()
    ridges = [height / roofs["bandwidth"] for height in roofs["peaks"].values()]
    at = [point["intensity"] for point in points] + ridges
    x = np.geomspace(min(at) / 2, max(at) * 2, 200)
    for kind, height in roofs["peaks"].items():
        axes.plot(x, np.minimum(x * roofs["bandwidth"], height) / 1e12, color="0.4", linewidth=0.8)
        axes.annotate(f"{kind} peak", (x[-1], height / 1e12), ha="right", va="bottom", fontsize="small")
    for point in points:
        fill = fills[_library(point["contender"])]
        color = look[_precision(point["contender"])]["color"]
        axes.plot(
            point["intensity"], point["rate"] / 1e12, works[point["work"]], color=color, fillstyle=fill, **_HOLLOW
        )
    axes.set(
        xscale="log", yscale="log", xlabel="intensity (FLOP per byte moved)", ylabel="speed (TFLOP/s of one device)"
    )
    axes.set_title(f"Roofline of {results['device_kind']}")
    axes.grid(True, which="major")
    handles = [
        Line2D([], [], color=look[_precision(c)]["color"], fillstyle=fills[_library(c)], label=c, **mark)
        for c in contenders
    ]
    handles += [Line2D([], [], marker=marker, ls="", color="0.3", label=work) for work, marker in works.items()]
    figure.legend(handles=handles, loc="outside right upper")
    return Drawing(
        name=name,
        title="Roofline",
        caption=f"Speed of the benchmark's contenders (--level={results['level']}) against the work that they do for "
        f"each byte, medians of {results['rounds']} rounds, under the roofs of {results['device_kind']} "
        f"({roofs['source']}).",
        figure=figure,
        runs=(source,),
        numbers=tuple({"run": source, **point} for point in points),
    )
