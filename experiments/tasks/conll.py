"""Sequence labels in columns, as of the shared tasks of CoNLL: `conll:DIR` or `conll:train=…,valid=…,test=…`.

A line is a word and what is known of it, parted by tabs or else by blanks: the word comes first, its tag last or in
the column that `tag=` counts from 1. A blank line ends a sentence, and a line whose word is -DOCSTART- a document.

References:
  Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task", 2003.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from experiments.tasks.examples import TaggedSentences, Task
from experiments.tasks.lines import lines, malformed
from experiments.tasks.schemes import OUTSIDE, SchemeError, recognise
from experiments.tasks.spec import Spec
from experiments.tasks.splits import split_task

OPTIONS = {"tag": ""}
_SUFFIXES = (".txt", ".conll", ".iob", ".bio", ".tsv")
_DOCUMENT = "-DOCSTART-"


@dataclasses.dataclass
class Sentence:
    """Words, their tags, the lines that these stand in, and the number of the document."""

    document: int
    words: list[str] = dataclasses.field(default_factory=list)
    tags: list[str] = dataclasses.field(default_factory=list)
    lines: list[int] = dataclasses.field(default_factory=list)


def load(spec: Spec) -> Task[TaggedSentences]:
    """Reads a task.

    Raises:
      ValueError: a file is missing, or not what is expected, with the line.
    """
    tag = spec.options["tag"]
    if tag and not (tag.isdecimal() and int(tag) > 0):
        raise ValueError(f"{spec.flag}: tag={tag} must be the number of a column, counted from 1.")
    files = spec.find(_SUFFIXES)
    return task(spec, files, {split: read(path, int(tag or 0)) for split, path in files.items()})


def read(path: str, tag: int = 0) -> list[Sentence]:
    """The sentences of a file.

    Args:
      path: the file.
      tag: the column of the tag, counted from 1; 0 for the last.

    Raises:
      ValueError: a line has too few columns, or another number than those before.
    """
    sentences: list[Sentence] = []
    columns, document = 0, 0
    current: Sentence | None = None
    for number, line in lines(path):
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            current = None
        elif cells[0] == _DOCUMENT:
            document, current = document + 1, None
        else:
            columns = columns or len(cells)
            least = max(tag, 2)
            if len(cells) != columns or columns < least or not (cells[0].strip() and cells[tag - 1].strip()):
                expected = f"{columns} columns as above" if columns >= least else f"at least {least} columns"
                raise malformed(path, number, f"expected {expected}, a word and its tag among them, not {line[:60]!r}.")
            if current is None:
                sentences.append(current := Sentence(document))
            current.words.append(cells[0].strip())
            current.tags.append(cells[tag - 1].strip())
            current.lines.append(number)
    return sentences


def task(spec: Spec, files: dict[str, str], read: dict[str, list[Sentence]]) -> Task[TaggedSentences]:
    """The task of sentences by split, all tags of one scheme."""
    everything = list(itertools.chain(*read.values()))
    try:
        scheme = recognise([sentence.tags for sentence in everything])
    except SchemeError as error:
        sentence = everything[error.sentence]
        path = next(files[split] for split, found in read.items() if any(sentence is one for one in found))
        raise malformed(path, sentence.lines[error.word], f"{error}: correct the tag.") from None
    tags = {tag for sentence in everything for tag in sentence.tags}
    classes = tuple(sorted(tags, key=lambda tag: (tag != OUTSIDE, tag[2:], tag) if scheme else (False, tag)))
    index = {name: i for i, name in enumerate(classes)}
    examples = {
        split: TaggedSentences(
            words=tuple(tuple(sentence.words) for sentence in found),
            tags=tuple(np.array([index[tag] for tag in sentence.tags], np.int32) for sentence in found),
            documents=np.array([sentence.document for sentence in found], np.int32),
        )
        for split, found in read.items()
    }
    return split_task(spec.data, classes, examples, scheme=scheme)
