"""What a task asks of a model: its inputs, what its logits should be, what they say, and how good that is.

A head works on batches of `experiments.encoding`, and on all models that are for its task. What it does with arrays is
pure and can be jitted.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.encoding import (
    IGNORED,
    TEMPLATES,
    Rows,
    Subwords,
    answer_texts,
    encode_conversations,
    encode_documents,
    encode_images,
    encode_questions,
    encode_texts,
    encode_words,
    word_predictions,
)
from experiments.models.purpose import Purpose
from experiments.scoring import Scores, entity_scores, label_scores, passage_scores, perplexity, share
from experiments.tasks import Conversations, Documents, Examples, Images, LabelledTexts, Questions, TaggedSentences

Batch = dict[str, Any]
Found = dict[str, list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Report:
    """How good what a model says of some examples is.

    Attributes:
      metric: the name of the number by which models are compared.
      value: that number, of which more is better.
      text: tables for a person.
      scores: all of it, for JSON.
      by_class: what can be drawn class by class, by what is counted.
    """

    metric: str
    value: float
    text: str
    scores: dict[str, Any]
    by_class: dict[str, Scores]


class Head(abc.ABC):
    """A task, of models that are for it.

    Attributes:
      reads: columns of a batch that arrays are computed from.
      purpose: of the models.
      subwords: their tokenizer; None of images.
    """

    reads: ClassVar[tuple[str, ...]]

    def __init__(self, purpose: Purpose, subwords: Subwords | None):
        self.purpose = purpose
        self._subwords = subwords

    @property
    def subwords(self) -> Subwords:
        assert self._subwords is not None
        return self._subwords

    @abc.abstractmethod
    def encode(self, examples: Any) -> Rows:
        """Rows of examples."""

    @abc.abstractmethod
    def logits(self, model: Any, batch: Batch) -> tuple[jax.Array, ...]:
        """What the model makes of a batch: float32 [..., classes] each."""

    @abc.abstractmethod
    def labels(self, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """For each of `logits` the right classes, int32 [...], and float32 [...], how much each of them counts."""

    @abc.abstractmethod
    def guesses(self, logits: tuple[jax.Array, ...], batch: Batch) -> dict[str, jax.Array]:
        """What logits say, an array [rows, ...] each."""

    @abc.abstractmethod
    def score(self, examples: Any, rows: Rows, found: Found) -> Report:
        """How good guesses, of each row, are."""

    def of(self, batch: Batch) -> Batch:
        """The columns of a batch that are read."""
        return {name: batch[name] for name in self.reads if name in batch}

    def loss(self, logits: tuple[jax.Array, ...], batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats, summed over what counts, and how much that is; float32 []."""
        sums, counts = [], []
        for each, (labels, weights) in zip(logits, self.labels(batch), strict=True):
            sums.append(jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(each, labels)))
            counts.append(jnp.sum(weights))
        return sum(sums[1:], sums[0]), sum(counts[1:], counts[0])


