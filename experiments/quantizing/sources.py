"""The model that is quantized, in float, and what it is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from experiments import stored, tasks
from experiments.downstream.heads import Head, head_of, task_of
from experiments.encoding import Batches, Subwords
from experiments.models import folder
from experiments.models.kinds import KINDS, Kind
from experiments.models.purpose import BYTES, Purpose
from experiments.quantizing.options import Options
from experiments.tasks.examples import LabelledTexts, TaggedSentences
from q8jax.policy import Policy

_EMBEDDING = "sentence-embedding"


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A model and its data.

    Attributes:
      kind, shapes, purpose: of the model.
      weights: float32 parameters, by path.
      compute: dtype of activations.
      tokenizer: what `encoding.Subwords.load` takes, or ''.
      head: what is asked of the model.
      test: the examples that it is measured on.
      batches: of them.
      calibration: batches of the training split.
    """

    kind: Kind
    shapes: Any
    purpose: Purpose
    weights: Any
    compute: str
    tokenizer: str
    head: Head
    test: Any
    batches: Batches
    calibration: Sequence[Mapping[str, np.ndarray]]

    def model(self) -> nnx.Module:
        """The model anew, unquantized."""
        policy = Policy.parse(f".*->compute={self.compute}")
        model = folder.build(self.kind, self.shapes, self.purpose, policy)
        nnx.update(model, self.weights)
        return model


def load(options: Options) -> Source:
    """Reads what the flags name.

    Raises:
      ValueError: one sentence that names the flag, or the file, and the fix.
    """
    kind, shapes, purpose, weights, compute, tokenizer = _model(options.model)
    compute = options.compute or compute
    purpose = dataclasses.replace(purpose, length=options.length or purpose.length, policy="")
    try:
        task = tasks.load(options.task)
    except ValueError as error:
        raise ValueError(str(error).replace("--data=", "--task=")) from None
    train, test = task.train, task.test if len(task.test) else task.train
    if purpose.task == _EMBEDDING:
        train, test = _texts(train), _texts(test)
    elif task_of(train) != purpose.task:
        raise ValueError(f"--model={options.model} is for {purpose.task}, --task={options.task} for {task_of(train)}.")
    elif task.classes and task.classes != purpose.classes:
        raise ValueError(f"--task={options.task} has other classes than --model={options.model} was trained for.")
    head = head_of(purpose, Subwords.load(tokenizer) if tokenizer else None)
    if options.examples is not None:
        test = test.subset(range(min(options.examples, len(test))))
    # What is enough for the batches, each of which has one of a few lengths.
    train = train.subset(range(min(len(train), options.batches * options.batch_size)))
    longest = (purpose.length,) if tokenizer else None
    rows = Batches(head.encode(train), options.batch_size, longest)
    found = [{**head.of(batch), **_mask(batch)} for batch, _ in zip(rows.once(), range(options.batches))]
    batches = Batches(head.encode(test), options.batch_size, longest)
    return Source(kind, shapes, purpose, weights, compute, tokenizer, head, test, batches, found)


def _mask(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"mask": batch["mask"]} if "mask" in batch else {}


def _model(place: str) -> tuple[Kind, Any, Purpose, Any, str, str]:
    if not place.startswith(folder.PACKAGE) and stored.is_run(place):
        run = stored.restore(place)
        model = run.model("bf16")
        if run.config["tokenizer"] != "bytes":
            raise ValueError(f"--model={place} reads pieces of {run.config['tokenizer']}, and only bytes are known.")
        purpose = Purpose("text-generation", length=run.options.seq_len, tokenizer=BYTES)
        kind = KINDS["q8jax-transformer"]
        return kind, model.config, purpose, nnx.state(model, nnx.Param), "bfloat16", BYTES
    whole, found = folder.load(place, policy=Policy.parse("fp32"))
    compute = next(iter({recipe.compute for _, recipe in found.policy.rules}), "float32")
    return found.kind, found.shapes, found.purpose, nnx.state(whole, nnx.Param), compute, found.tokenizer


def _texts(examples: Any) -> LabelledTexts:
    """The texts of examples, of which a sentence embedder makes vectors."""
    if isinstance(examples, TaggedSentences):
        texts = tuple(" ".join(words) for words in examples.words)
    elif hasattr(examples, "texts"):
        texts = tuple(examples.texts)
    else:
        raise ValueError(f"Sentence embeddings are of texts, which {type(examples).__name__} are not.")
    return LabelledTexts(texts, np.zeros(len(texts), np.int32))
