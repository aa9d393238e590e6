"""What is drawn: the runs of a study by arm, what the comparison says of them, and what is missing."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparing import ondisk, outcomes, results
from experiments.comparing.arms import BASELINE, CANDIDATE, CONTROL, NOISE
from experiments.loading import LoadError, RunRecord, distinct_names, find_files, find_runs, read_run
from experiments.runs.files import plain

STUDY, SENSITIVITY, BENCHMARK = "study.json", "whatif.json", "benchmark.json"
_METRIC = "eval_loss"
_MARGINS = {"parity": 0.25, "strict": 0.1}
# Of runs that no study.json describes.
_BASELINE, _CONTROLS = "bf16", ("fp8-unscaled", "int8-tensor")

# Gives the run of a directory.
_Read = Callable[[Path], RunRecord]

# Data and schedule: runs without a study.json that differ in one of these are not comparable.
_SAME = (
    *("data_sha256", "tokenizer", "vocab", "batch_size", "seq_len", "steps"),
    *("layers", "d_model", "heads", "kv_heads", "d_ff", "activation", "tied", "rope_theta"),
    *("lr", "warmup", "final_lr", "schedule", "decay", "b1", "b2", "weight_decay", "clip", "average"),
    *("eval_batches", "final_eval_batches"),
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What was run with several seeds.

    Attributes:
      name: unique.
      role: 'baseline', 'candidate', 'control' or 'noise'.
      baseline: name of the arm that it is compared with; its own of a baseline.
      runs: by seed, ascending, those that ended.
    """

    name: str
    role: str
    baseline: str
    runs: dict[int, RunRecord]

    @property
    def finished(self) -> dict[int, RunRecord]:
        return {seed: run for seed, run in self.runs.items() if run.summary is not None}

    @property
    def diverged(self) -> dict[int, RunRecord]:
        return {seed: run for seed, run in self.runs.items() if run.summary is None}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the run directories."""
        return names(self.runs.values())

    @property
    def label(self) -> str:
        """With how many of its runs did not diverge."""
        count, total = len(self.finished), len(self.runs)
        return f"{self.name} ({count} of {total} seeds)" if count < total else f"{self.name} ({counted(total, 'seed')})"


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs of a study.

    Attributes:
      source: what --runs named.
      arms: that have a run which ended.
      metric: entry of the summaries by which arms are compared.
      margins: percent, by name.
      comparison: by arm, as in comparison.json; empty without a baseline.
      noise: likewise; None where it was not measured.
      is_timed: whether it is known which runs had the machine to themselves.
      untimed: names of the runs that are known not to have had it, so that their speed means nothing.
      missing: sentences on what should be here and is not.
    """

    source: str
    arms: tuple[Arm, ...]
    metric: str
    margins: dict[str, float]
    comparison: dict[str, dict[str, Any]]
    noise: dict[str, Any] | None
    is_timed: bool
    untimed: frozenset[str]
    missing: tuple[str, ...]

    @property
    def runs(self) -> list[RunRecord]:
        return [run for arm in self.arms for run in arm.runs.values()]

    @property
    def title(self) -> str:
        """Precisions, and size of the model and of its training."""
        sizes = {(run.summary["params"], run.summary["tokens"]) for run in self.runs if run.summary is not None}
        described = "; ".join(f"{params:,} parameters, {tokens:,} tokens" for params, tokens in sorted(sizes))
        precisions = ", ".join(arm.name for arm in self.arms if arm.role in (BASELINE, CANDIDATE))
        return f"{precisions}: {described}" if described else precisions

    @property
    def others(self) -> dict[str, Path]:
        """Further files to draw under --runs, by where they lie there."""
        root = Path(self.source).expanduser()
        paths = [path for name in (SENSITIVITY, BENCHMARK) for path in find_files(self.source, name)]
        place = lambda path: path.relative_to(root) if root.is_dir() else Path(path.parent.name, path.name)
        return {place(path).as_posix(): path for path in paths}

    def pairs(self, arm: Arm) -> list[tuple[RunRecord, RunRecord]]:
        """Finished runs of an arm other than a baseline, each with its baseline's of the same seed."""
        others = {other.name: other.finished for other in self.arms}.get(arm.baseline, {})
        if arm.role == BASELINE:
            return []
        return [(run, others[seed]) for seed, run in arm.finished.items() if seed in others]

    def has_timing(self, arm: Arm) -> bool:
        """Whether the speed of its runs means something, as far as is known."""
        return self.untimed.isdisjoint(names((arm.finished or arm.runs).values()))


