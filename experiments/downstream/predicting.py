"""What a model says of inputs without labels, batch by batch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flax import nnx

from experiments.downstream.evaluation import guess
from experiments.downstream.heads import Head, NextPieces, Spans, head_of
from experiments.encoding import Batches, Rows, Subwords, word_predictions
from experiments.models.folder import Stored
from experiments.tasks import Images, LabelledTexts, Questions, TaggedSentences

_WORD = re.compile(r"\w+|[^\w\s]")
_SHORTEST = 16
# Inputs that are sorted by length together, in batches.
_BATCHES = 32


@dataclasses.dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
      where: its file and line, to open a message about it.
      value: of a JSON line the object, else the text; or the pixels of an image.
    """

    where: str
    value: Any


class Predictor:
    """Runs a model over inputs.

    Args:
      model: for a task.
      stored: what its folder says.
      batch_size: inputs of a batch.

    Attributes:
      latencies: seconds of each batch, from its rows to its outputs; those that were compiled for are left out.

    Raises:
      ValueError: a model whose task has no such outputs.
    """

    def __init__(self, model: nnx.Module, stored: Stored, batch_size: int):
        self._model, self._batch_size = model, batch_size
        self._head = head_of(stored.purpose, Subwords.load(stored.tokenizer) if stored.tokenizer else None)
        if isinstance(self._head, NextPieces):
            raise ValueError("a model that continues text is run by experiments.generate.")
        self.latencies: list[float] = []
        self._compiled: set[int] = set()

    def __call__(self, inputs: Iterable[Input]) -> Iterator[dict[str, Any]]:
        """Yields what the model says of each input, in their order.

        Raises:
          ValueError: an input that is not what the task needs, by its file and line.
        """
        inputs = iter(inputs)
        while chunk := list(itertools.islice(inputs, _BATCHES * self._batch_size)):
            yield from _TASKS[self._head.purpose.task](self, chunk)

    def _found(self, rows: Rows) -> dict[str, list[np.ndarray]]:
        batches = Batches(rows, self._batch_size, self._lengths())
        outputs = []
        for batch in batches.once():
            length = batch["ids"].shape[1] if "ids" in batch else 0
            if length not in self._compiled:
                guess(self._head, self._model, batch)
                self._compiled.add(length)
            began = time.perf_counter()
            outputs.append(guess(self._head, self._model, batch))
            self.latencies.append(time.perf_counter() - began)
        return {name: batches.in_order(output[name] for output in outputs) for name in outputs[0]}

    def _lengths(self) -> tuple[int, ...] | None:
        """Always the same ones, so that as few as can be are compiled."""
        if self._head.purpose.size:
            return None
        longest = self._head.purpose.length
        several = itertools.takewhile(lambda length: length < longest, (_SHORTEST * 2**i for i in itertools.count()))
        return (*several, longest)

    def _texts(self, chunk: list[Input]) -> Iterator[dict[str, Any]]:
        texts = tuple(_text(one, "text") for one in chunk)
        found = self._found(self._head.encode(LabelledTexts(texts, np.zeros(len(texts), np.int32))))
        if "embedding" in found:
            yield from ({"embedding": [float(x) for x in row]} for row in found["embedding"])
        else:
            yield from self._classes(found)

    def _images(self, chunk: list[Input]) -> Iterator[dict[str, Any]]:
        examples = Images(np.stack([one.value for one in chunk]), np.zeros(len(chunk), np.int32))
        yield from self._classes(self._found(self._head.encode(examples)))

    def _classes(self, found: dict[str, list[np.ndarray]]) -> Iterator[dict[str, Any]]:
        classes = self._head.purpose.classes
        for index, probability in zip(found["class"], found["probability"], strict=True):
            yield {"label": classes[int(index)], "probability": float(probability)}

    def _words(self, chunk: list[Input]) -> Iterator[dict[str, Any]]:
        words = tuple(_words_of(one) for one in chunk)
        tags = tuple(np.zeros(len(sentence), np.int32) for sentence in words)
        examples = TaggedSentences(words, tags, np.arange(len(words), dtype=np.int32))
        rows = self._head.encode(examples)
        predicted = word_predictions(examples, rows, self._found(rows)["class"])
        classes, scheme = self._head.purpose.classes, self._head.purpose.scheme
        for sentence, indices in zip(words, predicted, strict=True):
            named = [classes[i] for i in indices]
            line: dict[str, Any] = {"words": list(sentence), "tags": named}
            if scheme is not None:
                line["entities"] = _entities(sentence, named)
            yield line

    def _answers(self, chunk: list[Input]) -> Iterator[dict[str, Any]]:
        questions, contexts = (tuple(_text(one, name) for one in chunk) for name in ("question", "context"))
        examples = Questions(tuple(map(str, range(len(chunk)))), questions, contexts, ((),) * len(chunk))
        rows = self._head.encode(examples)
        assert isinstance(self._head, Spans)
        yield from ({"answer": text} for text in self._head.answers(examples, rows, self._found(rows)))


_TASKS: dict[str, Callable[[Predictor, list[Input]], Iterator[dict[str, Any]]]] = {
    "sentence-embedding": Predictor._texts,
    "text-classification": Predictor._texts,
    "token-classification": Predictor._words,
    "question-answering": Predictor._answers,
    "image-classification": Predictor._images,
}


def read_lines(lines: Iterable[str], name: str, is_json: bool) -> Iterator[Input]:
    """Inputs of text, one a line; blank lines are left out.

    Raises:
      ValueError: a line that holds no JSON object.
    """
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        if not is_json:
            yield Input(where, line.strip())
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON ({error}): repair it.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where} holds no JSON object: write one a line.")
        yield Input(where, value)


def read_images(path: str) -> Iterator[Input]:
    """Inputs of a .npy file, uint8 or float32 [n, height, width(, channels)].

    Raises:
      ValueError: the file is no such array.
    """
    try:
        pixels = np.load(path, allow_pickle=False)
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.ndim not in (3, 4)
            or pixels.dtype not in (np.uint8, np.float32)
        ):
            raise ValueError("it is no uint8 or float32 [n, height, width(, channels)]")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--input={path} is no array of images ({error}): write it with numpy.save.") from error
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    yield from (Input(f"{path}, image {i}", image) for i, image in enumerate(pixels))


def _text(one: Input, name: str) -> str:
    if isinstance(one.value, str):
        if name != "text":
            raise ValueError(f'{one.where} is text, where {{"question": …, "context": …}} is needed: give JSON lines.')
        return one.value
    value = one.value.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{one.where} has no text under {name!r}: add it.")
    return value


def _words_of(one: Input) -> tuple[str, ...]:
    if isinstance(one.value, str) or "words" not in one.value:
        return tuple(_WORD.findall(_text(one, "text")))
    words = one.value["words"]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"{one.where} has no list of texts under 'words': repair it.")
    return tuple(words)


def _entities(words: tuple[str, ...], tags: list[str]) -> list[dict[str, Any]]:
    """Entities by their first and last word; an I begins one where it cannot go on with one, as scores have it."""
    from seqeval.metrics.sequence_labeling import get_entities

    found = get_entities(tags)
    return [
        {"type": kind, "first": int(first), "last": int(last), "text": " ".join(words[first : last + 1])}
        for kind, first, last in found
    ]
