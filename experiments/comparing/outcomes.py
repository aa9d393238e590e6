"""The numbers of one arm of a study, from its runs and its baseline's."""

from __future__ import annotations

import dataclasses
import math
import statistics as means
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.comparing import curves, statistics
from experiments.comparing.arms import BASELINE, CANDIDATE, CONTROL
from experiments.comparing.record import StudyError, recipe
from experiments.loading import RunRecord

_COMPARED = [field.name for field in dataclasses.fields(statistics.Comparison)]


@dataclasses.dataclass(frozen=True)
class ArmRuns:
    """An arm and its runs.

    Attributes:
      name: of the arm.
      role: 'baseline', 'candidate', 'control' or 'noise'.
      baseline: name of the arm that it is compared with; its own of a baseline.
      runs: by seed, ascending, those that have ended and are judged.
      superseded: names of those that have ended and are not.
      planned: with how many seeds it is to be run.
      extended: whether that was raised after a result was seen.
      swept, late: as of an `Arm`.
    """

    name: str
    role: str
    baseline: str
    runs: dict[int, RunRecord]
    superseded: tuple[str, ...] = ()
    planned: int = 0
    extended: bool = False
    swept: bool = False
    late: bool = False


def final_loss(run: RunRecord, metric: str) -> float:
    """What is compared, of a run that has ended; infinite if it diverged.

    Raises:
      StudyError: its summary has no such entry.
    """
    if run.summary is None:
        return math.inf
    if metric not in run.summary:
        raise StudyError(f"{run.path / 'summary.json'} has no {metric}: give another --metric.")
    loss = run.summary[metric]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def outcome_of(
    arm: ArmRuns, baseline: ArmRuns, metric: str, margins: Mapping[str, float], is_timed: Callable[[RunRecord], bool]
) -> dict[str, Any]:
    """What comparison.json holds of an arm.

    A run is timed where nothing else had the machine. What is told of several seeds is the median, in which a run that
    never came down to within the wider margin of its baseline's final loss took infinitely long; spikes are summed up.

    Args:
      arm: the arm.
      baseline: what it is compared with; a baseline with itself, which compares nothing but shows when each run first
        had its own final loss.
      metric: entry of summary.json.
      margins: percent, by name.
      is_timed: whether the speed of a run means something.

    Raises:
      StudyError: a summary without the metric.
    """
    losses = {seed: final_loss(run, metric) for seed, run in arm.runs.items()}
    others = {seed: final_loss(run, metric) for seed, run in baseline.runs.items()}
    runs = {
        seed: _of_run(run, losses[seed], baseline.runs.get(seed), others.get(seed, math.nan), margins, is_timed(run))
        for seed, run in arm.runs.items()
    }
    # A run that diverged counts before its baseline has ended, too.
    judged = [seed for seed, loss in losses.items() if seed in others or math.isinf(loss)]
    finished = [run for run in runs.values() if run["outcome"] == "finished"]
    compared_seeds = [seed for seed in runs if math.isfinite(others.get(seed, math.nan))]
    paired = [runs[seed] for seed in compared_seeds]
    if arm.role == BASELINE:
        compared: dict[str, Any] = dict.fromkeys(_COMPARED)
        compared |= {"seeds": len(finished), "diverged": len(runs) - len(finished)}
    else:
        candidate = np.array([losses[seed] for seed in judged])
        reference = np.array([others.get(seed, math.nan) for seed in judged])
        compared = dataclasses.asdict(statistics.compare(candidate, reference, margins))
    return {
        "role": arm.role,
        "baseline": None if arm.role == BASELINE else arm.baseline,
        "recipe": recipe(next(iter(arm.runs.values())).config) if arm.runs else None,
        "loss": _mean([runs[seed]["loss"] for seed in (judged if arm.role == BASELINE else compared_seeds)]),
        **compared,
        "planned": arm.planned,
        "extended": arm.extended,
        "swept": arm.swept,
        "late": arm.late,
        **({"fails": compared["verdict"] == statistics.WORSE} if arm.role == CONTROL else {}),
        "tokens_to_baseline": _median([run["tokens_to_baseline"] for run in paired]),
        "seconds_to_baseline": _median([run["seconds_to_baseline"] for run in paired if run["timing_valid"]]),
        "reached_baseline": sum(run["tokens_to_baseline"] is not None for run in paired),
        "paired": len(paired),
        "spikes": sum(run["spikes"] for run in runs.values()),
        "tokens_per_second": _median([run["tokens_per_second"] for run in finished]),
        "timing_valid": bool(finished) and all(run["timing_valid"] for run in finished),
        "peak_memory_bytes": _median([run["peak_memory_bytes"] for run in finished]),
        "eval_gap_bf16": _mean([run["eval_gap_bf16"] for run in finished]),
        "judged": judged,
        "superseded": list(arm.superseded),
        "runs": runs,
    }


def adjust(entries: Sequence[dict[str, Any]]) -> None:
    """Adds to the p-values of non-inferiority what they are for being one of several candidates, by Holm's method.

    A candidate that is a point of a sweep is at parity only if it is by that: the best of many is easily found.
    """
    for entry in entries:
        for test in (entry["noninferiority"] or {}).values():
            test["p_holm"] = None
    tests = [entry["noninferiority"] for entry in entries if entry["role"] == CANDIDATE]
    for margin in tests[0] if tests else ():
        # Too few seeds for a p-value show nothing.
        adjusted = statistics.holm([1.0 if test[margin]["p"] is None else test[margin]["p"] for test in tests])
        for test, p in zip(tests, adjusted, strict=True):
            test[margin]["p_holm"] = p
    for entry in entries:
        if entry["swept"] and entry["verdict"] in (statistics.STRICT, statistics.PARITY):
            _judge_as_one_of(len(tests), entry)


