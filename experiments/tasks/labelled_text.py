"""Text classification: `csv:FILE`, `tsv:FILE` and `jsonl:FILE`, a text and a label in each row.

`text=` and `label=` name the columns, "text" and "label" unless said. `header=no` is for files without a first row of
names: columns are then counted from 1, the text first and the label second unless said. `encoding=` is of the file,
utf-8 unless said. In tab-separated files a quote is a character like any other.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator

import numpy as np

from experiments.data.spec import nearest
from experiments.tasks.examples import LabelledTexts, Task
from experiments.tasks.lines import json_objects, malformed, read_text, text_field
from experiments.tasks.spec import Spec
from experiments.tasks.splits import split_task

OPTIONS = {"text": "", "label": "", "header": "yes", "encoding": "utf-8"}
JSON_OPTIONS = {"text": "text", "label": "label"}
Row = tuple[str, str]


def load(spec: Spec) -> Task[LabelledTexts]:
    """Reads a task.

    Raises:
      ValueError: a file is missing, or not what is expected, with the line.
    """
    files = spec.find((f".{spec.kind}",))
    of = _json_rows if spec.kind == "jsonl" else _rows
    return task(spec, {split: list(of(spec, path)) for split, path in files.items()})


def task(spec: Spec, rows: dict[str, list[Row]]) -> Task[LabelledTexts]:
    """The task of (text, label) pairs by split; classes are the labels of all splits, numbers in their order."""
    labels = {label for _, label in itertools.chain(*rows.values())}
    is_number = all(label.isdecimal() for label in labels)
    classes = tuple(sorted(labels, key=lambda label: (int(label) if is_number else 0, label)))
    if len(classes) < 2:
        raise ValueError(f"{spec.flag}: {len(classes)} classes are too few to tell apart, choose another label=.")
    index = {name: i for i, name in enumerate(classes)}
    examples = {
        split: LabelledTexts(
            texts=tuple(text for text, _ in found), labels=np.array([index[label] for _, label in found], np.int32)
        )
        for split, found in rows.items()
    }
    return split_task(spec.data, classes, examples)


def _rows(spec: Spec, path: str) -> Iterator[Row]:
    if spec.options["header"] not in ("yes", "no"):
        raise ValueError(f"{spec.flag}: header={spec.options['header']} must be yes or no.")
    try:
        text = read_text(path, spec.options["encoding"])
    except LookupError:
        raise ValueError(
            f"{spec.flag}: encoding={spec.options['encoding']} is unknown, write utf-8 or latin-1 for instance."
        ) from None
    stream = io.StringIO(text, newline="")
    if spec.kind == "tsv":
        reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(stream, strict=True)
    header: list[str] | None = None
    at = (-1, -1)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise malformed(path, line, f"is not a row ({error}): expected cells in matching quotes.") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells if spec.options["header"] == "yes" else [str(i + 1) for i in range(len(cells))]
            at = _columns(spec, path, header)
            if spec.options["header"] == "yes":
                continue
        if len(cells) != len(header):
            raise malformed(path, line, f"expected {len(header)} columns as in the first row, not {len(cells)}.")
        found = cells[at[0]], cells[at[1]].strip()
        for name, cell in zip(("text", "label"), found):
            if not cell.strip():
                raise malformed(path, line, f"has no {name}: fill it in, or leave the row out.")
        yield found


def _columns(spec: Spec, path: str, header: list[str]) -> tuple[int, int]:
    """Positions of text and label."""
    defaults = {"text": "1", "label": "2"} if spec.options["header"] == "no" else {"text": "text", "label": "label"}
    names = {option: spec.options[option] or default for option, default in defaults.items()}
    for option, name in names.items():
        if name not in header:
            raise malformed(
                path,
                1,
                f"there is no column {name!r}{nearest(name, header)}: give {option}= one of {', '.join(header)}.",
            )
    return header.index(names["text"]), header.index(names["label"])


def _json_rows(spec: Spec, path: str) -> Iterator[Row]:
    text, label = spec.options["text"], spec.options["label"]
    for line, row in json_objects(path):
        if not isinstance(row.get(label), (str, int, bool)) or not str(row[label]).strip():
            raise malformed(
                path, line, f"expected a text or a whole number under {label!r}, not {row.get(label)!r:.40}."
            )
        yield text_field(path, line, row, text), str(row[label]).strip()
