"""A pretraining run's directory as the model that it has trained, without the flags of a command."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import data, options, runs
from experiments.data.tokenizers import ByteTokenizer, Tokenizer
from experiments.models.transformer import Transformer
from experiments.runs.config import CONFIG
from experiments.training import fallback
from experiments.training.precision import Phase, naming, phase_at, resolve
from experiments.training.step import State, Trainer


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """A run at its newest good checkpoint.

    Attributes:
      path: of its directory.
      options: what it was asked to do.
      config: what its config.json holds.
      trainer: of the phase in which it stands.
      state: its train state.
      step: of the checkpoint.
    """

    path: Path
    options: options.Options
    config: dict[str, Any]
    trainer: Trainer
    state: State
    step: int

    def model(self, precision: str | None = None) -> Transformer:
        """The model, in the precision in which it stands, with its scales; or in another, uncalibrated.

        Raises:
          ValueError: a misspelt precision, or one that does not fit the model.
        """
        if precision is None:
            return self.trainer.model(self.state)
        with naming(f"--precision={precision}"):
            phase = resolve(precision) if "->" in precision else resolve(precision, tuple(self.options.quantize))
            trainer = _trainer(self.options, self.config, phase)
            return trainer.model(trainer.enter(self.state, trainer.phase_state()))

    def tokenizer(self) -> Tokenizer:
        """What it reads text with.

        Raises:
          ValueError: it was trained or given, and the data or the file is no longer what it was.
        """
        if self.config["tokenizer"] == "bytes":
            return ByteTokenizer()
        dataset = self.dataset()
        if self.config["data_sha256"].get("tokenizer") != dataset.sha256.get("tokenizer"):
            raise ValueError(
                f"--model={self.path} has another tokenizer than --tokenizer={self.options.tokenizer} is now: restore "
                "that, or its data."
            )
        return dataset.tokenizer

    def dataset(self) -> data.Dataset:
        """The data that it was trained on.

        Raises:
          ValueError: it is not there.
        """
        return data.load(self.options.data, self.config["tokenizer"], self.options.cache)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is that of a run, rather than a folder with a model."""
    file = Path(path).expanduser() / CONFIG
    return file.is_file() and "precision" in runs.load_config(file)


def restore(path: str | os.PathLike[str]) -> StoredRun:
    """Reads a run that no process writes to; nothing in it changes.

    Raises:
      ValueError: it is no run's directory, or an entry of its config.json is none of a run.
      runs.RunError: it is in use, or has no checkpoint that is good.
    """
    folder = Path(path).expanduser()
    config = runs.load_config(folder / CONFIG)
    alone = flags.FlagValues()
    options.define(alone)
    alone(["stored", f"--config={folder / CONFIG}"])
    chosen = options.from_flags(config, alone)

    def trainer_after(step: int) -> Trainer:
        phase = phase_at(chosen.phases, step - 1)
        trainer = _trainer(chosen, config, phase)
        bounds = fallback.parse(chosen.fallback)
        if not bounds:
            return trainer
        fallen = fallback.Fallback(folder, bounds, primary=False)
        return _trainer(chosen, config, fallen.narrowed(phase, trainer.recipes(), step))

    def target(step: int) -> State:
        trainer = trainer_after(step)
        return fallback.carried(trainer, jax.eval_shape(trainer.init))

    with (
        runs.RunDir.look(folder, config) as directory,
        runs.Checkpoints(directory.checkpoints, tidy=False) as checkpoints,
    ):
        restored = checkpoints.latest_good(target)
    if restored is None:
        raise runs.RunError(f"--model={path} is a run without a checkpoint: let it save one first")
    return StoredRun(folder, chosen, config, trainer_after(restored.step), restored.tree, restored.step)


def _trainer(chosen: options.Options, config: dict[str, Any], phase: Phase) -> Trainer:
    seeds = chosen.seed, chosen.init_perturbation
    return Trainer(chosen.model_with(config["vocab"]), phase, chosen.optimizer, chosen.accumulate, *seeds)
