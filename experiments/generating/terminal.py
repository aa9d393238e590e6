"""Text as it comes, on a terminal or into a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

import numpy as np

from experiments.encoding import Subwords

_BROKEN = "\ufffd"


class Text:
    """What a row has written so far; a character is given out once all its bytes are there.

    Args:
      prompt: its pieces, which may decide how the next ones are spelt.
      subwords: the tokenizer.
    """

    def __init__(self, prompt: np.ndarray, subwords: Subwords):
        self._subwords = subwords
        self._tokens = prompt
        self._skipped = len(subwords.decode(prompt))
        self.whole = ""

    def add(self, tokens: np.ndarray, *, last: bool = False) -> str:
        """The text that tokens add; with the last ones, broken characters too."""
        self._tokens = np.concatenate([self._tokens, tokens])
        text = self._subwords.decode(self._tokens)[self._skipped :]
        if not last:
            text = text.rstrip(_BROKEN)
        added = text[len(self.whole) :]
        self.whole += added
        return added


class Stream:
    """Shows the texts of several rows at once: of one as it comes, of several line by line with their numbers.

    Args:
      out: where to.
      numbers: of the rows' requests, from 1.
      plain: whether there is one request in all.
    """

    def __init__(self, out: TextIO, numbers: Sequence[int], *, plain: bool):
        self._out, self._numbers, self._plain = out, numbers, plain
        self._lines = [""] * len(numbers)

    def add(self, row: int, text: str) -> None:
        if self._plain:
            self._out.write(text)
        else:
            *whole, self._lines[row] = (self._lines[row] + text).split("\n")
            for line in whole:
                self._show(row, line)
        self._out.flush()

    def finish(self) -> None:
        """Ends the lines that are not."""
        if self._plain:
            self._out.write("\n")
        for row, line in enumerate(self._lines):
            if line:
                self._show(row, line)
        self._out.flush()

    def _show(self, row: int, line: str) -> None:
        self._out.write(f"{self._numbers[row]}| {line}\n")
