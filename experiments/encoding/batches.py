"""Batches of encoded examples: which rows step `n` sees is a pure function of (seed, epoch, step).

Rows of about the same length share a batch and are padded to one of a few lengths, each of which is a program to
compile. Nothing is kept between steps, so a resumed run needs only the numbers of epoch and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from experiments.data.shuffle import ROUNDS, permute
from experiments.encoding.rows import IGNORED, Rows, bucket_lengths

Batch = dict[str, np.ndarray]


class Batches:
    """Rows cut into batches.

    A batch has every column of the rows, [batch_size, ...] or padded [batch_size, length]; beside them `mask`, bool
    [batch_size, length], which is True where a row has something, and `row`, int32 [batch_size], the number of the row.
    The last batch of a length is filled up with rows that count nothing: they are rows again, so that no attention is
    over nothing, but `row` and all that a loss counts by hold IGNORED or no weight.

    Attributes:
      rows: what is cut.
      batch_size: rows of a batch.
      lengths: that rows are padded to.
      per_epoch: how many batches have every row once.
    """

    def __init__(self, rows: Rows, batch_size: int, lengths: Sequence[int] | None = None):
        """Cuts rows; `lengths` are their own `bucket_lengths` unless given.

        Raises:
          ValueError: there are no rows, batch_size is below 1, or a row is longer than all lengths.
        """
        if batch_size < 1:
            raise ValueError(f"--batch_size={batch_size} must be 1 or more.")
        if not len(rows):
            raise ValueError("There are no rows to cut into batches: give a split that has examples.")
        self.rows, self.batch_size = rows, batch_size
        self.lengths = tuple(sorted(lengths)) if lengths else bucket_lengths(rows)
        self._own = own = rows.lengths
        if own.max() > self.lengths[-1]:
            raise ValueError(
                f"A row of {own.max()} positions does not fit into {self.lengths[-1]}: give longer lengths."
            )
        bucket = np.searchsorted(self.lengths, own)
        self._members = [np.flatnonzero(bucket == i) for i in range(len(self.lengths))]
        self._ends = np.cumsum([-(-len(members) // batch_size) for members in self._members])
        self.per_epoch = int(self._ends[-1])

    def train(self, *, seed: int, epoch: int, step: int) -> Batch:
        """The batch of a step: in one epoch every row comes once, in another order each time.

        Args:
          seed: 0 or more.
          epoch: from 0.
          step: from 0, within the epoch.
        """
        if not 0 <= step < self.per_epoch:
            raise ValueError(f"step {step} must be from 0 to {self.per_epoch - 1}, within the epoch.")
        state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(2 * ROUNDS, np.uint64)
        number = int(permute(np.array([step]), self.per_epoch, state[:ROUNDS])[0])
        return self._batch(number, state[ROUNDS:])

    def once(self) -> Iterator[Batch]:
        """Every row once, in an order of its own that is always the same; `in_order` undoes it."""
        return (self._batch(number, None) for number in range(self.per_epoch))

    def in_order(self, outputs: Iterable[np.ndarray]) -> list[np.ndarray]:
        """What a model made of the batches of `once`, by row.

        Args:
          outputs: for each batch an array [batch_size, ...].

        Returns:
          For each row its part; where that is by position, it goes on beyond the end of the row.
        """
        found: dict[int, np.ndarray] = {}
        for number, output in zip(range(self.per_epoch), outputs, strict=True):
            _, rows, counts = self._of(number, None)
            found.update(zip(rows[counts].tolist(), np.asarray(output)[counts], strict=True))
        return [found[row] for row in range(len(self.rows))]

    def _of(self, number: int, keys: np.ndarray | None) -> tuple[int, np.ndarray, np.ndarray]:
        """Length of a batch, its rows, and which of them count."""
        bucket = int(np.searchsorted(self._ends, number, side="right"))
        members = self._members[bucket]
        first = self.batch_size * (number - (int(self._ends[bucket - 1]) if bucket else 0))
        places = np.arange(first, first + self.batch_size)
        counts = places < len(members)
        places %= len(members)
        if keys is not None:
            places = permute(places, len(members), keys)
        return self.lengths[bucket], members[places], counts

    def _batch(self, number: int, keys: np.ndarray | None) -> Batch:
        length, rows, counts = self._of(number, keys)
        batch = {"row": np.where(counts, rows, IGNORED).astype(np.int32)}
        if length:
            batch["mask"] = np.arange(length) < self._own[rows][:, None]
        for name, column in self.rows.columns.items():
            if isinstance(column.values, np.ndarray):
                values = column.values[rows]
            else:
                chosen = [column.values[row] for row in rows]
                values = np.full((self.batch_size, length), column.pad, chosen[0].dtype)
                for i, value in enumerate(chosen):
                    values[i, : len(value)] = value
            if column.counts:
                values[~counts] = column.pad
            batch[name] = values
        return batch
