"""Text files by line, and the sentence that says where one of them is not as it must be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson


def malformed(path: str, line: int, sentence: str) -> ValueError:
    """An error about a line of a file, counted from 1."""
    return ValueError(f"{path}:{line}: {sentence}")


def read_text(path: str, encoding: str = "utf-8") -> str:
    """The text of a file, without a byte order mark, line ends as they are.

    Raises:
      ValueError: it cannot be read, or decoded.
    """
    try:
        with open(path, "rb") as file:
            stored = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}), check the file.") from error
    try:
        return stored.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = stored.count(b"\n", 0, error.start) + 1
        raise malformed(path, line, f"is not {encoding} (byte {error.start} of the file), convert it.") from error


def lines(path: str) -> Iterator[tuple[int, str]]:
    """Number from 1 and text of every line, without its end.

    Unlike `str.splitlines` it does not cut at the other characters that Unicode takes for line ends, which stand inside
    the rows of real files.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        yield number, line.removesuffix("\r")


def json_objects(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and JSON object of every line that is not blank.

    Raises:
      ValueError: a line is not a JSON object.
    """
    for number, line in lines(path):
        if line.strip():
            try:
                found = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise malformed(path, number, f"is not JSON ({error}): expected one object per line.") from error
            if not isinstance(found, dict):
                raise malformed(path, number, f"expected a JSON object, not {line[:40]!r}.")
            yield number, found


def text_field(path: str, line: int, row: dict[str, Any], name: str) -> str:
    """A field of a JSON object that must be text, and not blank.

    Raises:
      ValueError: it is not there, or something else.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        said = (
            f"{name!r} is {value!r:.40}" if name in row else f"there is no {name!r} among {', '.join(row) or 'nothing'}"
        )
        raise malformed(path, line, f"{said}: expected a text under {name!r}.")
    return value
