"""Flags of a program as tables, parsed strictly; --help shows them by group."""

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

TEXT, WHOLE, REAL, YES_NO = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool
LIST = flags.DEFINE_list
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
# By title: kind, name, default and explanation of each flag.
Groups = Mapping[str, Sequence[tuple[Any, str, Any, str]]]


def define(values: flags.FlagValues, groups: Groups) -> None:
    """Defines the flags; call once."""
    for rows in groups.values():
        for kind, name, default, text in rows:
            kind(name, default, text, flag_values=values)


def names(groups: Groups) -> list[str]:
    return [name for rows in groups.values() for _, name, _, _ in rows]


def parse(values: flags.FlagValues, groups: Groups, argv: list[str], introduction: str = "") -> list[str]:
    """Parses a command line anew; --help, or a flag that does not parse, ends the program.

    Args:
      values: in which the flags are defined.
      groups: the flags.
      argv: the program's name and its arguments.
      introduction: stands above the flags in what --help prints.

    Returns:
      What is left of argv: the program's name.
    """
    for name in names(groups):
        values[name].unparse()
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
        print(usage(values, groups, introduction))
        sys.exit(0)
    try:
        left = values(argv)
        if len(left) > 1:
            raise flags.Error(f"Unexpected argument {left[1]!r}, where a flag is written --name=value")
    except flags.Error as error:
        print(f"{Path(argv[0]).stem}: {_readable(values, groups, error)}", file=sys.stderr)
        sys.exit(2)
    if values is not flags.FLAGS:
        flags.FLAGS(argv[:1])  # which absl reads its own from
    if flags.FLAGS["verbosity"].using_default_value:
        # The devices that JAX looked for in vain are no news.
        flags.FLAGS["verbosity"].value = logging.ERROR
        flags.FLAGS["verbosity"].using_default_value = False
    return left


def given(values: flags.FlagValues, groups: Groups) -> set[str]:
    """The names of the flags that stand on the command line."""
    return {name for name in names(groups) if values[name].present}


def _readable(values: flags.FlagValues, groups: Groups, error: flags.Error) -> str:
    bad_value = re.match(r"flag (--(\w+)=.*?): ", str(error))
    if bad_value and bad_value[2] in names(groups):
        return f"{bad_value[1]} must be {KINDS[values[bad_value[2]].flag_type()]}."
    sentence = re.sub(r"\. Did you mean: (.+) \?$", r" (did you mean --\1?)", str(error)).rstrip(".")
    return f"{sentence}: --help lists the flags."


def usage(values: flags.FlagValues, groups: Groups, introduction: str) -> str:
    """What --help prints: every flag with its default."""
    lines = [introduction.strip()]
    for title, rows in groups.items():
        lines += ["", f"{title}:"]
        for kind, name, _, text in rows:
            flag = f"--[no]{name}" if kind is YES_NO else f"--{name}={values[name].serialize().partition('=')[2]}"
            lines += textwrap.wrap(text, 118, initial_indent=f"  {flag:<28} ", subsequent_indent=" " * 31)
    return "\n".join(lines)
