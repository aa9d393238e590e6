"""Training-step time of q8jax, of plain Flax and of the incumbents, side by side on this machine.

    python -m experiments.benchmark

times an MLP of --layers residual blocks [width -> hidden, gelu, hidden -> width] on --tokens rows under SGD, everything
in the step: forward, backward, update of parameters and of scaling state. All contenders are the same Linen module,
the same loss and the same update, and differ in what their `Dense` multiplies with. Rounds are interleaved and begin
with another contender each time, so that drift of a shared machine meets all alike; what counts is the ratio to plain
Flax bf16, taken within each round. Incumbents need the extra q8jax[incumbents] and are left out without it.
"""

import dataclasses
import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import linen as nn
from flax.linen import fp8_ops

import q8jax.linen as qlinen
from q8jax.recipe import Recipe

Variables = dict[str, Any]
REFERENCE = "flax bf16"
_LEARNING_RATE = np.float32(0.1)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of the MLP and of its batch."""

    layers: int
    width: int
    hidden: int
    tokens: int


class Mlp(nn.Module):
    """Residual blocks of two Dense layers, whose options a contender chooses."""

    shapes: Shapes
    dtype: Any
    dense: dict[str, Any] = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.shapes.layers):
            layer: Callable[..., nn.Module] = functools.partial(
                nn.Dense, use_bias=False, dtype=self.dtype, **self.dense
            )
            hidden = nn.gelu(layer(self.shapes.hidden, name=f"up{i}")(x))
            x = x + layer(self.shapes.width, name=f"down{i}")(hidden).astype(x.dtype)
        return x


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train the MLP.

    Attributes:
      build: from shapes to the Linen module.
      value_and_grad: of a function of the variables.
      calibrates: whether the scaling state starts from what q8jax observes in the first batch.
      requires: the package that it is imported from, None for ours and Flax's.
    """

    build: Callable[[Shapes], nn.Module]
    value_and_grad: Callable[..., Any] = jax.value_and_grad
    calibrates: bool = False
    requires: str | None = None

    @property
    def is_installed(self) -> bool:
        return self.requires is None or importlib.util.find_spec(self.requires) is not None


def _flax(dtype: Any, dot_general_cls: Any = None) -> Contender:
    options = {"dot_general_cls": dot_general_cls} if dot_general_cls else {}
    return Contender(lambda shapes: Mlp(shapes, dtype, options))


def _q8jax(precision: str) -> Contender:
    recipe = Recipe.parse(precision)
    options = {"dot_general_cls": qlinen.dot_general_cls(recipe)}
    build = lambda shapes: Mlp(shapes, jnp.dtype(recipe.compute), options)
    return Contender(build, qlinen.value_and_grad, calibrates=recipe.keeps_state)


def _aqt(shapes: Shapes) -> nn.Module:
    from aqt.jax.v2 import config
    from aqt.jax.v2.flax import aqt_flax

    return Mlp(shapes, jnp.bfloat16, {"dot_general_cls": functools.partial(aqt_flax.AqtDotGeneral, config.config_v4())})


def _qwix(forward: str, gradient: str, shapes: Shapes) -> nn.Module:
    import qwix

    rule = qwix.QtRule(module_path=".*", weight_qtype=forward, act_qtype=forward, bwd_qtype=gradient)
    return qwix.quantize_model(Mlp(shapes, jnp.bfloat16), qwix.QtProvider([rule]))


CONTENDERS = {
    "flax fp32": _flax(jnp.float32),
    REFERENCE: _flax(jnp.bfloat16),
    "q8jax fp32": _q8jax("fp32"),
    "q8jax bf16": _q8jax("bf16"),
    "q8jax fp8": _q8jax("fp8"),
    "q8jax int8": _q8jax("int8"),
    "flax fp8": _flax(jnp.bfloat16, fp8_ops.Fp8DirectDotGeneralOp),
    "qwix fp8": Contender(functools.partial(_qwix, "float8_e4m3fn", "float8_e5m2"), requires="qwix"),
    "qwix int8": Contender(functools.partial(_qwix, "int8", "int8"), requires="qwix"),
    "aqt int8": Contender(_aqt, requires="aqt"),
}


