"""What a downstream task is made of: examples in columns, one class for each kind of task, and their three splits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Self, TypeVar

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Columns of equal length, an entry per example: tuples or arrays."""

    def __len__(self) -> int:
        return len(getattr(self, dataclasses.fields(self)[0].name))

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The examples at these positions, in this order."""
        of = lambda column: column[indices] if isinstance(column, np.ndarray) else tuple(column[i] for i in indices)
        return type(self)(*(of(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def contents(self) -> Iterator[bytes]:
        """What of each example must not stand in two splits: its input, whatever its label."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """Of every column."""
        digest = hashlib.sha256()
        for field in dataclasses.fields(self):
            column = getattr(self, field.name)
            if isinstance(column, np.ndarray):
                digest.update(f"{field.name} {column.dtype} {column.shape}\n".encode())
                digest.update(column.tobytes())
            else:
                digest.update(f"{field.name} {json.dumps(column, default=_plain)}\n".encode())
        return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else dataclasses.asdict(value)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledTexts(Examples):
    """Texts to classify.

    Attributes:
      texts: none of them blank.
      labels: int32 [examples], indices of the task's classes.
    """

    texts: tuple[str, ...]
    labels: np.ndarray

    def contents(self) -> Iterator[bytes]:
        return (text.encode() for text in self.texts)


@dataclasses.dataclass(frozen=True, eq=False)
class TaggedSentences(Examples):
    """Sentences with a label for every word.

    Attributes:
      words: of each sentence, at least one, none of them empty.
      tags: of each sentence, int32 [words], indices of the task's classes.
      documents: int32 [sentences], which document each is of; sentences of one follow each other.
    """

    words: tuple[tuple[str, ...], ...]
    tags: tuple[np.ndarray, ...]
    documents: np.ndarray

    def contents(self) -> Iterator[bytes]:
        return ("\0".join(words).encode() for words in self.words)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A passage of a context: `context[start : start + len(text)] == text`."""

    start: int
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Questions(Examples):
    """Questions that a passage of a context answers, or none.

    Attributes:
      ids: all different.
      questions, contexts: none of them blank.
      answers: of each question those that are right; none where the context has no answer.
    """

    ids: tuple[str, ...]
    questions: tuple[str, ...]
    contexts: tuple[str, ...]
    answers: tuple[tuple[Answer, ...], ...]

    def contents(self) -> Iterator[bytes]:
        return (context.encode() for context in self.contexts)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side of a conversation says; `role` is system, user or assistant, and the last is to be learned."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations(Examples):
    """Dialogues, or prompts with their targets, which are dialogues of a user's and an assistant's turn.

    Attributes:
      turns: of each, at least one of the assistant's.
    """

    turns: tuple[tuple[Turn, ...], ...]

    def contents(self) -> Iterator[bytes]:
        said = lambda turns: [(turn.role, turn.text) for turn in turns if turn.role != "assistant"]
        return (json.dumps(said(turns) or dataclasses.astuple(turns[0])).encode() for turns in self.turns)


@dataclasses.dataclass(frozen=True, eq=False)
class Images(Examples):
    """Images to classify.

    Attributes:
      pixels: uint8 or float32 [images, height, width, channels].
      labels: int32 [images], indices of the task's classes.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def contents(self) -> Iterator[bytes]:
        return (image.tobytes() for image in self.pixels)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Examples):
    """Plain texts, for perplexity."""

    texts: tuple[str, ...]

    def contents(self) -> Iterator[bytes]:
        return (text.encode() for text in self.texts)


E = TypeVar("E", bound=Examples, covariant=True)
_NOUNS = {
    LabelledTexts: "texts",
    TaggedSentences: "sentences",
    Questions: "questions",
    Conversations: "conversations",
    Images: "images",
    Documents: "documents",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Task(Generic[E]):
    """Examples to learn from, to choose by, and to test on.

    Invariants: no split is empty, but for those of Documents that the user left out.

    Attributes:
      data: the `--data` value.
      classes: names of the labels, by their indices; empty where there are none.
      train, valid, test: the splits, examples of one kind.
      scheme: how tags mark entities, "IOB1", "IOB2" or "BIOES"; None where they do not.
    """

    data: str
    classes: tuple[str, ...]
    train: E
    valid: E
    test: E
    scheme: str | None = None

    @property
    def splits(self) -> dict[str, E]:
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @functools.cached_property
    def sha256(self) -> dict[str, str]:
        """Of each split."""
        return {name: examples.sha256 for name, examples in self.splits.items()}

    @property
    def description(self) -> str:
        """One line for a person."""
        counts = ", ".join(f"{len(examples):,} {name}" for name, examples in self.splits.items())
        classes = f"; {len(self.classes)} classes" * bool(self.classes) + f" in {self.scheme}" * bool(self.scheme)
        return f"{self.data}: {_NOUNS[type(self.train)]}: {counts}{classes}"
