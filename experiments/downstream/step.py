"""One step of fine-tuning, as a pure function of a state of plain dicts, like that of `experiments.training.step`:

    params      float32 master weights
    optimizer   optax's state
    step        int32
    sound       bool: no step has failed
    dots        what quantized dots keep
    loss_scale  float16 only

A step whose loss or gradient is not finite fails, and leaves the state as it was but for `sound`; in float16 it is
skipped instead as long as the loss scale can be halved.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import q8jax.nnx as qnnx
from experiments.downstream.heads import Batch, Head
from experiments.downstream.optimizer import Optimizer
from experiments.training.step import LEAST_LOSS_SCALE, State, choose, filled, first_loss_scale, next_loss_scale


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """What is learned from another model (Hinton, Vinyals and Dean 2015, arXiv:1503.02531).

    Attributes:
      teacher: the model, for the same task, with the same classes.
      temperature: that logits of both are divided by.
      weight: share of the loss that is the teacher's; the rest is the labels'.
    """

    teacher: nnx.Module
    temperature: float
    weight: float


class Trainer:
    """The functions of a run; each is a pure function of arrays that can be jitted.

    Args:
      model: what is learned from, which is only read.
      head: of the task.
      optimizer: and its schedule.
      compute: the model's compute dtype.
      distillation: or None.
    """

    def __init__(
        self,
        model: nnx.Module,
        head: Head,
        optimizer: Optimizer,
        compute: str,
        distillation: Distillation | None = None,
    ):
        self._head = head
        self._learning_rate = optimizer.learning_rate()
        self._transformation = optimizer.transformation()
        self._scales_loss = compute == "float16"
        parts: tuple[Any, ...] = nnx.split(model, nnx.Param, ...)
        self._graphdef, self._params, self._dots = parts
        self._distillation = distillation
        # An argument of the step: as a constant it would be in every program.
        self.teacher: Any = None
        if distillation is not None:
            self._teacher_graph, self.teacher = nnx.split(distillation.teacher)

    def init(self) -> State:
        """The state before the first step, uncalibrated."""
        params = jax.tree.map(jnp.array, nnx.to_pure_dict(self._params))
        state = {
            "params": params,
            "optimizer": self._transformation.init(params),
            "step": jnp.zeros((), jnp.int32),
            "sound": jnp.ones((), bool),
            "dots": jax.tree.map(jnp.array, nnx.to_pure_dict(self._dots)),
        }
        return {**state, "loss_scale": first_loss_scale()} if self._scales_loss else state

    def model(self, state: State) -> nnx.Module:
        """The model that a state holds."""
        return nnx.merge(self._graphdef, filled(self._params, state["params"]), filled(self._dots, state["dots"]))

    @property
    def keeps_scales(self) -> bool:
        """Whether scales come from state, so that the run needs a warm start."""
        return any(state.recipe.keeps_state for state in qnnx.scaling_states(self._merged()).values())

    def _merged(self) -> nnx.Module:
        return nnx.merge(self._graphdef, self._params, self._dots)

    def calibrate(self, state: State, teacher: Any, batch: Batch) -> State:
        """The `dots` of a warm start, from what the model computes of a batch in current scaling."""
        model = self.model(state)
        with qnnx.calibrating(model):
            _, _, amaxes = self._gradients(model, state, teacher, batch)
        return self._updated_dots(model, amaxes)

    def step(self, state: State, teacher: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One optimizer step.

        Returns:
          The next state, and scalars: loss in nats per label, gradient_norm, learning_rate, sound; in float16
          loss_scale and skipped_steps as well.
        """
        model = self.model(state)
        loss, gradients, amaxes = self._gradients(model, state, teacher, batch)
        gradients = nnx.to_pure_dict(gradients)
        if self._scales_loss:
            unscale = 1 / state["loss_scale"]["scale"]
            loss, gradients = jax.tree.map(lambda x: x * unscale, (loss, gradients))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
            learning_rate = jnp.asarray(self._learning_rate(state["step"]), jnp.float32)
            updates, optimizer = self._transformation.update(gradients, state["optimizer"], state["params"])
        params = jax.tree.map(lambda param, update: param + learning_rate * update, state["params"], updates)
        taken: State = {"params": params, "optimizer": optimizer}
        counted: State = {"step": state["step"] + 1, "dots": self._updated_dots(model, amaxes)}
        values = {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate}
        skips = jnp.zeros((), bool)
        if self._scales_loss:
            scale = state["loss_scale"]["scale"]
            skips = jnp.isfinite(loss) & ~finite & (scale > LEAST_LOSS_SCALE)
            counted["loss_scale"] = next_loss_scale(state["loss_scale"], finite)
            values |= {"loss_scale": scale, "skipped_steps": counted["loss_scale"]["skipped_steps"]}
        sound = state["sound"] & (finite | skips)
        following = {**choose(sound & finite, taken, state), **choose(sound, counted, state), "sound": sound}
        return following, {**values, "sound": sound}

    def _gradients(self, model: nnx.Module, state: State, teacher: Any, batch: Batch) -> tuple[jax.Array, Any, Any]:
        """Loss, gradients and observed amaxes; in float16 the first two times the loss scale."""
        factor = state["loss_scale"]["scale"] if self._scales_loss else jnp.ones((), jnp.float32)
        taught = self._taught(teacher, batch)
        return qnnx.value_and_grad(self._loss)(qnnx.prequantize(model), taught, batch, factor)

    def _loss(self, model: nnx.Module, taught: Any, batch: Batch, factor: jax.Array) -> jax.Array:
        logits = self._head.logits(model, batch)
        total, count = self._head.loss(logits, batch)
        if self._distillation is not None:
            share = jnp.float32(self._distillation.weight)
            total = (1 - share) * total + share * self._divergence(taught, logits, batch)
        return factor * total / jnp.maximum(count, 1)

    def _taught(self, teacher: Any, batch: Batch) -> Any:
        if self._distillation is None:
            return ()
        return self._head.logits(nnx.merge(self._teacher_graph, teacher), batch)

    def _divergence(self, taught: tuple[jax.Array, ...], logits: tuple[jax.Array, ...], batch: Batch) -> jax.Array:
        """Kullback–Leibler divergence of softened classes from the teacher's, times the square of the temperature,
        summed over what counts."""
        assert self._distillation is not None
        temperature = jnp.float32(self._distillation.temperature)
        total = jnp.zeros((), jnp.float32)
        for theirs, ours, (_, weights) in zip(taught, logits, self._head.labels(batch), strict=True):
            wanted, found = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (theirs, ours))
            total += jnp.sum(weights * jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1))
        return jnp.square(temperature) * total

    def _updated_dots(self, model: nnx.Module, amaxes: Any) -> State:
        qnnx.update_scaling(model, amaxes)
        return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
