"""From the `--precision` flags to policies: one, or a schedule of them."""

import dataclasses
import re

from q8jax.policy import Policy
from q8jax.recipe import Recipe

QUANTIZABLE = ("blocks", "head", "attention")


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of a run in one precision.

    Attributes:
      start: first step, counted from 0.
      name: as the user wrote it.
      policy: the resolved policy.
      compute: compute dtype of the model.
    """

    start: int
    name: str
    policy: Policy
    compute: str


def resolve(precision: str, quantize: tuple[str, ...], *, tied: bool, start: int = 0) -> Phase:
    """The phase that a precision means.

    Args:
      precision: a preset, a recipe, or a policy.
      quantize: which of QUANTIZABLE a preset or recipe covers; what it does not cover stays in its compute dtype.
      tied: whether the model has no head of its own.
      start: first step.

    Raises:
      ValueError: a misspelt precision, or rules that disagree about the compute dtype.
    """
    if "->" in precision:
        policy = Policy.parse(precision)
    else:
        policy = _cover(Recipe.parse(precision), quantize, tied)
    dtypes = {recipe.compute for _, recipe in policy.rules}
    if len(dtypes) > 1:
        raise ValueError(
            f"--precision: its rules compute in {' and '.join(sorted(dtypes))}, but activations have one dtype: "
            "give every rule the same compute=."
        )
    return Phase(start, precision, policy, dtypes.pop())


def _cover(recipe: Recipe, quantize: tuple[str, ...], tied: bool) -> Policy:
    unknown = set(quantize) - set(QUANTIZABLE)
    if unknown or not quantize:
        raise ValueError(f"--quantize={','.join(quantize)} must list some of {', '.join(QUANTIZABLE)}.")
    if "head" in quantize and tied:
        raise ValueError("--quantize=head needs a head of its own: add --notied.")
    wide = Recipe(compute=recipe.compute)
    rules = []
    if "blocks" in quantize:
        rules.append(("blocks/(attention/(qkv|out)|mlp/(up|down))", recipe))
    if "attention" in quantize:
        rules.append(("blocks/attention/(scores|values)", recipe))
    if "head" in quantize:
        rules.append(("head", recipe))
    if not {"blocks", "head"} <= set(quantize) and not (tied and "blocks" in quantize):
        rules.append((".*", wide))
    return Policy(tuple(rules))


def schedule(text: str, steps: int, quantize: tuple[str, ...], *, tied: bool) -> tuple[Phase, ...]:
    """Parses `--precision_schedule`, as in '0:bf16,200:fp8,-10%:bf16'.

    A start is a step, a percentage of the steps, or either with a minus sign, counted from the end.

    Raises:
      ValueError: an entry that is not start:precision, starts that do not begin at 0 and rise, or one beyond the run.
    """
    phases = []
    for entry in _entries(text):
        match = re.fullmatch(r"(-?)(\d+(?:\.\d+)?)(%?):(.+)", entry)
        if not match:
            raise ValueError(f"--precision_schedule entry {entry!r} must be start:precision, as in 200:fp8 or -10%:bf16.")
        minus, number, percent, precision = match.groups()
        if "." in number and not percent:
            raise ValueError(f"--precision_schedule entry {entry!r} must start at a whole step or a percentage.")
        start = round(float(number) * steps / 100) if percent else int(number)
        phases.append(resolve(precision, quantize, tied=tied, start=steps - start if minus else start))
    starts = [phase.start for phase in phases]
    if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= steps:
        raise ValueError(
            f"--precision_schedule={text} starts its phases at steps {starts}: begin at 0, rise, and stay below "
            f"--steps={steps}."
        )
    return tuple(phases)


def _entries(text: str) -> list[str]:
    # A recipe has commas of its own, so a new entry begins only where a start does.
    return re.split(r",(?=-?\d+(?:\.\d+)?%?:)", text)


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase that a step belongs to."""
    return max((phase for phase in phases if phase.start <= step), key=lambda phase: phase.start)
