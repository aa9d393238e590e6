"""How the tags of words mark entities: the schemes, which of them some tags follow, and where one breaks it.

References:
  Ramshaw and Marcus, "Text Chunking using Transformation-Based Learning", 1995 (IOB1).
  Tjong Kim Sang and Veenstra, "Representing Text Chunks", 1999 (IOB2).
  Ratinov and Roth, "Design Challenges and Misconceptions in Named Entity Recognition", 2009, §3 (BILOU, here BIOES).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

OUTSIDE = "O"
_TAG = re.compile(r"[A-Z]-\S+")


class SchemeError(ValueError):
    """Tags follow no scheme.

    Attributes:
      sentence, word: where the first one is that breaks the scheme of most.
    """

    def __init__(self, sentence: int, word: int, text: str):
        super().__init__(text)
        self.sentence, self.word = sentence, word


def recognise(sentences: Sequence[Sequence[str]]) -> str | None:
    """The scheme of tags.

    Args:
      sentences: tags, of each sentence.

    Returns:
      "IOB2", "IOB1" or "BIOES"; None where tags do not mark entities, as those of parts of speech.

    Raises:
      SchemeError: they do, but follow none of these.
    """
    tags = {tag for sentence in sentences for tag in sentence}
    marking = {tag for tag in tags if _TAG.fullmatch(tag)}
    if not marking or (OUTSIDE not in tags and marking < tags):
        return None
    unknown = tags - marking - {OUTSIDE}
    broken = {}
    for scheme, may_follow in _SCHEMES.items():
        broken[scheme] = list(itertools.islice(_violations(sentences, may_follow, unknown), _MANY))
        if not broken[scheme]:
            return scheme
    scheme = min(broken, key=lambda name: len(broken[name]))
    number, word = broken[scheme][0]
    sentence = sentences[number]
    if word == len(sentence):
        word -= 1
        what = f"{sentence[word]} cannot end a sentence"
    elif word:
        what = f"{sentence[word]} cannot come after {sentence[word - 1]}"
    else:
        what = f"{sentence[word]} cannot begin a sentence"
    raise SchemeError(number, word, f"{what} in {scheme}, which fits the tags best")


def _violations(
    sentences: Iterable[Sequence[str]], may_follow: Callable[[str, str], bool], unknown: set[str]
) -> Iterator[tuple[int, int]]:
    for number, sentence in enumerate(sentences):
        # Nothing may stay open at the end, where an O would stand.
        for word, (before, tag) in enumerate(itertools.pairwise((OUTSIDE, *sentence, OUTSIDE))):
            if tag in unknown or not may_follow(before, tag):
                yield number, word


def _iob2(before: str, tag: str) -> bool:
    """An entity begins with B and goes on with I."""
    return tag[0] in "OB" or (tag[0] == "I" and before[0] in "BI" and tag[2:] == before[2:])


def _iob1(before: str, tag: str) -> bool:
    """An entity is all I, but begins with B where it follows another of its type."""
    return tag[0] in "OI" or (tag[0] == "B" and before[0] in "BI" and tag[2:] == before[2:])


def _bioes(before: str, tag: str) -> bool:
    """An entity begins with B and ends with E, or is one S."""
    is_open = before[0] in "BI"
    return (tag[0] in "IE" and tag[2:] == before[2:]) if is_open else tag[0] in "OBS"


_SCHEMES = {"IOB2": _iob2, "IOB1": _iob1, "BIOES": _bioes}
_MANY = 1000  # violations tell well enough which scheme fits best
