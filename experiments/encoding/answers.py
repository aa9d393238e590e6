"""Questions with the windows of their contexts as pieces, and passages of text from what a model says of these.

References:
  Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019, §4.2 and §4.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.encoding.rows import IGNORED, Column, Rows
from experiments.encoding.subwords import Subwords
from experiments.tasks.examples import Answer, Questions

_QUESTION = 64  # pieces
_OVERLAP = 2  # one piece of context in so many is in the window before as well


def encode_questions(examples: Questions, subwords: Subwords, *, length: int) -> Rows:
    """Rows of a question and a window of its context each, the windows overlapping by half.

    Args:
      examples: questions; the first answer of each is what is to be learned.
      subwords: makes pieces, and knows how two texts are put together.
      length: most positions of a row.

    Returns:
      Columns by position: `ids`; `types`, to which text a piece belongs; `begin` and `finish`, the characters of the
      context that a piece is made of, IGNORED for others. And by row, int32 [rows]: `start` and `end`, positions of
      the first and last piece of the answer, both 0 where it is not wholly in this window; `question`, the number of
      the example. Questions of more than 64 pieces lose their end, and are counted as cut.

    Raises:
      ValueError: `length` is too short, or the tokenizer puts nothing before a question, where no answer would be.
    """
    frame = subwords.pair
    if not frame.opening:
        raise ValueError(f"--tokenizer={subwords.name} begins no text with a piece that can say there is no answer.")
    special = len(frame.opening) + len(frame.middle) + len(frame.closing)
    if length - special - _QUESTION < 2:
        raise ValueError(f"--length={length} has no room for a question and a context, give {special + 2 * _QUESTION}.")
    asked = [pieces.ids for pieces in subwords.split(examples.questions)]
    contexts = dict(zip(distinct := list(dict.fromkeys(examples.contexts)), subwords.split(distinct), strict=True))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "types", "begin", "finish")}
    rows: list[tuple[int, int, int]] = []
    for number, ids in enumerate(asked):
        ids, context = ids[:_QUESTION], contexts[examples.contexts[number]]
        room = length - special - len(ids)
        head = len(frame.opening) + len(ids) + len(frame.middle)
        outside = np.full((head, 2), IGNORED, np.int32), np.full((len(frame.closing), 2), IGNORED, np.int32)
        sizes = (len(frame.opening), len(ids), len(frame.middle))
        answer = _positions(examples.answers[number], context.offsets)
        for first in _starts(len(context.ids), room):
            piece, offsets = context.ids[first : first + room], context.offsets[first : first + room]
            row = [*frame.opening, *ids, *frame.middle, *piece, *frame.closing]
            columns["ids"].append(np.array(row, np.int32))
            columns["types"].append(np.repeat(frame.types, (*sizes, len(piece), len(frame.closing))).astype(np.int32))
            begin, finish = np.concatenate([outside[0], offsets, outside[1]]).T
            columns["begin"].append(begin)
            columns["finish"].append(finish)
            is_inside = answer is not None and first <= answer[0] and answer[1] < first + len(piece)
            begins, ends = (head - first + place for place in answer) if answer and is_inside else (0, 0)
            rows.append((number, begins, ends))
    question, start, end = np.array(rows, np.int32).reshape(-1, 3).T
    return Rows(
        {
            **{name: Column(values, IGNORED if name in ("begin", "finish") else 0) for name, values in columns.items()},
            "start": Column(np.ascontiguousarray(start), IGNORED, counts=True),
            "end": Column(np.ascontiguousarray(end), IGNORED, counts=True),
            "question": Column(np.ascontiguousarray(question), IGNORED, counts=True),
        },
        sum(len(ids) > _QUESTION for ids in asked),
    )


def answer_texts(
    examples: Questions,
    rows: Rows,
    start: Sequence[np.ndarray],
    end: Sequence[np.ndarray],
    *,
    longest: int = 30,
    may_be_none: bool,
) -> list[str]:
    """The passage that a model takes for the answer to each question.

    Over all windows of a question, the passage of a context with the largest sum of both logits; nothing where position
    0 has a larger one in the window in which it has its least.

    Args:
      examples: that the rows were made of.
      rows: by `encode_questions`.
      start, end: for each row the logits of each position, float [at least its length].
      longest: most pieces of a passage.
      may_be_none: whether there may be no answer, as in SQuAD 2.0.

    Returns:
      For each question a text, empty for no answer.
    """
    best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(examples)
    nothing = np.full(len(examples), np.inf)
    columns = (rows.columns[name].values for name in ("question", "begin", "finish"))
    for question, begin, finish, first, last in zip(*columns, start, end, strict=True):
        inside = np.flatnonzero(begin != IGNORED)
        nothing[question] = min(nothing[question], float(first[0]) + float(last[0]))
        if not len(inside):
            continue
        scores = np.asarray(first, np.float64)[inside][:, None] + np.asarray(last, np.float64)[inside]
        distance = np.arange(len(inside)) - np.arange(len(inside))[:, None]
        scores[(distance < 0) | (distance >= longest)] = -np.inf
        i, j = np.unravel_index(np.argmax(scores), scores.shape)
        best[question] = max(best[question], (float(scores[i, j]), int(begin[inside[i]]), int(finish[inside[j]])))
    return [
        "" if may_be_none and none > score else context[begin:finish]
        for context, none, (score, begin, finish) in zip(examples.contexts, nothing.tolist(), best, strict=True)
    ]


def _starts(pieces: int, room: int) -> range:
    """Where windows begin, the last of them with the last piece."""
    step = max(1, room - room // _OVERLAP)
    return range(0, max(1, pieces - room + step), step)


def _positions(answers: Sequence[Answer], offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last piece of the first answer; None where there is no answer, or no piece of it."""
    if not answers:
        return None
    start, stop = answers[0].start, answers[0].start + len(answers[0].text)
    touched = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None
