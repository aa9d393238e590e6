"""Exact match and F1 of passages of text, as SQuAD defines them.

References:
  Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016, §6.1.
  Rajpurkar, Jia and Liang, "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018, §5.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.scoring.intervals import Estimate, mean, share
from experiments.tasks.examples import Questions

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class PassageScores:
    """Scores of answers.

    Attributes:
      exact: share of answers that are one of the right ones.
      f1: mean of the best agreement in words with one of the right ones.
      by_kind: both for questions with an answer ("answered") and without one ("unanswerable"), those that there are.
    """

    exact: Estimate
    f1: Estimate
    by_kind: dict[str, tuple[Estimate, Estimate]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """A table for the terminal."""
        from q8jax.report import aligned

        rows = [("questions", "exact match", "F1", "count")]
        for name, (exact, f1) in {"all": (self.exact, self.f1), **self.by_kind}.items():
            rows.append((name, exact.text(), f1.text(), f"{exact.count:,}"))
        return "\n".join(aligned(rows))


def passage_scores(examples: Questions, predicted: Sequence[str]) -> PassageScores:
    """Scores of predicted answers, a text for each question, empty for none."""
    right = [[answer.text for answer in answers] for answers in examples.answers]
    exact = np.array([_best(exact_match, one, texts) for one, texts in zip(predicted, right, strict=True)])
    f1 = np.array([_best(word_f1, one, texts) for one, texts in zip(predicted, right, strict=True)])
    has_answer = np.array([bool(texts) for texts in right])
    kinds = {"answered": has_answer, "unanswerable": ~has_answer}
    both = lambda which: (share(int(exact[which].sum()), int(which.sum())), mean(f1[which]))
    return PassageScores(
        *both(np.ones_like(has_answer)), {name: both(which) for name, which in kinds.items() if which.any()}
    )


def exact_match(predicted: str, right: str) -> float:
    """1 where both are the same but for case, punctuation, articles and blanks, else 0."""
    return float(_words(predicted) == _words(right))


def word_f1(predicted: str, right: str) -> float:
    """F1 of the words of an answer; where one of them has none, whether neither has."""
    ours, theirs = _words(predicted), _words(right)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))


def _best(score: Any, predicted: str, right: Sequence[str]) -> float:
    # One that is nothing but articles and punctuation is not to be matched.
    return max(score(predicted, one) for one in ([text for text in right if _words(text)] or [""]))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()
