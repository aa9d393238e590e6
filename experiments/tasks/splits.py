"""Splits that are not given are made from train by the content of its examples, so that no content is in two.

The rule knows nothing of `--seed` or of the order of examples: runs that differ in seed share their splits, and an
example stays where it is when others come and go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from experiments.tasks.examples import Examples, Task

E = TypeVar("E", bound=Examples)
_SHARES = 10  # a tenth each
_SHARE_OF = {"valid": 0, "test": 1}


def shares(contents: Iterable[bytes]) -> np.ndarray:
    """Which tenth each content falls into by its SHA-256, int32 [contents] from 0 to 9."""
    digests = (hashlib.sha256(content).digest()[:8] for content in contents)
    return np.array([int.from_bytes(digest, "big") % _SHARES for digest in digests], np.int32)


def split_task(data: str, classes: Sequence[str], given: Mapping[str, E], scheme: str | None = None) -> Task[E]:
    """A task with all three splits: those given as they are, a missing one a tenth of train.

    Args:
      data: the `--data` value.
      classes: names of the labels.
      given: examples by split, train among them.
      scheme: of tags that mark entities.

    Raises:
      ValueError: a split is empty.
    """
    missing = [split for split in _SHARE_OF if split not in given]
    splits = dict(given)
    if missing:
        share = shares(given["train"].contents())
        held_out = {split: share == _SHARE_OF[split] for split in missing}
        splits |= {split: given["train"].subset(np.flatnonzero(mine)) for split, mine in held_out.items()}
        splits["train"] = given["train"].subset(np.flatnonzero(~np.any(list(held_out.values()), axis=0)))
    for split, examples in splits.items():
        if not len(examples):
            if split in missing or (missing and split == "train"):
                why = f"{sum(map(len, given.values()))} examples are too few to hold tenths out, give more"
            else:
                why = f"{split} has no examples, name another file"
            raise ValueError(f"--data={data}: {why}.")
    return Task(data, tuple(classes), splits["train"], splits["valid"], splits["test"], scheme)


def distinct(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(text, label) pairs, each text once, and not those that stand under several labels."""
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        labels.setdefault(text, set()).add(label)
    return [(text, found.pop()) for text, found in labels.items() if len(found) == 1]
