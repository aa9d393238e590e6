"""The training step of an MLP, on which q8jax, plain Flax and the incumbents are compared.

Residual blocks [width -> hidden, gelu, hidden -> width] under SGD, everything in the step: forward, backward, update of
parameters and of scaling state. All contenders have the same loss and the same update.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import q8jax
from experiments.benchmarks.contenders import CONTENDERS, REFERENCE, Contender, Dense, Network, Variables
from experiments.benchmarks.contest import contest
from experiments.benchmarks.results import Measurement, Program
from experiments.targets import Target
from experiments.training.mesh import Placement

_LEARNING_RATE = np.float32(0.1)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of the MLP and of its batch."""

    layers: int
    width: int
    hidden: int
    tokens: int

    @property
    def flops(self) -> int:
        """Of a step: three products for each layer, but no gradient of the first one's input."""
        product = 2 * self.tokens * self.width * self.hidden
        return (6 * self.layers - 1) * product


class Mlp(nn.Module):
    """Residual blocks of two layers of a contender's."""

    shapes: Shapes
    dense: Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.shapes.layers):
            hidden = nn.gelu(self.dense(self.shapes.hidden, name=f"up{i}")(x))
            x = x + self.dense(self.shapes.width, name=f"down{i}")(hidden).astype(x.dtype)
        return x


class Step:
    """One contender's training as pure functions of its variables and of a batch: x, and what is to come out if given.

    Args:
      contender: whose.
      shapes: of the MLP and of the batch.
    """

    def __init__(self, contender: Contender, shapes: Shapes):
        self._network = Network(contender, lambda dense: Mlp(shapes, dense))
        self.init = self._network.init

    def calibrate(self, variables: Variables, *batch: jax.Array) -> Variables:
        """The variables with scales that this batch brings, where the contender has a warm start."""
        return self._network.calibrate(self._loss, variables, *batch)

    def _loss(self, variables: Variables, x: jax.Array, *target: jax.Array) -> jax.Array:
        out = self._network(variables, x).astype(jnp.float32)
        return jnp.mean(jnp.square(out - target[0] if target else out))

    def __call__(self, variables: Variables, *batch: jax.Array) -> tuple[jax.Array, Variables]:
        """Returns the loss and the next variables."""
        value, gradients = self._network.value_and_grad(self._loss)(variables, *batch)
        descend = lambda param, gradient: param - _LEARNING_RATE * gradient
        # Every other collection is state, whose gradient is its next value.
        params = jax.tree.map(descend, variables["params"], gradients["params"])
        return value, {**gradients, "params": params}


class Training:
    """A compiled training step with its variables."""

    def __init__(self, contender: Contender, shapes: Shapes):
        keys = jax.random.split(jax.random.key(0), 2)
        x, target = (jax.random.normal(key, (shapes.tokens, shapes.width)) for key in keys)
        step = Step(contender, shapes)
        self._batch = x, target
        self._variables = jax.jit(step.calibrate)(jax.jit(step.init)(x), *self._batch)
        lowered = jax.jit(step, donate_argnums=0).lower(self._variables, *self._batch)
        self._step = lowered.compile()
        self.program = Program.of(q8jax.audit(lowered, self._step))
        self.losses: list[jax.Array] = []

    def __call__(self) -> Variables:
        value, self._variables = self._step(self._variables, *self._batch)
        self.losses.append(value)
        return self._variables


def measure(names: Iterable[str], shapes: Shapes, rounds: int) -> Measurement:
    """Times the training steps of the named contenders, REFERENCE among them."""
    builders = {name: lambda name=name: Training(CONTENDERS[name], shapes) for name in names}
    return contest("layer", dataclasses.asdict(shapes), shapes.flops, builders, REFERENCE, rounds)


def compiled_for(contender: Contender, shapes: Shapes, goal: Target, asked: str | None = None) -> q8jax.Report:
    """The audit of a contender's step, compiled for a target whose devices take `shapes.tokens` rows each.

    Args:
      contender, shapes, goal: which step, how large, and for what.
      asked: as `q8jax.audit` takes it.
    """
    placement = Placement(goal.devices)
    rows = shapes.tokens * placement.size
    x = jax.ShapeDtypeStruct((rows, shapes.width), jnp.bfloat16, sharding=placement.rows)
    step = Step(contender, shapes)
    on_devices = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated)
    variables = jax.tree.map(on_devices, jax.eval_shape(step.init, x))
    lowered = placement.lower(step, variables, x, donate=(0,))
    return q8jax.audit(lowered, lowered.compile(compiler_options=dict(goal.options)), asked=asked)


def count(names: Iterable[str], shapes: Shapes, goal: Target) -> Measurement:
    """What the steps of the named contenders, REFERENCE among them, are compiled to for a target."""
    programs = {name: Program.of(compiled_for(CONTENDERS[name], shapes, goal)) for name in names}
    devices = len(goal.devices)
    return Measurement(
        "layer", dataclasses.asdict(shapes), shapes.flops * devices, REFERENCE, programs, devices=devices
    )
