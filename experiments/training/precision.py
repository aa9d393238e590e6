"""From the `--precision` flags to policies: one, or a schedule of them."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from q8jax.policy import Policy
from q8jax.recipe import Recipe

QUANTIZABLE = ("blocks", "head", "attention")
_PATHS = {
    "blocks": "blocks/(attention/(qkv|out)|mlp/(up|down))",
    "attention": "blocks/attention/(scores|values)",
    "head": "head",
}


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


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Puts the flag that the user wrote in front of what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def written_out(precision: str) -> str:
    """What a precision is that may be @FILE: the policy in that file, whose rules may stand on lines of their own.

    Raises:
      ValueError: the file cannot be read.
    """
    if not precision.startswith("@"):
        return precision
    try:
        lines = Path(precision[1:]).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--precision={precision} cannot be read ({error}): give a file with a policy.") from error
    return "".join(map(str.strip, lines))


def resolve(precision: str, quantize: tuple[str, ...] = ("blocks",)) -> Phase:
    """The phase that a precision means, from the first step on.

    Args:
      precision: a preset, a recipe, or a policy.
      quantize: which of QUANTIZABLE a preset or recipe covers; what it does not cover stays in its compute dtype.

    Raises:
      ValueError: a misspelt precision, or rules that disagree about the compute dtype.
    """
    with naming(f"--precision={precision}"):
        return _phase(0, precision, quantize)


def _phase(start: int, precision: str, quantize: tuple[str, ...]) -> Phase:
    if "->" not in precision:
        policy = _cover(Recipe.parse(precision), quantize)
    elif quantize != ("blocks",):
        raise ValueError("a policy names its layers itself, so leave --quantize out.")
    else:
        policy = Policy.parse(precision)
    dtypes = sorted({recipe.compute for _, recipe in policy.rules})
    if len(dtypes) > 1:
        raise ValueError(
            f"its rules compute in {' and '.join(dtypes)}, but activations have one dtype: give every rule the same "
            "compute=."
        )
    return Phase(start, precision, policy, dtypes[0])


def _cover(recipe: Recipe, quantize: tuple[str, ...]) -> Policy:
    if not set(quantize) <= set(QUANTIZABLE) or not quantize:
        raise ValueError(f"--quantize={','.join(quantize)} must list some of {', '.join(QUANTIZABLE)}.")
    rules = [(_PATHS[part], recipe) for part in QUANTIZABLE if part in quantize]
    if set(quantize) != set(_PATHS):
        rules.append((".*", Recipe(compute=recipe.compute)))
    return Policy(tuple(rules))


def schedule(text: str, steps: int, quantize: tuple[str, ...] = ("blocks",)) -> tuple[Phase, ...]:
    """Parses `--precision_schedule`, as in '0:bf16,200:fp8,-10%:bf16'.

    A start is a step, a percentage of the steps, or either with a minus sign, counted from the end.

    Args:
      text: the entries.
      steps: length of the run.
      quantize: as for `resolve`.

    Raises:
      ValueError: an entry that is not start:precision, starts that do not begin at 0 and rise, or one beyond the run.
    """
    with naming(f"--precision_schedule={text}"):
        phases = tuple(_entry(entry, steps, quantize) for entry in _entries(text))
        starts = [phase.start for phase in phases]
        if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= steps:
            raise ValueError(f"phases start at steps {starts}: begin at 0, rise, and stay below --steps={steps}.")
    return phases


def _entry(entry: str, steps: int, quantize: tuple[str, ...]) -> Phase:
    match = re.fullmatch(r"(-?)(\d+(?:\.\d+)?)(%?):(.+)", entry)
    if not match:
        raise ValueError(f"{entry!r} must be start:precision, as in 200:fp8 or -10%:bf16.")
    minus, number, percent, precision = match.groups()
    if "." in number and not percent:
        raise ValueError(f"{entry!r} must start at a whole step or a percentage.")
    start = round(float(number) * steps / 100) if percent else int(number)
    return _phase(steps - start if minus else start, precision, quantize)


def _entries(text: str) -> list[str]:
    # A recipe has commas of its own, so a new entry begins only where a start does.
    return re.split(r",(?=-?\d+(?:\.\d+)?%?:)", text)


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase that a step belongs to."""
    return max((phase for phase in phases if phase.start <= step), key=lambda phase: phase.start)
