"""What a recipe's rounding adds to the noise of a model's gradient.

A step's gradient is that of its batch, and scatters from batch to batch. Rounding adds to the scatter, and may move the
mean. Where the scatter is much larger than the mean, as in all but very large batches, a run learns from a batch in
inverse proportion to its variance (McCandlish et al. 2018, An empirical model of large-batch training,
arXiv:1812.06162, section 2.2), so that a recipe which adds one percent should cost about as much as batches one percent
smaller. It ranks recipes in a minute; what they cost is for pairs of whole runs to say.

Gradients are measured as AdamW's update takes them, divided by the root of their second moment.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.training.step import State, Trainer

Name = TypeVar("Name", bound=Hashable)

_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Noise:
    """What a recipe does to gradient and loss.

    Attributes:
      noise: variance over batches of what the recipe adds to the gradient, as a share of the plain gradient's variance.
      noise_error: standard error of `noise`.
      bias: square of the mean of what it adds, as a share of the square of the mean plain gradient; NaN where the
        batches are too few to see that mean.
      loss_change: of the loss of the same parameters, in nats per token.
      loss_change_error: its standard error.
    """

    noise: float
    noise_error: float
    bias: float
    loss_change: float
    loss_change_error: float


def measure(
    plain: Trainer, others: Mapping[Name, Trainer], state: State, batches: Iterable[jax.Array]
) -> tuple[float, dict[Name, Noise]]:
    """The gradient's noise at a state, and what other trainers' recipes add to it.

    Args:
      plain: the trainer whose gradient is compared with.
      others: trainers of the same model, by name.
      state: of the plain trainer, after at least one step.
      batches: at least two global batches, placed.

    Returns:
      The variance of the plain gradient over the batches as a multiple of the square of its mean, infinite where the
      batches are too few to see that mean; and for each of the others what it does.
    """
    weight = jax.jit(_weights)(state)
    base = jax.jit(_gradient(plain))
    functions = {name: jax.jit(_gradient(trainer)) for name, trainer in others.items()}
    states = {name: trainer.enter(state, jax.jit(trainer.phase_state)()) for name, trainer in others.items()}
    reference, added = _Scatter(), {name: _Scatter() for name in others}
    for tokens in batches:
        loss, gradient = jax.device_get(base(state, weight, tokens))
        reference.see(loss, gradient)
        for name, function in functions.items():
            other_loss, other = jax.device_get(function(states[name], weight, tokens))
            added[name].see(other_loss - loss, jax.tree.map(np.subtract, other, gradient))
    signal = reference.mean_squared
    scale = reference.variance / signal if signal > 0 else math.inf
    return scale, {name: _noise(scatter, reference) for name, scatter in added.items()}


def _noise(added: "_Scatter", reference: "_Scatter") -> Noise:
    share = added.variance / reference.variance
    # The error of the ratio of mean squares, which differs from the ratio of variances by what the means are, little.
    residuals = np.subtract(
        added.squares, np.multiply(np.mean(added.squares) / np.mean(reference.squares), reference.squares)
    )
    root = math.sqrt(len(residuals))
    bias = max(added.mean_squared, 0.0) / reference.mean_squared if reference.mean_squared > 0 else math.nan
    return Noise(
        share,
        float(np.std(residuals, ddof=1)) / root / float(np.mean(reference.squares)),
        bias,
        float(np.mean(added.losses)),
        float(np.std(added.losses, ddof=1)) / root,
    )


class _Scatter:
    """Of one vector per batch: its variance, and the square of its mean without what variance adds to that."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.squares: list[float] = []
        self._sum: Any = None

    def see(self, loss: np.ndarray, vector: Any) -> None:
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), vector)
        self.losses.append(float(loss))
        self.squares.append(_squared(wide))
        self._sum = wide if self._sum is None else jax.tree.map(np.add, self._sum, wide)

    @property
    def _square_of_mean(self) -> float:
        return _squared(self._sum) / len(self.squares) ** 2

    @property
    def variance(self) -> float:
        count = len(self.squares)
        return (float(np.mean(self.squares)) - self._square_of_mean) * count / (count - 1)

    @property
    def mean_squared(self) -> float:
        return self._square_of_mean - self.variance / len(self.squares)


def _squared(vector: Any) -> float:
    return float(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(vector)))


def _weights(state: State) -> Any:
    """What AdamW multiplies its first moment by, float32, shaped as the parameters."""
    moments = optax.tree.get(state["optimizer"], "nu")
    return jax.tree.map(lambda moment: 1 / (jnp.sqrt(moment) + _EPSILON), moments)


def _gradient(trainer: Trainer) -> Callable[[State, Any, jax.Array], tuple[jax.Array, Any]]:
    def function(state: State, weight: Any, tokens_AxBxT1: jax.Array) -> tuple[jax.Array, Any]:
        if trainer.keeps_scales:
            state = {**state, "dots": trainer.calibrate(state, tokens_AxBxT1)}
        loss, gradients, _ = trainer.gradients(trainer.model(state), state, tokens_AxBxT1)
        unscale = 1 / trainer.loss_factor(state, 1)
        return loss * unscale, jax.tree.map(lambda x, w: x * unscale * w, nnx.to_pure_dict(gradients), weight)

    return function