def names(runs: Iterable[RunRecord]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.name for run in runs))


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def load(source: str) -> Study:
    """Reads what --runs names.

    Args:
      source: the directory of a study, of some runs, or a glob.

    Raises:
      ValueError: a directory is missing or damaged, runs are not comparable, or none has ended.
    """
    folder = Path(source).expanduser()
    # The comparison reads the runs as well.
    read = functools.cache(read_run)
    if not (folder / STUDY).exists():
        return _found(source, source, read)
    plan = _plan(folder / STUDY)
    baselines = [arm["name"] for arm in plan["arms"] if arm["role"] == BASELINE]
    if any(_has_ended(read, folder, name, seed) for name in baselines for seed in plan["seeds"]):
        return _planned(source, folder, plan, read)
    # There is nothing to compare with yet, but curves can be drawn.
    found = _found(source, str(folder / "runs"), read)
    missing = (
        *results.missing(folder, read),
        f"No run of {plan['baseline']}, the baseline, has ended: nothing is compared with it.",
    )
    return dataclasses.replace(found, metric=plan["metric"], margins=plan["margins"], missing=missing)


def _plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_bytes())
        plan["seeds"], [(arm["name"], arm["role"]) for arm in plan["arms"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} is no plan of a study ({error!r}): restore it, or give its runs/ alone.") from error
    return plan


def _ended(run: RunRecord, metric: str) -> RunRecord:
    """A run; one whose final loss is not finite has diverged, as for the comparison."""
    if run.summary is None or math.isfinite(outcomes.final_loss(run, metric)):
        return run
    reason = f"the final {metric} is not finite"
    return dataclasses.replace(run, summary=None, diverged={"step": run.config["steps"], "reason": reason})


def _run_path(folder: Path, arm: str, seed: int) -> Path:
    return folder / "runs" / f"{arm}-seed{seed}"


def _has_ended(read: _Read, folder: Path, arm: str, seed: int) -> bool:
    path = _run_path(folder, arm, seed)
    return path.is_dir() and read(path).outcome in ("finished", "diverged")


def _planned(source: str, folder: Path, plan: Mapping[str, Any], read: _Read) -> Study:
    """A study as its plan says, of the runs that the comparison judges."""
    found, has_time = results.evaluate(folder, read), results.timing(folder)
    if os.access(folder, os.W_OK):  # who has no more than a copy cannot go on with the study either
        results.note(folder, found)
    comparison = found["precisions"]
    arms = []
    for arm in plan["arms"]:
        name, role = arm["name"], arm["role"]
        seeds = map(int, comparison[name]["runs"])
        runs = {seed: _ended(read(_run_path(folder, name, seed)), found["metric"]) for seed in seeds}
        if runs:
            baseline = name if role == BASELINE else arm.get("baseline", plan["baseline"])
            arms.append(Arm(name, role, baseline, dict(sorted(runs.items()))))
    return Study(
        source=source,
        arms=tuple(arms),
        metric=found["metric"],
        margins=found["margins"],
        comparison=comparison,
        noise=found["noise"],
        is_timed=True,
        untimed=_untimed(arms, has_time),
        missing=tuple(found["missing"]),
    )


def _found(source: str, folder: str, read: _Read) -> Study:
    """Runs that no plan describes: an arm for each precision, and BF16 the baseline."""
    paths = find_runs(folder)
    ended = (_ended(read(path), _METRIC) for path in paths)
    records = [dataclasses.replace(run, name=name) for run, name in zip(ended, distinct_names(paths), strict=True)]
    # A study's runs may be given without their study.
    above = next((p for p in (Path(folder), Path(folder).parent) if (p / ondisk.ATTEMPTS).exists()), None)
    has_time = (lambda run: True) if above is None else results.timing(above)
    missing = [sentence for run in records if (sentence := _why_left_out(run))]
    grouped: dict[tuple[str, float], list[RunRecord]] = {}
    for run in records:
        if run.outcome in ("finished", "diverged"):
            grouped.setdefault((run.precision, run.config.get("init_perturbation", 0.0)), []).append(run)
    if not grouped:
        raise LoadError(f"no run under {folder} has ended: {' '.join(missing)}")
    _check_comparable([run for runs in grouped.values() for run in runs])
    first = (_BASELINE, 0.0)
    arms = []
    for precision, perturbation in sorted(grouped, key=lambda key: (key != first, key)):
        runs = _by_seed(grouped[precision, perturbation])
        role = CONTROL if precision in _CONTROLS else NOISE if perturbation else CANDIDATE
        role = BASELINE if (precision, perturbation) == first else role
        arms.append(Arm(f"{precision}-perturbed" if perturbation else precision, role, _BASELINE, runs))
    comparison = {}
    if first in grouped:
        of = {arm.name: outcomes.ArmRuns(arm.name, arm.role, arm.baseline, arm.runs) for arm in arms}
        entries = (outcomes.outcome_of(arm, of[_BASELINE], _METRIC, _MARGINS, has_time) for arm in of.values())
        comparison = plain(dict(zip(of, entries, strict=True)))
    else:
        missing.append(f"No run of {_BASELINE}, the baseline, has ended: nothing is compared with it.")
    return Study(
        source=source,
        arms=tuple(arms),
        metric=_METRIC,
        margins=_MARGINS,
        comparison=comparison,
        noise=None,
        is_timed=above is not None,
        untimed=_untimed(arms, has_time),
        missing=tuple(missing),
    )


def _untimed(arms: Iterable[Arm], has_time: Callable[[RunRecord], bool]) -> frozenset[str]:
    return frozenset(run.name for arm in arms for run in arm.runs.values() if not has_time(run))


def _why_left_out(run: RunRecord) -> str | None:
    after = f"after step {run.metrics['step'][-1:].sum()} of {run.config['steps']}"
    if run.outcome == "running":
        return f"{run.name} is still running, {after}: it is left out."
    if run.outcome == "unfinished":
        return f"{run.name} was stopped {after}: it is left out until the command that began it has ended."
    return None


def _by_seed(runs: Sequence[RunRecord]) -> dict[int, RunRecord]:
    found: dict[int, RunRecord] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        for flag in ("recipes", "quantize"):
            first = next(iter(found.values()), run)
            if first.config.get(flag) != run.config.get(flag):
                raise LoadError(
                    f"{first.path} and {run.path} are both of --precision={run.precision}, but with other {flag}: "
                    "leave one of them out."
                )
        if run.seed in found:
            raise LoadError(
                f"{found[run.seed].path} and {run.path} are both of --precision={run.precision} --seed={run.seed}: "
                "leave one of them out."
            )
        found[run.seed] = run
    return found


def _check_comparable(runs: Sequence[RunRecord]) -> None:
    first: dict[tuple[int, Any], RunRecord] = {}
    for run in runs:
        results.check_began_alike(run, first.setdefault((run.seed, run.config.get("init_perturbation")), run))
    for run in runs[1:]:
        for flag in _SAME:
            old, new = (_setting(one.config.get(flag)) for one in (runs[0], run))
            if old != new:
                name = flag.removesuffix("_sha256")
                raise LoadError(
                    f"{runs[0].path} and {run.path} are not comparable, --{name} is {old} in one "
                    f"and {new} in the other: give runs of the same data and schedule."
                )


def _setting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {str(digest)[:12]}" for name, digest in sorted(value.items()))
    return value


def common_steps(runs: Sequence[RunRecord], metric: str) -> np.ndarray:
    """Steps at which all runs have a value, int64 [S]; none of no runs."""
    shared = None
    for run in runs:
        steps = run.metrics["step"][np.isfinite(run.metrics.get(metric, np.full(len(run.metrics["step"]), np.nan)))]
        shared = steps if shared is None else np.intersect1d(shared, steps, assume_unique=True)
    return np.zeros(0, np.int64) if shared is None else shared


def values_at(runs: Sequence[RunRecord], metric: str, steps: np.ndarray) -> np.ndarray:
    """Of a metric, float64 [runs, S]."""
    return np.stack([run.metrics[metric][np.searchsorted(run.metrics["step"], steps)] for run in runs])
