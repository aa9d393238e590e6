"""One training step, as a pure function, and the evaluation that goes with it.

The train state is a pytree of plain dicts of arrays, so that it can be donated, saved and resharded:

    params      float32 master weights
    optimizer   optax's state
    average     where it is asked for: the exponential moving average of params
    step        int32
    sound       bool: no step has failed
    nonfinite   int32: tensors that were not finite in the steps since the last line of metrics
    dots        what quantized dots keep: scales, amax histories, rounding keys; of the current phase only
    loss_scale  float16 only: the scale, steps since it last changed, and the number of skipped steps

A step whose loss or gradient is not finite fails: it leaves the state as it was, but for `sound`, and so do all that
follow it. The host may then look late, and still finds what the step was made from. In float16 a step of which only the
gradient is not finite is skipped instead, as long as the loss scale can be halved.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import q8jax.nnx as qnnx
from experiments.models.config import TransformerConfig
from experiments.models.shardings import WHOLE, ModelShardings
from experiments.models.transformer import Transformer
from experiments.training.cross_entropy import cross_entropy
from experiments.training.optimizer import OptimizerConfig
from experiments.training.precision import Phase
from q8jax import scaling
from q8jax.recipe import Recipe

State = dict[str, Any]

_GROWTH_INTERVAL = 200
_FIRST_LOSS_SCALE = 2.0**15
LEAST_LOSS_SCALE = 1.0
_LARGEST_LOSS_SCALE = 2.0**24


def summed_loss(model: Transformer, tokens_BxT1: jax.Array) -> jax.Array:
    """Cross-entropy in nats, summed over the tokens, float32."""
    logits = model.logits(model.hidden(tokens_BxT1[:, :-1])[0])
    return jnp.sum(cross_entropy(logits, tokens_BxT1[:, 1:]))


def fingerprint(state: State) -> jax.Array:
    """uint32 that hardly two sets of parameters have in common: their bits summed up, each leaf's times its number.

    The sum wraps around, so it is the same in whatever order it is taken, and on whatever mesh.
    """
    sums = [jnp.sum(lax.bitcast_convert_type(leaf, jnp.uint32)) for leaf in jax.tree.leaves(state["params"])]
    numbers = jnp.arange(1, 2 * len(sums), 2, dtype=jnp.uint32)
    return jnp.sum(jnp.stack(sums) * numbers)


class Trainer:
    """Builds the functions of one phase; everything here is a pure function of arrays that can be jitted.

    Args:
      config: shapes of the model.
      phase: its precision.
      optimizer: AdamW and its schedule.
      accumulate: microbatches of a step.
      seed: of the initialisation; the same in every precision.
      perturbation: relative size of the Gaussian noise that the initialisation is multiplied by.
      shardings: where the model's arrays are.
    """

    def __init__(
        self,
        config: TransformerConfig,
        phase: Phase,
        optimizer: OptimizerConfig,
        accumulate: int = 1,
        seed: int = 0,
        perturbation: float = 0.0,
        shardings: ModelShardings = WHOLE,
    ):
        self.config = config
        self.phase = phase
        self.accumulate = accumulate
        self.seed = seed
        self._perturbation = perturbation
        self._shardings = shardings
        self._average = optimizer.average
        self._learning_rate = optimizer.learning_rate()
        self._transformation = optimizer.transformation()
        self._scales_loss = phase.compute == "float16"
        parts: tuple[Any, ...] = nnx.split(nnx.eval_shape(self._build), nnx.Param, ...)
        self._graphdef, self._params, self._dots = parts

    def _build(self) -> Transformer:
        rngs = nnx.Rngs(params=self.seed, rounding=self.seed)
        dtype = jnp.dtype(self.phase.compute)
        return Transformer(self.config, self.phase.policy, dtype, rngs=rngs, shardings=self._shardings)

    def model(self, state: State) -> Transformer:
        """The model that a state holds."""
        return nnx.merge(self._graphdef, filled(self._params, state["params"]), filled(self._dots, state["dots"]))

    def init(self) -> State:
        """The state before the first step, uncalibrated."""
        params = nnx.to_pure_dict(nnx.state(self._build(), nnx.Param))
        if self._perturbation:
            params = _perturbed(params, self._perturbation, self.seed)
        averaged = {"average": jax.tree.map(jnp.copy, params)} if self._average else {}
        return {
            "params": params,
            "optimizer": self._transformation.init(params),
            **averaged,
            "step": jnp.zeros((), jnp.int32),
            "sound": jnp.ones((), bool),
            "nonfinite": jnp.zeros((), jnp.int32),
            **self.phase_state(),
        }

    def phase_state(self) -> State:
        """What the state of this phase does not take over from the phase before, uncalibrated."""
        state: State = {"dots": nnx.to_pure_dict(nnx.state(self._build(), nnx.Not(nnx.Param)))}
        if self._scales_loss:
            state["loss_scale"] = first_loss_scale()
        return state

    def enter(self, state: State, phase_state: State) -> State:
        """The state with which this phase goes on from another's."""
        kept = ("params", "optimizer", "average", "step", "sound", "nonfinite")
        return {**{name: state[name] for name in kept if name in state}, **phase_state}

    @property
    def keeps_scales(self) -> bool:
        """Whether scales come from state, so that the phase needs a warm start."""
        return any(recipe.keeps_state for _, recipe in self.phase.policy.rules)

    def calibrate(self, state: State, tokens_AxBxT1: jax.Array) -> State:
        """The `dots` of a warm start, from what the model computes of the first global batch in current scaling."""
        model = self.model(state)
        with qnnx.calibrating(model):
            _, _, amaxes = self.gradients(model, state, tokens_AxBxT1)
        return _updated_dots(model, amaxes)

    def gradients(self, model: Transformer, state: State, tokens_AxBxT1: jax.Array) -> tuple[jax.Array, Any, Any]:
        """Loss, gradients and observed amaxes of a global batch; in float16 the first two times the loss scale."""
        microbatches, rows, columns = tokens_AxBxT1.shape
        factor = self.loss_factor(state, microbatches * rows * (columns - 1))
        devices = self._shardings.devices
        if microbatches > 1 or not self.config.remat or not self._shardings.makes_codes_twice:
            model = qnnx.prequantize(model, devices=devices)
        loss_fn = lambda model, batch, factor: summed_loss(model, batch) * factor
        differentiate = qnnx.value_and_grad(loss_fn, devices=devices)
        together = scaling.over_devices if devices else lambda amaxes: amaxes
        if microbatches == 1:
            loss, gradients, amaxes = differentiate(model, tokens_AxBxT1[0], factor)
            return loss, gradients, together(amaxes)

        def microbatch(index, batch_BxT1):
            return differentiate(qnnx.fold_rounding_keys(model, index), batch_BxT1, factor)

        def add(total, indexed):
            loss, gradients, amaxes = microbatch(*indexed)
            sums = jax.tree.map(jnp.add, total[:2], (loss, gradients))
            return (*sums, scaling.combine(total[2], amaxes)), None

        indexed = jnp.arange(microbatches), tokens_AxBxT1
        shapes = jax.eval_shape(microbatch, indexed[0][0], tokens_AxBxT1[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        loss, gradients, amaxes = lax.scan(add, zeros, indexed)[0]
        return loss, gradients, together(amaxes)

    def loss_factor(self, state: State, tokens: int) -> jax.Array:
        """What the summed loss of a microbatch is multiplied by: 1 / tokens, in float16 times the loss scale.

        The tokens are those of the whole step, or gradient amaxes would grow with the number of microbatches.
        """
        factor = jnp.float32(1 / tokens)
        return factor * state["loss_scale"]["scale"] if self._scales_loss else factor

    def updates(self, state: State, gradients: State) -> State:
        """What a step with these gradients, in float16 still times the loss scale, adds to the parameters."""
        if self._scales_loss:
            gradients = jax.tree.map(lambda x: x / state["loss_scale"]["scale"], gradients)
        learning_rate, updates, _ = self._optimize(state, gradients)
        return jax.tree.map(lambda update: learning_rate * update, updates)

    def _optimize(self, state: State, gradients: State) -> tuple[jax.Array, State, Any]:
        """The learning rate, the updates at learning rate 1, and the next state of the optimizer."""
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
            learning_rate = jnp.asarray(self._learning_rate(state["step"]), jnp.float32)
            return learning_rate, *self._transformation.update(gradients, state["optimizer"], state["params"])

    def step(self, state: State, tokens_AxBxT1: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        """One optimizer step on a global batch of A microbatches.

        Returns:
          The next state, and scalars: loss, gradient_norm, learning_rate, nonfinite_tensors (since the last line of
          metrics), sound; in float16 loss_scale and skipped_steps as well.
        """
        model = self.model(state)
        loss, gradients, amaxes = self.gradients(model, state, tokens_AxBxT1)
        gradients = nnx.to_pure_dict(gradients)
        if self._scales_loss:
            unscale = 1 / state["loss_scale"]["scale"]
            loss, gradients = jax.tree.map(lambda x: x * unscale, (loss, gradients))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        learning_rate, updates, optimizer = self._optimize(state, gradients)
        params = jax.tree.map(lambda param, update: param + learning_rate * update, state["params"], updates)
        taken: State = {"params": params, "optimizer": optimizer}
        if self._average:
            taken["average"] = self._averaged(state["average"], params, state["step"])
        seen = [jnp.ravel(~jnp.isfinite(a)) for a in (*jax.tree.leaves(amaxes), loss, norm)]
        nonfinite = state["nonfinite"] + jnp.sum(jnp.concatenate(seen).astype(jnp.int32))
        counted: State = {"step": state["step"] + 1, "nonfinite": nonfinite, "dots": _updated_dots(model, amaxes)}
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "nonfinite_tensors": nonfinite,
        }
        skips = jnp.zeros((), bool)
        if self._scales_loss:
            scale = state["loss_scale"]["scale"]
            # No loss scale helps a loss that is not finite: it is the unscaled forward pass that overflowed.
            skips = jnp.isfinite(loss) & ~finite & (scale > LEAST_LOSS_SCALE)
            counted["loss_scale"] = next_loss_scale(state["loss_scale"], finite)
            metrics |= {"loss_scale": scale, "skipped_steps": counted["loss_scale"]["skipped_steps"]}
        sound = state["sound"] & (finite | skips)
        following = {**choose(sound & finite, taken, state), **choose(sound, counted, state), "sound": sound}
        return following, {**metrics, "sound": sound}

    def evaluate(self, state: State, tokens_ExBxT1: jax.Array) -> jax.Array:
        """Mean loss of E held-out batches in nats per token, scales frozen."""
        graphdef, leaves = nnx.split(qnnx.prequantize(self.model(state)))

        def add(total, batch_BxT1):
            return total + summed_loss(nnx.merge(graphdef, leaves), batch_BxT1), None

        batches, rows, columns = tokens_ExBxT1.shape
        total, _ = lax.scan(add, jnp.zeros((), jnp.float32), tokens_ExBxT1)
        return total / jnp.float32(batches * rows * (columns - 1))

    def _averaged(self, average: State, params: State, step: jax.Array) -> State:
        # A shorter average at first, which else would remember the initialisation (tf.train.ExponentialMovingAverage).
        done = step.astype(jnp.float32)
        decay = jnp.minimum(jnp.float32(self._average), (1 + done) / (10 + done))
        return jax.tree.map(lambda mean, param: mean + (1 - decay) * (param - mean), average, params)

    def recipes(self) -> dict[str, Recipe]:
        """The recipe of every dot that the policy covers, by the path of its layer."""
        model = nnx.merge(self._graphdef, self._params, self._dots)
        dots = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, qnnx.QuantizedDot)]
        return {"/".join(map(str, path[:-1])): dot.recipe for path, dot in dots}


