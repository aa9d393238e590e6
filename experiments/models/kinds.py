"""The kinds of models that folders hold: how each is made for a task, and which of its layers a precision covers."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

import q8jax.nnx as qnnx
from experiments.models import own, published
from experiments.models.bert_heads import (
    PairClassifier,
    SentenceEmbedder,
    SequenceClassifier,
    SpanPredictor,
    TokenClassifier,
)
from experiments.models.cnn import Cnn, CnnConfig
from experiments.models.config import TransformerConfig
from experiments.models.gpt2 import Gpt2
from experiments.models.purpose import TASKS, Purpose
from experiments.models.recurrent import RecurrentConfig, Tagger
from experiments.models.transformer import Transformer
from q8jax import choices
from q8jax.policy import Policy
from q8jax.recipe import Recipe

_Make = Callable[[Any, Purpose, Policy, Any, nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
      read: its shapes, from a config.json or the folder of one.
      make: of shapes, what it is for, policy, compute dtype and rngs, a model.
      tasks: of `purpose.TASKS`, what it can be made for; the first is that of a folder which does not say.
      parts: patterns of the layers' paths by part, which together are all of them.
    """

    read: Callable[[str | os.PathLike[str]], Any]
    make: _Make
    tasks: tuple[str, ...]
    parts: Mapping[str, str]


def _bert(config: Any, purpose: Purpose, policy: Policy, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    classes = len(purpose.classes)
    made: Mapping[str, Callable[[], nnx.Module]] = {
        "sentence-embedding": lambda: SentenceEmbedder(config, dtype, rngs=rngs),
        "text-classification": lambda: SequenceClassifier(config, classes, dtype, rngs=rngs),
        "token-classification": lambda: TokenClassifier(config, classes, dtype, casings=purpose.casings, rngs=rngs),
        "question-answering": lambda: SpanPredictor(config, dtype, rngs=rngs),
        "entity-pairs": lambda: PairClassifier(config, classes, dtype, rngs=rngs),
    }
    return qnnx.quantize_model(made[purpose.task](), policy, rngs=rngs)


def _gpt2(config: Any, purpose: Purpose, policy: Policy, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    del purpose
    return qnnx.quantize_model(Gpt2(config, dtype, rngs=rngs), policy, rngs=rngs)


def _own(make: Callable[..., nnx.Module]) -> _Make:
    """Of a model that is made with its policy."""
    return lambda config, purpose, policy, dtype, rngs: make(config, policy, dtype, rngs=rngs)


def _within(prefix: str, head: str = "head") -> Mapping[str, str]:
    return {
        "blocks": f"{prefix}(attention/(qkv|out)|mlp/(up|down))",
        "attention": f"{prefix}attention/(scores|values)",
        "head": head,
    }


_TEXT = ("text-generation",)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "bert": Kind(
            published.bert_config,
            _bert,
            ("sentence-embedding", "text-classification", "token-classification", "question-answering", "entity-pairs"),
            _within("encoder/blocks/[0-9]+/", "head|encoder/pooler"),
        ),
        "gpt2": Kind(published.gpt2_config, _gpt2, _TEXT, _within("blocks/[0-9]+/")),
        "llama": Kind(published.llama_config, _own(Transformer), _TEXT, _within("blocks/")),
        "q8jax-transformer": Kind(
            functools.partial(own.config, TransformerConfig), _own(Transformer), _TEXT, _within("blocks/")
        ),
        "q8jax-cnn": Kind(
            functools.partial(own.config, CnnConfig),
            _own(Cnn),
            ("image-classification",),
            {"blocks": "blocks/.*", "stem": "stem", "head": "head"},
        ),
        "q8jax-lstm": Kind(
            functools.partial(own.config, RecurrentConfig),
            _own(Tagger),
            ("token-classification",),
            {"blocks": "layers/.*", "head": "head"},
        ),
    }
)


def kind_of(model_type: Any, where: object) -> Kind:
    """The kind of this model_type; a ValueError names the file that has another."""
    if not isinstance(model_type, str) or model_type not in KINDS:
        raise ValueError(f"{where} is of model_type {model_type!r}, none of {', '.join(KINDS)}: give another model.")
    return KINDS[model_type]


def policy_of(kind: Kind, precision: str, parts: tuple[str, ...] = ("blocks",)) -> Policy:
    """The policy that a precision means for a kind of model.

    Args:
      kind: of the model.
      precision: a preset, a recipe, or a policy, which is taken as it is.
      parts: which a preset or recipe covers; what it does not cover stays in its compute dtype.

    Raises:
      ValueError: a misspelt precision or part, a part that the kind does not have, or rules that disagree about the
        compute dtype.
    """
    if "->" in precision:
        if parts != ("blocks",):
            raise ValueError("a policy names its layers itself, so leave --quantize out.")
        policy = Policy.parse(precision)
    else:
        for part in parts:
            choices.check("part to quantize", part, kind.parts)
        recipe = Recipe.parse(precision)
        rules = [(kind.parts[part], recipe) for part in kind.parts if part in parts]
        if set(parts) != set(kind.parts):
            rules.append((".*", Recipe(compute=recipe.compute)))
        policy = Policy(tuple(rules))
    compute_of(policy)
    return policy


def compute_of(policy: Policy) -> str:
    """The compute dtype of a policy's rules; a ValueError where they disagree."""
    dtypes = sorted({recipe.compute for _, recipe in policy.rules})
    if len(dtypes) > 1:
        raise ValueError(
            f"its rules compute in {' and '.join(dtypes)}, but activations have one dtype: give every rule the same "
            "compute=."
        )
    return dtypes[0]


assert {task for kind in KINDS.values() for task in kind.tasks} == set(TASKS)
