"""One training step, as a pure function, and the evaluation that goes with it.

The train state is a pytree of plain dicts of arrays, so that it can be donated, saved and resharded:

    params      float32 master weights
    dots        what quantized dots keep: scales, amax histories, rounding keys; of the current phase only
    optimizer   optax's state
    loss_scale  float16 only: the scale, steps since it last changed, and the number of skipped steps
    step        int32
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import q8jax.nnx as qnnx
from experiments.models.config import TransformerConfig
from experiments.models.transformer import Transformer
from experiments.training.optimizer import OptimizerConfig
from experiments.training.precision import Phase
from q8jax import scaling
from q8jax.recipe import Recipe

State = dict[str, Any]

_GROWTH_INTERVAL = 200
_FIRST_LOSS_SCALE = 2.0**15
_LARGEST_LOSS_SCALE = 2.0**24


def summed_loss(model: Transformer, tokens_BxT1: jax.Array) -> jax.Array:
    """Cross-entropy in nats, summed over the tokens, float32."""
    logits = model(tokens_BxT1[:, :-1])
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT1[:, 1:]))


class Trainer:
    """Builds the functions of one phase; everything here is a pure function of arrays that can be jitted.

    Args:
      config: shapes of the model.
      phase: its precision.
      optimizer: AdamW and its schedule.
      accumulate: microbatches of a step.
      seed: of the initialisation; the same in every precision.
    """

    def __init__(self, config: TransformerConfig, phase: Phase, optimizer: OptimizerConfig, accumulate: int, seed: int):
        self.config = config
        self.phase = phase
        self.accumulate = accumulate
        self.seed = seed
        self.learning_rate = optimizer.learning_rate()
        self._transformation = optimizer.transformation()
        self._scales_loss = phase.compute == "float16"
        abstract = nnx.eval_shape(self._build)
        self._graphdef, self._params, self._dots = nnx.split(abstract, nnx.Param, ...)

    def _build(self) -> Transformer:
        rngs = nnx.Rngs(params=self.seed, rounding=self.seed)
        return Transformer(self.config, self.phase.policy, jnp.dtype(self.phase.compute), rngs=rngs)

    def _model(self, params: Any, dots: Any) -> Transformer:
        return nnx.merge(self._graphdef, _fill(self._params, params), _fill(self._dots, dots))

    def init(self) -> State:
        """The state before the first step, uncalibrated."""
        params, dots = (nnx.to_pure_dict(part) for part in nnx.state(self._build(), nnx.Param, ...))
        state = {"params": params, "optimizer": self._transformation.init(params), "step": jnp.zeros((), jnp.int32)}
        return {**state, **self._phase_state(dots)}

    def _phase_state(self, dots: Any) -> State:
        state: State = {"dots": dots}
        if self._scales_loss:
            state["loss_scale"] = {
                "scale": jnp.asarray(_FIRST_LOSS_SCALE, jnp.float32),
                "good_steps": jnp.zeros((), jnp.int32),
                "skipped_steps": jnp.zeros((), jnp.int32),
            }
        return state

    def enter(self, state: State) -> State:
        """Carries parameters and optimizer over from another phase; the rest starts afresh."""
        _, dots = nnx.state(self._build(), nnx.Param, ...)
        kept = {name: state[name] for name in ("params", "optimizer", "step")}
        return {**kept, **self._phase_state(nnx.to_pure_dict(dots))}

    @property
    def keeps_scales(self) -> bool:
        """Whether scales come from state, so that the phase needs a warm start."""
        return any(recipe.keeps_state for _, recipe in self.phase.policy.rules)

    def calibrate(self, state: State, tokens_AxBxT1: jax.Array) -> State:
        """Warm start on the first global batch: each scale from what the model computes with every tensor's own."""
        model = self._model(state["params"], state["dots"])
        with qnnx.calibrating(model):
            _, _, amaxes = self._gradients(model, state, tokens_AxBxT1)
        qnnx.update_scaling(model, amaxes)
        return {**state, "dots": nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))}

    def _gradients(self, model: Transformer, state: State, tokens_AxBxT1: jax.Array):
        microbatches, rows, columns = tokens_AxBxT1.shape
        tokens = microbatches * rows * (columns - 1)
        factor = jnp.float32(1 / tokens)
        if self._scales_loss:
            factor = factor * state["loss_scale"]["scale"]
        # Divided by the tokens of the whole step, or gradient amaxes would grow with the number of microbatches.
        differentiate = qnnx.value_and_grad(lambda model, batch, factor: summed_loss(model, batch) * factor)
        graphdef, params, dots = nnx.split(model, nnx.Param, ...)

        def microbatch(batch_BxT1):
            return differentiate(nnx.merge(graphdef, params, dots), batch_BxT1, factor)

        if microbatches == 1:
            return microbatch(tokens_AxBxT1[0])

        def add(total, batch_BxT1):
            loss, gradients, amaxes = microbatch(batch_BxT1)
            sums = jax.tree.map(jnp.add, total[:2], (loss, gradients))
            return (*sums, scaling.combine(total[2], amaxes)), None

        shapes = jax.eval_shape(microbatch, tokens_AxBxT1[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.scan(add, zeros, tokens_AxBxT1)[0]

    def step(self, state: State, tokens_AxBxT1: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        """One optimizer step on a global batch of A microbatches.

        Returns:
          The next state, and scalars: loss, gradient_norm, learning_rate, nonfinite_tensors; in float16 loss_scale and
          skipped_steps as well. A step whose loss or gradient is not finite changes no parameter.
        """
        model = self._model(state["params"], state["dots"])
        loss, gradients, amaxes = self._gradients(model, state, tokens_AxBxT1)
        gradients = nnx.to_pure_dict(gradients)
        unscale = 1 / state["loss_scale"]["scale"] if self._scales_loss else jnp.float32(1)
        loss = loss * unscale
        if self._scales_loss:
            gradients = jax.tree.map(lambda g: g * unscale, gradients)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
            updates, optimizer = self._transformation.update(gradients, state["optimizer"], state["params"])
            learning_rate = self.learning_rate(state["step"])
        params = optax.apply_updates(state["params"], updates)
        qnnx.update_scaling(model, amaxes)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        following = {
            "params": keep(params, state["params"]),
            "optimizer": keep(optimizer, state["optimizer"]),
            "dots": nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))),
            "step": state["step"] + 1,
        }
        seen = [jnp.ravel(~jnp.isfinite(a)) for a in (*jax.tree.leaves(amaxes), loss, norm)]
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "nonfinite_tensors": jnp.sum(jnp.concatenate(seen).astype(jnp.int32)),
        }
        if self._scales_loss:
            following["loss_scale"] = _next_loss_scale(state["loss_scale"], finite)
            metrics["loss_scale"] = state["loss_scale"]["scale"]
            metrics["skipped_steps"] = following["loss_scale"]["skipped_steps"]
        return following, metrics

    def evaluate(self, state: State, tokens_ExBxT1: jax.Array) -> jax.Array:
        """Mean loss of E held-out batches in nats per token, scales frozen."""
        model = self._model(state["params"], state["dots"])
        graphdef, leaves = nnx.split(model)

        def add(total, batch_BxT1):
            return total + summed_loss(nnx.merge(graphdef, leaves), batch_BxT1), None

        batches, rows, columns = tokens_ExBxT1.shape
        total, _ = lax.scan(add, jnp.zeros((), jnp.float32), tokens_ExBxT1)
        return total / jnp.float32(batches * rows * (columns - 1))

    def recipes(self) -> dict[str, Recipe]:
        """The recipe of every dot that the policy covers, by the path of its layer."""
        model = nnx.merge(self._graphdef, self._params, self._dots)
        return {path.rpartition("/")[0]: state.recipe for path, state in qnnx.scaling_states(model).items()}

    def residuals(self, state: State, tokens_BxT1: jax.ShapeDtypeStruct) -> Any:
        """Shapes and dtypes of what one microbatch keeps for its backward pass, parameters aside."""

        def backward(params, dots, tokens):
            return jax.vjp(lambda p: summed_loss(self._model(p, dots), tokens), params)[1]

        kept = jax.eval_shape(backward, state["params"], state["dots"], tokens_BxT1)
        own = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state["params"])]
        return [leaf for leaf in jax.tree.leaves(kept) if (leaf.shape, leaf.dtype) not in own]

    def amaxes_in_order(self, state: State, tokens_BxT1: jax.Array) -> dict[str, jax.Array]:
        """max |x| of parameters, blocks' outputs, logits, loss and gradients, in the order they are computed."""
        largest = lambda x: jnp.max(jnp.abs(x)).astype(jnp.float32)
        paths = lambda tree: {
            "/".join(str(part.key) for part in path): largest(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        model = self._model(state["params"], state["dots"])
        hidden, after_block = model.hidden(tokens_BxT1[:, :-1])
        found = {f"parameter {path}": amax for path, amax in paths(state["params"]).items()}
        found |= {f"output of block {i}": after_block[i] for i in range(self.config.layers)}
        found |= {"final norm": largest(hidden), "logits": largest(model.logits(hidden))}
        loss, gradients, _ = self._gradients(model, state, tokens_BxT1[None])
        found["loss"] = loss
        return found | {f"gradient of {path}": amax for path, amax in paths(nnx.to_pure_dict(gradients)).items()}


def _fill(template: nnx.State, values: Any) -> nnx.State:
    """A copy of `template` that holds `values`."""
    filled = jax.tree.map(lambda leaf: leaf, template)
    nnx.replace_by_pure_dict(filled, values)
    return filled


def _next_loss_scale(state: State, finite: jax.Array) -> State:
    """Halved after a step that was not finite, doubled after 200 that were (arXiv:1710.03740, section 3.2)."""
    good = jnp.where(finite, state["good_steps"] + 1, 0)
    grows = good >= _GROWTH_INTERVAL
    grown = jnp.minimum(state["scale"] * 2, jnp.float32(_LARGEST_LOSS_SCALE))
    return {
        "scale": jnp.where(finite, jnp.where(grows, grown, state["scale"]), state["scale"] * jnp.float32(0.5)),
        "good_steps": jnp.where(grows, 0, good),
        "skipped_steps": state["skipped_steps"] + (~finite).astype(jnp.int32),
    }