class Training:
    """A compiled training step with its variables."""

    def __init__(self, contender: Contender, shapes: Shapes):
        keys = jax.random.split(jax.random.key(0), 4)
        x, target = (jax.random.normal(key, (shapes.tokens, shapes.width)) for key in keys[:2])
        rngs = {"params": keys[2], "stochastic_rounding": keys[3]}
        model = contender.build(shapes)

        def loss(variables: Variables, x: jax.Array, target: jax.Array) -> jax.Array:
            out: Any = model.apply(variables, x, rngs=rngs)
            return jnp.mean(jnp.square(out.astype(jnp.float32) - target))

        def step(variables: Variables, *batch: jax.Array) -> tuple[jax.Array, Variables]:
            value, gradients = contender.value_and_grad(loss)(variables, *batch)
            descend = lambda param, gradient: param - _LEARNING_RATE * gradient
            # Every other collection is state, whose gradient is its next value.
            params = jax.tree.map(descend, variables["params"], gradients["params"])
            return value, {**gradients, "params": params}

        self._batch = x, target
        self._variables = jax.jit(model.init)(rngs, x)
        if contender.calibrates:
            self._variables = jax.jit(functools.partial(qlinen.calibrate, loss))(self._variables, *self._batch)
        self._step = jax.jit(step, donate_argnums=0).lower(self._variables, *self._batch).compile()

    def run(self) -> tuple[float, float]:
        """Takes a step; returns its wall-clock seconds and its loss."""
        start = time.perf_counter()
        value, self._variables = self._step(self._variables, *self._batch)
        jax.block_until_ready(self._variables)
        return time.perf_counter() - start, float(value)


def measure(names: Sequence[str], shapes: Shapes, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and losses of the named contenders, each float64 [contenders, rounds]; a first round is not counted."""
    trainings = [Training(CONTENDERS[name], shapes) for name in names]
    results = np.empty((2, len(names), rounds + 1))
    for i in range(rounds + 1):
        for j in np.roll(np.arange(len(names)), -i):
            results[:, j, i] = trainings[j].run()
    return results[0, :, 1:], results[1, :, 1:]


def table(names: Sequence[str], seconds: np.ndarray, losses: np.ndarray) -> str:
    """A Markdown table of what `measure` returns; ratios are to REFERENCE, which is among the names."""
    ratios = seconds / seconds[list(names).index(REFERENCE)]
    lines = ["| step of | ms, median | ratio to flax bf16, median (quartiles) | last loss |", "|---|---|---|---|"]
    for name, times, ratio, loss in zip(names, seconds, ratios, losses, strict=True):
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        cells = f"{np.median(times) * 1e3:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{loss[-1]:.4f}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this program's flags; not on import, so that programs can share a process and flag names."""
    whole = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
    whole("layers", 4, "Residual blocks.")
    whole("width", 512, "Width of the residual stream.")
    whole("hidden", 2048, "Hidden width.")
    whole("tokens", 2048, "Rows of the batch.")
    whole("rounds", 20, "Timed steps of each contender.")
    names = ", ".join(CONTENDERS)
    flags.DEFINE_list("contenders", [], f"Beside {REFERENCE}; all if empty: {names}.", flag_values=values)
    is_known = lambda chosen: set(chosen) <= set(CONTENDERS)
    flags.register_validator("contenders", is_known, f"choose some of {names}.", flag_values=values)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}: this program takes flags only.")
    logging.set_verbosity(logging.ERROR)  # JAX logs every backend that is not installed
    warnings.filterwarnings("ignore", module="qwix|aqt")
    values = flags.FLAGS
    chosen = [name for name in CONTENDERS if name in (values.contenders or CONTENDERS) or name == REFERENCE]
    names = [name for name in chosen if CONTENDERS[name].is_installed]
    if missing := [name for name in chosen if name not in names]:
        print(f"Left out, for want of pip install 'q8jax[incumbents]': {', '.join(missing)}.\n")
    shapes = Shapes(values.layers, values.width, values.hidden, values.tokens)
    print(table(names, *measure(names, shapes, values.rounds)))
    print(f"\n{values.rounds} rounds of {shapes} on {jax.devices()[0].device_kind}, jax {jax.__version__}.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
