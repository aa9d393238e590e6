"""Encoded examples that are not yet padded, and the few lengths that they are padded to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

IGNORED = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Column:
    """One value per row, or one per position of each row.

    Attributes:
      values: an array [rows, ...], or for each row an array [positions].
      pad: beyond the end of a row.
      counts: whether a loss counts by this column, which a row that only fills a batch holds `pad` in.
    """

    values: np.ndarray | Sequence[np.ndarray]
    pad: float = 0
    counts: bool = False

    @property
    def is_ragged(self) -> bool:
        return not isinstance(self.values, np.ndarray)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What a model reads, by row.

    Invariants: all columns have as many rows; in one row all ragged columns have as many positions.

    Attributes:
      columns: by name; `ids` are the pieces.
      cut: how many examples lost a part because a row is too short for them.
    """

    columns: Mapping[str, Column]
    cut: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).values)

    @property
    def lengths(self) -> np.ndarray:
        """int32 [rows]: positions of each row; 0 where no column has any, as of images."""
        ragged = [column.values for column in self.columns.values() if column.is_ragged]
        return np.array([len(values) for values in ragged[0]] if ragged else [0] * len(self), np.int32)


def bucket_lengths(*several: Rows, count: int = 4, multiple: int = 8) -> tuple[int, ...]:
    """The lengths that rows are padded to, which is how many programs a step is compiled to.

    Of all choices of so many multiples, that which pads least; found by dynamic programming.

    Args:
      several: all rows that will be in batches of these lengths.
      count: how many lengths at most.
      multiple: what each is a multiple of.

    Returns:
      Ascending; the last holds the longest row. (0,) for rows without positions.
    """
    lengths = np.concatenate([rows.lengths for rows in several])
    rounded, counts = np.unique(-(-lengths // multiple) * multiple, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: the least padded size of rows up to the j-th length, which is a bucket, and the buckets.
    best: dict[int, tuple[int, tuple[int, ...]]] = {-1: (0, ())}
    for _ in range(min(count, len(rounded))):
        best |= {
            j: min(
                (size + int((below[j + 1] - below[i + 1]) * rounded[j]), (*chosen, int(rounded[j])))
                for i, (size, chosen) in best.items()
                if i < j
            )
            for j in range(len(rounded))
        }
    return best[len(rounded) - 1][1]
