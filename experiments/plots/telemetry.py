"""Telemetry of an arm as arrays, and its figures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.loading import RunRecord
from experiments.plots.drawing import Drawing
from experiments.plots.study import Arm, Study, names
from experiments.plots.style import Venue

TENSORS = {"x": "activations x", "w": "weights w", "g": "gradients g"}
GEMMS = {"fwd": "forward", "dlhs": "gradient of x", "drhs": "gradient of w"}
_NOT_NUMBERS = "binades"
# More would be a hundred figures, in a report that opens slowly.
_MOST_ARMS = 8


class ArmError(ValueError):
    """An arm cannot be drawn; its text is one sentence that names the flag and the fix."""


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """Of the runs of an arm.

    Attributes:
      runs: names, by seed.
      steps: at which any of them has it, int64 [S].
      is_even: whether all of them have it at all these steps, as none that diverged has.
      layers: names, sorted.
      values: by layer, tensor or GEMM, and statistic: float64 [runs, S, depth], NaN where there is none.
      formats: by layer and tensor, the first run's last; None where it was never quantized.
      binades: of the first run, by layer and tensor: the last step at which it was quantized, and counts [depth, bins].
      first_binade: exponent of the first bin.
    """

    runs: tuple[str, ...]
    steps: np.ndarray
    is_even: bool
    layers: tuple[str, ...]
    values: dict[tuple[str, str, str], np.ndarray]
    formats: dict[tuple[str, str], str | None]
    binades: dict[tuple[str, str], tuple[int, np.ndarray]]
    first_binade: int

    def mean(self, layer: str, tensor: str, statistic: str) -> np.ndarray | None:
        """Over runs, float64 [S, depth]; None where nothing is known."""
        values = self.values.get((layer, tensor, statistic))
        if values is None or not np.isfinite(values).any():
            return None
        known = np.isfinite(values)
        total = np.sum(np.where(known, values, 0.0), axis=0)
        return np.divide(total, known.sum(axis=0), out=np.full(total.shape, np.nan), where=known.any(axis=0))


def gather(runs: Sequence[RunRecord]) -> Telemetry | None:
    """The telemetry of runs; None if no run has any."""
    found = [(run, records) for run in runs if (records := run.telemetry)]
    if not found:
        return None
    of_runs = [{record["step"] for record in records} for _, records in found]
    steps = np.array(sorted(set().union(*of_runs)), np.int64)
    formats, binades = _seen_last(found[0][1])
    values: dict[tuple[str, str, str], np.ndarray] = {}
    for place, (_, records) in enumerate(found):
        _fill(values, records, steps, place, len(found))
    return Telemetry(
        runs=names(run for run, _ in found),
        steps=steps,
        is_even=all(len(own) == len(steps) for own in of_runs),
        layers=tuple(sorted({layer for layer, _, _ in values})),
        values=dict(sorted(values.items())),
        formats=formats,
        binades=binades,
        first_binade=found[0][1][-1].get("first_binade", 0),
    )


def _seen_last(
    records: Sequence[dict[str, Any]],
) -> tuple[dict[tuple[str, str], str | None], dict[tuple[str, str], tuple[int, np.ndarray]]]:
    """Formats and binades of a run, each of the last step at which the tensor was quantized, if it ever was."""
    formats: dict[tuple[str, str], str | None] = {}
    binades = {}
    for record in records:
        for layer, qtypes in record.get("formats", {}).items():
            for tensor, qtype in qtypes.items():
                formats[layer, tensor] = qtype or formats.get((layer, tensor))
                counts = record["dots"].get(layer, {}).get(tensor, {}).get(_NOT_NUMBERS)
                if qtype is not None and counts is not None:
                    binades[layer, tensor] = record["step"], np.array(counts, np.int64)
    return formats, binades


def _fill(
    values: dict[tuple[str, str, str], np.ndarray],
    records: Sequence[dict[str, Any]],
    steps: np.ndarray,
    place: int,
    runs: int,
) -> None:
    """Takes up what one run has; where a step has nothing, as after a fallback, NaN stays."""
    for at, record in zip(np.searchsorted(steps, [record["step"] for record in records]), records, strict=True):
        for layer, tensors in record["dots"].items():
            for tensor, statistics in tensors.items():
                for statistic, entries in statistics.items():
                    if statistic == _NOT_NUMBERS:
                        continue
                    key = layer, tensor, statistic
                    if key not in values:
                        values[key] = np.full((runs, len(steps), len(entries)), np.nan)
                    values[key][place, at] = entries


def draw(telemetry: Sequence[tuple[Arm, Telemetry]], venue: Venue) -> Iterator[Drawing | str]:
    """Yields the figures, and sentences on what is missing."""
    from experiments.plots import amax, binades, heat

    if not telemetry:
        yield (
            "No run has telemetry of tensors, which pretrain writes with --telemetry=tensors: heat maps, histories of "
            "amax and histograms are not drawn."
        )
        return
    yield from heat.draw(telemetry, venue)
    for arm, found in telemetry:
        yield amax.draw(arm, found, venue)
    for arm, found in telemetry:
        quantized = any(found.formats.values())
        if found.binades and quantized:
            yield binades.draw(arm, found, venue)
        elif quantized:
            yield f"{arm.name} has no histograms, which pretrain writes with --telemetry=tensors,binades."


def chosen(
    telemetry: Sequence[tuple[Arm, Telemetry]], wanted: Sequence[str]
) -> tuple[list[tuple[Arm, Telemetry]], list[str]]:
    """Those to draw, each of which takes figures of its own, and sentences on what is left out.

    Args:
      telemetry: of all arms.
      wanted: names of arms; of none, the first few, quantized ones before others.

    Raises:
      ArmError: an arm without telemetry is wanted.
    """
    if wanted:
        known = {arm.name for arm, _ in telemetry}
        for name in wanted:
            if name not in known:
                raise ArmError(f"--tensors_of={name} has no telemetry: choose of {', '.join(sorted(known))}.")
        return [pair for pair in telemetry if pair[0].name in wanted], []
    first = sorted(telemetry, key=lambda pair: not any(pair[1].formats.values()))[:_MOST_ARMS]
    names = [arm.name for arm, _ in first]
    left_out = [arm.name for arm, _ in telemetry if arm.name not in names]
    if not left_out:
        return list(telemetry), []
    why = f"Tensors are drawn of {_MOST_ARMS} arms: name others by --tensors_of, of {', '.join(left_out)}."
    return [pair for pair in telemetry if pair[0].name in names], [why]


def gather_arms(study: Study) -> list[tuple[Arm, Telemetry]]:
    """Arms that have telemetry, with it."""
    found = [(arm, gather(list(arm.runs.values()))) for arm in study.arms]
    return [(arm, telemetry) for arm, telemetry in found if telemetry is not None]


def shown(items: Sequence[Any], most: int) -> list[Any]:
    """All, or so many of them at equal distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def short(layer: str) -> str:
    """Without the name of the stack, which is that of most layers."""
    return layer.removeprefix("blocks/")


def short_format(qtype: str) -> str:
    """As recipes name it."""
    return re.sub(r"^float\d_", "", qtype)
