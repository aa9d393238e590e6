"""From checked flags to what a run is of: its task, its rows, and a model to begin with."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

from experiments import tasks
from experiments.downstream.heads import Head, head_of, task_of
from experiments.downstream.options import Options
from experiments.encoding import CASINGS, Batches, Subwords, bucket_lengths, image_statistics
from experiments.models import folder
from experiments.models.cnn import CnnConfig
from experiments.models.kinds import KINDS, Kind, policy_of
from experiments.models.purpose import BYTES, Purpose
from experiments.models.recurrent import RecurrentConfig
from experiments.tasks import Images, Questions, TaggedSentences
from experiments.training.precision import naming
from q8jax.policy import Policy

_PRESET_KINDS = {"cnn": "q8jax-cnn", "lstm": "q8jax-lstm"}


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A task and a model for it.

    Attributes:
      task: the examples.
      head: what they ask of the model.
      kind, shapes, purpose: of the model.
      tokenizer: what `encoding.Subwords.load` takes, or ''.
      policy: in which the model is trained.
      batches: by split.
    """

    task: tasks.Task[Any]
    head: Head
    kind: Kind
    shapes: Any
    purpose: Purpose
    tokenizer: str
    policy: Policy
    batches: dict[str, Batches]

    def model(self, options: Options) -> tuple[nnx.Module, tuple[str, ...]]:
        """The model before it is trained, and which of its variables are new though it was trained before.

        Raises:
          ValueError: weights that are not the model's, or a policy that does not fit it.
        """
        with naming(f"--precision={options.precision}"):
            model = folder.build(self.kind, self.shapes, self.purpose, self.policy, seed=options.seed)
        if options.is_preset:
            return model, ()
        with naming(f"--model={options.model}"):
            optional = folder.table(model).optional
            return model, folder.load_weights(model, folder.find(options.model), new=optional)


def prepare(options: Options) -> Setup:
    """Reads what the flags name, and checks that it fits together.

    Raises:
      ValueError: one sentence that names the flag, or the file, and the fix.
    """
    model = options.model
    kind, shapes, before = KINDS[_PRESET_KINDS.get(model, "bert")], None, None
    tokenizer = BYTES if model == "lstm" else ""
    if not options.is_preset:
        stored = folder.read(model)
        kind, shapes, before, tokenizer = stored.kind, stored.shapes, stored.purpose, stored.tokenizer
    with naming(f"--precision={options.precision}"):
        policy = policy_of(kind, options.precision, tuple(options.quantize))
    task = _task(options.task)
    wanted = task_of(task.train)
    if wanted not in kind.tasks:
        raise ValueError(f"--model={model} is for {' or '.join(kind.tasks)}, where --task={options.task} is {wanted}.")
    if not tokenizer and not isinstance(task.train, Images):
        raise ValueError(f"--model={model} has no tokenizer.json: put the one that it was trained with beside it.")
    subwords = Subwords.load(tokenizer) if tokenizer else None
    _check_goes_on(options, task, wanted, before)
    purpose = _purpose(options, task, wanted, subwords, before)
    purpose = dataclasses.replace(purpose, policy=str(policy))
    if shapes is None:
        shapes = _preset(model, task, subwords)
    _check_shapes(options, shapes, subwords)
    head = head_of(purpose, subwords)
    splits = {name: split for name, split in task.splits.items() if len(split)}
    if missing := sorted({"train", "valid", "test"} - splits.keys()):
        raise ValueError(f"--task={options.task} has no examples for {' and '.join(missing)}: name files for them.")
    with naming(f"--task={options.task}"):
        rows = {name: head.encode(split) for name, split in splits.items()}
    lengths = bucket_lengths(*rows.values())
    batches = {name: Batches(of, options.batch_size, lengths) for name, of in rows.items()}
    return Setup(task, head, kind, shapes, purpose, tokenizer, policy, batches)


def _task(name: str) -> tasks.Task[Any]:
    try:
        return tasks.load(name)
    except ValueError as error:
        # Of pretraining the flag for data has that name.
        raise ValueError(str(error).replace("--data=", "--task=")) from None


def _check_goes_on(options: Options, task: Any, wanted: str, before: Purpose | None) -> None:
    """Refuses a model that has been trained for another task, whose head would be taken for this one's."""
    if before is None or (before.task != wanted and not before.classes):
        return
    if (before.task, before.classes) != (wanted, task.classes):
        raise ValueError(
            f"--model={options.model} has been trained for {before.task} with {len(before.classes)} classes, not for "
            f"--task={options.task}: give pretrained weights."
        )


def _purpose(options: Options, task: Any, wanted: str, subwords: Any, before: Purpose | None) -> Purpose:
    train = task.train
    purpose = Purpose(wanted, task.classes, task.scheme, length=options.length, template=options.template)
    if isinstance(train, TaggedSentences):
        told = options.casing
        if told is None:
            if before is not None and before.task == wanted:
                told = before.casings > 0
            else:
                told = not options.is_preset and _loses_case(subwords)
        purpose = dataclasses.replace(purpose, by_document=options.by_document, casings=len(CASINGS) if told else 0)
    elif isinstance(train, Questions):
        nothing = any(not answers for split in task.splits.values() for answers in split.answers)
        purpose = dataclasses.replace(purpose, may_be_none=nothing)
    elif isinstance(train, Images):
        mean, sd = image_statistics(train)
        purpose = dataclasses.replace(
            purpose, size=train.pixels.shape[1:], mean=tuple(mean.tolist()), sd=tuple(sd.tolist())
        )
    return purpose


def _loses_case(subwords: Subwords) -> bool:
    upper, lower = subwords.split(["A", "a"])
    return np.array_equal(upper.ids, lower.ids)


def _preset(model: str, task: Any, subwords: Subwords | None) -> Any:
    classes = len(task.classes)
    if model == "cnn":
        return CnnConfig(channels=task.train.pixels.shape[-1], classes=classes)
    assert subwords is not None
    return RecurrentConfig(vocab=subwords.vocab_size, classes=classes)


def _check_shapes(options: Options, shapes: Any, subwords: Subwords | None) -> None:
    positions = getattr(shapes, "positions", options.length)
    if options.length > positions:
        raise ValueError(f"--length={options.length} is longer than the model's {positions} positions: give less.")
    if subwords is not None and subwords.vocab_size > shapes.vocab:
        raise ValueError(
            f"--model={options.model} has {shapes.vocab} pieces, and its tokenizer {subwords.vocab_size}: restore both."
        )
