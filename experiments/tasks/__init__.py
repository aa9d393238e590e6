"""Downstream tasks: examples to learn from, to choose by and to test on, whatever form they are stored in.

task = load("conll2003")                        # or "csv:reviews.csv,text=review,label=stars", see SOURCES
task.classes, task.scheme                       # ("O", "B-LOC", …), "IOB2"
task.train.words[0], task.train.tags[0]         # ("EU", "rejects", …), int32 indices of classes
"""

from experiments.tasks.examples import (
    Answer,
    Conversations,
    Documents,
    Examples,
    Images,
    LabelledTexts,
    Questions,
    TaggedSentences,
    Task,
    Turn,
)
from experiments.tasks.loading import SOURCES, load

__all__ = [
    "SOURCES",
    "Answer",
    "Conversations",
    "Documents",
    "Examples",
    "Images",
    "LabelledTexts",
    "Questions",
    "TaggedSentences",
    "Task",
    "Turn",
    "load",
]
