"""AdamW or SGD, with the schedules of pretraining."""

import dataclasses

import optax

from experiments.training.optimizer import OptimizerConfig, decayed
from q8jax import choices

OPTIMIZERS = ("adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class Optimizer(OptimizerConfig):
    """Optimizer and learning-rate schedule.

    Attributes:
      optimizer: 'adamw' or 'sgd', with Nesterov's momentum.
      momentum: of SGD.

    Raises:
      ValueError: a value out of its range, naming the flag.
    """

    optimizer: str = "adamw"
    momentum: float = 0.9

    def __post_init__(self):
        choices.check("--optimizer", self.optimizer, OPTIMIZERS)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum={self.momentum} must be at least 0 and below 1.")
        super().__post_init__()

    def transformation(self) -> optax.GradientTransformation:
        """Clipping, then the optimizer at learning rate 1, without decay of norms and biases."""
        if self.optimizer == "adamw":
            return super().transformation()
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.add_decayed_weights(self.weight_decay, decayed),
            optax.sgd(1.0, self.momentum, nesterov=True),
        )
