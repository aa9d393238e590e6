"""Precision, recall, F1 and support by class, with their averages, by scikit-learn; of entities by seqeval.

References:
  Sokolova and Lapalme, "A Systematic Analysis of Performance Measures for Classification Tasks", 2009, §3.
  Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task", 2003, §2 (entities).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.scoring.intervals import Estimate, share

AVERAGES = ("micro", "macro", "weighted")
_NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """Scores of one class, or an average of several.

    Attributes:
      name: of the class, or of the average.
      precision: share of what was predicted to be of it that is; None where nothing was.
      recall: share of what is of it that was predicted to be; None where nothing is, which has no support.
      f1: their harmonic mean; None where both are None, 0 where one of them is.
      support: how many are of it.
      predicted: how many were predicted to be.
    """

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of all classes.

    Averages are over the classes that are, or were predicted to be, there; a None counts as 0 in them. That is how
    scikit-learn and seqeval have them.

    Attributes:
      what: is counted, in the plural: "words", "texts", "entities".
      classes: a row for each class.
      averages: micro, macro and weighted by support.
      accuracy: share of right ones; None of entities, of which there may be more predicted than there are.
    """

    what: str
    classes: tuple[ClassScores, ...]
    averages: tuple[ClassScores, ...]
    accuracy: Estimate | None

    def average(self, name: str) -> ClassScores:
        """The average of this name, of AVERAGES."""
        return self.averages[AVERAGES.index(name)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, None where there is no value."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """A table for the terminal."""
        from q8jax.report import aligned

        cells = lambda row: [row.name, *map(_number, (row.precision, row.recall, row.f1)), f"{row.support:,}"]
        empty = [""] * 5
        rows = [[self.what, "precision", "recall", "F1", "support"], empty, *map(cells, self.classes), empty]
        rows += map(cells, self.averages)
        if self.accuracy is not None:
            rows.append(["accuracy", "", "", _number(self.accuracy.value), f"{self.accuracy.count:,}"])
            rows.append(["  95 % interval", "", "", f"{self.accuracy.low:.4f} to {self.accuracy.high:.4f}", ""])
        return "\n".join(aligned(rows))


def label_scores(true: np.ndarray, predicted: np.ndarray, classes: Sequence[str], what: str) -> Scores:
    """Scores of labels.

    Args:
      true, predicted: int [n], indices of classes.
      classes: their names.
      what: is labelled, in the plural.

    Raises:
      ValueError: there are none, they differ in number, or scikit-learn is not installed.
    """
    if true.shape != predicted.shape or true.ndim != 1 or not len(true):
        raise ValueError(
            f"Scores need as many predictions as labels, and some, not {predicted.shape} for {true.shape}."
        )
    with _needed("scikit-learn"):
        from sklearn import metrics
    support, guessed = (np.bincount(labels, minlength=len(classes)) for labels in (true, predicted))
    of = lambda average: metrics.precision_recall_fscore_support(
        true, predicted, labels=np.flatnonzero(support + guessed), average=average, zero_division=0.0
    )
    return _scores(what, classes, support, guessed, of, share(int(np.sum(true == predicted)), len(true)))


def entity_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Scores:
    """Scores of entities: one is right whose type, first and last word all are.

    Tags that follow no scheme, as a model may predict them, are read as the scripts of CoNLL do: an I begins an entity
    where it cannot go on with one.

    Args:
      true, predicted: tags, of each sentence, in IOB1, IOB2 or BIOES.

    Raises:
      ValueError: sentences differ in number or length, or seqeval is not installed.
    """
    if [len(tags) for tags in true] != [len(tags) for tags in predicted]:
        raise ValueError("Scores of entities need as many predicted tags as there are words in each sentence.")
    with _needed("seqeval"):
        from seqeval.metrics import sequence_labeling
    tags = [list(map(list, sentences)) for sentences in (true, predicted)]
    found = [[kind for kind, *_ in sequence_labeling.get_entities(sentences)] for sentences in tags]
    names = sorted({*found[0], *found[1]})
    support, guessed = (np.array([kinds.count(name) for name in names], np.int64) for kinds in found)
    of = lambda average: sequence_labeling.precision_recall_fscore_support(*tags, average=average, zero_division=0)
    return _scores("entities", names, support, guessed, of, None)


def _scores(
    what: str,
    names: Sequence[str],
    support: np.ndarray,
    guessed: np.ndarray,
    of: Callable[[str | None], tuple[Any, ...]],
    accuracy: Estimate | None,
) -> Scores:
    """Scores by what a library gives for the classes that are there, alone (None) or averaged."""
    there = np.flatnonzero(support + guessed).tolist()
    alone = dict(zip(there, zip(*of(None)[:3], strict=True), strict=True)) if there else {}
    row = lambda name, values, true, ours: ClassScores(
        name=name,
        precision=float(values[0]) if ours else None,
        recall=float(values[1]) if true else None,
        f1=float(values[2]) if true or ours else None,
        support=int(true),
        predicted=int(ours),
    )
    nothing = (0.0, 0.0, 0.0)
    return Scores(
        what=what,
        classes=tuple(row(name, alone.get(i, nothing), support[i], guessed[i]) for i, name in enumerate(names)),
        averages=tuple(row(name, of(name) if there else nothing, support.sum(), guessed.sum()) for name in AVERAGES),
        accuracy=accuracy,
    )


@contextlib.contextmanager
def _needed(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"Scores need {package}, run pip install 'q8jax[finetune]'.") from error


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"
