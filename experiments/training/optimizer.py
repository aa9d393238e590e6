"""AdamW with warm-up and a cosine, linear or warm-up-stable-decay schedule."""

import dataclasses
from typing import Any

import jax
import optax

from q8jax import choices

SCHEDULES = ("cosine", "linear", "wsd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
      steps: length of the run.
      lr: peak learning rate.
      warmup: steps of linear warm-up from 0.
      final_lr: learning rate at the end, as a share of the peak.
      schedule: 'cosine', 'linear', or 'wsd': constant after warm-up, then linear decay over the last `decay` share of
        the steps (Hu et al. 2024, MiniCPM, arXiv:2404.06395).
      decay: that share.
      b1, b2: AdamW's moment decays.
      weight_decay: decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), on matrices only.
      clip: largest global gradient norm.
      average: decay of the exponential moving average of the parameters that is evaluated too; 0 keeps none.

    Raises:
      ValueError: a value out of its range, naming the flag.
    """

    steps: int
    lr: float = 3e-3
    warmup: int = 30
    final_lr: float = 0.1
    schedule: str = "cosine"
    decay: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    average: float = 0.0

    def __post_init__(self):
        choices.check("--schedule", self.schedule, SCHEDULES)
        if self.steps < 1:
            raise ValueError(f"--steps={self.steps} must be at least 1.")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup={self.warmup} must be at least 0 and below --steps={self.steps}.")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name}={getattr(self, name)} must be positive and finite.")
        for name in ("final_lr", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be from 0 to 1.")
        for name in ("b1", "b2", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"--weight_decay={self.weight_decay} must be finite and not negative.")

    def learning_rate(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        if self.schedule == "cosine":
            end = self.lr * self.final_lr
            return optax.warmup_cosine_decay_schedule(0.0, self.lr, self.warmup, self.steps, end)
        falling = round((1.0 if self.schedule == "linear" else self.decay) * self.steps)
        constant = max(self.steps - falling, self.warmup)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.lr, self.warmup),
                optax.constant_schedule(self.lr),
                optax.linear_schedule(self.lr, self.lr * self.final_lr, max(self.steps - constant, 1)),
            ],
            [self.warmup, constant],
        )

    def transformation(self) -> optax.GradientTransformation:
        """Clipping, then AdamW at learning rate 1, without decay of norms.

        The schedule is left out because it follows the steps of the run, of which optax counts only those not skipped.
        """
        adamw = optax.adamw(1.0, self.b1, self.b2, weight_decay=self.weight_decay, mask=decayed)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


def decayed(params: Any) -> Any:
    """Which of the parameters decay: matrices, and no norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
