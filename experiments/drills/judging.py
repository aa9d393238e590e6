"""Whether a run that met faults is, bit for bit, the run that met none."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.drills.sessions import Session
from experiments.runs import Checkpoints, RunError, read_metrics
from experiments.runs.files import read_json

# What depends on how fast the machine was, of a line of metrics and of the summary.
_OF_LINES = ("tokens_per_second", "input_wait")
_TIMES = ("checkpoint_wait", "checkpoint_share", "step_ms", "compile_seconds", "mfu", "joules_per_token")
_OF_SUMMARY = (*_OF_LINES, *_TIMES, "peak_memory_bytes")


def losses(reference: Path, run: Path) -> list[str]:
    """What of an uninterrupted run is not in another: a sentence each, none where nothing is lost."""
    problems = []
    for compare in (_metrics, _summary, _checkpoint):
        try:
            problems += compare(reference, run)
        except RunError as error:
            problems.append(str(error))
    return problems


def answer(session: Session, code: int, *words: str) -> list[str]:
    """What is wrong with how a start ended: its exit code, or that it did not say these words in one line."""
    problems = []
    if session.code != code:
        last = session.lines[-1][1] if session.lines else "nothing"
        problems.append(f"it ended with exit code {session.code} where {code} was due, and said last: {last}")
    if words and not session.said(*words):
        problems.append(f"it did not say {' … '.join(words)!r}")
    if session.said("Traceback (most recent call last)"):
        problems.append("it ended in a traceback")
    return problems


def without(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _metrics(reference: Path, run: Path) -> list[str]:
    """The first difference of two curves."""
    for wanted, found in itertools.zip_longest(read_metrics(reference), read_metrics(run)):
        if wanted is None or found is None:
            return [f"step {(wanted or found)['step']} is {'missing' if found is None else 'one too many'}"]
        if without(wanted, _OF_LINES) != without(found, _OF_LINES):
            return [f"the line of step {wanted['step']} is {found} and was {wanted}"]
        if not found["tokens_per_second"] > 0:
            return [f"step {found['step']} took {found['tokens_per_second']} tokens per second"]
    return []


def _summary(reference: Path, run: Path) -> list[str]:
    wanted, found = (without(read_json(path / "summary.json"), _OF_SUMMARY) for path in (reference, run))
    return [] if wanted == found else [f"the summary is {found} and was {wanted}"]


def _checkpoint(reference: Path, run: Path) -> list[str]:
    """Differences of the last checkpoints, whose digests are verified on the way, and what should not lie there."""
    (step, wanted), (found_step, found) = map(last_state, (reference, run))
    if step != found_step:
        return [f"the last checkpoint is of step {found_step} and was of {step}"]
    different = [name for name in wanted.keys() | found.keys() if not _same(wanted.get(name), found.get(name))]
    problems = [f"{', '.join(sorted(different))} of checkpoint {step} differ"] if different else []
    left = sorted(path.name for path in (run / "checkpoints").glob("*.partial"))
    return problems + ([f"{', '.join(left)} was left behind"] if left else [])


def last_state(run: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, leaves) of the newest checkpoint.

    Raises:
      RunError: there is none, or it is damaged.
    """

    def leaves(step: int) -> dict[str, np.ndarray]:
        record = read_json(run / "checkpoints" / str(step) / "metadata.json")
        return {name: _empty(described) for name, described in record["leaves"].items()}

    warnings: list[str] = []
    with Checkpoints(run / "checkpoints", warn=warnings.append) as checkpoints:
        restored = checkpoints.latest_good(leaves)
    if restored is None or warnings:
        raise RunError("; ".join(warnings) or f"{run} has no checkpoint")
    return restored.step, restored.tree


def _empty(described: str) -> np.ndarray:
    """An array of a dtype and shape such as `float32[4,128]`."""
    match = re.fullmatch(r"(\w+)\[([\d,]*)\]", described)
    assert match, described
    return np.empty([int(size) for size in match[2].split(",") if size], np.dtype(match[1]))


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return False
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