def choose(condition: jax.Array, new: State, old: State) -> State:
    """The new entries where a condition holds, else those of the old state."""
    return {name: jax.tree.map(lambda n, o: jnp.where(condition, n, o), new[name], old[name]) for name in new}


def _perturbed(params: State, size: float, seed: int) -> State:
    """Parameters times 1 + size · N(0, 1), drawn apart from the initialisation."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31), len(leaves))
    noise = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return treedef.unflatten([leaf * (1 + jnp.float32(size) * n) for leaf, n in zip(leaves, noise, strict=True)])


def _updated_dots(model: Transformer, amaxes: Any) -> State:
    qnnx.update_scaling(model, amaxes)
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))


def filled(template: nnx.State, values: Any) -> nnx.State:
    """A copy of `template` that holds `values`."""
    filled = jax.tree.map(lambda leaf: leaf, template)
    nnx.replace_by_pure_dict(filled, values)
    return filled


def first_loss_scale() -> State:
    """What float16 begins with."""
    return {
        "scale": jnp.asarray(_FIRST_LOSS_SCALE, jnp.float32),
        "good_steps": jnp.zeros((), jnp.int32),
        "skipped_steps": jnp.zeros((), jnp.int32),
    }


def next_loss_scale(state: State, finite: jax.Array) -> State:
    """Halved after a step that was not finite, doubled after 200 that were (arXiv:1710.03740, section 3.2)."""
    good = jnp.where(finite, state["good_steps"] + 1, 0)
    grows = good >= _GROWTH_INTERVAL
    grown = jnp.minimum(state["scale"] * 2, jnp.float32(_LARGEST_LOSS_SCALE))
    return {
        "scale": jnp.where(finite, jnp.where(grows, grown, state["scale"]), state["scale"] * jnp.float32(0.5)),
        "good_steps": jnp.where(grows, 0, good),
        "skipped_steps": state["skipped_steps"] + (~finite).astype(jnp.int32),
    }
