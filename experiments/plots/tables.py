"""Tables of what the study found, what it cost, and what the telemetry saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.comparing.tables import verdict
from experiments.plots.curves import UNTIMED
from experiments.plots.plot import Table
from experiments.plots.study import Arm, Study
from experiments.plots.telemetry import TENSORS, Telemetry, short_format

NOTHING = "–"


def tables(study: Study, telemetry: Sequence[tuple[Arm, Telemetry]]) -> Iterator[Table]:
    """Yields those that there is something for."""
    if study.comparison:
        yield _results(study)
        yield _costs(study)
    if telemetry:
        yield _telemetry(telemetry)


def _results(study: Study) -> Table:
    found = study.comparison
    return Table(
        name="results",
        title="Results",
        caption=f"Final held-out loss ({study.metric}, nats per token; mean over its pairs) and its difference to that "
        "of the baseline's run with the same seed, with Student's confidence interval and one-sided upper bound. "
        f"Strict parity is a bound below {study.margins['strict']:+g} %, parity one below "
        f"{study.margins['parity']:+g} %.{_noise(study.noise)}",
        columns=("precision", "loss", "difference (%)", "95 % interval", "upper 95 %", "seeds", "diverged", "verdict"),
        rows=tuple(
            (
                arm.name,
                _number(found[arm.name]["loss"], ".4f"),
                _number(found[arm.name]["delta_percent"], "+.3f"),
                _interval(found[arm.name]["ci95"]),
                _number(found[arm.name]["upper95"], "+.3f"),
                found[arm.name]["seeds"],
                found[arm.name]["diverged"],
                verdict(found[arm.name]),
            )
            for arm in study.arms
        ),
        runs=tuple(arm.names for arm in study.arms),
    )


def _noise(noise: Mapping[str, Any] | None) -> str:
    paired, unpaired = (noise or {}).get("paired"), (noise or {}).get("unpaired")
    text = ""
    if paired:
        text += f" Chance alone moves paired runs by {paired['sd_percent']:.3f} % (standard deviation, {paired['arm']})"
        text += f", and seeds by {unpaired['sd_percent']:.3f} %." if unpaired else "."
    return text


def _costs(study: Study) -> Table:
    found = study.comparison
    untimed = [arm.name for arm in study.arms if not study.has_timing(arm)]
    note = f" Without speed and time: {', '.join(untimed)}, where {UNTIMED}." if untimed else ""
    scale = lambda value, unit: None if value is None else value / unit

    def cells(arm: Arm) -> tuple[Any, ...]:
        entry, timed = found[arm.name], study.has_timing(arm)
        return (
            arm.name,
            _number(entry["tokens_per_second"] if timed else None, ",.0f"),
            _reached(entry),
            _number(entry["seconds_to_baseline"] if timed else None, ",.0f"),
            _number(scale(entry["peak_memory_bytes"], 1e9), ".2f"),
            entry["spikes"],
        )

    return Table(
        name="costs",
        title="Speed, memory and way to the baseline's loss",
        caption="Median training speed, tokens until a run first comes to within "
        f"{study.margins['parity']:g} % of the last held-out loss of the baseline's run with the same seed, and the "
        "time that training on so many takes at its speed (medians over all pairs, beside how many got there), median "
        f"peak memory, and loss spikes of all runs.{note}",
        columns=(
            *("precision", "tokens/s", "tokens to baseline (millions)", "time to baseline (s)"),
            *("memory (GB)", "spikes"),
        ),
        rows=tuple(map(cells, study.arms)),
        runs=tuple(arm.names for arm in study.arms),
    )


def _reached(entry: Mapping[str, Any]) -> str:
    """Tokens to the baseline's loss, in millions, and how many runs got there."""
    if not entry["paired"]:
        return NOTHING
    share = f"{entry['reached_baseline']} of {entry['paired']}"
    tokens = entry["tokens_to_baseline"]
    return f"{tokens / 1e6:.3f} ({share})" if tokens else f"not reached ({share})"


def _telemetry(telemetry: Sequence[tuple[Arm, Telemetry]]) -> Table:
    rows, runs = [], []
    for arm, found in telemetry:
        for tensor in TENSORS:
            formats = sorted({short_format(qtype) for (_, t), qtype in found.formats.items() if t == tensor and qtype})
            if formats:
                rows.append((arm.name, tensor, ", ".join(formats), *_statistics(found, tensor)))
                runs.append(found.runs)
    return Table(
        name="telemetry",
        title="What quantization does to tensors",
        caption="Over all layers, depths, telemetry steps and seeds: activations x, weights w and gradients g in their "
        "formats, signal to quantization noise, values that became zero or were clipped, and the true amax over the "
        "one that its scale was made for.",
        columns=(
            *("precision", "tensor", "format", "SQNR, median (dB)", "SQNR, least (dB)", "underflow, mean (%)"),
            *("saturation, mean (%)", "saturation, most (%)", "staleness, most"),
        ),
        rows=tuple(rows),
        runs=tuple(runs),
    )


def _statistics(found: Telemetry, tensor: str) -> tuple[str, ...]:
    def of(statistic: str, reduce: Any, spec: str, factor: float = 1.0) -> str:
        parts = [values.ravel() for (_, t, s), values in found.values.items() if (t, s) == (tensor, statistic)]
        values = np.concatenate(parts) if parts else np.zeros(0)
        values = values[np.isfinite(values)]
        return _number(factor * float(reduce(values)), spec) if len(values) else NOTHING

    return (
        of("sqnr", np.median, ".1f"),
        of("sqnr", np.min, ".1f"),
        of("underflow", np.mean, ".2g", 100.0),
        of("saturation", np.mean, ".2g", 100.0),
        of("saturation", np.max, ".2g", 100.0),
        of("staleness", np.max, ".2f"),
    )


def _interval(ends: Sequence[float] | None) -> str:
    return NOTHING if ends is None else f"[{ends[0]:+.3f}, {ends[1]:+.3f}]"


def _number(value: float | None, spec: str) -> str:
    return NOTHING if value is None else format(value, spec)
