"""What a study has found: comparison.json, from nothing but what stands in its directory."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparing import ondisk, record
from experiments.comparing.arms import BASELINE, CANDIDATE, NOISE, preset
from experiments.comparing.record import StudyError, refused
from experiments.comparing.tables import table
from experiments.loading import RunRecord, read_run
from experiments.options import MAY_CHANGE
from experiments.runs.config import CONFIG, config_differences
from experiments.runs.files import plain, write_json

__all__ = ["StudyError", "check_began_alike", "evaluate", "missing", "note", "refused", "table", "timing", "write"]

COMPARISON = "comparison.json"
# Of the processors' time, taken by others.
_MOST_OTHERS = 0.05
_SAME_ARM_MAY_DIFFER = (*MAY_CHANGE, "seed", "workdir", "recipes")
# A run says what they came to, and the study what was given.
_RESOLVED = ("mesh", "tokenizer")
_FLAGS_OF = {"data_sha256": "data", "vocab": "tokenizer", "recipes": "precision"}


def evaluate(study: Path, read: Callable[[Path], RunRecord] = read_run) -> dict[str, Any]:
    """What comparison.json holds; a partial study is evaluated for what is there.

    Args:
      study: its directory.
      read: gives the run of a directory, to callers who need it again.

    Raises:
      StudyError: it is no study, its runs cannot be compared, or no baseline has ended.
      LoadError: a run directory is damaged.
    """
    # SciPy takes a second to import, which programs need not spend that only ask what they may run.
    from experiments.comparing import outcomes

    plan = _plan(study)
    attempts = _attempts(study)
    records = record.read_lines(study / record.RECORD)
    missing: list[str] = []
    planned = {arm["name"]: arm.get("seeds", plan["seeds"]) for arm in plan["arms"]}
    here = {name: _read(study, name, seeds, attempts, missing, read) for name, seeds in planned.items()}
    _check_comparable(plan, here)
    _check_beginnings(plan, here)
    # Several of one preset are a sweep, however they came into the study.
    variants = collections.Counter(filter(None, map(_preset, plan["arms"])))
    arms = {}
    for arm in plan["arms"]:
        name = arm["name"]
        ended = {seed: run for seed, run in here[name].items() if run.outcome in ("finished", "diverged")}
        judged, superseded = _judged(name, ended, records, missing)
        of = name if arm["role"] == BASELINE else arm.get("baseline", plan["baseline"])
        wanted = len(planned[name]) - len(superseded)
        policy = record.recipe(next(iter(judged.values())).config) if judged else ""
        extended = record.was_extended(records, name, policy, wanted)
        swept = bool(arm.get("swept")) or variants[_preset(arm) or ""] > 1
        arms[name] = outcomes.ArmRuns(
            name, arm["role"], of, judged, superseded, wanted, extended, swept=swept, late=bool(arm.get("late"))
        )
    if not any(arm.runs for arm in arms.values() if arm.role == BASELINE):
        raise StudyError(f"no run of {plan['baseline']}, the baseline of {study}, has ended: run it first.")
    is_timed = timing(study)
    entries = {
        name: outcomes.outcome_of(arm, arms[arm.baseline], plan["metric"], plan["margins"], is_timed)
        for name, arm in arms.items()
    }
    outcomes.adjust(list(entries.values()))
    perturbed = {n: entries[n] for n, arm in arms.items() if arm.role == NOISE and arm.baseline == plan["baseline"]}
    found = {
        **{name: plan[name] for name in ("baseline", "metric", "margins")},
        "noise": outcomes.noise(entries[plan["baseline"]], perturbed),
        "precisions": entries,
        "missing": missing,
    }
    return plain(found, COMPARISON)


def timing(study: Path) -> Callable[[RunRecord], bool]:
    """Whether a run of a study is known to have had the machine to itself.

    Raises:
      StudyError: the record of the study's attempts cannot be read.
    """
    attempts = _attempts(study)

    def is_timed(run: RunRecord) -> bool:
        # Of a run that was started by other means, nobody knows what ran beside it.
        known = attempts.get(run.path.name, [])
        is_quiet = lambda others: isinstance(others, int | float) and others <= _MOST_OTHERS
        is_alone = all(a.get("jobs") == 1 and is_quiet(a.get("others")) for a in known)
        return bool(known) and is_alone and len(run.sessions) == 1

    return is_timed


def missing(study: Path, read: Callable[[Path], RunRecord] = read_run) -> list[str]:
    """Sentences on what is planned and has not ended; the arguments are those of `evaluate`.

    Raises:
      StudyError, LoadError: as `evaluate`.
    """
    plan = _plan(study)
    found: list[str] = []
    for arm in plan["arms"]:
        _read(study, arm["name"], arm.get("seeds", plan["seeds"]), _attempts(study), found, read)
    return found


def write(study: Path) -> dict[str, Any]:
    """Evaluates a study, and writes comparison.json and, of what was not seen before, record.jsonl.

    Raises:
      StudyError, LoadError: as `evaluate`.
      RunError: the disk refuses it.
    """
    found = evaluate(study)
    # First the record: nothing is shown that is not in it.
    note(study, found)
    with ondisk.writing(study / COMPARISON):
        write_json(study / COMPARISON, found, sort_keys=False)
    return found


def note(study: Path, found: Mapping[str, Any]) -> None:
    """Writes down in record.jsonl what `evaluate` found and is going to be seen, but for what stands there.

    Raises:
      StudyError, RunError: it cannot be read, or written.
    """
    seen = {n: entry for n, entry in found["precisions"].items() if entry["role"] != BASELINE and entry["judged"]}
    record.add(study, {name: {**entry, "seeds": entry["judged"]} for name, entry in seen.items()})


def _plan(study: Path) -> dict[str, Any]:
    path = study / "study.json"
    if not path.exists():
        raise StudyError(f"{study} holds no study.json: give the --out of a study.")
    try:
        plan = json.loads(path.read_bytes())
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): restore it.") from error
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}): restore it.") from error
    try:
        roles = {arm["name"]: arm["role"] for arm in plan["arms"]}
        of = {plan["baseline"], *(arm.get("baseline", plan["baseline"]) for arm in plan["arms"])}
        is_plan = (
            plan["format"] == 1
            and {"metric", "seeds"} <= plan.keys()
            and {"parity", "strict"} == plan["margins"].keys()
            and all(isinstance(margin, int | float) for margin in plan["margins"].values())
            and all(isinstance(seed, int) for seeds in _all_seeds(plan) for seed in seeds)
            and all(isinstance(arm["flags"], dict) for arm in plan["arms"])
            and all(roles.get(name) == BASELINE for name in of)
        )
    except (AttributeError, KeyError, TypeError):
        is_plan = False
    if not is_plan:
        raise StudyError(f"{path} is no study as this version writes it: restore it, or give another --out.")
    return plan


def _preset(arm: Mapping[str, Any]) -> str | None:
    """Of a candidate, as `Arm.preset`."""
    return preset(arm["flags"]) if arm["role"] == CANDIDATE else None


def _all_seeds(plan: Mapping[str, Any]) -> list[list[int]]:
    return [plan["seeds"], *(arm["seeds"] for arm in plan["arms"] if "seeds" in arm)]


def _attempts(study: Path) -> dict[str, list[dict[str, Any]]]:
    """By name of the run, in order."""
    found = collections.defaultdict(list)
    for attempt in record.read_lines(study / ondisk.ATTEMPTS):
        found[attempt.get("run", "")].append(attempt)
    return found


def _read(
    study: Path,
    arm: str,
    seeds: Sequence[int],
    attempts: Mapping[str, Sequence[Mapping[str, Any]]],
    missing: list[str],
    read: Callable[[Path], RunRecord],
) -> dict[int, RunRecord]:
    """The runs of an arm that are there, by seed; what has not ended is added to `missing`."""
    here, absent = {}, []
    for seed in sorted(seeds):
        name = f"{arm}-seed{seed}"
        path = study / "runs" / name
        failed = [a for a in attempts.get(name, ())[-1:] if a.get("outcome") == "failed"]
        why = f"failed ({str(failed[0].get('reason')).rstrip('.')})" if failed else ""
        if not (path / CONFIG).exists():
            if failed:
                missing.append(f"{name} {why}.")
            else:
                absent.append(seed)
            continue
        run = here[seed] = read(path)
        if run.outcome in ("running", "unfinished"):
            state = "is still running" if run.outcome == "running" else why or "was stopped"
            missing.append(f"{name} {state}, after step {run.metrics['step'][-1:].sum()} of {run.config['steps']}.")
    if absent:
        missing.append(f"{arm} has not been run with seed{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}.")
    return here


def _judged(
    arm: str, runs: dict[int, RunRecord], records: Sequence[Mapping[str, Any]], missing: list[str]
) -> tuple[dict[int, RunRecord], tuple[str, ...]]:
    """The runs with the newest recipe on fresh seeds, and the names of the others, of which `missing` is told."""
    if not runs:
        return {}, ()
    newest = max(runs.values(), key=_age)
    policy = record.recipe(newest.config)
    earlier = {seed for seed, run in runs.items() if record.recipe(run.config) != policy}
    stale = (record.judged_otherwise(records, arm, policy) & runs.keys()) - earlier
    for seeds, why in (
        (earlier, f"with an earlier recipe than {newest.name}"),
        (stale, "on seeds on which another recipe of that name was judged before"),
    ):
        if seeds:
            listed = ", ".join(runs[seed].name for seed in sorted(seeds))
            missing.append(f"{listed} {'were' if len(seeds) > 1 else 'was'} run {why}, and not judged.")
    left_out = earlier | stale
    judged = {seed: run for seed, run in runs.items() if seed not in left_out}
    return judged, tuple(runs[seed].name for seed in sorted(left_out))


def _age(run: RunRecord) -> tuple[str, int]:
    return (run.sessions[0].get("start_time", "") if run.sessions else ""), run.seed


def _check_comparable(plan: Mapping[str, Any], here: Mapping[str, Mapping[int, RunRecord]]) -> None:
    """Raises StudyError if runs differ in more than they are meant to.

    The runs of an arm differ in their seed, and their recipe may have been changed; an arm and its baseline differ in
    the flags by which the study tells them apart as well; baselines, of which a sweep has several, at least not in
    their data.
    """
    for arm in plan["arms"]:
        for seed, run in here[arm["name"]].items():
            planned = {**arm["flags"], "seed": seed}
            found = config_differences({name: run.config.get(name) for name in planned}, planned, _RESOLVED)
            for name, (then, now) in found.items():
                raise StudyError(f"{run.path} was run with --{name}={then} (in study.json {now}): run it again.")
    flags = {arm["name"]: arm["flags"] for arm in plan["arms"]}
    first = {name: next(iter(runs.values())) for name, runs in here.items() if runs}
    pairs = [(one, run, _SAME_ARM_MAY_DIFFER) for name, one in first.items() for run in here[name].values()]
    for arm in plan["arms"]:
        name, of = arm["name"], arm.get("baseline", plan["baseline"])
        if name in first and of in first:
            apart = {f for f in flags[name].keys() | flags[of].keys() if flags[name].get(f) != flags[of].get(f)}
            pairs.append((first[of], first[name], (*_SAME_ARM_MAY_DIFFER, "precision_schedule", "precision", *apart)))
    for one, other, may_differ in pairs:
        _refuse(one, other, config_differences(one.config, other.config, may_differ))
    baselines = [arm["name"] for arm in plan["arms"] if arm["role"] == BASELINE and arm["name"] in first]
    if not {"data", "tokenizer"} & {flag for arm in plan["arms"] for flag in arm["flags"]}:
        for one, other in itertools.pairwise(first[name] for name in baselines):
            digests = ({"data_sha256": run.config.get("data_sha256")} for run in (one, other))
            _refuse(one, other, config_differences(*digests))


def _check_beginnings(plan: Mapping[str, Any], here: Mapping[str, Mapping[int, RunRecord]]) -> None:
    """Raises StudyError if two runs of a pair began with different parameters, as those of two versions may.

    Runs of before this was written down say nothing, and are not compared with others that do.
    """
    for arm in plan["arms"]:
        others = here[arm.get("baseline", plan["baseline"])]
        for seed in here[arm["name"]].keys() & others.keys():
            check_began_alike(here[arm["name"]][seed], others[seed])


def check_began_alike(one: RunRecord, other: RunRecord) -> None:
    """Raises StudyError if two runs of one seed began with different parameters, neither being perturbed alone."""
    began, before = one.initialisation, other.initialisation
    if one.config.get("init_perturbation") == other.config.get("init_perturbation") and began != before:
        raise StudyError(
            f"{one.path} began with other parameters ({began or 'not said'}) than {other.path} "
            f"({before or 'not said'}), as one version of the model may do and another not: run one of them again."
        )


def _refuse(one: RunRecord, other: RunRecord, differences: Mapping[str, tuple[str, str]]) -> None:
    for name, (then, now) in differences.items():
        flag = _FLAGS_OF.get(name.split(".")[0], name)
        what = f"--{flag}" if flag == name else f"--{flag} ({name})"
        raise StudyError(
            f"{one.path} and {other.path} cannot be compared, {what} is {then} in one and {now} in the other: run one "
            "of them again with the flags of the study."
        )
