"""Questions with passages that answer them, in the JSON of SQuAD: `squad:DIR` or `squad:train=…,valid=…`.

Version 1.1, or 2.0, where questions may have no answer. Every answer must stand in its context where it says so.

References:
  Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016.
  Rajpurkar, Jia and Liang, "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018.
"""

from __future__ import annotations

from typing import Any

import orjson

from experiments.tasks.examples import Answer, Questions, Task
from experiments.tasks.lines import read_text
from experiments.tasks.spec import Spec
from experiments.tasks.splits import split_task

OPTIONS: dict[str, str] = {}


def load(spec: Spec) -> Task[Questions]:
    """Reads a task.

    Raises:
      ValueError: a file is missing, or not what is expected, with the place in it.
    """
    examples = {split: read(path) for split, path in spec.find((".json",)).items()}
    return split_task(spec.data, (), examples)


def read(path: str) -> Questions:
    """The questions of a file.

    Raises:
      ValueError: it is not of this form, an id comes twice, or an answer is not in its context.
    """
    try:
        stored = orjson.loads(read_text(path))
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: is not JSON ({error.msg}): expected the JSON of SQuAD.") from error
    rows: dict[str, tuple[str, str, tuple[Answer, ...]]] = {}
    for i, article in enumerate(_get(path, "", stored, "data", list)):
        for j, paragraph in enumerate(_get(path, f"data[{i}]", article, "paragraphs", list)):
            place = f"data[{i}].paragraphs[{j}]"
            context = _get(path, place, paragraph, "context", str)
            for k, question in enumerate(_get(path, place, paragraph, "qas", list)):
                here = f"{place}.qas[{k}]"
                name = _get(path, here, question, "id", str)
                if name in rows:
                    raise ValueError(
                        f"{path}: {here}.id {name!r} is that of another question, expected ids that differ."
                    )
                text = _get(path, here, question, "question", str)
                rows[name] = text.strip(), context, _answers(path, here, question, context)
    columns = zip(*((name, *row) for name, row in rows.items())) if rows else ((),) * 4
    ids, questions, contexts, answers = columns
    return Questions(ids, questions, contexts, answers)


def _answers(path: str, place: str, question: dict[str, Any], context: str) -> tuple[Answer, ...]:
    found = []
    for i, answer in enumerate(_get(path, place, question, "answers", list)):
        here = f"{place}.answers[{i}]"
        start, text = _get(path, here, answer, "answer_start", int), _get(path, here, answer, "text", str)
        if start < 0 or context[start : start + len(text)] != text:
            there = context[max(start, 0) :][: len(text)]
            raise ValueError(f"{path}: {here} is {text!r:.60}, but at {start} the context has {there!r:.60}.")
        found.append(Answer(start, text))
    if bool(found) == bool(question.get("is_impossible", False)):
        expected = "no answers" if found else "answers, or is_impossible to be true"
        raise ValueError(f"{path}: {place} must have {expected}.")
    return tuple(found)


def _get(path: str, place: str, parent: Any, name: str, kind: type) -> Any:
    value = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
        names = {list: "a list", str: "a text", int: "a whole number"}
        raise ValueError(f"{path}: {f'{place}.{name}'.lstrip('.')} must be {names[kind]}, as in the JSON of SQuAD.")
    return value
