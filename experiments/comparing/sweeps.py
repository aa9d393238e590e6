"""What --precisions, --seeds, --grid and --zip say, as lists."""

import itertools
import re
from collections.abc import Sequence

from q8jax.recipe import GEMMS

Point = dict[str, str]

# The operands of a GEMM have a comma between them, which separates no entries.
_ENTRY = re.compile(rf"(?:(?:{'|'.join(GEMMS)})=[^,/]*,[^,/]*|[^,])+")
_SCHEDULE = re.compile(r"0%?:")


def is_schedule(precision: str) -> bool:
    """Whether it is a value of --precision_schedule rather than of --precision."""
    return _SCHEDULE.match(precision) is not None


def precisions(texts: Sequence[str]) -> list[str]:
    """The entries of one or more --precisions, each once.

    Commas separate presets and recipes, but for the comma within a GEMM. A policy (it has a '->') or a schedule (it
    starts with '0:') is all that its flag says.
    """
    entries: list[str] = []
    for text in texts:
        entries += [text] if "->" in text or is_schedule(text) else _ENTRY.findall(text)
    return list(dict.fromkeys(entry.strip() for entry in entries if entry.strip()))


def seeds(text: str) -> list[int]:
    """'8' is the first eight, '8:16' those from 8 to 15, '0,3,5' and '0:4,8' lists.

    Raises:
      ValueError: none of these, or no seed at all.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", part.strip())
        if not match:
            raise ValueError(f"--seeds={text} must be a number of seeds, a range as in 8:16, or a list as in 0,3,5.")
        first, end = int(match[1]), match[2]
        if end is not None:
            found += range(first, int(end))
        else:
            found += [first] if "," in text else range(first)
    if not found:
        raise ValueError(f"--seeds={text} has no seed: give at least --seeds=1.")
    return sorted(set(found))


def points(grids: Sequence[str], zips: Sequence[str]) -> list[Point]:
    """The settings that a sweep goes through, name to value as text; one without any where nothing is swept.

    Args:
      grids: NAME=V1,V2; all combinations are taken.
      zips: the same, but these go through their values together.

    Raises:
      ValueError: an axis that is misspelt or given twice, or zips of different lengths.
    """
    axes = [("grid", *_axis("grid", text)) for text in grids] + [("zip", *_axis("zip", text)) for text in zips]
    names = [name for _, name, _ in axes]
    for kind, name, _ in axes:
        if names.count(name) > 1:
            raise ValueError(f"--{kind}={name} is swept twice: keep one.")
    lengths = {name: len(values) for kind, name, values in axes if kind == "zip"}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"--zip takes its values together, but {listed}: give each as many.")
    steps = [[{name: value} for value in values] for kind, name, values in axes if kind == "grid"]
    if lengths:
        zipped = [(name, values) for kind, name, values in axes if kind == "zip"]
        steps.append([{name: values[i] for name, values in zipped} for i in range(len(zipped[0][1]))])
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*steps)]


def _axis(kind: str, text: str) -> tuple[str, list[str]]:
    name, _, rest = text.partition("=")
    # GEMMs have commas within, so theirs are separated by bars alone, as is whatever has a bar.
    values = rest.split("|" if "|" in rest or name in GEMMS else ",")
    if not name or not all(value.strip() for value in values):
        raise ValueError(f"--{kind}={text} must be NAME=VALUE,VALUE, or NAME=VALUE|VALUE where values have commas.")
    return name.strip(), [value.strip() for value in values]
