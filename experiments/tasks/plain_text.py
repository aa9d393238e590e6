"""Plain text, for perplexity: `text:FILES` or `text:test=FILES`, a path or a glob in each place.

A file is a document. Where validation and test are not given, and there are too few files to split by file, a document
is a paragraph. A split that is not given beside `test=` is empty, for a model that is only measured.
"""

from __future__ import annotations

from experiments.data.text import MIN_FILES_TO_SPLIT_BY_FILE, find_files
from experiments.tasks.examples import Documents, Task
from experiments.tasks.lines import read_text
from experiments.tasks.spec import SPLITS, Spec, check_file
from experiments.tasks.splits import split_task

OPTIONS: dict[str, str] = {}


def load(spec: Spec) -> Task[Documents]:
    """Reads a task.

    Raises:
      ValueError: no file is named or matches, or one is not UTF-8 or empty.
    """
    patterns = {"train": spec.path} if spec.path else spec.files
    if not patterns:
        raise ValueError(f"{spec.flag}: name the files, as in text:FILES or text:test=FILES.")
    texts = {split: _texts(spec.flag, pattern) for split, pattern in patterns.items()}
    if set(texts) == {"train"}:
        if len(texts["train"]) < MIN_FILES_TO_SPLIT_BY_FILE:
            texts = {"train": [paragraph for text in texts["train"] for paragraph in _paragraphs(text)]}
        return split_task(spec.data, (), {"train": Documents(tuple(texts["train"]))})
    train, valid, test = (Documents(tuple(texts.get(split, ()))) for split in SPLITS)
    return Task(spec.data, (), train, valid, test)


def _texts(flag: str, pattern: str) -> list[str]:
    paths = sorted(find_files(pattern))
    if not paths:
        raise ValueError(f"{flag}: no file matches {pattern!r}, check the path.")
    texts = []
    for path in paths:
        check_file(flag, path)
        texts.append(read_text(path))
        if not texts[-1].strip():
            raise ValueError(f"{flag}: {path} is empty, leave it out.")
    return texts


def _paragraphs(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    joined = "\n".join(lines)
    return [paragraph.strip("\n") for paragraph in joined.split("\n\n") if paragraph.strip()]
