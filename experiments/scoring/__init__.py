"""Scores of what a model predicts, with intervals: as text, for JSON, and in experiments.plots as a figure.

scores = label_scores(true, predicted, task.classes, "texts")
print(scores.text(), scores.as_dict(), scores.average("macro").f1, scores.accuracy.low)
entity_scores(true_tags, predicted_tags)        # tags by sentence, as text
passage_scores(task.test, answers)              # exact match and F1 of SQuAD
perplexity(nats, pieces)                        # summed loss of each text, and of how many pieces
"""

from experiments.scoring.classes import AVERAGES, ClassScores, Scores, entity_scores, label_scores
from experiments.scoring.intervals import Estimate, mean, perplexity, share
from experiments.scoring.passages import PassageScores, passage_scores

__all__ = [
    "AVERAGES",
    "ClassScores",
    "Estimate",
    "PassageScores",
    "Scores",
    "entity_scores",
    "label_scores",
    "mean",
    "passage_scores",
    "perplexity",
    "share",
]