def _judge_as_one_of(several: int, entry: dict[str, Any]) -> None:
    shown = {name for name, test in entry["noninferiority"].items() if test["p_holm"] < statistics.LEVEL}
    if {"strict", "parity"} <= shown:
        return
    needed = {
        name: statistics.seeds_needed(
            entry["delta_percent"],
            statistics.sd_to_plan_with(entry["sd_percent"], entry["seeds"]),
            test["margin"],
            statistics.LEVEL / several,
        )
        for name, test in entry["noninferiority"].items()
    }
    if "parity" in shown:
        is_promising = entry["delta_percent"] < entry["noninferiority"]["strict"]["margin"]
        entry |= {"verdict": statistics.PARITY, "seeds_needed_strict": needed["strict"] if is_promising else None}
    else:
        entry |= {"verdict": statistics.OPEN, "seeds_needed": needed["parity"], "seeds_needed_strict": None}


def noise(baseline: Mapping[str, Any], perturbed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What chance alone does to the baseline.

    Args:
      baseline: its entry.
      perturbed: by name of the arm, those of the same with its initialisation perturbed.

    Returns:
      "paired": mean and standard deviation, with 95 % intervals, of the differences of the perturbed runs to those of
      the same seed; "unpaired": the standard deviation of the losses from seed to seed; "gain": how many times as many
      seeds it would take to see the same difference without pairing. None where there are too few runs.
    """
    floors = {"paired": _paired_floor(perturbed), "unpaired": _floor(_finite(baseline, "loss"), baseline["loss"])}
    paired, unpaired = floors["paired"], floors["unpaired"]
    gain = None
    if paired and unpaired and paired["sd_nats"]:
        # The variance of a difference of two runs that share nothing is twice that of one.
        gain = 2 * (unpaired["sd_nats"] / paired["sd_nats"]) ** 2
    return {**floors, "gain": gain}


def _paired_floor(perturbed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    for name, entry in perturbed.items():
        nats, percent = _finite(entry, "delta_nats"), _finite(entry, "delta_percent")
        if len(nats) > 1:
            sd = float(statistics.mean_and_sd(np.array(percent))[1])
            return {
                "arm": name,
                **{key: entry[key] for key in ("delta_nats", "delta_percent", "ci95")},
                **_spread(nats),
                "sd_percent": sd,
                "sd_percent_ci95": statistics.sd_interval(sd, len(percent), 0.95),
            }
    return None


def _floor(losses: list[float], mean: float) -> dict[str, Any] | None:
    if len(losses) < 2:
        return None
    spread = _spread(losses)
    low, high = spread["sd_nats_ci95"]
    percent = {"sd_percent": 100 * spread["sd_nats"] / mean, "sd_percent_ci95": (100 * low / mean, 100 * high / mean)}
    return {**spread, **percent}


def _spread(values: list[float]) -> dict[str, Any]:
    sd = float(statistics.mean_and_sd(np.array(values))[1])
    interval = statistics.sd_interval(sd, len(values), 0.95)
    return {"seeds": len(values), "sd_nats": sd, "sd_nats_ci95": interval}


def _finite(entry: Mapping[str, Any], name: str) -> list[float]:
    return [run[name] for run in entry["runs"].values() if run[name] is not None]


def _of_run(
    run: RunRecord,
    loss: float,
    other: RunRecord | None,
    reference: float,
    margins: Mapping[str, float],
    is_timed: bool,
) -> dict[str, Any]:
    summary = (run.summary or {}) if math.isfinite(loss) else {}
    delta = loss - reference if math.isfinite(loss) and math.isfinite(reference) else None
    tokens = _tokens_to_reach(run, other, margins["parity"]) if delta is not None and other is not None else None
    speed = summary.get("tokens_per_second")
    diverged_at = None
    if not summary:
        diverged_at = run.diverged["step"] if run.diverged else run.config["steps"]
    return {
        "run": run.name,
        "outcome": "finished" if summary else "diverged",
        "diverged_at": diverged_at,
        "baseline_run": None if other is None else other.name,
        "loss": loss if summary else None,
        "delta_nats": delta,
        "delta_percent": None if delta is None else 100 * delta / reference,
        "tokens_to_baseline": tokens,
        "seconds_to_baseline": tokens / speed if tokens is not None and speed and is_timed else None,
        "spikes": curves.spikes(run.metrics.get("loss", np.zeros(0))),
        "tokens_per_second": speed,
        "timing_valid": is_timed,
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "eval_gap_bf16": summary.get("eval_gap_bf16"),
    }


def _tokens_to_reach(run: RunRecord, other: RunRecord, margin: float) -> float | None:
    """Tokens to come down to the last held-out loss on the curve of another run and so many percent more.

    With nothing added, a run at parity would get there by its last step or not at all, as chance will have it.
    """
    if "eval_loss" not in run.metrics or "eval_loss" not in other.metrics:
        return None
    curve = other.metrics["eval_loss"]
    known = curve[np.isfinite(curve)]
    if not len(known):
        return None
    return curves.tokens_to_reach(run.tokens, run.metrics["eval_loss"], known[-1] * (1 + margin / 100))


def _median(values: list[float | None]) -> float | None:
    """None counts as infinite, and stands for it in the result."""
    median = means.median(math.inf if value is None else value for value in values) if values else math.inf
    return median if math.isfinite(median) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return means.fmean(known) if known else None
