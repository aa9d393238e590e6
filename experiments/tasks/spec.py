"""Strict reading of the string behind `--data` for a task: KIND, and what it reads.

    conll:DIR                                   train, valid and test are found in the folder by their names
    csv:reviews.csv,text=review,label=stars     one file: a tenth of its examples validates and a tenth tests
    tsv:train=a.tsv,test=b.tsv                  files by name; what is not given is made from train

Commas part the items. An item with a comma in it stands in double quotes, `csv:"train=a,b.csv",label=y`.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from experiments.data.spec import nearest

SPLITS = ("train", "valid", "test")
_STEMS = {"train": "train|training", "valid": "valid|validation|val|dev", "test": "test|testing"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A `--data` value in parts.

    Attributes:
      data: as the user wrote it.
      kind: before the colon.
      path: the item without a name, or None.
      files: by split, as far as given.
      options: the other named items, with the defaults of those that are not given.
    """

    data: str
    kind: str
    path: str | None
    files: Mapping[str, str]
    options: Mapping[str, str]

    @property
    def flag(self) -> str:
        """The flag and its value, to open a message about it."""
        return f"--data={self.data}"

    def find(self, suffixes: Sequence[str]) -> dict[str, str]:
        """Path of each split's file; the one that is not named is train's, and a folder is looked into.

        Args:
          suffixes: of the files to find in a folder, such as ".csv".

        Returns:
          By split, train always.

        Raises:
          ValueError: there is no such file, none for train, or several for one split.
        """
        files = dict(self.files)
        if self.path is not None and os.path.isdir(self.path):
            files = _found(self.flag, self.path, suffixes)
        elif self.path is not None:
            files = {"train": self.path}
        for path in files.values():
            check_file(self.flag, path)
        return files


def check_file(flag: str, path: str) -> None:
    """Raises ValueError unless the path is that of a file."""
    if not os.path.isfile(path):
        what = "is a folder, name a file in it" if os.path.isdir(path) else "does not exist, check the path"
        raise ValueError(f"{flag}: {path} {what}.")


def parse(data: str, options: Mapping[str, str]) -> Spec:
    """Reads a `--data` value whose kind is known.

    Args:
      data: the value.
      options: names of what may be said besides files, with their defaults.

    Raises:
      ValueError: an item is unknown, empty, given twice, or a second one without a name; or files are given twice.
    """
    kind, _, rest = data.partition(":")
    flag = f"--data={data}"
    try:
        [items] = csv.reader([rest], strict=True) if rest else [[]]
    except (csv.Error, ValueError):
        raise ValueError(f'{flag}: quotes do not match, write an item with a comma as "name=a,b".') from None
    known = (*SPLITS, *options)
    path: str | None = None
    given: dict[str, str] = {}
    for item in items:
        name, equals, value = (part.strip() for part in item.partition("="))
        if equals and name not in known:
            raise ValueError(f"{flag}: unknown option {name!r}{nearest(name, known)}, choose from {', '.join(known)}.")
        if equals and name in given:
            raise ValueError(f"{flag}: {name!r} is given twice, keep one of them.")
        if not (value if equals else name):
            raise ValueError(f"{flag}: {name + '=' if equals else 'an item'} is empty, leave it out.")
        if equals:
            given[name] = value
        elif path is not None:
            raise ValueError(f"{flag}: {item!r} is a second path, name the files as train=…,valid=…,test=….")
        else:
            path = os.path.expanduser(name)
    files = {name: os.path.expanduser(given.pop(name)) for name in SPLITS if name in given}
    if path is not None and files:
        raise ValueError(f"{flag}: {path} has no name beside {', '.join(files)}, write train={path}.")
    return Spec(data, kind, path, files, {**options, **given})


def _found(flag: str, folder: str, suffixes: Sequence[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(tuple(suffixes)))
    for split, stems in _STEMS.items():
        matches = [name for name in names if re.match(rf"({stems})([^a-z].*)?\.[a-z]+$", name.lower())]
        if len(matches) > 1:
            raise ValueError(f"{flag}: {' and '.join(matches)} may both be {split}, write {split}=FILE.")
        files.update((split, os.path.join(folder, name)) for name in matches)
    if "train" not in files:
        raise ValueError(
            f"{flag}: {folder} has no train{' or train'.join(suffixes)}, name the files as train=…,test=…."
        )
    return files
