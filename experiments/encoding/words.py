"""Words with labels, as pieces: the first piece of a word carries its label, and every word is labelled once.

What is longer than a row is cut into windows that overlap, so that words near a cut are read with what stands around
them; of an overlap each window labels its half.

References:
  Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019, §5.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.encoding.rows import IGNORED, Column, Rows
from experiments.encoding.subwords import Subwords
from experiments.tasks.examples import TaggedSentences

CASINGS = ("none", "no letters", "lower", "capitalized", "upper", "mixed")
_OVERLAP = 4  # at most one piece in so many of a row is there for what follows it


def encode_words(examples: TaggedSentences, subwords: Subwords, *, length: int, by_document: bool = False) -> Rows:
    """Rows of tagged words.

    Args:
      examples: sentences.
      subwords: makes pieces.
      length: most positions of a row, those around the words included.
      by_document: whether rows go on over the ends of sentences, so that a word is read with those of others around it.

    Returns:
      Columns by position: `ids`; `labels`, the class at the first piece of each word that the row is to label, else
      IGNORED; `word`, the number of that word, counted through all sentences, else IGNORED; `casing`, how a piece's
      word is written, for models that read no capitals: an index of CASINGS. A word of more pieces than a row holds
      loses its last ones, and is counted as cut.

    Raises:
      ValueError: `length` leaves no room for words.
    """
    frame = subwords.single
    room = length - len(frame.opening) - len(frame.closing)
    if room < 1:
        raise ValueError(f"--length={length} has no room for words between {length - room} special pieces, raise it.")
    words = list(itertools.chain(*examples.words))
    labels = np.concatenate([*examples.tags, np.zeros(0, np.int32)])
    pieces = subwords.words(words)
    cut = sum(len(piece) > room for piece in pieces)
    pieces = [piece[:room] for piece in pieces]
    casings = np.array([casing(word) for word in words], np.int32)
    sizes = np.array([len(piece) for piece in pieces], np.int32)
    columns: dict[str, list[np.ndarray]] = {"ids": [], "labels": [], "word": [], "casing": []}
    before, after = (np.full(len(ids), IGNORED, np.int32) for ids in (frame.opening, frame.closing))
    for start, stop, first, last in _windows(_units(examples, by_document), sizes.tolist(), room):
        numbers = np.arange(start, stop, dtype=np.int32)
        word = np.full(int(sizes[start:stop].sum()), IGNORED, np.int32)
        heads = np.concatenate([[0], np.cumsum(sizes[start : stop - 1])])
        word[heads] = np.where((first <= numbers) & (numbers < last), numbers, IGNORED)
        word = np.concatenate([before, word, after])
        columns["ids"].append(np.array([*frame.opening, *np.concatenate(pieces[start:stop]), *frame.closing], np.int32))
        columns["word"].append(word)
        columns["labels"].append(np.where(word == IGNORED, IGNORED, labels[word]).astype(np.int32))
        shape = np.repeat(casings[start:stop], sizes[start:stop])
        columns["casing"].append(np.concatenate([0 * before, shape, 0 * after]).astype(np.int32))
    counting = {"labels", "word"}
    return Rows({k: Column(v, IGNORED if k in counting else 0, k in counting) for k, v in columns.items()}, cut)


def word_predictions(examples: TaggedSentences, rows: Rows, predicted: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Predicted classes of words from those of pieces.

    Args:
      examples: that the rows were made of.
      rows: by `encode_words`.
      predicted: for each row the class at each position, int [at least its length].

    Returns:
      For each sentence int32 [words], as `examples.tags`.
    """
    sizes = [len(words) for words in examples.words]
    flat = np.full(sum(sizes), IGNORED, np.int32)
    for word, classes in zip(rows.columns["word"].values, predicted, strict=True):
        heads = word != IGNORED
        flat[word[heads]] = classes[: len(word)][heads]
    return np.split(flat, np.cumsum(sizes)[:-1])


def casing(word: str) -> int:
    """How a word is written, an index of CASINGS."""
    letters = [letter for letter in word if letter.isalpha()]
    if not letters:
        return 1
    if word.lower() == word:
        return 2
    if word.upper() == word and len(letters) > 1:
        return 4
    return 3 if letters[0].isupper() and not any(letter.isupper() for letter in letters[1:]) else 5


def _units(examples: TaggedSentences, by_document: bool) -> list[tuple[int, int]]:
    """First word and that beyond the last of each stretch that a row may hold together."""
    ends = np.cumsum([len(words) for words in examples.words]).tolist()
    if by_document:
        following = [*examples.documents[1:].tolist(), IGNORED]
        ends = [end for end, mine, next in zip(ends, examples.documents.tolist(), following) if mine != next]
    return list(itertools.pairwise([0, *ends]))


def _windows(units: Sequence[tuple[int, int]], sizes: Sequence[int], room: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields windows of words: start and stop of what is read, then of what is labelled.

    Args:
      units: start and stop of what may be read together.
      sizes: pieces of each word, from 1 to `room`.
      room: pieces that fit into a window.
    """
    for begin, end in units:
        cuts = [_reach(sizes, begin, end, begin, room)]
        while cuts[-1][1] < end:
            new = cuts[-1][1]
            start, left = new, min(room // _OVERLAP, room - sizes[new])
            while start - 1 > cuts[-1][0] and sizes[start - 1] <= left:
                start -= 1
                left -= sizes[start]
            cuts.append(_reach(sizes, start, end, start, room))
        # Each of two that overlap labels its half of what both have.
        borders = [begin, *((after[0] + before[1] + 1) // 2 for before, after in itertools.pairwise(cuts)), end]
        yield from ((*cut, *labelled) for cut, labelled in zip(cuts, itertools.pairwise(borders), strict=True))


def _reach(sizes: Sequence[int], start: int, end: int, stop: int, room: int) -> tuple[int, int]:
    """A window from `start` with as many words as fit."""
    while stop < end and sizes[stop] <= room:
        room -= sizes[stop]
        stop += 1
    return start, stop
