"""Plain text for perplexity: every piece is predicted once, and with enough before it.

References:
  Baevski and Auli, "Adaptive Input Representations for Neural Language Modeling", 2019, §4.3 (context before what is
  scored).
"""

from __future__ import annotations

import numpy as np

from experiments.encoding.rows import Column, Rows
from experiments.encoding.subwords import Subwords
from experiments.tasks.examples import Documents

_CONTEXT = 2  # one position in so many of a row is there to be read, not scored


def encode_documents(examples: Documents, subwords: Subwords, *, length: int) -> Rows:
    """Rows of windows of documents, the windows overlapping by half.

    A document is read from what the tokenizer opens texts with on, or else from the separator, so that its first piece
    is predicted too, and so is the separator at its end.

    Args:
      examples: documents.
      subwords: makes pieces.
      length: most positions of a row.

    Returns:
      Columns by position: `ids`, what is read; `targets`, what comes next; `weights`, float32, 1 for what is scored.
      And by row: `document`, int32 [rows], of which it is. All weights together are the number of pieces, of which
      each document has one more than its text.

    Raises:
      ValueError: `length` is below 2.
    """
    if length < 2:
        raise ValueError(f"--length={length} must be at least 2, for half of a row is there to be read only.")
    columns: dict[str, list[np.ndarray]] = {"ids": [], "targets": [], "weights": []}
    documents = []
    opening = subwords.single.opening or (subwords.separator,)
    for number, text in enumerate(examples.texts):
        # A text at a time: all pieces of all texts with their offsets would take much memory.
        [pieces] = subwords.split([text])
        ids = np.array([*opening, *pieces.ids, subwords.separator], np.int32)
        scored = len(opening) - 1
        while scored < len(ids) - 1:
            start = max(0, scored - length // _CONTEXT)
            stop = min(start + length, len(ids) - 1)
            columns["ids"].append(ids[start:stop])
            columns["targets"].append(ids[start + 1 : stop + 1])
            columns["weights"].append((np.arange(start, stop) >= scored).astype(np.float32))
            documents.append(number)
            scored = stop
    return Rows(
        {
            **{name: Column(values, counts=name == "weights") for name, values in columns.items()},
            "document": Column(np.array(documents, np.int32)),
        }
    )
