"""One long sequence of tokens, in memory or on disk, read by position."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TokenArray(Protocol):
    """What a stream is made of: a NumPy array, a memory map, or a shard opened on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray: ...


class TokenStream:
    """Concatenation of one-dimensional unsigned integer arrays, without copying them.

    Reading treats the stream as a ring: after the last token comes the first.
    """

    def __init__(self, parts: Sequence[TokenArray]):
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns tokens `start … start + length - 1`, positions modulo `len(self)`.

        Returns:
            int32 [length].
        """
        tokens = np.empty(length, np.int32)
        filled = 0
        position = start % len(self)
        while filled < length:
            index = int(np.searchsorted(self._ends, position, side="right"))
            part = self.parts[index]
            local = position - int(self._ends[index]) + len(part)
            chunk = part[local : local + length - filled]
            tokens[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
            position = (position + len(chunk)) % len(self)
        return tokens


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned type that holds every id below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1)
