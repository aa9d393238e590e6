"""What a model in a folder is for: its task, and all that turns text or pixels into its inputs and logits into answers.

It stands in config.json under the key "q8jax", beside the published options.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from q8jax import choices

TASKS = (
    "text-classification",
    "token-classification",
    "question-answering",
    "entity-pairs",
    "sentence-embedding",
    "text-generation",
    "image-classification",
)
BYTES = "bytes"


@dataclasses.dataclass(frozen=True)
class Purpose:
    """What a model is for.

    Attributes:
      task: of TASKS.
      classes: names of the classes, by the indices of logits; none where there are none.
      scheme: how classes of tokens mark entities, or None.
      casings: number of casings that the model is told of each token, or 0.
      length: most positions of an input.
      by_document: whether sentences of a document share rows.
      template: how turns of a conversation are told apart, of `encoding.TEMPLATES`.
      may_be_none: whether a question may have no answer.
      tokenizer: BYTES, the name of a file beside config.json, or '' of a model of images.
      size: height, width and channels of images, or ().
      mean, sd: by channel, which are taken out of pixels.
      policy: in which the model was trained or quantized, and is to run; '' for float32.

    Raises:
      ValueError: an unknown task.
    """

    task: str
    classes: tuple[str, ...] = ()
    scheme: str | None = None
    casings: int = 0
    length: int = 128
    by_document: bool = False
    template: str = "plain"
    may_be_none: bool = False
    tokenizer: str = ""
    size: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    sd: tuple[float, ...] = ()
    policy: str = ""

    def __post_init__(self):
        choices.check("task", self.task, TASKS)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what differs from the defaults."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if v != fields[k]}

    @classmethod
    def of(cls, values: Mapping[str, Any], where: object) -> "Purpose":
        """Inverse of `as_dict`; a ValueError names `where`, and the entry that is not as it must be."""
        types = typing.get_type_hints(cls)
        made: dict[str, Any] = {}
        for name, value in values.items():
            choices.check(f"entry of q8jax in {where}", name, types)
            value = tuple(value) if isinstance(value, list) else value
            if not _is(value, types[name]):
                raise ValueError(f"{where} gives q8jax.{name} the value {value!r}: repair it.")
            made[name] = value
        if "task" not in made:
            raise ValueError(f"{where} does not say q8jax.task: repair it.")
        return cls(**made)


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(item, typing.get_args(kind)[0]) for item in value)
    if typing.get_args(kind):
        return any(_is(value, one) for one in typing.get_args(kind))
    # To Python true is a whole number.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
