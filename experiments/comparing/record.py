"""`record.jsonl`: every result of every arm that was ever looked at.

Whoever sees a result and then changes the recipe has chosen the recipe by those seeds, on which it is then bound to
look better than it is. So a changed recipe is judged on seeds that no other recipe of the same name was judged on, and
an arm that is a preset with overrides on seeds that it was judged on with none before, or with others. Any other arm
that is added after a look is marked as such.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparing import ondisk
from experiments.runs.environment import revision_text

RECORD = "record.jsonl"
_RESULT = ("recipe", "seeds", "planned", "delta_percent", "upper95", "verdict")
# Versions of SciPy differ in the last digits of numbers.
_LOOK = ("recipe", "seeds", "planned", "verdict")


class StudyError(ValueError):
    """A study cannot be evaluated; its text is one sentence that names the file or the flag, and the fix."""


def recipe(config: Mapping[str, Any]) -> str:
    """The precision of a run in full, one text for a policy or a schedule of some."""
    recipes = config["recipes"]
    return ",".join(f"{r['start']}:{r['policy']}" if len(recipes) > 1 else r["policy"] for r in recipes)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, none if there is no file; half a last line is left out.

    Raises:
      StudyError: it cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): restore it.") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(json.loads(line))
        except ValueError:
            records.append(None)
        if not isinstance(records[-1], dict):
            raise StudyError(f"line {number} of {path} is damaged: restore it.")
    return records


def judged_otherwise(records: Sequence[Mapping[str, Any]], arm: str, policy: str) -> set[int]:
    """The seeds on which an arm was evaluated with another recipe than this one."""
    others = [r for r in records if r.get("arm") == arm and r.get("recipe") != policy]
    return {seed for record in others for seed in record.get("seeds") or ()}


def judged(study: Path, arm: str) -> set[int]:
    """The seeds on which an arm was evaluated, with whatever recipe.

    Raises:
      StudyError: the record cannot be read.
    """
    return {seed for r in read_lines(study / RECORD) if r.get("arm") == arm for seed in r.get("seeds") or ()}


def was_extended(records: Sequence[Mapping[str, Any]], arm: str, policy: str, planned: int) -> bool:
    """Whether an arm with this recipe was looked at when it was to be run with fewer seeds."""
    looks = [r for r in records if r.get("arm") == arm and r.get("recipe") == policy and r.get("planned") is not None]
    return any(look["planned"] < planned for look in looks if look["seeds"])


def refused(study: Path, arm: str, policy: str, seeds: Collection[int], variants: Collection[str] = ()) -> str | None:
    """Why an arm must not be run with a recipe on these seeds; None if it may.

    Args:
      study: its directory, which need not be there.
      arm: its name.
      policy: the recipe in full.
      seeds: that it would be run with.
      variants: names of arms that were planned before it and are of the same preset with other overrides.

    Raises:
      StudyError: the record cannot be read.
    """
    path = study / RECORD
    records = read_lines(path)
    for name in (arm, *variants):
        seen = judged_otherwise(records, name, policy)
        again = sorted(seen & set(seeds))
        if again:
            fresh = max(seen) + 1
            whose = arm if name == arm else f"{arm} is a change of {name}, which"
            return (
                f"{whose} was judged with another recipe on seed{'s' * (len(again) > 1)} {', '.join(map(str, again))}, "
                f"as {path} tells: give fresh ones, as in --seeds={fresh}:{fresh + len(seeds)}."
            )
    return None


def add(study: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Records what was evaluated, but for what is the last of its arm already.

    Args:
      study: its directory.
      entries: by arm, its recipe, the seeds it was judged on, with how many it is to be run, and the result.

    Raises:
      StudyError: the record cannot be read.
      RunError: the disk refuses a line.
    """
    last = {record.get("arm"): record for record in read_lines(study / RECORD)}
    revision = revision_text(Path(__file__).resolve())
    for arm, entry in entries.items():
        if any(last.get(arm, {}).get(name) != entry[name] for name in _LOOK):
            time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            found = {name: entry[name] for name in _RESULT}
            ondisk.append(study / RECORD, {"time": time, "arm": arm, **found, "revision": revision})
