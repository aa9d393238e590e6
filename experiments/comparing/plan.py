"""A study: which arms run with which seeds and flags, and `study.json`, where that is written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import options
from experiments.comparing import ondisk, record
from experiments.comparing.arms import CANDIDATE, Arm, argument
from experiments.runs.config import CONFIG, config_differences, load_config
from experiments.runs.errors import RunError
from experiments.runs.files import TEMPORARY_SUFFIX, read_json, write_json
from experiments.runs.lease import LOCK

STUDY = "study.json"
RUNS = "runs"
FORMAT = 1
# Percent of the baseline's loss: what counts as no loss of quality, and as none to speak of.
MARGINS = {"parity": 0.25, "strict": 0.1}


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
      name: of its directory.
      arm: the name of its arm.
      seed: its seed.
      path: its directory.
      arguments: of pretrain.
      config: every flag and recipe, as config.json is to hold them, but for what data and devices resolve.
    """

    name: str
    arm: str
    seed: int
    path: Path
    arguments: tuple[str, ...]
    config: dict[str, Any]

    @property
    def steps(self) -> int:
        return self.config["steps"]

    def differences(self) -> dict[str, tuple[str, str]]:
        """What its directory, where there is one, was run with otherwise: name to (there, here) as text.

        Raises:
          RunError: its config.json is damaged.
        """
        if not (self.path / CONFIG).exists():
            return {}
        stored = load_config(self.path / CONFIG)
        # A flag that is newer than the run leaves it as it was; pretrain itself refuses one that does not.
        known = {name: setting for name, setting in self.config.items() if name in stored}
        return config_differences(
            {name: stored[name] for name in known}, known, (*options.MAY_CHANGE, "mesh", "tokenizer")
        )


