"""The arms of a study: what is run once with every seed."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import options
from experiments.comparing import sweeps
from experiments.training.precision import naming
from q8jax import choices
from q8jax.policy import Policy
from q8jax.presets import PRECISIONS
from q8jax.recipe import Recipe

BASELINE, CANDIDATE, CONTROL, NOISE = ROLES = ("baseline", "candidate", "control", "noise")
# Far below what a recipe does, far above what rounding in float32 loses.
PERTURBATION = 1e-5

# What the study decides itself, and by which flag of its own.
DECIDED = {"precision": "precisions", "precision_schedule": "precisions", "seed": "seeds", "workdir": "out"}
# What one command of pretrain may ask for, but no study.
REFUSED = ("config", "print_plan", "stop_after")

_RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))
# For a field that not every recipe has a use for, a value that one without refuses.
_PROBES: dict[str, Any] = {
    "history": 1,
    "amax": "recent",
    "margin": 1,
    "scales": "power_of_two",
    "accumulation": "accurate",
}
# Sweeping these changes the precision, so all their values are compared with the same baseline.
_OF_PRECISION = (*_RECIPE_FIELDS, "quantize")
_LONGEST_NAME = 80


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the study.

    Attributes:
      name: unique, and the beginning of its runs' names.
      role: one of ROLES.
      flags: of pretrain, those that other arms have otherwise.
      baseline: name of the arm that it is compared with; None of a baseline.
      seeds: its own; None where they are those of the study.
      swept: whether it is one of the points of a sweep, of which the best is bound to look better than it is.
      late: whether it was added when results of other candidates on the same seeds had been seen.
    """

    name: str
    role: str
    flags: dict[str, Any]
    baseline: str | None
    seeds: tuple[int, ...] | None = None
    swept: bool = False
    late: bool = False

    def is_as(self, other: "Arm") -> bool:
        """Whether it runs the same, whichever seeds and however it came into the study."""
        as_run = lambda arm: (arm.name, arm.role, arm.flags, arm.baseline)
        return as_run(self) == as_run(other)

    @property
    def preset(self) -> str | None:
        """As of its flags."""
        return preset(self.flags)


