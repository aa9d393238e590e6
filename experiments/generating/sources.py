"""Where the model comes from: the directory of a pretraining run, or a folder that holds one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import q8jax.nnx as qnnx
from experiments import stored
from experiments.data.tokenizers import GivenTokens
from experiments.encoding import Subwords
from experiments.models import folder
from experiments.models.kinds import policy_of
from experiments.stored import StoredRun
from experiments.training.precision import naming
from experiments.training.step import summed_loss

_TASK = "text-generation"
# Enough for amaxes, and little to differentiate.
_CALIBRATION_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that writes text.

    Attributes:
      model: a Transformer or a Gpt2.
      subwords: the pieces it reads.
      precision: as the user wrote it, or as it is stored.
      positions: the longest text it can read; None for any.
      length: of the texts it was trained on, where that is known.
      is_calibrated: whether every scale that its precision keeps has a value.
      run: that it is of, or None.
    """

    model: Any
    subwords: Subwords
    precision: str
    positions: int | None
    length: int | None
    is_calibrated: bool
    run: StoredRun | None

    def calibrated(self, prompts: Sequence[np.ndarray]) -> Source:
        """With scales from what the model computes of prompts, where it has none of its own."""
        if self.is_calibrated:
            return self
        length = min(max(map(len, prompts)) + 1, _CALIBRATION_TOKENS, (self.positions or _CALIBRATION_TOKENS) + 1)
        # Repeated to one length, for padding would be seen by scales of whole tensors.
        rows = jnp.asarray(np.stack([np.resize(prompt, max(length, 2)) for prompt in prompts]), jnp.int32)
        qnnx.calibrate(self.model, summed_loss, rows)
        return dataclasses.replace(self, is_calibrated=True)


def load(place: str, precision: str | None, tokenizer: str) -> Source:
    """The model that --model names.

    Args:
      place: the directory of a run, a folder with a model, or package:NAME.
      precision: in which its products run; None for that in which it is stored.
      tokenizer: "bytes", the path of a tokenizer.json, or '' for the model's own.

    Raises:
      ValueError: one sentence that names the flag and the fix.
      runs.RunError: the run is in use, or has no checkpoint that is good.
    """
    if not place:
        raise ValueError("--model= is needed: give the directory of a run, or a folder with a model.")
    if not place.startswith(folder.PACKAGE) and not Path(place).expanduser().is_dir():
        raise ValueError(f"--model={place} is no directory: give that of a run, or a folder with a model.")
    source = _of_run(place, precision, tokenizer) if stored.is_run(place) else _of_folder(place, precision, tokenizer)
    if (known := source.subwords.vocab_size) > (has := source.model.config.vocab):
        raise ValueError(
            f"--tokenizer={source.subwords.name} has {known:,} pieces, of which --model={place} knows {has:,}: give "
            "the tokenizer of the model."
        )
    return source


def _of_run(place: str, precision: str | None, tokenizer: str) -> Source:
    run = stored.restore(place)
    own = run.tokenizer() if not tokenizer else None
    if isinstance(own, GivenTokens):
        raise ValueError(f"--model={place} was trained on {run.options.data}, which is no text: give another run.")
    subwords = Subwords.load(tokenizer) if own is None else Subwords(own)
    model = run.model(precision)
    name = precision or run.trainer.phase.name
    calibrated = precision is None or not keeps_scales(model)
    return Source(model, subwords, name, None, run.options.seq_len, calibrated, run)


def _of_folder(place: str, precision: str | None, tokenizer: str) -> Source:
    with naming(f"--model={place}"):
        found = folder.read(place)
        if found.purpose.task != _TASK:
            raise ValueError(f"it is made for {found.purpose.task}: give a decoder, as Llama and GPT-2 are.")
        policy = None
        if precision is not None:
            with naming(f"--precision={precision}"):
                policy = policy_of(found.kind, precision)
        if not (name := tokenizer or found.tokenizer):
            raise ValueError(f"it holds no {folder.TOKENIZER}: give --tokenizer=, the path of one, or bytes.")
        model, _ = folder.load(place, policy=policy)
    label = precision or found.purpose.policy or "fp32"
    positions = getattr(found.shapes, "positions", None)
    calibrated = policy is None or not keeps_scales(model)
    return Source(model, Subwords.load(name), label, positions, positions, calibrated, None)


def keeps_scales(model: Any) -> bool:
    """Whether the precision of a model takes scales from one step to the next."""
    return any(scales.recipe.keeps_state for scales in qnnx.scaling_states(model).values())