@dataclasses.dataclass(frozen=True)
class Study:
    """What study.json holds.

    Attributes:
      baseline: name of the arm that an arm without a baseline of its own is compared with.
      metric: the entry of summary.json that is compared.
      seeds: of every arm that has none of its own.
      arms: in the order of the table.
      flags: of pretrain, for all arms.
    """

    baseline: str
    metric: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    flags: dict[str, Any]

    def runs(self, out: Path) -> list[PlannedRun]:
        """Its runs, seed by seed, so that a part of them is balanced too; checked as pretrain checks its flags.

        Raises:
          ValueError: one sentence that names the flag and the fix.
        """
        configs = {arm.name: self._config(arm, max(self.seeds)) for arm in self.arms}
        return [
            PlannedRun(
                name=(name := f"{arm.name}-seed{seed}"),
                arm=arm.name,
                seed=seed,
                path=out / RUNS / name,
                arguments=(*self._arguments(arm), f"--seed={seed}", f"--workdir={out / RUNS / name}"),
                config={**configs[arm.name], "seed": seed},
            )
            for seed in self.seeds
            for arm in self.arms
        ]

    def joined(self, stored: Study | None, out: Path) -> Study:
        """This study with the arms and seeds that `out` has beside its own.

        Raises:
          ValueError: what `out` has is another study.
        """
        if stored is None:
            return self
        refuse = lambda flag, then, now: ValueError(
            f"--out={out} holds a study with --{flag}={then} (here {now}): give another --out, or repeat the flags."
        )
        if stored.baseline != self.baseline:
            raise refuse("baseline", stored.baseline, self.baseline)
        if stored.metric != self.metric:
            raise refuse("metric", stored.metric, self.metric)
        for arm in stored.arms:
            then, now = stored._config(arm, 0), self._config(arm, 0)
            for name, (old, new) in config_differences(then, now, options.MAY_CHANGE).items():
                raise refuse(name, old, new)
        looked_at = {seed for arm in stored.arms if arm.role == CANDIDATE for seed in record.judged(out, arm.name)}
        arms = {arm.name: dataclasses.replace(arm, seeds=None) for arm in stored.arms}
        planned = {arm.name: set(arm.seeds or stored.seeds) for arm in stored.arms}
        for arm in self.arms:
            if arm.name not in arms and arm.role == CANDIDATE and looked_at & set(self.seeds):
                arm = dataclasses.replace(arm, late=True)
            planned[arm.name] = planned.get(arm.name, set()) | set(self.seeds)
            there = arms.setdefault(arm.name, arm)
            arms[arm.name] = dataclasses.replace(there, swept=there.swept or arm.swept)
            if not arm.is_as(there):
                raise ValueError(
                    f"--out={out} holds an arm {arm.name} that is a {arms[arm.name].role} with "
                    f"{_shown(arms[arm.name])}, here a {arm.role} with {_shown(arm)}: give another --out, or repeat "
                    "--precisions and --controls."
                )
        seeds = set().union(*planned.values())
        own = {name: None if found == seeds else tuple(sorted(found)) for name, found in planned.items()}
        joined = tuple(dataclasses.replace(arm, seeds=own[arm.name]) for arm in arms.values())
        return dataclasses.replace(self, seeds=tuple(sorted(seeds)), arms=joined)

    def save(self, out: Path) -> None:
        """Writes study.json, unless it is there and the same.

        Raises:
          RunError: the disk refuses it.
        """
        written = {
            "format": FORMAT,
            "baseline": self.baseline,
            "metric": self.metric,
            "seeds": list(self.seeds),
            "arms": [_record(arm) for arm in self.arms],
            "flags": self.flags,
            "margins": MARGINS,
        }
        with ondisk.writing(out / STUDY):
            if not (out / STUDY).exists() or read_json(out / STUDY) != written:
                write_json(out / STUDY, written, sort_keys=False)

    @classmethod
    def load(cls, out: Path) -> Study | None:
        """The study in `out`; None where there is nothing.

        Raises:
          RunError: study.json is damaged, or `out` belongs to something else.
        """
        path = out / STUDY
        if not path.exists():
            # What a killed start leaves, and runs that were started by other means.
            own = {LOCK, f".{STUDY}{TEMPORARY_SUFFIX}", RUNS}
            if out.is_file() or (out.is_dir() and any(entry.name not in own for entry in out.iterdir())):
                raise RunError(f"--out={out} is there and holds no {STUDY}; give a new or empty directory")
            return None
        found = read_json(path)
        try:
            if found["format"] != FORMAT:
                raise ValueError
            arms = tuple(
                Arm(
                    *(arm["name"], arm["role"], arm["flags"], arm.get("baseline"), _seeds(arm)),
                    *(bool(arm.get(mark)) for mark in ("swept", "late")),
                )
                for arm in found["arms"]
            )
            return cls(found["baseline"], found["metric"], tuple(found["seeds"]), arms, found["flags"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path} is no study of this version; restore it, or give another --out") from error

    def _arguments(self, arm: Arm) -> list[str]:
        return [argument(name, setting) for name, setting in {**self.flags, **arm.flags}.items()]

    def _config(self, arm: Arm, seed: int) -> dict[str, Any]:
        options.parse(["compare", *self._arguments(arm), f"--seed={seed}"])
        chosen = options.from_flags()
        recipes = [{"start": phase.start, "policy": str(phase.policy)} for phase in chosen.phases]
        return {**chosen.flags, "recipes": recipes}


def _record(arm: Arm) -> dict[str, Any]:
    seeds = None if arm.seeds is None else list(arm.seeds)
    known = {"name": arm.name, "role": arm.role, "flags": arm.flags, "baseline": arm.baseline, "seeds": seeds}
    marks = {"swept": arm.swept or None, "late": arm.late or None}
    return {name: value for name, value in (known | marks).items() if value is not None}


def _seeds(arm: dict[str, Any]) -> tuple[int, ...] | None:
    return tuple(arm["seeds"]) if "seeds" in arm else None


def _shown(arm: Arm) -> str:
    return " ".join(argument(name, setting) for name, setting in arm.flags.items())


def of_arms(arms: Sequence[Arm], seeds: Sequence[int], flags: dict[str, Any], metric: str) -> Study:
    """The study that compares these arms, the first baseline being that of the study."""
    return Study(next(arm.name for arm in arms if arm.baseline is None), metric, tuple(seeds), tuple(arms), flags)
