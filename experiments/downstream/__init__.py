"""Downstream tasks of models: what each asks of a model and how it is scored, and one step of learning it.

head = head_of(stored.purpose, subwords)
rows = head.encode(task.test)
report = evaluate(head, model, task.test, Batches(rows, 32))
print(report.text)
"""

from experiments.downstream.evaluation import evaluate, guess
from experiments.downstream.heads import Head, Report, head_of

__all__ = ["Head", "Report", "evaluate", "guess", "head_of"]
