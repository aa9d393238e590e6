"""The training step that pretrain's flags describe, for devices of any kind; its data is not needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments import options
from experiments.training.mesh import Placement
from experiments.training.precision import naming
from experiments.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Job:
    """A training step and where it runs.

    Attributes:
      options: the checked flags.
      trainer: its functions.
      placement: on which devices.
      tokens: a global batch, int32 [A, B/A, T+1].
    """

    options: options.Options
    trainer: Trainer
    placement: Placement
    tokens: jax.ShapeDtypeStruct

    @classmethod
    def of_flags(cls, devices: Sequence[jax.Device], vocab: int | None = None) -> Job:
        """The step that the parsed flags ask for; unless they say a batch size, it is large enough for the devices.

        Args:
          devices: to choose from.
          vocab: size of the vocabulary; by default as --model has it.

        Raises:
          ValueError: one sentence that names the flag and the fix.
        """
        options.fit_batch(len(devices))
        chosen = options.from_flags()
        config = chosen.model_with(vocab or chosen.model.vocab)
        placement = Placement.parse(chosen.mesh, chosen.microbatch, devices, config)
        shape = chosen.accumulate, chosen.microbatch, chosen.seq_len + 1
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement.batch)
        (phase,) = chosen.phases
        with naming(chosen.precision_flag):
            where = placement.of_model(chosen.mesh, config, chosen.seq_len)
            trainer = Trainer(config, phase, chosen.optimizer, chosen.accumulate, chosen.seed, shardings=where)
        return cls(chosen, trainer, placement, tokens)

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered with nothing allocated; it donates the state.

        Raises:
          ValueError: a rule of the precision matches no layer, or a tile does not divide its axis.
        """
        with naming(self.options.precision_flag):
            return self.placement.lower_step(self.trainer, self.tokens)