def _counted(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    counts = labels != IGNORED
    return jnp.where(counts, labels, 0), counts.astype(jnp.float32)


def _chosen(logits: jax.Array) -> dict[str, jax.Array]:
    """The likeliest class, and how likely it is."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return {"class": jnp.argmax(logits, axis=-1).astype(jnp.int32), "probability": jnp.max(probabilities, axis=-1)}


class _Classes(Head):
    """A class for each row."""

    what: ClassVar[str]

    def labels(self, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], ...]:
        return (_counted(batch["labels"]),)

    def guesses(self, logits: tuple[jax.Array, ...], batch: Batch) -> dict[str, jax.Array]:
        return _chosen(logits[0])

    def score(self, examples: Any, rows: Rows, found: Found) -> Report:
        scores = label_scores(examples.labels, np.array(found["class"]), self.purpose.classes, self.what)
        assert scores.accuracy is not None
        return Report(
            "accuracy", scores.accuracy.value, scores.text(), {self.what: scores.as_dict()}, {self.what: scores}
        )


class TextClasses(_Classes):
    """A class for each text."""

    reads = ("ids", "mask", "labels")
    what = "texts"

    def encode(self, examples: LabelledTexts) -> Rows:
        return encode_texts(examples, self.subwords, length=self.purpose.length)

    def logits(self, model: Any, batch: Batch) -> tuple[jax.Array, ...]:
        return (model(batch["ids"], batch["mask"]),)


class ImageClasses(_Classes):
    """A class for each image."""

    reads = ("pixels", "labels")
    what = "images"

    def encode(self, examples: Images) -> Rows:
        if examples.pixels.shape[1:] != self.purpose.size:
            sizes = examples.pixels.shape[1:], self.purpose.size
            raise ValueError(f"Images are {sizes[0]}, where the model takes {sizes[1]}: scale them.")
        return encode_images(examples, (np.array(self.purpose.mean, np.float32), np.array(self.purpose.sd, np.float32)))

    def logits(self, model: Any, batch: Batch) -> tuple[jax.Array, ...]:
        return (model(batch["pixels"]),)


class WordTags(Head):
    """A class for each word; entities, where these mark them."""

    reads = ("ids", "mask", "casing", "labels")

    def encode(self, examples: TaggedSentences) -> Rows:
        purpose = self.purpose
        return encode_words(examples, self.subwords, length=purpose.length, by_document=purpose.by_document)

    def logits(self, model: Any, batch: Batch) -> tuple[jax.Array, ...]:
        told = (None, batch["casing"]) if self.purpose.casings else ()
        return (model(batch["ids"], batch["mask"], *told),)

    def labels(self, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], ...]:
        return (_counted(batch["labels"]),)

    def guesses(self, logits: tuple[jax.Array, ...], batch: Batch) -> dict[str, jax.Array]:
        return _chosen(logits[0])

    def score(self, examples: TaggedSentences, rows: Rows, found: Found) -> Report:
        predicted = word_predictions(examples, rows, found["class"])
        classes = self.purpose.classes
        words = label_scores(np.concatenate(examples.tags), np.concatenate(predicted), classes, "words")
        by_class, metric = {"words": words}, ("micro F1 of words", words)
        if self.purpose.scheme is not None:
            tags = lambda several: [[classes[i] for i in sentence] for sentence in several]
            by_class["entities"] = entity_scores(tags(examples.tags), tags(predicted))
            metric = "micro F1 of entities", by_class["entities"]
        return Report(
            metric[0],
            metric[1].average("micro").f1 or 0.0,
            "\n\n".join(scores.text() for scores in by_class.values()),
            {what: scores.as_dict() for what, scores in by_class.items()},
            by_class,
        )


class Spans(Head):
    """The passage of a context that answers a question."""

    reads = ("ids", "mask", "types", "start", "end")

    def encode(self, examples: Questions) -> Rows:
        return encode_questions(examples, self.subwords, length=self.purpose.length)

    def logits(self, model: Any, batch: Batch) -> tuple[jax.Array, ...]:
        return tuple(model(batch["ids"], batch["mask"], batch["types"]))

    def labels(self, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], ...]:
        return _counted(batch["start"]), _counted(batch["end"])

    def guesses(self, logits: tuple[jax.Array, ...], batch: Batch) -> dict[str, jax.Array]:
        return dict(zip(("start", "end"), logits, strict=True))

    def score(self, examples: Questions, rows: Rows, found: Found) -> Report:
        scores = passage_scores(examples, self.answers(examples, rows, found))
        return Report("F1 of answers", scores.f1.value, scores.text(), {"questions": scores.as_dict()}, {})

    def answers(self, examples: Questions, rows: Rows, found: Found) -> list[str]:
        """A text for each question, empty for none."""
        return answer_texts(examples, rows, found["start"], found["end"], may_be_none=self.purpose.may_be_none)


class NextPieces(Head):
    """What comes next in a text: only of what is to be learned of it."""

    reads = ("ids", "targets", "weights")

    def encode(self, examples: Conversations | Documents) -> Rows:
        length = self.purpose.length
        if isinstance(examples, Documents):
            return encode_documents(examples, self.subwords, length=length)
        template = TEMPLATES[self.purpose.template]
        return encode_conversations(examples, self.subwords, length=length, template=template, pack=False)

    def logits(self, model: Any, batch: Batch) -> tuple[jax.Array, ...]:
        return (model(batch["ids"]),)

    def labels(self, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], ...]:
        return ((batch["targets"], batch["weights"]),)

    def guesses(self, logits: tuple[jax.Array, ...], batch: Batch) -> dict[str, jax.Array]:
        nats = optax.softmax_cross_entropy_with_integer_labels(logits[0], batch["targets"])
        right = (jnp.argmax(logits[0], axis=-1) == batch["targets"]) | (batch["weights"] == 0)
        return {
            "nats": jnp.sum(batch["weights"] * nats, axis=1),
            "pieces": jnp.sum(batch["weights"], axis=1),
            "right": jnp.all(right, axis=1),
        }

    def score(self, examples: Conversations | Documents, rows: Rows, found: Found) -> Report:
        nats, pieces, right = (np.array(found[name]) for name in ("nats", "pieces", "right"))
        texts = pieces > 0
        of_pieces = perplexity(nats[texts], pieces[texts])
        lines = [f"perplexity of pieces  {of_pieces.text()}"]
        scores = {"perplexity": of_pieces.as_dict()}
        if isinstance(examples, Conversations):
            # Greedy decoding gives the target if and only if each piece of it is the likeliest after those before.
            exact = share(int(right[texts].sum()), int(texts.sum()))
            lines.append(f"targets that greedy decoding gives  {exact.text()}")
            scores["exact"] = exact.as_dict()
        return Report("negative log perplexity", -float(np.log(of_pieces.value)), "\n".join(lines), scores, {})


class Sentences(Head):
    """A vector for each text, of which nothing is right or wrong."""

    reads = ("ids", "mask")

    def encode(self, examples: LabelledTexts) -> Rows:
        return encode_texts(examples, self.subwords, length=self.purpose.length)

    def logits(self, model: Any, batch: Batch) -> tuple[jax.Array, ...]:
        return (model(batch["ids"], batch["mask"]),)

    def labels(self, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], ...]:
        raise ValueError("There is nothing to learn of sentence embeddings: choose another task.")

    def guesses(self, logits: tuple[jax.Array, ...], batch: Batch) -> dict[str, jax.Array]:
        return {"embedding": logits[0]}

    def score(self, examples: Any, rows: Rows, found: Found) -> Report:
        raise ValueError("There is nothing to score of sentence embeddings: choose another task.")


_HEADS: dict[str, type[Head]] = {
    "sentence-embedding": Sentences,
    "text-classification": TextClasses,
    "token-classification": WordTags,
    "question-answering": Spans,
    "text-generation": NextPieces,
    "image-classification": ImageClasses,
}
_TASKS: dict[type[Examples], str] = {
    LabelledTexts: "text-classification",
    TaggedSentences: "token-classification",
    Questions: "question-answering",
    Conversations: "text-generation",
    Documents: "text-generation",
    Images: "image-classification",
}


def task_of(examples: Examples) -> str:
    """The task, of `purpose.TASKS`, that examples are of."""
    return _TASKS[type(examples)]


def head_of(purpose: Purpose, subwords: Subwords | None) -> Head:
    """The head of models with a purpose.

    Raises:
      ValueError: a purpose for which there is none, as entity pairs, of which no task has examples.
    """
    if purpose.task not in _HEADS:
        raise ValueError(f"There are no examples of {purpose.task}: choose {', '.join(_HEADS)}.")
    return _HEADS[purpose.task](purpose, subwords)
