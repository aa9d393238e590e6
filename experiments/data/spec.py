"""Strict reading of the strings behind `--data` and `--tokenizer`."""

import difflib
from collections.abc import Iterable, Mapping


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a misspelt word, empty where nothing is close."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def parse_integers(flag: str, options: Iterable[str], ranges: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Reads `name=integer` items, each name known, given once, and within its closed range.

    Args:
        flag: the flag and its value as the user wrote them, which opens every message.
        options: the items, for example `["order=2", "vocab=64"]`.
        ranges: for every valid name, its smallest and largest value.

    Returns:
        The options that were given.

    Raises:
        ValueError: an item is not `name=integer`, is unknown, repeated or out of range.
    """
    given: dict[str, int] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if name not in ranges:
            raise ValueError(
                f"{flag}: unknown option {option!r}{nearest(name, ranges)}, choose from "
                f"{', '.join(f'{known}=…' for known in ranges)}."
            )
        if name in given:
            raise ValueError(f"{flag}: option {name!r} is given twice, keep one of them.")
        low, high = ranges[name]
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not equals or not low <= value <= high:
            raise ValueError(f"{flag}: {name} must be an integer from {low} to {high}, not {text!r}.")
        given[name] = value
    return given
