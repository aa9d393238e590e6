"""Prompts from flags, files and standard input, and as pieces that fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from experiments.encoding import Subwords
from experiments.tasks.lines import json_objects, lines, text_field

_FIELD = "prompt"


def gather(given: Sequence[str], path: str, standard_input: TextIO | None) -> list[str]:
    """The prompts of a command.

    Args:
      given: those of --prompt.
      path: of --prompts: a text file with one a line, or a .jsonl file with one in each object under "prompt"; or ''.
      standard_input: which is one prompt if there is no other; None if a person sits there.

    Raises:
      ValueError: there is none, or a file that cannot be read or holds none, or a malformed line.
    """
    if given and path:
        raise ValueError("--prompt and --prompts both give prompts: give one of them.")
    if given:
        return list(given)
    if path:
        place = Path(path).expanduser()
        if not place.is_file():
            raise ValueError(f"--prompts={path} is no file: check the path.")
        found = _of_json(str(place)) if place.suffix == ".jsonl" else _of_lines(str(place))
        if not found:
            raise ValueError(f"--prompts={path} holds no prompt: write one a line.")
        return found
    if standard_input is None:
        raise ValueError("There is no prompt: give --prompt=, --prompts=FILE, or text on standard input.")
    return [standard_input.read().removesuffix("\n")]


def _of_lines(path: str) -> list[str]:
    return [line for _, line in lines(path) if line.strip()]


def _of_json(path: str) -> list[str]:
    return [text_field(path, number, row, _FIELD) for number, row in json_objects(path)]


def encode(prompts: Sequence[str], subwords: Subwords) -> list[np.ndarray]:
    """Pieces of each prompt, int32 [tokens], after what the tokenizer opens texts with.

    Raises:
      ValueError: a prompt that has none.
    """
    opening = np.array(subwords.single.opening, np.int32)
    encoded = []
    for number, pieces in enumerate(subwords.split(prompts), start=1):
        if not len(pieces.ids):
            raise ValueError(f"Prompt {number} is empty: give it some text.")
        encoded.append(np.concatenate([opening, pieces.ids]))
    return encoded


def slots_for(
    lengths: Sequence[int], new: int, cache_tokens: int | None, positions: int | None, what: str = "prompt"
) -> int:
    """How many tokens each row of the cache is to hold.

    Args:
      lengths: of the prompts.
      new: tokens to write.
      cache_tokens: as --cache_tokens asks, or None for as many as are needed.
      positions: that the model has, or None for any number.
      what: the lengths are of.

    Raises:
      ValueError: they do not fit.
    """
    longest = int(np.argmax(lengths)) + 1
    # The last one is written and never read.
    needed = lengths[longest - 1] + new - 1
    for limit, name in ((cache_tokens, f"--cache_tokens={cache_tokens}"), (positions, f"the model's {positions}")):
        if limit is not None and needed > limit:
            raise ValueError(
                f"{what.capitalize()} {longest} has {lengths[longest - 1]} tokens, which with --new_tokens={new} is "
                f"more than {name}: shorten it, or write fewer."
            )
    return cache_tokens or needed