def preset(flags: Mapping[str, Any]) -> str | None:
    """The preset that a precision is, with overrides or without; None of a recipe, a policy or a schedule."""
    name = flags.get("precision", "").partition("/")[0]
    return name if name in PRECISIONS else None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is compared.

    Attributes:
      precisions: the candidates, as pretrain's --precision takes them.
      baseline: the precision that they are compared with.
      controls: precisions that must fail.
      noise: whether the baseline is also run with its initialisation perturbed.
    """

    precisions: Sequence[str]
    baseline: str
    controls: Sequence[str]
    noise: bool

    def arms(self, points: Sequence[sweeps.Point]) -> list[Arm]:
        """The arms at every point of a sweep, each once.

        What a sweep changes besides the precision, it changes for baseline, controls and noise as well.

        Raises:
          ValueError: an axis that is no flag or recipe field, or has a value that it cannot take or no effect.
        """
        _check_precision("baseline", self.baseline)
        for control in self.controls:
            _check_precision("controls", control)
        for name in points[0]:
            self._check_axis(name)
        arms: dict[str, Arm] = {}
        for point in points:
            others = {name: value(name, text) for name, text in point.items() if name not in _OF_PRECISION}
            of_precision = {name: text for name, text in point.items() if name in _OF_PRECISION}
            for arm in self._arms(others, of_precision):
                is_swept = arm.role == CANDIDATE and len(points) > 1
                arms.setdefault(arm.name, dataclasses.replace(arm, swept=is_swept))
        return list(arms.values())

    def _arms(self, others: dict[str, Any], of_precision: dict[str, str]) -> list[Arm]:
        """Those at one point of a sweep."""
        reference = Arm(_name(self.baseline, others), BASELINE, _flags(self.baseline, others), None)
        found = []
        for precision in self.precisions:
            overrides = {name: text for name, text in of_precision.items() if _takes(precision, name)}
            fields = "".join(f"/{name}={text}" for name, text in overrides.items() if name in _RECIPE_FIELDS)
            settings = {name: value(name, text) for name, text in overrides.items() if name not in _RECIPE_FIELDS}
            if precision == self.baseline and not overrides:
                found.append(reference)
            elif precision not in self.controls:
                text, settings = precision + fields, {**settings, **others}
                _check_precision("precisions", text)
                found.append(Arm(_name(text, settings), CANDIDATE, _flags(text, settings), reference.name))
        if reference not in found:
            found.insert(0, reference)
        for control in self.controls:
            found.append(Arm(_name(control, others), CONTROL, _flags(control, others), reference.name))
        if self.noise:
            flags = _flags(self.baseline, {**others, "init_perturbation": PERTURBATION})
            found.append(Arm(_name(f"{self.baseline}-perturbed", others), NOISE, flags, reference.name))
        return found

    def _check_axis(self, name: str) -> None:
        if name in DECIDED:
            raise ValueError(f"--{name} is not swept: give its values in --{DECIDED[name]}.")
        sweepable = [flag for flag in options.from_flags().flags if flag not in (*DECIDED, *REFUSED)]
        choices.check("flag or recipe field in --grid or --zip", name, [*_RECIPE_FIELDS, *sweepable])
        if name in options.given_flags():
            raise ValueError(f"--{name} is swept as well as given: leave one of the two out.")
        if name in _OF_PRECISION and not any(_takes(precision, name) for precision in self.precisions):
            raise ValueError(f"{name} is swept, but has no effect on any of --precisions: leave it out.")


def _check_precision(flag: str, text: str) -> None:
    if not sweeps.is_schedule(text):  # which depends on --steps
        with naming(f"--{flag}={text}"):
            Policy.parse(text)


def value(name: str, text: str) -> Any:
    """The value of a flag of pretrain.

    Raises:
      ValueError: it is of another kind.
    """
    try:
        return options.FLAGS[name].parser.parse(text)
    except (TypeError, ValueError):
        raise ValueError(f"--{name} is swept over {text!r}, which it cannot be.") from None


def argument(name: str, setting: Any) -> str:
    """A flag of pretrain as it stands on the command line."""
    if isinstance(setting, bool):
        return f"--{name}" if setting else f"--no{name}"
    return f"--{name}={_text(setting)}"


def _text(setting: Any) -> str:
    return ",".join(map(str, setting)) if isinstance(setting, list) else str(setting)


def _flags(precision: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    name = "precision_schedule" if sweeps.is_schedule(precision) else "precision"
    return {name: precision, **settings}


def _takes(precision: str, name: str) -> bool:
    """Whether a sweep of `name` changes what `precision` computes.

    Raises:
      ValueError: a policy or schedule, into which nothing can be put from outside.
    """
    if "->" in precision or sweeps.is_schedule(precision):
        raise ValueError(
            f"{name} is swept, which cannot be put into --precisions={precision}: give a policy or schedule for each "
            "value instead."
        )
    with naming(f"--precisions={precision}"):
        recipe = Recipe.parse(precision)
    if not recipe.is_quantized:
        return False
    try:
        if name in _PROBES:
            dataclasses.replace(recipe, **{name: _PROBES[name]})
    except ValueError:
        return False
    return True


def _name(precision: str, settings: Mapping[str, Any]) -> str:
    """Readable, and of letters that every file system and shell takes as they are."""
    parts = [precision, *(f"{name}={_text(setting)}" for name, setting in settings.items())]
    name = "_".join(parts).replace("/", "_").replace(",", "+")
    if len(name) <= _LONGEST_NAME and re.fullmatch(r"[A-Za-z0-9_.=%+-]+", name):
        return name
    digest = hashlib.sha256("_".join(parts).encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_.=%+-]+", "-", name)[: _LONGEST_NAME // 2].strip("-.") + f"-{digest}"
