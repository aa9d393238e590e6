"""Prompts with targets, and dialogues, for a model that predicts the next piece: only what is to be learned counts.

References:
  Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021 (several examples in a row).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from experiments.encoding.rows import Column, Rows
from experiments.encoding.subwords import Subwords
from experiments.tasks.examples import Conversations, Turn

_LEARNED = "assistant"


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are told apart.

    Attributes:
      openings: texts before a turn, by role; special pieces where the tokenizer knows them by these names.
      closing: texts after a turn; after one that is to be learned they are learned as well, as where to stop.
      ends: whether the separator of documents stands after a turn that is to be learned, and is learned.
    """

    openings: Mapping[str, tuple[str, ...]]
    closing: tuple[str, ...]
    ends: bool


_NOTHING: Mapping[str, tuple[str, ...]] = MappingProxyType({"system": (), "user": (), "assistant": ()})
TEMPLATES = MappingProxyType(
    {
        # The target follows the prompt at once: for prompts that end as the task wants them to.
        "plain": Template(_NOTHING, (), ends=True),
        "chatml": Template(
            {role: ("<|im_start|>", f"{role}\n") for role in _NOTHING}, ("<|im_end|>", "\n"), ends=False
        ),
    }
)


def encode_conversations(
    examples: Conversations, subwords: Subwords, *, length: int, template: Template, pack: bool
) -> Rows:
    """Rows of conversations, a piece predicted at each position.

    Args:
      examples: conversations.
      subwords: makes pieces.
      length: most positions of a row.
      template: how turns are told apart.
      pack: whether several share a row where they fit, in which case a model must let none see another by `segments`.

    Returns:
      Columns by position: `ids`, what is read; `targets`, what comes next; `weights`, float32, 1 where that is to be
      learned and 0 elsewhere; `segments`, the conversation counted from 1 in each row; `positions`, from 0 in each
      conversation. One that is too long loses its beginning, for its end is what is learned, and is counted as cut.
    """
    segments, cut = [], 0
    for turns in examples.turns:
        ids, weights = _pieces(turns, subwords, template)
        cut += len(ids) > length + 1
        segments.append((ids[-length - 1 :], weights[-length - 1 :]))
    sizes = [len(ids) - 1 for ids, _ in segments]
    together = _packed(sizes, length) if pack else [[i] for i in range(len(sizes))]
    join = lambda of: [np.concatenate([of(*segments[i]) for i in row]).astype(np.int32) for row in together]
    columns = {
        "ids": Column(join(lambda ids, _: ids[:-1])),
        "targets": Column(join(lambda ids, _: ids[1:])),
        "weights": Column([w.astype(np.float32) for w in join(lambda _, weights: weights[1:])], counts=True),
        "segments": Column(
            [np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), [sizes[i] for i in row]) for row in together]
        ),
        "positions": Column(join(lambda ids, _: np.arange(len(ids) - 1))),
    }
    return Rows(columns, cut)


def _pieces(turns: tuple[Turn, ...], subwords: Subwords, template: Template) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation, and 1 for those to be learned, int32 [pieces] both."""
    parts = [np.array(subwords.single.opening or (subwords.separator,), np.int32)]
    weights = [np.zeros(len(parts[0]), np.int32)]
    for turn in turns:
        is_learned = turn.role == _LEARNED
        opening = [subwords.special(text) for text in template.openings[turn.role]]
        said = [subwords.split([turn.text])[0].ids, *(subwords.special(text) for text in template.closing)]
        if is_learned and template.ends:
            said.append(np.array([subwords.separator], np.int32))
        for these, weight in ((opening, 0), (said, int(is_learned))):
            parts += these
            weights += [np.full(len(ids), weight, np.int32) for ids in these]
    ids, learned = np.concatenate(parts), np.concatenate(weights)
    # Nothing is learned from what is said after it.
    stop = np.flatnonzero(learned)[-1] + 1
    return ids[:stop], learned[:stop]


def _packed(sizes: list[int], room: int) -> list[list[int]]:
    """Which go together: the largest first, each where the least room is left that it fits into."""
    rows: list[list[int]] = []
    left: dict[int, list[int]] = {}
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [space for space, those in left.items() if those and space >= sizes[i]]
        if fitting:
            space = min(fitting)
            row = left[space].pop()
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        left.setdefault(space - sizes[i], []).append(row)
    return rows
