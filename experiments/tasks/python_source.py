"""Kinds of tokens in Python source, a task without any download: `python-tokens`.

The words of a "sentence" are all tokens of one file of the standard library, their tags the exact types that Python's
own `tokenize` gives them: names, numbers, comments, every operator, and the line ends that end a statement or do not.
What has no text (dedents, the end) is left out. Python versions differ in their library and in some tokens: only
results on splits of equal digests can be compared.
"""

from __future__ import annotations

import io
import token
import tokenize

import numpy as np

from experiments.data.text import SEPARATOR, stdlib_corpus
from experiments.tasks.examples import TaggedSentences, Task
from experiments.tasks.spec import Spec
from experiments.tasks.splits import split_task


def load(spec: Spec) -> Task[TaggedSentences]:
    """Tokenizes the standard library, which takes some seconds; its files are split by their content."""
    corpus = stdlib_corpus()
    sources = sorted((corpus.train + corpus.validation).split(SEPARATOR)[:-1])
    files = [found for source in sources if (found := tokens(source.decode()))]
    classes = tuple(sorted({name for file in files for _, name in file}))
    index = {name: i for i, name in enumerate(classes)}
    examples = TaggedSentences(
        words=tuple(tuple(text for text, _ in file) for file in files),
        tags=tuple(np.array([index[name] for _, name in file], np.int32) for file in files),
        documents=np.arange(len(files), dtype=np.int32),
    )
    return split_task(spec.data, classes, {"train": examples})


def tokens(source: str) -> list[tuple[str, str]]:
    """Text and exact type of every token that has a text; none where the source is for another Python."""
    try:
        found = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return []
    return [(one.string, token.tok_name[one.exact_type]) for one in found if one.string]
