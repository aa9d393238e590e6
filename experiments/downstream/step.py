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
import numpy as np
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
      range_lr: peak learning rate of learned ranges, if the model has them.
      distillation: or None.
    """

    def __init__(
        self,
        model: nnx.Module,
        head: Head,
        optimizer: Optimizer,
        compute: str,
        distillation: Distillation | None = None,
        range_lr: float | None = None,
    ):
        self._head = head
        self._learning_rate = optimizer.learning_rate()
        self._transformation = optimizer.transformation()
        self._scales_loss = compute == "float16"
        self._range_factor = 1.0 if range_lr is None else range_lr / optimizer.lr
        parts: tuple[Any, ...] = nnx.split(model, nnx.Param, ...)
        self._graphdef, self._params, self._dots = parts
        self._distillation = distillation
        # An argument of the step: as a constant it would be in every program.
        self.teacher: Any = None
        if distillation is not None:
            self._teacher_graph, self.teacher = nnx.split(distillation.teacher)

    def init(self) -> State:
        """The state before the first step, uncalibrated."""
        # Parameters are an argument: as constants they would be in the program.
        return jax.jit(self._start)(nnx.to_pure_dict(self._params), nnx.to_pure_dict(self._dots))

    def _start(self, params: State, dots: State) -> State:
        state = {
            "params": jax.tree.map(jnp.copy, params),
            "optimizer": self._transformation.init(params),
            "step": jnp.zeros((), jnp.int32),
            "sound": jnp.ones((), bool),
            "dots": jax.tree.map(jnp.copy, dots),
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

    def observe(self, state: State, teacher: Any, batch: Batch) -> Any:
        """The amaxes of what the model computes of a batch in current scaling; join those of several by max."""
        model = self.model(state)
        with qnnx.calibrating(model):
            return self._gradients(model, state, teacher, batch)[2]

    def calibrated(self, state: State, amaxes: Any) -> State:
        """The state with scales, and learned ranges, that begin with these amaxes."""
        model = self.model(state)
        for _, dot in nnx.iter_modules(model):
            if isinstance(dot, qnnx.QuantizedDot) and dot.recipe.slots:
                is_static = np.array([slot.is_static for slot in dot.recipe.slots])[:, None]
                dot.history.set_value(jnp.where(is_static, jnp.float32(0), dot.history[...]))
        with qnnx.calibrating(model):
            qnnx.update_scaling(model, amaxes)
        return {**state, **_parts(model)}

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
        add = lambda path, param, update: param + learning_rate * self._factor(path) * update
        params = jax.tree_util.tree_map_with_path(add, state["params"], updates)
        following = self.model({**state, "params": params})
        qnnx.update_scaling(following, amaxes)  # after the parameters, of which learned ranges are
        taken: State = {"params": params, "optimizer": optimizer}
        counted: State = {"step": state["step"] + 1, "dots": _parts(following)["dots"]}
        values = {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate}
        skips = jnp.zeros((), bool)
        if self._scales_loss:
            scale = state["loss_scale"]["scale"]
            skips = jnp.isfinite(loss) & ~finite & (scale > LEAST_LOSS_SCALE)
            counted["loss_scale"] = next_loss_scale(state["loss_scale"], finite)
            values |= {"loss_scale": scale, "skipped_steps": counted["loss_scale"]["skipped_steps"]}
        sound = state["sound"] & (finite | skips)
        chosen = {**choose(sound & finite, taken, state), **choose(sound, counted, state), "sound": sound}
        return chosen, {**values, "sound": sound}

    def _factor(self, path: Any) -> jax.Array:
        return jnp.float32(self._range_factor if path[-1].key == "learned_range" else 1)

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


def _parts(model: nnx.Module) -> State:
    parts: tuple[Any, ...] = nnx.split(model, nnx.Param, ...)
    return {"params": nnx.to_pure_dict(parts[1]), "dots": nnx.to_pure_dict(parts[2])}
